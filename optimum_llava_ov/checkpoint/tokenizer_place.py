"""Find the files of a checkpoint's tokenizer, which may be in a repository of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from optimum_llava_ov.checkpoint.options import shown
from optimum_llava_ov.checkpoint.related import find_related
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.errors import HubError, InvalidCheckpointError


_SUFFIX = "-tokenizer"
_ADVICE = (
    'Name it: `--model-kwargs \'{"tokenizer": "<folder or model id>"}\'` on the command line, '
    '`model_kwargs={"tokenizer": ...}` in `main_export`, `tokenizer=` in `from_pretrained`.'
)


@dataclass(frozen=True)
class TokenizerPlace:
    """
    Attributes:
        repository: repository of the tokenizer's files.
        reason: a sentence that says why it is this one.
        is_own: whether it is the checkpoint's own.
    """

    repository: Repository
    reason: str
    is_own: bool = True

    @classmethod
    def find(cls, repository: Repository, vocabulary: str, chosen: str | None = None) -> TokenizerPlace:
        """Find the tokenizer of a checkpoint.

        No option of a released `config.json` names a tokenizer. That of LLaVA-1.6-34B is also in a repository that has
        the checkpoint's name and `-tokenizer`: `liuhaotian/llava-v1.6-34b-tokenizer`. If a checkpoint has no
        vocabulary, such a repository is looked for: on the Hub, or beside the checkpoint's folder.

        Args:
            repository: repository of the checkpoint, or of its base model.
            vocabulary: name of the file with the vocabulary.
            chosen: folder or model id of the tokenizer, which the user has chosen.

        Raises:
            [`InvalidCheckpointError`]: there is no vocabulary.
        """
        if chosen:
            what = f"The tokenizer {shown(chosen)}"
            place = find_related(repository, chosen, what, _ADVICE, chosen=True, needed=vocabulary)
            return cls(place.at_one_commit(vocabulary), "It was chosen by name.", is_own=False)
        if repository.get(vocabulary) is not None:
            return cls(repository, "It is the checkpoint's own.")
        beside = _beside(repository)
        try:
            file = beside.require(vocabulary, "it is the vocabulary of the language model")
        except (HubError, InvalidCheckpointError) as error:
            raise InvalidCheckpointError(
                f"{repository.name!r} has no {vocabulary}, and no tokenizer is beside it: {error} {_ADVICE}"
            ) from error
        return cls(beside.pinned(file), f"{repository.name!r} itself has no {vocabulary}.", is_own=False)


def _beside(repository: Repository) -> Repository:
    """Return the repository that has the name of the checkpoint and `-tokenizer`. It may not exist."""
    if repository.is_local:
        folder = Path(repository.name).resolve()
        return Repository(str(folder.with_name(folder.name + _SUFFIX)))
    return replace(repository, name=repository.name + _SUFFIX, subfolder="", revision=None, on_hub=True)
