"""Writing a bundle so that whatever happens, the output is the old one or the new one, never half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from optimum_llava_ov.bundle.layout import EXTRA_FILES, FILES, check_bundle
from optimum_llava_ov.errors import BundleError


@contextmanager
def staged(output: str | Path, tokenizers: bool = True) -> Iterator[Path]:
    """A folder beside `output` to write a bundle into, which takes its place when it is whole.

    What is in `output` besides a bundle (hidden files such as `.git`, `eval.json` and the like are fine) is a reason to refuse.
    The staging folder is deleted when something fails; one that a killed process left behind is deleted by the next export.

    Raises:
        [`BundleError`]: `output` holds something else, or is being written by another process.
    """
    output = Path(os.path.realpath(output))
    staging, previous = (output.with_name(f".{output.name}.{kind}") for kind in ("partial", "previous"))
    check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output.with_name(f".{output.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise BundleError(
            f"Another process is exporting to {output} right now. Wait for it, or choose another folder."
        ) from error
    try:
        if previous.exists() and not output.exists():  # killed between the two renames below
            previous.rename(output)
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)
        staging.mkdir()
        yield staging
        check_bundle(staging, tokenizers)
        _take_place(staging, output, previous)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def check_output(output: Path) -> None:
    """Refuse an output that a bundle must not replace."""
    if output.exists() and not output.is_dir():
        raise BundleError(f"{output} is a file, expected a folder to write the bundle into. Choose another name.")
    if not output.is_dir():
        return
    foreign = sorted(entry.name for entry in output.iterdir() if not _belongs(entry.name))
    if foreign:
        shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        raise BundleError(
            f"{output} holds something else than a bundle ({shown}); it was left as it is. Choose another folder, or move these away."
        )


def _belongs(name: str) -> bool:
    return name in FILES or name in EXTRAS or name.startswith(".")


EXTRAS = (*EXTRA_FILES, "model_cache")


def _take_place(staging: Path, output: Path, previous: Path) -> None:
    if not output.exists():
        staging.rename(output)
        return
    for entry in output.iterdir():
        if entry.name.startswith("."):
            shutil.move(entry, staging / entry.name)
    output.rename(previous)
    staging.rename(output)
    shutil.rmtree(previous, ignore_errors=True)
