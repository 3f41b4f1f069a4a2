"""Turn the settings of a chat into options of `generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """Describe a setting: how its text is read, and which values are accepted."""

    read: Callable[[str], float]
    accepts: Callable[[float], bool]
    expected: str


SETTINGS = {
    "temperature": Setting(float, lambda value: 0 <= value <= 2, "a number from 0 (greedy decoding) to 2"),
    "top_p": Setting(float, lambda value: 0 < value <= 1, "a number above 0, up to 1"),
    "max_new_tokens": Setting(int, lambda value: value >= 1, "an integer above 0"),
}


def sampling_options(temperature: float, top_p: float, max_new_tokens: int) -> dict[str, Any]:
    """Return options of `generate`. A temperature of 0 means greedy decoding."""
    if not temperature:
        return {"do_sample": False, "max_new_tokens": max_new_tokens}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}


def read_setting(name: str, text: str) -> float:
    """Read the value of a setting.

    Raises:
        `ValueError`: There is no such setting, or the value is not accepted; says what is expected.
    """
    if name not in SETTINGS:
        raise ValueError(f"The setting {name!r} does not exist. Choose one of {', '.join(SETTINGS)}.")
    setting = SETTINGS[name]
    try:
        value = setting.read(text)
    except ValueError:
        value = float("nan")
    if not setting.accepts(value):
        raise ValueError(f"{name} is {text!r}. Expected {setting.expected}.")
    return value
