"""List the images of folders, lists, tables, archives and data sets."""

from __future__ import annotations

import csv
import glob
import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from optimum_llava_ov.captions.items import Item, ParquetCell, TarMember


SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
IMAGE_COLUMNS = ("image", "images", "image_path", "image_file", "file_name", "path", "jpg", "png")
KEY_COLUMNS = ("key", "id", "__key__")


@dataclass(frozen=True)
class Source:
    """Describe where images are.

    Attributes:
        name (`str`): A folder, a pattern such as `images/*.jpg`, a `.txt` list of paths, a `.jsonl`, `.csv` or
            `.parquet` table, a `.tar` archive of webdataset (patterns may match several tables or archives), or the id
            of a data set on the Hub.
        image_column (`str` or `None`): Column of paths, bytes or images. Default: the first usual name.
        prompt_column (`str` or `None`): Column of prompts; in archives, the suffix of the files with prompts.
        key_column (`str` or `None`): Column of names for the output. Default: `key` or `id`, else the path of the
            image, else the number of the row.
        split (`str`): Split of a data set on the Hub.
    """

    name: str
    image_column: str | None = None
    prompt_column: str | None = None
    key_column: str | None = None
    split: str = "train"

    @property
    def is_on_hub(self) -> bool:
        """Return whether it is the id of a data set, and not on this machine."""
        return not Path(self.name).exists() and not self._matches()

    def items(self) -> Iterator[Item]:
        """List the images in an order that is always the same. Nothing is decoded.

        Raises:
            `ValueError`: There is no such source, or it does not have the columns.
        """
        path = Path(self.name)
        if path.is_dir():
            return _folder(path)
        files = [path] if path.is_file() else self._matches()
        if not files:
            return self._hub()
        suffixes = {file.suffix.lower() for file in files}
        readers = {
            ".txt": _list,
            ".jsonl": self._jsonl,
            ".csv": self._csv,
            ".parquet": self._parquet,
            ".tar": self._tar,
        }
        if suffixes <= SUFFIXES:
            return (Item(str(file), file) for file in files)
        if len(suffixes) > 1 or not suffixes <= set(readers):
            raise ValueError(
                f"{self.name} has files of the types {', '.join(sorted(suffixes))}. Expected images, or files of one "
                f"of the types {', '.join(readers)}."
            )
        reader = readers[suffixes.pop()]
        return itertools.chain.from_iterable(map(reader, files))

    def _matches(self) -> list[Path]:
        return [Path(name) for name in sorted(glob.glob(self.name, recursive=True))]  # noqa: PTH207  also absolute

    def _jsonl(self, file: Path) -> Iterator[Item]:
        with file.open(encoding="utf-8") as lines:
            rows = (_json(line, file, number) for number, line in enumerate(lines, start=1) if line.strip())
            yield from self._rows(rows, file)

    def _csv(self, file: Path) -> Iterator[Item]:
        with file.open(encoding="utf-8", newline="") as lines:
            yield from self._rows(csv.DictReader(lines), file)

    def _rows(self, rows: Iterable[dict[str, Any]], file: Path) -> Iterator[Item]:
        image = None
        for number, row in enumerate(rows):
            image = image or self._image_column(list(row), file)
            yield Item(self._key(row, number, row.get(image)), row.get(image), self._prompt(row, file), file.parent)

    def _parquet(self, file: Path) -> Iterator[Item]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            image = self._image_column(names, file)
            others = [name for name in (self.prompt_column, self.key_column, *KEY_COLUMNS) if name in names]
            number = 0
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group, others).to_pylist() if others else []
                for row in range(parquet.metadata.row_group(group).num_rows):
                    values = table[row] if table else {}
                    key, prompt = self._key(values, number, None), self._prompt(values, file)
                    yield Item(key, ParquetCell(file, group, row, image), prompt, file.parent)
                    number += 1

    def _tar(self, file: Path) -> Iterator[Item]:
        """List the samples of an archive: files of one sample have the same name up to the first dot."""
        with tarfile.open(file, "r:") as archive:
            members = (member for member in archive if member.isfile())
            for key, group in itertools.groupby(members, key=lambda member: _stem(member.name)):
                files = {PurePosixPath(member.name).name.partition(".")[2].lower(): member for member in group}
                image = next((files[suffix] for suffix in files if f".{suffix}" in SUFFIXES), None)
                content = TarMember(file, image.offset_data, image.size) if image is not None else None
                prompt = None
                if self.prompt_column is not None:
                    member = files.get(self.prompt_column)
                    text = archive.extractfile(member) if member is not None else None
                    prompt = None if text is None else text.read().decode("utf-8", "replace").strip()
                yield Item(key, content, prompt)
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all that it has seen

    def _hub(self) -> Iterator[Item]:
        if self.name.count("/") > 1 or self.name.startswith((".", "/")) or any(sign in self.name for sign in "*?["):
            raise ValueError(f"{self.name} does not exist. Expected a folder, a file, a pattern, or a data set's id.")
        try:
            from datasets import Image, load_dataset
        except ImportError as error:
            raise ImportError(
                f"{self.name} is not on this machine, and a data set of the Hub needs the package `datasets`. "
                'Install it with: pip install "optimum-llava-ov[data]"'
            ) from error
        data = load_dataset(self.name, split=self.split, streaming=True)
        image = self._image_column(list(data.features or next(iter(data))), Path(self.name))
        if data.features and isinstance(data.features[image], Image):
            data = data.cast_column(image, Image(decode=False))
        for number, row in enumerate(data):
            yield Item(self._key(row, number, None), row[image], self._prompt(row, Path(self.name)))

    def _image_column(self, names: list[str], file: Path) -> str:
        wanted = IMAGE_COLUMNS if self.image_column is None else (self.image_column,)
        found = next((name for name in wanted if name in names), None)
        if found is None:
            raise ValueError(
                f"{file} has the columns {', '.join(names)}. Expected {' or '.join(wanted)}. Name the column of the "
                "images with --image-column."
            )
        return found

    def _key(self, row: dict[str, Any], number: int, path: Any) -> str:
        names = KEY_COLUMNS if self.key_column is None else (self.key_column,)
        value = next((row[name] for name in names if row.get(name) is not None), None)
        if value is None and self.key_column is not None:
            raise ValueError(f"Row {number} has no value in the column {self.key_column}, which --key-column names.")
        return str(value) if value is not None else path if isinstance(path, str) else f"{number:09}"

    def _prompt(self, row: dict[str, Any], file: Path) -> str | None:
        if self.prompt_column is None:
            return None
        if self.prompt_column not in row:
            raise ValueError(f"{file} has no column {self.prompt_column}, which --prompt-column names.")
        return row[self.prompt_column]


def _folder(folder: Path) -> Iterator[Item]:
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if Path(name).suffix.lower() in SUFFIXES:
                file = Path(place, name)
                yield Item(file.relative_to(folder).as_posix(), file)


def _list(file: Path) -> Iterator[Item]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if path := line.strip():
                yield Item(path, path, folder=file.parent)


def _stem(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.parent / path.name.partition(".")[0])


def _json(line: str, file: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"Line {number} of {file} is not JSON: {error}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"Line {number} of {file} is not a JSON object.")  # noqa: TRY004  the content is wrong
    return row
