"""Describe the machine: processor, devices, memory, disk, and how fast it reads memory."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import openvino
import psutil
import torch
from huggingface_hub import constants

from optimum_llava_ov.kernels.extension import AVX2, OPENVINO, is_faster, lacks_fast_kernel, why_not
from optimum_llava_ov.system.machine import describe_cpu


_READ_BYTES = 1 << 28  # more than the caches of processors hold
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Computer:
    """Describe a machine.

    Attributes:
        cpu (`dict`): Name, features, cores and system.
        precision (`str`): What the processor computes in by default, as OpenVINO chooses: "bf16", "f16" or "f32".
        matmul_kernel (`str`): What `OVModelForLlava` multiplies compressed weights with: "avx2" (this package's)
            or "openvino".
        missing_kernel (`str` or `None`): Why this package's kernel cannot run, if it would be faster here.
        devices (`dict[str, str]`): OpenVINO's devices, with their full names.
        memory, free_memory (`int`): Bytes of memory that this process may use, and those that are free.
        disks (`dict[str, int]`): Free bytes, by folder: the current one, and the cache of the Hub.
        memory_bandwidth (`float`): Bytes of memory that all cores read in a second. Measured.
    """

    cpu: dict
    precision: str
    matmul_kernel: str
    missing_kernel: str | None
    devices: dict[str, str]
    memory: int
    free_memory: int
    disks: dict[str, int]
    memory_bandwidth: float


def describe_computer() -> Computer:
    """Describe this machine. Takes less than a second."""
    core = openvino.Core()
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") if "CPU" in core.available_devices else ()
    precision = next((name.lower() for name in ("BF16", "FP16") if name in capabilities), "f32").replace("fp", "f")
    memory, free_memory = _memory()
    folders = (Path.cwd(), Path(constants.HF_HUB_CACHE))
    return Computer(
        cpu=describe_cpu(),
        precision=precision,
        matmul_kernel=AVX2 if is_faster() else OPENVINO,
        missing_kernel=why_not() if lacks_fast_kernel() else None,
        devices={name: core.get_property(name, "FULL_DEVICE_NAME") for name in core.available_devices},
        memory=memory,
        free_memory=free_memory,
        disks={str(folder): free_disk(folder) for folder in folders},
        memory_bandwidth=_measure_bandwidth(),
    )


def free_disk(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free


def _memory() -> tuple[int, int]:
    """Return total and free memory in bytes. In a container, its limit counts."""
    memory = psutil.virtual_memory()
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return memory.total, memory.available
    return min(memory.total, limit), min(memory.available, max(limit - used, 0))


def _measure_bandwidth() -> float:
    """Return the bytes of memory that all cores read in a second: the best of five rounds."""
    values = torch.ones(_READ_BYTES // 4)
    values.sum()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - started)
    return _READ_BYTES / min(seconds)
