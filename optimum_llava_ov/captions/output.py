"""Write captions in parts. A part takes its place when it is whole, and what was begun is continued.

The folder has `_job.json` (what was asked for), `part-000000.parquet` (rows of a complete part, in the order of the
images) and `_part-000001.jsonl.incomplete` (rows of a part that was begun, in the order in which they came). Readers
of Parquet folders skip names that begin with `_` or `.`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from optimum_llava_ov.files import replace_text


PARQUET, JSONL = FORMATS = (".parquet", ".jsonl")
JOB = "_job.json"
INCOMPLETE = ".jsonl.incomplete"


@dataclass(frozen=True)
class Row:
    """Hold the caption of one image.

    Attributes:
        index (`int`): Number of the image in its part.
        key (`str`): Name of the image.
        prompt (`str`): What the model was asked.
        caption (`str` or `None`): What it answered. `None` after an error.
        tokens (`int`): Number of tokens of the answer.
        finish_reason (`str` or `None`): "stop" or "length".
        seconds (`float`): Time in the batch.
        error (`str` or `None`): Why there is no caption.
    """

    index: int
    key: str
    prompt: str
    caption: str | None = None
    tokens: int = 0
    finish_reason: str | None = None
    seconds: float = 0.0
    error: str | None = None


COLUMNS = [field.name for field in fields(Row) if field.name != "index"]


class Part:
    """Write the rows of one part.

    Args:
        folder: The output.
        name: Name of the part, without suffix.
        suffix: ".parquet" or ".jsonl".
    """

    def __init__(self, folder: Path, name: str, suffix: str):
        self.file = folder / f"{name}{suffix}"
        self._incomplete = folder / f"_{name}{INCOMPLETE}"
        self._rows: dict[int, Row] = {}
        self._output: Any = None

    @property
    def is_complete(self) -> bool:
        return self.file.exists()

    @property
    def rows(self) -> dict[int, Row]:
        """Return the rows by their index."""
        return self._rows

    def begin(self) -> None:
        """Read the rows of an earlier run. The last line may be torn."""
        self._rows = {row.index: row for row in _read_lines(self._incomplete)}
        text = "".join(_line(asdict(row)) for row in self._rows.values())
        replace_text(self._incomplete, text)
        self._output = self._incomplete.open("a", encoding="utf-8")

    def add(self, row: Row) -> None:
        self._rows[row.index] = row
        self._output.write(_line(asdict(row)))
        self._output.flush()

    def complete(self) -> None:
        """Put the part in its place."""
        rows = [self._rows[index] for index in sorted(self._rows)]
        values = [{name: getattr(row, name) for name in COLUMNS} for row in rows]
        if self.file.suffix == PARQUET:
            temporary = self.file.with_name(f".{self.file.name}.{os.getpid()}")
            _write_parquet(values, temporary)
            temporary.replace(self.file)
        else:
            replace_text(self.file, "".join(map(_line, values)))
        self.close()
        self._incomplete.unlink(missing_ok=True)
        self._rows = {}

    def close(self) -> None:
        if self._output is not None:
            self._output.close()
            self._output = None


def open_output(folder: Path, job: dict[str, Any]) -> None:
    """Make the folder of the output, or check that it is of the same job.

    Raises:
        `ValueError`: The folder has other files, or captions of another job; says what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / JOB
    if not file.exists():
        if any(folder.iterdir()):
            raise ValueError(f"{folder} contains files that are not captions. Choose a new folder for --output.")
        replace_text(file, json.dumps(job, indent=2, ensure_ascii=False) + "\n")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    different = sorted(name for name in {*before, *job} if before.get(name) != job.get(name))
    if different:
        name = different[0]
        raise ValueError(
            f"{folder} was started with {name} {before.get(name)!r}, but this command has {job.get(name)!r}. Use the "
            "same options to continue, or another folder for --output."
        )


def read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of the complete parts, in the order of the parts."""
    for file in sorted(folder.glob("part-*")):
        if file.suffix == PARQUET:
            import pyarrow.parquet

            yield from pyarrow.parquet.read_table(file).to_pylist()
        elif file.suffix == JSONL:
            yield from (json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line)


def _read_lines(file: Path) -> Iterator[Row]:
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            yield Row(**json.loads(line))
        except (ValueError, TypeError):  # noqa: PERF203  the line was torn
            return


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def _write_parquet(rows: Sequence[dict[str, Any]], file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number, real = pa.string(), pa.int64(), pa.float64()
    types = dict(zip(COLUMNS, (text, text, text, number, text, real, text)))
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(list(types.items()))), file)
