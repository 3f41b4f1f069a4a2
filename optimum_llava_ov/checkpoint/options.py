"""Read JSON files of limited size, and check each option by a rule for its type and range."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_llava_ov.errors import InvalidCheckpointError


MAX_SETTINGS_BYTES = 1 << 20  # the largest known file, of CLIP, has 4,500 bytes
MAX_INDEX_BYTES = 16 << 20  # also for the tokenizer's settings, which may list every token
MAX_TOKENIZER_BYTES = 64 << 20

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


@dataclass(frozen=True)
class Rule:
    """Check the value of an option.

    Attributes:
        accepts: function that returns whether a value from JSON is valid.
        text: description of the valid values, for messages.
    """

    accepts: Callable[[Any], bool]
    text: str


def one_of(*values: Any) -> Rule:
    """Accept one of these values."""
    return Rule(
        lambda value: value in values, ", ".join("absent" if value is None else str(value) for value in values)
    )


def integer(low: int, high: int) -> Rule:
    """Accept integers from `low` to `high`."""
    return Rule(lambda value: _is_integer(value) and low <= value <= high, f"an integer from {low:,} to {high:,}")


def positive(high: float) -> Rule:
    """Accept numbers above 0, up to `high`."""
    return Rule(lambda value: _is_number(value) and 0 < value <= high, f"a number above 0, up to {high:,}")


def numbers(count: int, rule: Rule) -> Rule:
    """Accept lists of `count` numbers that `rule` accepts."""
    return Rule(
        lambda value: isinstance(value, list) and len(value) == count and all(rule.accepts(item) for item in value),
        f"{count} numbers, each {rule.text}",
    )


def list_of(rule: Rule) -> Rule:
    """Accept lists of one or more values that `rule` accepts."""
    return Rule(
        lambda value: isinstance(value, list) and len(value) > 0 and all(map(rule.accepts, value)),
        f"a list, each {rule.text}",
    )


def number(low: float, high: float) -> Rule:
    """Accept numbers from `low` to `high`."""
    return Rule(lambda value: _is_number(value) and low <= value <= high, f"a number from {low:,} to {high:,}")


def text() -> Rule:
    """Accept strings."""
    return Rule(lambda value: isinstance(value, str), "a string")


def flag() -> Rule:
    """Accept `true` and `false`."""
    return Rule(lambda value: isinstance(value, bool), "true, false")


def either(*rules: Rule) -> Rule:
    """Accept values that one of `rules` accepts."""
    return Rule(lambda value: any(rule.accepts(value) for rule in rules), " or ".join(rule.text for rule in rules))


def optional(rule: Rule) -> Rule:
    """Accept absent options, and values that `rule` accepts."""
    return Rule(lambda value: value is None or rule.accepts(value), f"absent, {rule.text}")


def shown(value: Any) -> str:
    """Format a value for a message, as `repr` does, shortened to one line."""
    return _repr.repr(value)


def broken_rules(values: Mapping[str, Any], rules: Mapping[str, Rule], prefix: str = "") -> list[str]:
    """Describe each option whose value its rule does not accept. The value of an absent option is `None`."""
    return [
        f"{prefix}{name}={shown(values.get(name))} (supported: {rule.text})"
        for name, rule in rules.items()
        if not rule.accepts(values.get(name))
    ]


def read_json(
    file: Path, max_bytes: int = MAX_SETTINGS_BYTES, error_class: type[ValueError] = InvalidCheckpointError
) -> dict[str, Any]:
    """Read a file with one JSON object.

    Raises:
        `error_class`: the file is too large, cannot be read, or is not a JSON object; says what to do.
    """
    try:
        size = file.stat().st_size
        values = json.loads(file.read_text(encoding="utf-8")) if size <= max_bytes else None
    except OSError as error:
        raise error_class(f"{file} cannot be read ({error.strerror}). Check the file and its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise error_class(f"{file} is not valid JSON ({error}). Download it again.") from error
    if size > max_bytes:
        raise error_class(f"{file} has {size:,} bytes, expected at most {max_bytes:,}. Download it again.")
    if not isinstance(values, dict):
        raise error_class(f"{file} holds {shown(values)}, expected a JSON object: {{...}}. Download it again.")
    return values


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))
