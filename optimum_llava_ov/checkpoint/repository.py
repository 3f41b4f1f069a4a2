"""Files of a model repository, wherever it is: a local folder or the Hub, online or from the cache."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from optimum_llava_ov.errors import InvalidCheckpointError


logger = logging.getLogger(__name__)

# What everybody who takes a model id takes besides, as in transformers
HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")


@dataclass(frozen=True)
class Repository:
    """A folder on disk or a model id on the Hub.

    Args:
        name (`str`): path of a folder, or `owner/name`.
        subfolder (`str`): where in it the files are.
        revision, cache_dir, token, local_files_only, force_download: as for [`~huggingface_hub.hf_hub_download`].
        on_hub (`bool`): whether `name` is a model id even if there is a folder of that name.
    """

    name: str
    subfolder: str = ""
    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False
    force_download: bool = False
    on_hub: bool = False

    @property
    def is_local(self) -> bool:
        return not self.on_hub and Path(self.name).is_dir()

    @property
    def folder(self) -> Path:
        """Of a local repository, the folder that holds its files."""
        return Path(self.name) / self.subfolder

    def get(self, filename: str) -> Path | None:
        """Path of a file, downloaded if need be, or `None` if the repository has no such file.

        Raises:
            [`InvalidCheckpointError`]: the repository cannot be reached or read; says what to do.
        """
        if self.is_local:
            path = self.folder / filename
            return path if path.is_file() else None
        with self._explained(filename):
            try:
                for _ in range(2):
                    there = self._blobs()
                    path = self._download(filename)
                    if path.resolve().name in there or _is_intact(path):
                        return path
                    logger.warning("%s of %s arrived damaged. Downloading it again.", filename, self.name)
                    path.resolve().unlink()
                    path.unlink(missing_ok=True)
            except (LocalEntryNotFoundError, OfflineModeIsEnabled):
                if self.offline:
                    return None
                raise
            except EntryNotFoundError:
                return None
        raise InvalidCheckpointError(
            f"{filename} of {self.name!r} arrived damaged twice: its content is not what its SHA-256 says. Something between here and the "
            "Hub changes it (HF_ENDPOINT, proxy). It was deleted; try again."
        )

    def _download(self, filename: str) -> Path:
        return Path(
            hf_hub_download(
                self.name,
                filename,
                subfolder=self.subfolder or None,
                revision=self.revision,
                cache_dir=self._cache_dir,
                token=self.token,
                local_files_only=self.local_files_only,
                force_download=self.force_download,
                library_name="optimum-llava-ov",
            )
        )

    def _blobs(self) -> set[str]:
        """Names of the files that the cache has and that will not be downloaded."""
        folder = (
            Path(self._cache_dir or constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.name, repo_type="model") / "blobs"
        )
        return {file.name for file in folder.iterdir()} if folder.is_dir() and not self.force_download else set()

    @contextmanager
    def _explained(self, filename: str) -> Iterator[None]:
        """Turn the client's errors into ones that say what to do."""
        try:
            yield
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            if _is_refusal(error.__cause__):  # the client says only that nothing is cached
                raise self._refused(filename, error.__cause__) from error
            raise InvalidCheckpointError(
                f"{filename} of {self.name!r} is not in the cache and the Hub cannot be reached. Check the connection "
                f"(HF_ENDPOINT, proxy), or download it elsewhere and pass the folder. ({error.__cause__ or error})"
            ) from error
        except GatedRepoError as error:
            raise InvalidCheckpointError(
                f"{self.name!r} is gated. Accept its terms on its page, then log in with `hf auth login` or set HF_TOKEN."
            ) from error
        except RepositoryNotFoundError as error:
            raise InvalidCheckpointError(
                f"{self.name!r} is neither a folder here nor a model on the Hub. If it is private, log in with `hf auth login` "
                "or set HF_TOKEN."
            ) from error
        except RevisionNotFoundError as error:
            raise InvalidCheckpointError(f"{self.name!r} has no revision {self.revision!r}.") from error
        except HFValidationError as error:
            raise InvalidCheckpointError(
                f"{self.name!r} is not a folder here, and not a valid model id either (`owner/name`). ({error})"
            ) from error
        except HfHubHTTPError as error:
            raise self._refused(filename, error) from error
        except (httpx.TransportError, OSError) as error:
            raise InvalidCheckpointError(
                f"{filename} of {self.name!r} did not arrive. Run it again: whole files stay in the cache. ({error})"
            ) from error

    def _refused(self, filename: str, error: HfHubHTTPError) -> InvalidCheckpointError:
        advice = (
            "Log in with `hf auth login`, or set HF_TOKEN to a valid token. " if error.response.status_code in (401, 403) else ""
        )
        return InvalidCheckpointError(f"The Hub did not give {filename} of {self.name!r}. {advice}({error})")

    @property
    def _cache_dir(self) -> str | Path | None:
        """Optimum's default is what HF_HUB_CACHE says only under its old name, HUGGINGFACE_HUB_CACHE; the Hub client knows better."""
        return None if str(self.cache_dir) == constants.HUGGINGFACE_HUB_CACHE else self.cache_dir

    def download(self, filenames: Iterable[str]) -> Path:
        """Folder of the cache with these files, those that the repository has.

        Raises:
            [`InvalidCheckpointError`]: it has none of them, or cannot be reached or read.
        """
        repository, folder = self, None
        for filename in sorted(filenames, key=lambda name: name.endswith(".bin")):  # what is large comes last
            if (path := repository.get(filename)) is not None:
                repository, folder = repository.pinned(path), path.parent
        if folder is None:
            raise InvalidCheckpointError(f"{self.name!r} has none of the files that are needed.")
        return folder

    def require(self, filename: str, why: str) -> Path:
        """Like [`get`], but a missing file is an error that says what it is needed for."""
        path = self.get(filename)
        if path is None:
            place = "in the cache (offline mode)" if not self.is_local and self.offline else "there"
            raise InvalidCheckpointError(f"{self.name!r} has no {filename} {place}. It is needed: {why}.")
        return path

    @property
    def offline(self) -> bool:
        from huggingface_hub import is_offline_mode

        return self.local_files_only or is_offline_mode()

    def pinned(self, path: Path) -> Repository:
        """The same repository at the commit `path` was downloaded from, so that all files are of one version."""
        if self.is_local or "snapshots" not in path.parts:
            return self
        return replace(self, revision=path.parts[path.parts.index("snapshots") + 1])


def repository_of_snapshot(folder: Path) -> Repository | None:
    """The repository that a folder of the Hub's cache is from; `None` for another folder."""
    match = re.fullmatch(r"(.*)/models--([^/]+)/snapshots/([^/]+)(?:/(.+))?", folder.absolute().as_posix())
    if match is None:
        return None
    cache, name, revision, subfolder = match.groups()
    return Repository(name.replace("--", "/", 1), subfolder or "", revision, cache_dir=cache)


def _is_intact(path: Path) -> bool:
    """Whether a file that was downloaded is what the Hub says it is. The client looks only at its size.

    The cache names large files by their SHA-256.
    """
    if not re.fullmatch("[0-9a-f]{64}", path.resolve().name):
        return True
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return sha256.hexdigest() == path.resolve().name


def _is_refusal(error: BaseException | None) -> bool:
    """Whether the Hub was reached and said no, for a reason that will still be there tomorrow."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code in (400, 401, 403)
