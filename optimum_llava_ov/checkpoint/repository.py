"""Find files of a model repository: in a local folder, on the Hub, or in the Hub's cache."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
from huggingface_hub import (
    _CACHED_NO_EXIST,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
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
from huggingface_hub.utils import validate_repo_id

from optimum_llava_ov.errors import HubError, HubUnreachableError, InvalidCheckpointError
from optimum_llava_ov.hub_errors import clean_token, is_unreachable, redacted, root_cause, status_meaning, unreachable


logger = logging.getLogger(__name__)

# Options that go with a model id, as in transformers
HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")


@dataclass(frozen=True)
class Repository:
    """Find files in a folder on disk, or of a model id on the Hub.

    Args:
        name (`str`): path of a folder, or model id `owner/name`.
        subfolder (`str`): folder of the files in the repository.
        revision, cache_dir, token, local_files_only, force_download: as for [`~huggingface_hub.hf_hub_download`].
        on_hub (`bool`): whether `name` is a model id even if a folder of this name exists.
        any_name (`bool`): whether a model id may have no owner. Only old models of other people have such ids.
    """

    name: str
    subfolder: str = ""
    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False
    force_download: bool = False
    on_hub: bool = False
    any_name: bool = False

    def __post_init__(self):
        object.__setattr__(self, "token", clean_token(self.token))

    @classmethod
    def of(cls, name_or_path: str | Path | Repository, **kwargs) -> Repository:
        """Return the repository of a folder or a model id, or the repository itself.

        Args:
            kwargs: options of the Hub, and `any_name`. Other arguments, and those that are `None`, are ignored.
        """
        if isinstance(name_or_path, Repository):
            return name_or_path
        names = (*HUB_OPTIONS, "any_name")
        return cls(str(name_or_path), **{name: kwargs[name] for name in names if kwargs.get(name) is not None})

    @property
    def is_local(self) -> bool:
        """Return whether the repository is a folder on disk."""
        return not self.on_hub and Path(self.name).is_dir()

    @property
    def folder(self) -> Path:
        """Return the folder of the files of a local repository."""
        return Path(self.name) / self.subfolder

    def get(self, filename: str) -> Path | None:
        """Return the path of a file; `None` if the repository does not have it. Download the file if necessary.

        Without a connection, only files in the cache are found, as in offline mode.

        Raises:
            [`InvalidCheckpointError`]: the name is neither a folder nor a model id, or the downloaded file is damaged.
            [`HubUnreachableError`]: the Hub cannot be reached, and the cache has no file of the repository.
            [`HubError`]: the Hub does not know the repository or refuses access; says what to do.
        """
        try:
            return self._find(filename)
        except HubUnreachableError as error:
            if not self._is_cached:
                raise
            logger.warning("%s Only files in the cache are used.", error)
            return None

    def has(self, filename: str) -> bool:
        """Return whether the repository has a file. Does not download it, which [`get`] does.

        Raises:
            [`InvalidCheckpointError`], [`HubError`]: see [`get`].
        """
        if self.is_local:
            return (self.folder / filename).is_file()
        self._check_name()
        cached = self._cached(filename)
        if cached is not None and (isinstance(cached, str) or self.offline):
            return isinstance(cached, str)
        if self.offline:
            return False
        try:
            url = hf_hub_url(self.name, filename, subfolder=self.subfolder or None, revision=self.revision)
            get_hf_file_metadata(url, token=self.token, library_name="optimum-llava-ov")
        except EntryNotFoundError:
            return False
        except (HfHubHTTPError, httpx.TransportError, OSError, RuntimeError, ValueError) as error:
            explained = self._explain(filename, error)
            if isinstance(explained, HubUnreachableError) and self._is_cached:
                return False
            raise explained from error
        return True

    def _find(self, filename: str) -> Path | None:
        """Like [`get`], but always raise an error if there is no connection and the file is not in the cache."""
        if self.is_local:
            path = self.folder / filename
            return path if path.is_file() else None
        self._check_name()
        if self._cached(filename) is _CACHED_NO_EXIST and re.fullmatch("[0-9a-f]{40}", self.revision or ""):
            return None  # a commit never changes
        try:
            return self._fetch(filename)
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            if self.offline:
                return None
            raise self._explain(filename, error) from error
        except EntryNotFoundError:
            return None
        except InvalidCheckpointError:
            raise
        except (HfHubHTTPError, httpx.TransportError, OSError, RuntimeError, ValueError) as error:
            raise self._explain(filename, error) from error

    def _fetch(self, filename: str) -> Path:
        for _ in range(2):
            cached_blobs = self._cached_blobs()
            path = self._download(filename)
            if path.resolve().name in cached_blobs or _is_intact(path):
                return path
            logger.warning("The downloaded %s of %s is damaged. Downloading it again.", filename, self.name)
            path.resolve().unlink()
            path.unlink(missing_ok=True)
        raise InvalidCheckpointError(
            f"{filename} of {self.name!r} was downloaded twice, and its content does not match its SHA-256. A server "
            "between here and the Hub changes it (HF_ENDPOINT, proxy). The file was deleted. Try again."
        )

    def _download(self, filename: str) -> Path:
        try:
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
        except (httpx.TransportError, RuntimeError):
            # The client does not look into the cache after these errors of the connection
            cached = None if self.force_download else self._cached(filename)
            if isinstance(cached, str):
                return Path(cached)
            # After two tries, huggingface_hub 1.21 only says "the client has been closed". Ask again for the reason.
            url = hf_hub_url(self.name, filename, subfolder=self.subfolder or None, revision=self.revision)
            get_hf_file_metadata(url, token=self.token, library_name="optimum-llava-ov")
            raise

    def _cached(self, filename: str):
        """Return the path of a file in the cache.

        Returns:
            `_CACHED_NO_EXIST` if the cache knows that the repository does not have it, `None` if it does not know.
        """
        path = f"{self.subfolder}/{filename}" if self.subfolder else filename
        return try_to_load_from_cache(self.name, path, cache_dir=self._cache_dir, revision=self.revision)

    @property
    def _storage(self) -> Path:
        """Return the folder of this repository in the cache."""
        return Path(self._cache_dir or constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.name, repo_type="model")

    @property
    def _is_cached(self) -> bool:
        """Return whether the cache has files of this revision."""
        reference = self._storage / "refs" / (self.revision or constants.DEFAULT_REVISION)
        revision = reference.read_text() if reference.is_file() else self.revision
        return revision is not None and (self._storage / "snapshots" / revision).is_dir()

    def _check_name(self) -> None:
        """Check that the name is a model id, before a request is sent to the Hub."""
        try:
            validate_repo_id(self.name)
            is_id = self.any_name or "/" in self.name
        except HFValidationError:
            is_id = False
        if not is_id:
            what = (
                f"{self.name!r} is a file, not a folder"
                if Path(self.name).is_file()
                else f"There is no folder {self.name!r}"
            )
            raise InvalidCheckpointError(f"{what}, and this name is not a model id of the Hub: expected `owner/name`.")

    def _cached_blobs(self) -> set[str]:
        """Return the names of the cached files that will not be downloaded again."""
        folder = self._storage / "blobs"
        return {file.name for file in folder.iterdir()} if folder.is_dir() and not self.force_download else set()

    def _explain(self, filename: str, error: Exception) -> HubError:
        """Convert an error of the Hub's client to an error that says what to do."""
        asked, cause = f"{filename} of {self.name!r}", root_cause(error)
        if isinstance(cause, GatedRepoError):
            message = (
                f"{self.name!r} is gated. Accept its terms on its page, then log in with `hf auth login` or set "
                "HF_TOKEN."
            )
        elif isinstance(cause, RepositoryNotFoundError):
            message = (
                f"{self.name!r} is neither a folder here nor a model on the Hub. If it is private, log in with "
                "`hf auth login` or set HF_TOKEN."
            )
        elif isinstance(cause, RevisionNotFoundError):
            message = f"{self.name!r} has no revision {self.revision!r}."
        elif isinstance(cause, HfHubHTTPError):
            message = status_meaning(cause, asked)
        elif is_unreachable(cause):
            advice = (
                f"Or run `hf download {self.name}` on a machine with a connection, and give the folder of this copy."
            )
            message = f"{unreachable(cause)} {asked} is neither in a folder here nor in the cache. {advice}"
            return HubUnreachableError(redacted(message, self.token))
        else:
            message = f"The download of {asked} failed. Run it again: complete files stay in the cache. ({cause})"
        return HubError(redacted(message, self.token))

    @property
    def _cache_dir(self) -> str | Path | None:
        """Return `cache_dir`; `None` for Optimum's default, which ignores HF_HUB_CACHE.

        With `None`, the Hub's client uses HF_HUB_CACHE.
        """
        return None if str(self.cache_dir) == constants.HUGGINGFACE_HUB_CACHE else self.cache_dir

    def download(self, filenames: Iterable[str]) -> Path:
        """Download those of these files that the repository has, all at one commit, and return their folder.

        Raises:
            [`InvalidCheckpointError`]: the repository has none of them.
            [`InvalidCheckpointError`], [`HubError`]: see [`get`].
        """
        repository, folder = self, None
        for filename in sorted(filenames, key=lambda name: name.endswith(".bin")):  # large files last
            if (path := repository.get(filename)) is not None:
                repository, folder = repository.pinned(path), path.parent
        if folder is None:
            if self.offline and not self.is_local:
                raise InvalidCheckpointError(
                    f"{self.name!r} is not in the cache, and the Hub is not asked (offline mode). Download it first: "
                    f"hf download {self.name}"
                )
            raise InvalidCheckpointError(f"{self.name!r} has none of the required files. Check the name.")
        return folder

    def require(self, filename: str, why: str) -> Path:
        """Return the path of a file as [`get`] does. If it is missing, raise an error that says why it is needed."""
        path = self._find(filename)
        if path is None:
            place = " in the cache (offline mode)" if not self.is_local and self.offline else ""
            raise InvalidCheckpointError(f"{self.name!r} has no {filename}{place}. It is needed: {why}.")
        return path

    @property
    def offline(self) -> bool:
        """Return whether requests to the Hub are switched off."""
        from huggingface_hub import is_offline_mode

        return self.local_files_only or is_offline_mode()

    def at_one_commit(self, *filenames: str) -> Repository:
        """Return this repository at the commit that it has now, by the first of these files that it has.

        Files at a commit never change, so what is in the cache is then not asked for again.

        Raises:
            [`InvalidCheckpointError`], [`HubError`]: see [`get`].
        """
        files = (self.get(name) for name in filenames)
        file = next((file for file in files if file is not None), None)
        return self if file is None else self.pinned(file)

    def pinned(self, path: Path) -> Repository:
        """Return this repository at the commit of the downloaded file `path`, so that all files have one version."""
        if self.is_local or "snapshots" not in path.parts:
            return self
        return replace(self, revision=path.parts[path.parts.index("snapshots") + 1])


def repository_of_snapshot(folder: Path) -> Repository | None:
    """Return the repository of a folder in the Hub's cache; `None` for any other folder."""
    match = re.fullmatch(r"(.*)/models--([^/]+)/snapshots/([^/]+)(?:/(.+))?", folder.absolute().as_posix())
    if match is None:
        return None
    cache, name, revision, subfolder = match.groups()
    return Repository(name.replace("--", "/", 1), subfolder or "", revision, cache_dir=cache)


def _is_intact(path: Path) -> bool:
    """Return whether a downloaded file matches its SHA-256. The client checks only its size.

    The cache names large files by their SHA-256. Other files are not checked.
    """
    if not re.fullmatch("[0-9a-f]{64}", path.resolve().name):
        return True
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return sha256.hexdigest() == path.resolve().name
