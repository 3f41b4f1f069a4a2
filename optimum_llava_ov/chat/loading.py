"""Sessions for the programs, with messages that say what there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optimum_llava_ov.chat.session import ChatSession


def available_devices() -> list[str]:
    import openvino

    return openvino.Core().available_devices


def check_device(device: str) -> None:
    """
    Raises:
        `ValueError`: OpenVINO finds no such device. Says which it finds.
    """
    found = available_devices()
    first = device.split(":")[0].split(".")[0].upper()
    if first not in ("AUTO", "HETERO", "MULTI") and first not in {name.split(".")[0] for name in found}:
        raise ValueError(f"There is no device {device!r} here. OpenVINO finds: {', '.join(found)}; or let it choose with AUTO.")


def session_factory(bundle: str, device: str = "CPU", ov_config: dict[str, str] | None = None) -> Callable[..., ChatSession]:
    """Load a bundle once. What comes back makes a session each time it is called, with the arguments of [`ChatSession`].

    Raises:
        `ValueError`: there is no such device, or the folder is no bundle.
    """
    check_device(device)
    from transformers import AutoProcessor

    from optimum_llava_ov.runtime.modeling import OVModelForLlavaMPT

    model = OVModelForLlavaMPT.from_pretrained(bundle, device=device, ov_config=ov_config)
    processor = AutoProcessor.from_pretrained(model.model_save_dir)
    return lambda **kwargs: model.chat(processor, **kwargs)


def sampling_options(temperature: float, top_p: float, max_new_tokens: int) -> dict[str, Any]:
    """As `generate` takes them; a temperature of 0 is the likeliest word each time."""
    if not temperature:
        return {"do_sample": False, "max_new_tokens": max_new_tokens}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
