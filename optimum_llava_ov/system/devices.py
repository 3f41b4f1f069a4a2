"""Check devices. This module imports fast, so that a program can report a missing device at once."""

from __future__ import annotations


def available_devices() -> list[str]:
    """Return the names of the devices that OpenVINO finds."""
    import openvino

    return openvino.Core().available_devices


def check_device(device: str) -> None:
    """Check that OpenVINO finds a device.

    Raises:
        `ValueError`: OpenVINO does not find it; names the devices that it finds.
    """
    found = available_devices()
    first = device.split(":")[0].split(".")[0].upper()
    if first not in ("AUTO", "HETERO", "MULTI") and first not in {name.split(".")[0] for name in found}:
        raise ValueError(f"OpenVINO does not find the device {device!r}. Choose one of {', '.join(found)}, or AUTO.")
