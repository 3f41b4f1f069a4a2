"""What measurements depend on: machine and versions. Standard library only."""

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
# Of a CPU's flags, those that kernels for inference are chosen by.
FEATURES = ("avx", "amx", "bf16", "fma", "f16c", "sse4_2", "asimd", "sve", "i8mm")


def machine() -> dict:
    """What the times depend on. `load` is the average of the last minutes: other programs that were running."""
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
    """Of Python and of the packages that are measured; `None` for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
