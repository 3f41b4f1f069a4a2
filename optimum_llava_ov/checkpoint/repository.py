"""Files of a model repository, wherever it is: a local folder or the Hub, online or from the cache."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

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

from optimum_llava_ov.errors import InvalidCheckpointError


# What everybody who takes a model id takes besides, as in transformers
HUB_OPTIONS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")


@dataclass(frozen=True)
class Repository:
    """A folder on disk or a model id on the Hub.

    Args:
        name (`str`): path of a folder, or `owner/name`.
        subfolder (`str`): where in it the files are.
        revision, cache_dir, token, local_files_only, force_download: as for [`~huggingface_hub.hf_hub_download`].
    """

    name: str
    subfolder: str = ""
    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False
    force_download: bool = False

    @property
    def is_local(self) -> bool:
        return Path(self.name).is_dir()

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
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            if self.offline:
                return None
            raise InvalidCheckpointError(
                f"{filename} of {self.name!r} is not in the cache and the Hub cannot be reached. Check the connection "
                f"(HF_ENDPOINT, proxy), or download it elsewhere and pass the folder. ({error})"
            ) from error
        except EntryNotFoundError:
            return None
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
            raise InvalidCheckpointError(f"The Hub did not give {filename} of {self.name!r}: {error}") from error

    @property
    def _cache_dir(self) -> str | Path | None:
        """Optimum's default is what HF_HUB_CACHE says only under its old name, HUGGINGFACE_HUB_CACHE; the Hub client knows better."""
        return None if str(self.cache_dir) == constants.HUGGINGFACE_HUB_CACHE else self.cache_dir

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
