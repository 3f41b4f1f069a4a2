"""Compressed weights wait on disk, not in memory, until all of a part are there and it can be written.

NNCF needs the whole graph to choose precisions, and keeps every compressed weight until the graph is saved: 4.2 GB for a 7B model in
4 bits. Here each goes to a file of its own beside the output and is mapped from there, so the system can drop it when it needs the
memory. When the part is written, each file is deleted as soon as its bytes are in place, so the disk holds hardly more than the result.
"""

from __future__ import annotations

import html
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import openvino
from openvino import opset13


MIN_BYTES = 1 << 20  # smaller constants stay where they are
_CONSTANT = re.compile(r'<layer id="\d+" name="([^"]*)" type="Const"[^>]*>\s*<data [^>]*?offset="(\d+)" size="(\d+)"')


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
        data = np.ascontiguousarray(constant.data).reshape(-1).view(np.uint8)
        if data.nbytes < MIN_BYTES or data.nbytes != constant.get_byte_size() or not hasattr(os, "posix_fallocate"):
            return constant
        self.folder.mkdir(exist_ok=True)
        name, file = constant.get_friendly_name(), self.folder / f"{len(self._files)}.weight"
        self._files[name] = file
        with file.open("wb") as reserved:
            os.posix_fallocate(reserved.fileno(), 0, data.nbytes)  # a full disk is an error here, and would be a crash later
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
        constants = {op.get_friendly_name(): op for op in model.get_ops() if op.get_type_name() == "Constant"}
        graph = path.read_text()
        with binary.open("wb+") as output:
            path.write_text(self._write(graph, constants, output))
        shutil.rmtree(self.folder)

    def _write(self, graph: str, constants: dict[str, openvino.op.Constant], output: BinaryIO) -> str:
        """Write the constants in the order of the graph, equal ones once, and return the graph with their offsets."""
        offsets: dict[tuple[int, bytes], list[int]] = {}
        parts, end = [], 0
        for match in _CONSTANT.finditer(graph):
            name, size = html.unescape(match[1]), int(match[3])
            data = np.ascontiguousarray(constants[name].data).reshape(-1).view(np.uint8)
            assert data.nbytes == size, f"{name} has {data.nbytes} bytes in memory, {size} in the graph"
            candidates = offsets.setdefault((size, data[:4096].tobytes()), [])
            offset = next((candidate for candidate in candidates if _is_at(output, candidate, data)), None)
            if offset is None:
                offset = output.seek(0, os.SEEK_END)
                output.write(data)
                candidates.append(offset)
            if name in self._files:
                os.truncate(self._files[name], 0)  # the mapping is still there; nothing reads it any more
            parts += [graph[end : match.start(2)], str(offset)]
            end = match.end(2)
        return "".join([*parts, graph[end:]])


def _fill(file: Path, data: np.ndarray) -> None:
    """Through the file, which costs less than through the mapping: no page is faulted in."""
    with file.open("r+b", buffering=0) as output:
        written = 0
        while written < data.nbytes:  # one call writes 2 GB at most
            written += output.write(data[written:])


def _is_at(output: BinaryIO, offset: int, data: np.ndarray) -> bool:
    output.seek(offset)
    return output.read(data.nbytes) == data.tobytes()
