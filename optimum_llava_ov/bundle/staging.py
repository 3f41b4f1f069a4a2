"""Writing a bundle so that whatever happens, the output is the old one or the new one, and nothing of the user's is touched.

A bundle is written into a workspace: a new folder, hidden inside the output, or beside it if there is no output yet. A file of the same
name, the marker, says that this package made it. Nothing of the user's is ever moved there, so it can be deleted at any time.

An output that does not exist appears with one rename. In one that exists, which may be a mount point or a repository of git, the files
are renamed one by one. That they all are there is written into the marker first. From then on the new bundle counts: who uses the
folder next completes a replacement that was interrupted, with [`complete_replacement`]. Until it is complete, the folder has no
`openvino_language_model.xml`, so that other engines do not take a mixture of two bundles for one.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from optimum_llava_ov.bundle.layout import EXTRA_FILES, FILES, PARTS, check_bundle
from optimum_llava_ov.bundle.output import MODEL_CACHE, OURS, check_output
from optimum_llava_ov.errors import BundleError


_PARTIAL, _WHOLE = ".partial", ".whole"
_LAST = PARTS["language_model"]  # of the files that are renamed: no engine loads a bundle without it
_SECONDS_TO_REPLACE = 10  # how long to wait for another process that renames files


@contextmanager
def staged(output: str | Path, tokenizers: bool = True) -> Iterator[Path]:
    """Give a new folder to write a bundle into. It takes the place of what is in `output` when it is whole.

    Hidden files in `output`, such as `.git`, stay where they are. If something fails, `output` is as it was.

    Args:
        output: folder of the bundle, which may be a link or a mount point.
        tokenizers: whether the bundle must have the tokenizers' OpenVINO models.

    Raises:
        [`BundleError`]: `output` holds something else, is being written by another process, or its disk is full.
    """
    output = prepare_output(output)
    home = _Home.of(output)
    with home.locked(f"Another process is exporting to {output} right now. Wait for it, or choose another folder."):
        _clear_beside(output)
        home.clear(output)
        workspace = home.new_workspace()
        try:
            yield workspace.folder
            check_bundle(workspace.folder, tokenizers)
            _take_place(workspace, output)
        except Exception as error:
            reason = None if workspace.is_whole else _why_not_written(error)
            if reason is None:
                raise
            raise BundleError(
                f"Writing the bundle to {output} failed: {reason}. What was there is unchanged. Make room, or write to another disk."
            ) from error
        finally:
            if not workspace.is_whole:
                workspace.delete()


def prepare_output(output: str | Path) -> Path:
    """Check that a bundle may be written to `output`, as early as possible. Links are followed.

    Raises:
        [`BundleError`]: it may not, or cannot; says why.
    """
    try:
        output = Path(os.path.realpath(output))
    except ValueError as error:  # a null character
        raise BundleError(f"{str(output)!r} cannot be a folder: {error}. Choose another name.") from error
    complete_replacement(output)
    check_output(output)
    return output


def complete_replacement(folder: str | Path) -> None:
    """Complete a replacement of the bundle in `folder` that was interrupted when the new one was whole already.

    For all that reads bundles. It is a look into the folder if there is nothing to do, and also if there is no such folder.

    Raises:
        [`BundleError`]: the files cannot be renamed, or another process takes longer for that than it can take.
    """
    home = _Home(Path(os.path.realpath(folder)) / OURS)
    if not any(workspace.is_whole for workspace in home.workspaces()):
        return
    with home.locked(f"Another process is replacing {folder} right now. Wait for it.", _SECONDS_TO_REPLACE):
        home.clear(home.folder.parent)


@dataclass(frozen=True)
class _Workspace:
    """A folder that an export made for itself, and may delete.

    Args:
        name: path of the folder. Beside it is its marker: `<name>.partial`, made before the folder, which becomes `<name>.whole` with the
            names of the bundle's files.
    """

    name: str

    @property
    def folder(self) -> Path:
        return Path(self.name)

    @property
    def _partial(self) -> Path:
        return Path(f"{self.name}{_PARTIAL}")

    @property
    def _whole(self) -> Path:
        return Path(f"{self.name}{_WHOLE}")

    @property
    def is_whole(self) -> bool:
        return self._whole.exists()

    def names(self) -> list[str]:
        """The bundle's files, with those that were renamed into the output already. Nothing else that a marker may say counts."""
        return [
            name for name in self._whole.read_text(encoding="utf-8").splitlines() if name in (*FILES, *EXTRA_FILES)
        ]

    def declare_whole(self) -> None:
        names = sorted(file.name for file in self.folder.iterdir())
        self._partial.write_text("\n".join(names), encoding="utf-8")
        self._partial.rename(self._whole)

    def delete(self) -> None:
        """Delete what is left of it; the marker last, so that an interrupted deletion can be continued."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if not self.folder.exists():
            with suppress(OSError):
                self._partial.unlink(missing_ok=True)
                self._whole.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Home:
    """The hidden folder, in an output or beside it, for the lock and the workspaces. It is there only while they are."""

    folder: Path

    @classmethod
    def of(cls, output: Path) -> _Home:
        return cls(output / OURS) if output.is_dir() else cls.beside(output)

    @classmethod
    def beside(cls, output: Path) -> _Home:
        return cls(output.parent / f".{output.name[:50]}{OURS}")  # so short that the file system takes it

    @contextmanager
    def locked(self, message: str, timeout: float = 0) -> Iterator[None]:
        """Hold the lock of the output; `message` is for who cannot have it within `timeout` seconds."""
        lock = FileLock(self.folder / "optimum-llava-ov.lock", timeout=timeout)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise BundleError(message) from error
        except OSError as error:
            raise BundleError(f"{self.folder.parent} cannot be written to: {error.strerror}.") from error
        try:
            yield
        finally:
            # While it is held: nobody else can have the file then, and who has opened it looks whether it still has a name
            with suppress(OSError):  # Windows deletes no file that is open
                Path(lock.lock_file).unlink()
            lock.release()
            with suppress(OSError):  # something is left in it
                self.folder.rmdir()

    def workspaces(self) -> list[_Workspace]:
        """All that exports have left here. A folder without a marker is not ours, whatever its name is, nor is what a link leads to."""
        try:
            markers = (
                []
                if self.folder.is_symlink()
                else [entry for entry in self.folder.iterdir() if entry.suffix in (_PARTIAL, _WHOLE)]
            )
        except OSError:  # no such folder, or not readable
            return []
        workspaces = [_Workspace(str(marker.with_suffix(""))) for marker in sorted(markers)]
        return [workspace for workspace in workspaces if not workspace.folder.is_symlink()]

    def new_workspace(self) -> _Workspace:
        try:
            descriptor, marker = tempfile.mkstemp(suffix=_PARTIAL, dir=self.folder)
            os.close(descriptor)
            workspace = _Workspace(marker.removesuffix(_PARTIAL))
            workspace.folder.mkdir()
        except OSError as error:
            raise BundleError(f"{self.folder.parent} cannot be written to: {error.strerror}.") from error
        return workspace

    def clear(self, output: Path) -> None:
        """Complete or delete what killed processes have left. For who holds the lock."""
        for workspace in self.workspaces():
            if workspace.is_whole:
                _move_files(workspace, output)
            workspace.delete()


def _take_place(workspace: _Workspace, output: Path) -> None:
    if not output.exists():
        workspace.folder.rename(output)
        workspace.delete()
        return
    workspace.declare_whole()
    _move_files(workspace, output)


def _move_files(workspace: _Workspace, output: Path) -> None:
    """Replace the bundle in `output` by the one in the workspace; goes on where an earlier call was interrupted."""
    try:
        names = workspace.names()
        if (workspace.folder / _LAST).exists():
            (output / _LAST).unlink(missing_ok=True)
        for name in {*FILES, *EXTRA_FILES}.difference(names):  # of the old bundle, and not true of the new one
            (output / name).unlink(missing_ok=True)
        for name in sorted(names, key=_LAST.__eq__):
            if (workspace.folder / name).exists():
                (workspace.folder / name).replace(output / name)
        if not (output / MODEL_CACHE).is_symlink():
            for file in (output / MODEL_CACHE).glob("*.blob"):  # compiled from the old weights
                file.unlink()
        workspace.delete()
    except OSError as error:
        raise BundleError(
            f"The new bundle is whole, but its files could not be moved into {output} ({error}). Correct that, then load the bundle or "
            "export again: this completes it."
        ) from error


def _why_not_written(error: Exception) -> str | None:
    """What the disk has against a file; `None` for any other error."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else None
    # How OpenVINO and the tokenizers say it
    if any(words in str(error) for words in ("iostream error", "No space left on device")):
        return "the disk is full, or takes no files of this size"
    return None


def _clear_beside(output: Path) -> None:
    """Delete what a process has left that was killed when it wrote `output` for the first time."""
    beside = _Home.beside(output)
    if output.is_dir() and beside.workspaces():
        with suppress(BundleError), beside.locked(""):
            beside.clear(output)
