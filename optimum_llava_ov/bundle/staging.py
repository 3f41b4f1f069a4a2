"""Write a bundle so that, after any failure, the output is either the old or the new bundle.

Files of the user are never changed.

A bundle is written into a workspace: a new hidden folder inside the output, or beside it if the output does not exist.
A marker file of the same name says that this package made the workspace. Files of the user are never moved there, so
it can be deleted at any time.

If the output does not exist, the workspace is renamed to it. If the output exists, which may be a mount point or a git
repository, the files are renamed one by one. Before that, the marker records that the new bundle is complete. From
then on, the new bundle is valid: if the replacement is interrupted, the next program that uses the folder completes it
with [`complete_replacement`]. Until then, the folder has no `openvino_language_model.xml`, so that other engines do
not load a mixture of two bundles.
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
_LAST = PARTS["language_model"]  # file to rename last, because no engine loads a bundle without it
_SECONDS_TO_REPLACE = 10  # maximum time to wait for another process that renames files


@contextmanager
def staged(output: str | Path, tokenizers: bool = True) -> Iterator[Path]:
    """Yield a new folder for a bundle. At the end of the context, the bundle replaces the content of `output`.

    Hidden files in `output`, such as `.git`, stay. If something fails, `output` is unchanged.

    Args:
        output: folder of the bundle, which may be a link or a mount point.
        tokenizers: whether the bundle must have the OpenVINO models of the tokenizer.

    Raises:
        [`BundleError`]: `output` contains other files, another process is writing to it, or its disk is full.
    """
    output = prepare_output(output)
    home = _Home.of(output)
    with home.locked(f"Another process is exporting to {output}. Wait until it ends, or choose another folder."):
        _clear_beside(output)
        home.clear(output)
        workspace = home.new_workspace()
        try:
            yield workspace.folder
            check_bundle(workspace.folder, tokenizers)
            _replace_output(workspace, output)
        except Exception as error:
            reason = None if workspace.is_whole else _why_not_written(error)
            if reason is None:
                raise
            raise BundleError(
                f"Writing the bundle to {output} failed: {reason}. The folder is unchanged. Free some space, or write "
                "to another disk."
            ) from error
        finally:
            if not workspace.is_whole:
                workspace.delete()


def prepare_output(output: str | Path) -> Path:
    """Check early that a bundle may be written to `output`, and return its real path. Links are followed.

    Raises:
        [`BundleError`]: a bundle may not or cannot be written there; says why.
    """
    try:
        output = Path(os.path.realpath(output))
    except ValueError as error:  # a null character
        raise BundleError(f"{str(output)!r} cannot be a folder: {error}. Choose another name.") from error
    complete_replacement(output)
    check_output(output)
    return output


def complete_replacement(folder: str | Path) -> None:
    """Complete an interrupted replacement of the bundle in `folder`.

    All functions that read bundles call this first. It is fast if there is nothing to do. The folder need not exist.

    Raises:
        [`BundleError`]: the files cannot be renamed, or another process does not finish renaming them in time.
    """
    home = _Home(Path(os.path.realpath(folder)) / OURS)
    if not any(workspace.is_whole for workspace in home.workspaces()):
        return
    with home.locked(f"Another process is replacing {folder}. Wait until it ends.", _SECONDS_TO_REPLACE):
        home.clear(home.folder.parent)


@dataclass(frozen=True)
class _Workspace:
    """Manage a folder that an export made, and may delete.

    Args:
        name: path of the folder. Its marker is `<name>.partial`, which is made before the folder. When the bundle is
            complete, the marker gets the names of the bundle's files and is renamed to `<name>.whole`.
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
        """Return whether the bundle in the workspace is complete."""
        return self._whole.exists()

    def names(self) -> list[str]:
        """Read the names of the bundle's files from the marker, with files that are already in the output.

        Other names in the marker are ignored.
        """
        return [
            name for name in self._whole.read_text(encoding="utf-8").splitlines() if name in (*FILES, *EXTRA_FILES)
        ]

    def declare_whole(self) -> None:
        """Record in the marker that the bundle is complete."""
        names = sorted(file.name for file in self.folder.iterdir())
        self._partial.write_text("\n".join(names), encoding="utf-8")
        self._partial.rename(self._whole)

    def delete(self) -> None:
        """Delete the workspace. The marker is deleted last, so that an interrupted deletion can be continued."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if not self.folder.exists():
            with suppress(OSError):
                self._partial.unlink(missing_ok=True)
                self._whole.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Home:
    """Manage the hidden folder of the lock and the workspaces, in an output or beside it."""

    folder: Path

    @classmethod
    def of(cls, output: Path) -> _Home:
        """Return the folder in an existing output, or beside a new one."""
        return cls(output / OURS) if output.is_dir() else cls.beside(output)

    @classmethod
    def beside(cls, output: Path) -> _Home:
        """Return the folder beside an output."""
        # Shortened, because file systems limit the length of a name
        return cls(output.parent / f".{output.name[:50]}{OURS}")

    @contextmanager
    def locked(self, message: str, timeout: float = 0) -> Iterator[None]:
        """Hold the lock of the output. If it is not free within `timeout` seconds, raise an error with `message`."""
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
            # Delete the file while the lock is held. A process that has opened it checks afterwards that it still
            # exists.
            with suppress(OSError):  # Windows cannot delete an open file
                Path(lock.lock_file).unlink()
            lock.release()
            with suppress(OSError):  # the folder is not empty
                self.folder.rmdir()

    def workspaces(self) -> list[_Workspace]:
        """Return the workspaces that exports have left here. Folders without a marker and links are not workspaces."""
        try:
            markers = (
                []
                if self.folder.is_symlink()
                else [entry for entry in self.folder.iterdir() if entry.suffix in (_PARTIAL, _WHOLE)]
            )
        except OSError:  # the folder does not exist or is not readable
            return []
        workspaces = [_Workspace(str(marker.with_suffix(""))) for marker in sorted(markers)]
        return [workspace for workspace in workspaces if not workspace.folder.is_symlink()]

    def new_workspace(self) -> _Workspace:
        """Make a workspace and its marker."""
        try:
            descriptor, marker = tempfile.mkstemp(suffix=_PARTIAL, dir=self.folder)
            os.close(descriptor)
            workspace = _Workspace(marker.removesuffix(_PARTIAL))
            workspace.folder.mkdir()
        except OSError as error:
            raise BundleError(f"{self.folder.parent} cannot be written to: {error.strerror}.") from error
        return workspace

    def clear(self, output: Path) -> None:
        """Complete or delete the workspaces of killed processes. The caller must hold the lock."""
        for workspace in self.workspaces():
            if workspace.is_whole:
                _move_files(workspace, output)
            workspace.delete()


def _replace_output(workspace: _Workspace, output: Path) -> None:
    if not output.exists():
        workspace.folder.rename(output)
        workspace.delete()
        return
    workspace.declare_whole()
    _move_files(workspace, output)


def _move_files(workspace: _Workspace, output: Path) -> None:
    """Replace the bundle in `output` by the bundle in the workspace, or continue an interrupted replacement."""
    try:
        names = workspace.names()
        if (workspace.folder / _LAST).exists():
            (output / _LAST).unlink(missing_ok=True)
        for name in {*FILES, *EXTRA_FILES}.difference(names):  # files of the old bundle that the new one does not have
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
            f"The new bundle is complete, but its files could not be moved into {output} ({error}). Fix this, then "
            "load the bundle or export again: both finish the move."
        ) from error


def _why_not_written(error: Exception) -> str | None:
    """Return why the disk cannot hold a file; `None` for any other error."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else None
    # Messages of OpenVINO and the tokenizers
    if any(words in str(error) for words in ("iostream error", "No space left on device")):
        return "the disk is full, or does not allow files of this size"
    return None


def _clear_beside(output: Path) -> None:
    """Delete the workspaces of a process that was killed while it wrote `output` for the first time."""
    beside = _Home.beside(output)
    if output.is_dir() and beside.workspaces():
        with suppress(BundleError), beside.locked(""):
            beside.clear(output)
