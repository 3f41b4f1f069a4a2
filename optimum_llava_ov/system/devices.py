"""The devices of this machine. Light to import, so that a program can say at once that one is missing."""

from __future__ import annotations


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
        raise ValueError(
            f"There is no device {device!r} here. OpenVINO finds: {', '.join(found)}; or let it choose with AUTO."
        )
