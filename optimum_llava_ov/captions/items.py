"""Name images without reading them, so that a list of a million takes little memory and any process can read one."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_llava_ov.errors import ImageError


@dataclass(frozen=True)
class TarMember:
    """A file in a tar archive."""

    archive: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class ParquetCell:
    """A value in a Parquet file."""

    file: Path
    row_group: int
    row: int
    column: str

    def read(self) -> Any:
        return _column(self.file, self.row_group, self.column)[self.row].as_py()


@functools.lru_cache(maxsize=2)  # cells are read in their order
def _column(file: Path, row_group: int, column: str) -> Any:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as parquet:
        return parquet.read_row_group(row_group, [column]).column(0)


@dataclass(frozen=True)
class Item:
    """One image to caption.

    Attributes:
        key (`str`): Name of the image in the output.
        image: A path, the bytes of a file, a `PIL.Image`, a [`TarMember`] or a [`ParquetCell`].
        prompt (`str` or `None`): Its own prompt.
        folder (`Path` or `None`): Where a relative path begins.
        place (`tuple[int, int]`): Its part of the output, and its number there.
    """

    key: str
    image: Any
    prompt: str | None = None
    folder: Path | None = None
    place: tuple[int, int] = (0, 0)

    def read(self) -> Any:
        """Return the image as a path, bytes or a `PIL.Image`.

        Raises:
            [`ImageError`]: There is no image.
            `OSError`: The file cannot be read.
        """
        value = self.image.read() if isinstance(self.image, TarMember | ParquetCell) else self.image
        if isinstance(value, dict):  # an image of the library `datasets`
            value = value.get("bytes") or value.get("path")
        if value is None or value == "":
            raise ImageError("There is no image.")
        if isinstance(value, str):
            return (self.folder or Path()) / value
        return value
