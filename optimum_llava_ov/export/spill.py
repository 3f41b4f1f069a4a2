"""Compressed weights wait on disk, not in memory, until all of a part are there and it can be written.

NNCF needs the whole graph to choose precisions, and keeps every compressed weight until the graph is saved: 4.2 GB for a 7B model in
4 bits. Here each goes to a file of its own beside the output and is mapped from there, so the system can drop it when it needs the
memory. When the part is written, each file is deleted as soon as its bytes are in place, so the disk holds hardly more than the result.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree

import numpy as np
import openvino
from openvino import opset13

from optimum_llava_ov.errors import BundleError


MIN_BYTES = 1 << 20  # smaller constants stay where they are
_SAMPLE = 4096  # bytes at the beginning and the end of a constant that are compared


class Spill:
    """Where the weights of one part wait.

    Args:
        folder: for the files; made when needed, deleted by [`save`].
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, Path] = {}
        self._mappings: list[np.memmap] = []
        self._copier, self._copying = ThreadPoolExecutor(1), None

    def constant(self, constant: openvino.op.Constant) -> openvino.op.Constant:
        """The same constant, with its bytes in a file; a small one as it is."""
        data = _bytes(constant)
        if data.nbytes < MIN_BYTES or data.nbytes != constant.get_byte_size() or not hasattr(os, "posix_fallocate"):
            return constant
        self.folder.mkdir(exist_ok=True)
        name, file = constant.get_friendly_name(), self.folder / f"{len(self._files)}.weight"
        self._files[name] = file
        with file.open("wb") as reserved:
            os.posix_fallocate(
                reserved.fileno(), 0, data.nbytes
            )  # a full disk is an error here, and would be a crash later
        self._mappings.append(np.memmap(file, np.uint8, mode="r+"))
        # While NNCF computes the next one; never more than one, which is memory
        self.wait()
        self._copying = self._copier.submit(_fill, file, data)
        tensor = openvino.Tensor(self._mappings[-1], constant.get_output_shape(0), constant.get_element_type())
        return opset13.constant(tensor, name=name, shared_memory=True)

    def wait(self) -> None:
        """Until everything is in its file."""
        if self._copying is not None:
            self._copying.result()
            self._copying = None

    def save(self, model: openvino.Model, path: str | os.PathLike, compress_to_fp16: bool = False) -> None:
        """Write what `openvino.save_model` writes, byte for byte."""
        path = Path(path)
        self.wait()
        if not self._files or compress_to_fp16:
            openvino.save_model(model, path, compress_to_fp16)
            return
        binary = path.with_suffix(".bin")
        # OpenVINO writes the graph, and its weights to nowhere. Offsets in the graph are wrong then, sizes are not.
        binary.symlink_to(os.devnull)
        openvino.save_model(model, path, compress_to_fp16)
        binary.unlink()
        graph = ElementTree.parse(path)
        layers = [layer for layer in graph.iter("layer") if layer.get("type") == "Const"]
        constants = {op.get_friendly_name(): op for op in model.get_ops() if op.get_type_name() == "Constant"}
        samples = {name: _sample(_bytes(constant)) for name, constant in constants.items()}
        _check_layers(layers, constants)
        with binary.open("wb") as output, binary.open("rb") as written:
            self._write(layers, constants, output, written)
        path.write_text(
            f'<?xml version="1.0"?>\n{ElementTree.tostring(graph.getroot(), encoding="unicode")}\n', encoding="utf-8"
        )
        _read_back(path, samples)
        shutil.rmtree(self.folder)

    def _write(
        self,
        layers: list[ElementTree.Element],
        constants: dict[str, openvino.op.Constant],
        output: BinaryIO,
        written: BinaryIO,
    ) -> None:
        """Write the constants in the order of the graph, equal ones once, and enter their offsets into the graph."""
        offsets: dict[tuple[int, bytes], list[int]] = {}
        for layer in layers:
            name, data = layer.get("name"), _bytes(constants[layer.get("name")])
            candidates = offsets.setdefault((data.nbytes, data[:_SAMPLE].tobytes()), [])
            if candidates:
                output.flush()
            offset = next((candidate for candidate in candidates if _is_at(written, candidate, data)), None)
            if offset is None:
                offset = output.tell()
                output.write(data)
                candidates.append(offset)
            if name in self._files:
                os.truncate(self._files[name], 0)  # the mapping is still there; nothing reads it any more
            layer.find("data").set("offset", str(offset))


def _check_layers(layers: list[ElementTree.Element], constants: dict[str, openvino.op.Constant]) -> None:
    """Check that each constant of the model is one layer of the graph, with its size, before the first is written."""
    found = sorted((layer.get("name"), layer.find("data").get("size")) for layer in layers)
    expected = sorted((name, str(_bytes(constant).nbytes)) for name, constant in constants.items())
    if found != expected:
        different = sorted({name for name, _ in set(found).symmetric_difference(expected)}) or ["two of one name"]
        raise BundleError(
            f"OpenVINO {openvino.get_version()} wrote a graph whose constants are not those of the model ({', '.join(different[:5])}). "
            "Nothing was exported. Please report this, and install another version of OpenVINO."
        )


def _read_back(path: Path, samples: dict[str, bytes]) -> None:
    """Load the file that was written, mapped, and compare the beginning and the end of each constant."""
    model = openvino.Core().read_model(path)
    found = {op.get_friendly_name(): _sample(_bytes(op)) for op in model.get_ops() if op.get_type_name() == "Constant"}
    wrong = sorted(name for name in samples.keys() | found.keys() if samples.get(name) != found.get(name))
    if wrong:
        raise BundleError(
            f"{path.name} does not hold the weights that were written ({', '.join(wrong[:5])}). Export again."
        )


def _bytes(constant: openvino.op.Constant) -> np.ndarray:
    """`(bytes,)` uint8, without a copy."""
    return np.ascontiguousarray(constant.data).reshape(-1).view(np.uint8)


def _sample(data: np.ndarray) -> bytes:
    return data[:_SAMPLE].tobytes() + data[-_SAMPLE:].tobytes()


def _fill(file: Path, data: np.ndarray) -> None:
    """Through the file, which costs less than through the mapping: no page is faulted in."""
    with file.open("r+b", buffering=0) as output:
        written = 0
        while written < data.nbytes:  # one call writes 2 GB at most
            written += output.write(data[written:])


def _is_at(written: BinaryIO, offset: int, data: np.ndarray) -> bool:
    written.seek(offset)
    return written.read(data.nbytes) == data.tobytes()
