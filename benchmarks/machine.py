"""Describe the machine and the versions of packages. Uses the standard library only."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


PACKAGES = (
    "optimum-llava-ov",
    "optimum",
    "optimum-intel",
    "openvino",
    "openvino-genai",
    "openvino-tokenizers",
    "nncf",
    "torch",
    "transformers",
)
# Flags of a CPU that decide which kernels run
FEATURES = ("avx", "amx", "bf16", "fma", "f16c", "sse4_2", "asimd", "sve", "i8mm")


def machine() -> dict:
    """Describe the machine. `load` is the average load of the last minutes, including other programs."""
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    values = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    flags = values.get("flags", values.get("Features", "")).split()
    return {
        "cpu": values.get("model name", platform.machine()),
        "features": sorted(flag for flag in flags if flag.startswith(FEATURES)),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "load": os.getloadavg(),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages; `None` for a package that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
