"""Map the tensors of a checkpoint from disk. No tensor is copied into memory, and no code is executed."""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from optimum_llava_ov.checkpoint.options import MAX_INDEX_BYTES, read_json, shown
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.errors import InvalidCheckpointError


# Name of a single file and name of an index of several, in the order of preference
WEIGHT_FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def weight_files(repository: Repository, what: str) -> list[Path]:
    """Return the paths of the weights of a repository, which are downloaded first.

    Args:
        repository: where they are.
        what: what they are, for messages.

    Raises:
        [`InvalidCheckpointError`]: there are none, or a file is missing.
    """
    for single, index in WEIGHT_FILES:
        if (path := repository.get(single)) is not None:
            return [path]
        if (path := repository.get(index)) is not None:
            shards = index_shards(path)
            return [
                repository.require(shard, f"{index} says that {what} are in {len(shards)} files") for shard in shards
            ]
    names = ", ".join(name for names in WEIGHT_FILES for name in names)
    raise InvalidCheckpointError(f"{repository.name!r} has none of {names}: {what} are not there.")


def index_shards(index_file: Path) -> list[str]:
    """Return the sorted names of the weight files in an index (`*.index.json`).

    Raises:
        [`InvalidCheckpointError`]: the file is not an index, or names a file outside its folder or of another type.
    """
    weight_map = read_json(index_file, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidCheckpointError(
            f"{index_file} is not an index of weights (weight_map={shown(weight_map)}). Expected JSON with a "
            "`weight_map` from tensor names to files. Download the file again."
        )
    suffix = ".safetensors" if ".safetensors" in index_file.name else ".bin"
    for name, file in weight_map.items():
        # Only a plain name, because a path could lead outside the repository
        if not isinstance(file, str) or not re.fullmatch(rf"[^/\\\0]+{re.escape(suffix)}", file):
            raise InvalidCheckpointError(
                f"{index_file} says that the tensor {shown(name)} is in {shown(file)}, expected the name of a "
                f"{suffix} file in the same folder. Take the index from the checkpoint's own repository."
            )
    return sorted(set(weight_map.values()))


def map_files(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """Map all tensors of several weight files (see [`map_tensors`])."""
    return {name: tensor for file in files for name, tensor in map_tensors(file).items()}


def map_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Map all tensors of one weight file.

    Args:
        file (`Path`): `.safetensors` file, or `.bin` file as `torch.save` writes it.

    Raises:
        [`InvalidCheckpointError`]: the file is truncated or damaged, or is a pickle with other objects than tensors.
    """
    try:
        tensors = _map_safetensors(file) if file.suffix == ".safetensors" else _map_pickle(file)
    except InvalidCheckpointError:
        raise
    except Exception as error:  # a parser can raise any error for damaged bytes
        raise InvalidCheckpointError(_damaged(file, error)) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and _is_plain(value) for name, value in tensors.items()
    ):
        raise InvalidCheckpointError(
            f"{file} is not a dictionary of tensors, so it does not hold the weights of a model."
        )
    return tensors


def _map_safetensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  it is not a dictionary


def _map_pickle(file: Path) -> Any:
    # torch before 1.6 wrote plain pickles, which cannot be mapped. `weights_only` protects in both cases.
    is_zip = zipfile.is_zipfile(file)
    if is_zip:
        with zipfile.ZipFile(file) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if packed:  # `torch.save` does not compress, and the unpacked data may have any size
            raise InvalidCheckpointError(
                f"{file} is a compressed archive, expected a file as `torch.save` writes it. Unpack it first."
            )
    try:
        return torch.load(file, map_location="cpu", mmap=is_zip, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        if (forbidden := _forbidden(str(error))) is None:
            raise
        raise InvalidCheckpointError(
            f"{file} holds other objects than tensors and was not loaded: loading it would run code from the "
            f"checkpoint ({forbidden}). Ask its author for a file written with `safetensors`."
        ) from error


def _forbidden(message: str) -> str | None:
    """Return what `weights_only` refused to load, from torch's message; `None` if it is about damaged bytes."""
    if match := re.search(r"unsupported GLOBAL (\S+)|GLOBAL (\S+) was not an allowed", message, re.IGNORECASE):
        return match[1] or match[2]
    if match := re.search(r"Unsupported operand (\d+)", message):
        names = {opcode.code: opcode.name for opcode in pickletools.opcodes}
        name = names.get(chr(int(match[1])))
        return f"pickle instruction {name}" if name else None
    sentences = (
        r"(?:Can only|Trying to|Only persistent_load|persistent_load id|Cannot use)[^\n]*|"
        r"[^\n]* must be imported to load[^\n]*"
    )
    match = re.search(sentences, message)
    return match[0].strip() if match else None


def _is_plain(value: Any) -> bool:
    """Return whether a value is a dense tensor on the CPU. A pickle may also hold sparse tensors and meta tensors."""
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu"


def _damaged(file: Path, error: Exception) -> str:
    with suppress(OSError), file.open("rb") as stream:
        if stream.read(32).startswith(b"version https://git-lfs"):
            return (
                f"{file} is a Git LFS pointer, not the file itself. Run `git lfs pull` in its folder, or use `hf "
                "download`."
            )
    return (
        f"{file} ({file.stat().st_size:,} bytes) is truncated or damaged ({_first_line(error)}). Delete it and "
        "download it again (`hf download --force-download`)."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
