"""Describe the processor and the versions of packages, which measurements depend on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import openvino
import torch


PACKAGES = ("optimum-llava-ov", "openvino", "openvino-genai", "optimum-intel", "transformers", "torch")
# Instruction sets that speed up matrix multiplications in int8 and bf16, by the names that Linux uses
FEATURES = (
    "avx2",
    "avx_vnni",
    "avx512_f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
)
ARM_FEATURES = ("neon", "bf16", "i8mm", "dot", "sve", "sve2", "sme")


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of [`PACKAGES`]; `None` for packages that are not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def describe_cpu() -> dict[str, Any]:
    """Return name, features and number of cores of the processor, and the operating system."""
    return {
        "name": openvino.Core().get_property("CPU", "FULL_DEVICE_NAME"),
        "features": cpu_features(),
        "cores": available_cores(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_features() -> list[str]:
    """Return the [`FEATURES`] that the processor has. An older torch returns only the widest one, such as `avx512`."""
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return [name for name in (*FEATURES, *ARM_FEATURES) if found.get(name)]
    return [torch.backends.cpu.get_cpu_capability().lower()]


def available_cores() -> int:
    """Return the number of logical processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
