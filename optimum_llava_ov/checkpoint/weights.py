"""Tensors of a checkpoint, mapped from disk: nothing is copied into memory and nothing is executed."""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from pathlib import Path

import torch

from optimum_llava_ov.errors import InvalidCheckpointError


def index_shards(index_file: Path) -> list[str]:
    """Names of the weight files an index (`*.index.json`) speaks of, in order."""
    try:
        weight_map = json.loads(index_file.read_text())["weight_map"]
        return sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidCheckpointError(
            f"{index_file} is not an index of weights ({error}). Expected JSON with a `weight_map` from tensor names to files; "
            "download the file again."
        ) from error


def map_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of one weight file, backed by the file itself.

    Args:
        file (`Path`): a `.safetensors` file, or a `.bin` file as `torch.save` writes it.

    Raises:
        [`InvalidCheckpointError`]: the file is truncated, or is a pickle that holds anything but tensors.
    """
    return _map_safetensors(file) if file.suffix == ".safetensors" else _map_pickle(file)


def _map_safetensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  it is no dictionary
    except (SafetensorError, struct.error) as error:
        raise InvalidCheckpointError(_damaged(file, error)) from error


def _map_pickle(file: Path) -> dict[str, torch.Tensor]:
    # Files from before torch 1.6 are bare pickles, which cannot be mapped. weights_only still guards them.
    try:
        tensors = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"unsupported GLOBAL (\S+)", str(error), re.IGNORECASE)
        if forbidden is None:
            raise InvalidCheckpointError(_damaged(file, error)) from error
        raise InvalidCheckpointError(
            f"{file} holds more than tensors and was not opened: loading it would run code from the checkpoint "
            f"({forbidden.group(1)}). Ask its author for a file written with `safetensors`."
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise InvalidCheckpointError(_damaged(file, error)) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise InvalidCheckpointError(f"{file} does not hold a dictionary of tensors, so these are not weights of a model.")
    return tensors


def _damaged(file: Path, error: Exception) -> str:
    return (
        f"{file} ({file.stat().st_size:,} bytes) is truncated or damaged ({_first_line(error)}). Delete it and download it again "
        "(`--force-download` of `hf download`)."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
