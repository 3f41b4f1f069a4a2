"""Keep compressed weights on disk, not in memory, until the graph is written.

NNCF needs the whole graph to choose precisions, and it keeps all compressed weights until the graph is saved: 4.2 GB
for a 7B model in 4 bits. Here, each weight is written to a file beside the output and mapped from there, so that the
system can free its memory. When the graph is written, each of these files is emptied as soon as its bytes are in the
output, so that the export needs hardly more disk than its result.
"""

from __future__ import annotations

import os
import shutil
import xml.etree.ElementTree as ET
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import openvino
from openvino import opset13

from optimum_llava_ov.errors import BundleError
from optimum_llava_ov.system.memory import reserve


MIN_BYTES = 1 << 20  # smaller constants stay in memory
_SAMPLE = 4096  # number of bytes at both ends of a constant that are compared


class Spill:
    """Keep the compressed weights of one part in files.

    Args:
        folder: folder of the files. It is made when the first file is written, and [`save`] deletes it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, Path] = {}
        self._mappings: list[np.memmap] = []
        self._copier = ThreadPoolExecutor(1)
        self._copying: Future[None] | None = None

    def constant(self, constant: openvino.op.Constant) -> openvino.op.Constant:
        """Return a constant of the same value that is mapped from a file. A small constant is returned unchanged."""
        data = _bytes(constant)
        if data.nbytes < MIN_BYTES or data.nbytes != constant.get_byte_size() or not hasattr(os, "posix_fallocate"):
            return constant
        self.folder.mkdir(exist_ok=True)
        name, file = constant.get_friendly_name(), self.folder / f"{len(self._files)}.weight"
        self._files[name] = file
        reserve(file, data.nbytes)
        self._mappings.append(np.memmap(file, np.uint8, mode="r+"))
        # Copy in the background while NNCF computes the next weight. At most one copy is pending, to limit memory.
        self.wait()
        self._copying = self._copier.submit(_fill, file, data)
        tensor = openvino.Tensor(self._mappings[-1], constant.get_output_shape(0), constant.get_element_type())
        return opset13.constant(tensor, name=name, shared_memory=True)

    def wait(self) -> None:
        """Wait until the pending copy is in its file."""
        if self._copying is not None:
            self._copying.result()
            self._copying = None

    def save(self, model: openvino.Model, path: str | os.PathLike, compress_to_fp16: bool = False) -> None:
        """Write a graph. The files equal those of `openvino.save_model`, byte for byte."""
        path = Path(path)
        self.wait()
        if not self._files or compress_to_fp16:
            openvino.save_model(model, path, compress_to_fp16)
            return
        binary = path.with_suffix(".bin")
        # OpenVINO writes the graph, and its weights to /dev/null. Sizes in the graph are right, offsets are wrong.
        binary.symlink_to(os.devnull)
        openvino.save_model(model, path, compress_to_fp16)
        binary.unlink()
        graph = ET.parse(path)
        layers = [layer for layer in graph.iter("layer") if layer.get("type") == "Const"]
        constants = {op.get_friendly_name(): op for op in model.get_ops() if op.get_type_name() == "Constant"}
        samples = {name: _sample(_bytes(constant)) for name, constant in constants.items()}
        _check_layers(layers, constants)
        with binary.open("wb") as output, binary.open("rb") as written:
            self._write(layers, constants, output, written)
        path.write_text(
            f'<?xml version="1.0"?>\n{ET.tostring(graph.getroot(), encoding="unicode")}\n', encoding="utf-8"
        )
        _read_back(path, samples)
        shutil.rmtree(self.folder)

    def _write(
        self,
        layers: list[ET.Element],
        constants: dict[str, openvino.op.Constant],
        output: BinaryIO,
        written: BinaryIO,
    ) -> None:
        """Write the constants in the order of the graph, equal ones once, and set their offsets in the graph."""
        offsets: dict[tuple[int, bytes], list[int]] = {}
        for layer in layers:
            name = _name(layer)
            data = _bytes(constants[name])
            candidates = offsets.setdefault((data.nbytes, data[:_SAMPLE].tobytes()), [])
            if candidates:
                output.flush()
            offset = next((candidate for candidate in candidates if _is_at(written, candidate, data)), None)
            if offset is None:
                offset = output.tell()
                output.write(data.data)
                candidates.append(offset)
            if name in self._files:
                os.truncate(self._files[name], 0)  # the file stays mapped, but is not read again
            _data(layer).set("offset", str(offset))


def _check_layers(layers: list[ET.Element], constants: dict[str, openvino.op.Constant]) -> None:
    """Check that the graph has exactly one layer of the right size for each constant of the model."""
    found = sorted((_name(layer), _data(layer).get("size", "")) for layer in layers)
    expected = sorted((name, str(_bytes(constant).nbytes)) for name, constant in constants.items())
    if found != expected:
        different = sorted({name for name, _ in set(found).symmetric_difference(expected)}) or [
            "two have the same name"
        ]
        raise BundleError(
            f"OpenVINO {openvino.get_version()} wrote a graph whose constants are not those of the model "
            f"({', '.join(different[:5])}). Nothing was exported. Please report this, and install another version of "
            "OpenVINO."
        )


def _read_back(path: Path, samples: dict[str, bytes]) -> None:
    """Load the written graph, and compare the beginning and the end of each constant."""
    model = openvino.Core().read_model(path)
    found = {op.get_friendly_name(): _sample(_bytes(op)) for op in model.get_ops() if op.get_type_name() == "Constant"}
    wrong = sorted(name for name in samples.keys() | found.keys() if samples.get(name) != found.get(name))
    if wrong:
        raise BundleError(
            f"{path.name} does not hold the weights that were written ({', '.join(wrong[:5])}). Export again."
        )


def _bytes(constant: openvino.op.Constant) -> np.ndarray:
    """Return the bytes of a constant, uint8 `(num_bytes,)`, without a copy."""
    return np.ascontiguousarray(constant.data).reshape(-1).view(np.uint8)


def _sample(data: np.ndarray) -> bytes:
    return data[:_SAMPLE].tobytes() + data[-_SAMPLE:].tobytes()


def _fill(file: Path, data: np.ndarray) -> None:
    """Write data to a reserved file. This is faster than writing to its mapping, which causes page faults."""
    with file.open("r+b", buffering=0) as output:
        written = 0
        while written < data.nbytes:  # one call writes up to 2 GB
            written += output.write(data[written:].data)


def _name(layer: ET.Element) -> str:
    return layer.get("name", "")


def _data(layer: ET.Element) -> ET.Element:
    return next(layer.iterfind("data"))


def _is_at(written: BinaryIO, offset: int, data: np.ndarray) -> bool:
    written.seek(offset)
    return written.read(data.nbytes) == data.tobytes()
