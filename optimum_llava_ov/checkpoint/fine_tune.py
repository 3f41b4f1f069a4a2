"""Recognise what the original's training writes, and find the base models that it needs.

A fine-tune is a folder without whole weights: a LoRA adapter, a projector, or delta weights. It names its base, which
may be a language model, a whole LLaVA, or again a fine-tune. What is in the folder says what it is, never its name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import torch

from optimum_llava_ov.checkpoint.lora import ADAPTER_CONFIG, AdapterConfig, adapter_file, read_adapter
from optimum_llava_ov.checkpoint.merge import Difference, Overlay, Replacement
from optimum_llava_ov.checkpoint.names import without_peft
from optimum_llava_ov.checkpoint.options import read_json, shown
from optimum_llava_ov.checkpoint.related import find_related
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.checkpoint.tensors import WEIGHT_FILES, map_files, map_tensors, weight_files
from optimum_llava_ov.errors import InvalidCheckpointError, UnsupportedCheckpointError


logger = logging.getLogger(__name__)

PROJECTOR_FILE = "mm_projector.bin"
NON_LORA_FILE = "non_lora_trainables.bin"
MAX_STEPS = 16
_LAST_NORMS = ("model.norm.weight", "transformer.norm_f.weight")
_LARGEST_IN_DELTA = 0.1
_ADVICE = (
    'Name its location: `--model-kwargs \'{"base_model": "<folder or model id>"}\'` on the command line, '
    '`model_kwargs={"base_model": ...}` in `main_export`, `base_model=` in `from_pretrained`.'
)
# What must be equal in the configurations of a fine-tune and of its base
_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "d_model", "n_heads", "n_layers", "expansion_ratio",
)  # fmt: skip
_LANGUAGE_MODELS = {
    "llama": "LLaMA", "llava": "LLaMA", "llava_llama": "LLaMA",
    "mistral": "Mistral", "llava_mistral": "Mistral",
    "mpt": "MPT", "llava_mpt": "MPT",
}  # fmt: skip


class Kind(Enum):
    """What a fine-tune consists of."""

    LORA = "LoRA adapter"
    PROJECTOR = "projector"
    DELTA = "delta weights"


@dataclass(frozen=True)
class FineTune:
    """
    Attributes:
        kind ([`Kind`]): what it consists of.
        repository ([`Repository`]): where it is.
        adapter ([`AdapterConfig`], *optional*): configuration of a LoRA adapter.
    """

    kind: Kind
    repository: Repository
    adapter: AdapterConfig | None = None

    @classmethod
    def recognise(cls, repository: Repository, has_base: bool = False) -> FineTune | None:
        """Return what a repository holds; `None` if it has whole weights, or none of these kinds.

        Args:
            repository: where to look. Only small files are downloaded.
            has_base: whether the user has named a base model. Whole weights are then taken as delta weights.

        Raises:
            [`InvalidCheckpointError`], [`UnsupportedCheckpointError`]: `adapter_config.json` cannot be read, or is not
                supported.
        """
        config_file = repository.get(ADAPTER_CONFIG)
        if config_file is not None:
            return cls(Kind.LORA, repository.pinned(config_file), AdapterConfig.read(config_file))
        is_projector = repository.has(PROJECTOR_FILE)
        if not is_projector and not has_base:
            return None
        if any(repository.has(name) for names in WEIGHT_FILES for name in names):
            return cls(Kind.DELTA, repository) if has_base else None
        return cls(Kind.PROJECTOR, repository) if is_projector else None

    @property
    def has_projector(self) -> bool:
        """Return whether it holds a projector. For an adapter, its configuration or a file beside it says so."""
        return self.kind is not Kind.LORA or self.repository.has(NON_LORA_FILE)

    @property
    def is_unfinished(self) -> bool:
        """Return whether it is a `checkpoint-N` folder of the original's training, which does not hold the projector.

        The folder above it then holds the projector, or the LLaVA's `config.json`, which the training writes at its
        end.
        """
        if self.has_projector or _settings(self.repository) or not self.repository.is_local:
            return False
        above = Repository(str(self.repository.folder.resolve().parent))
        return above.has(NON_LORA_FILE) or (above.has(ADAPTER_CONFIG) and _is_llava(_settings(above)))

    def base(self, chosen: str | None = None) -> Repository:
        """Return the repository of the base model.

        Args:
            chosen: folder or model id from the user, instead of the one that the fine-tune names.

        Raises:
            [`InvalidCheckpointError`]: no base is named, or it is not found.
        """
        named, source = self.named_base, self._source_of_name
        name = chosen or named
        if not name:
            raise InvalidCheckpointError(
                f"{self.repository.name!r} holds only a {self.kind.value}, and does not name the base model that it "
                f"was trained on. {_ADVICE}"
            )
        what = f"The base model {shown(name)}" + ("" if chosen else f", {source} of {self.repository.name!r},")
        revision = None if chosen or self.adapter is None else self.adapter.base_revision
        base = find_related(self.repository, name, what, _ADVICE, chosen=bool(chosen), revision=revision)
        if chosen and named and not _is_same(named, chosen, base):
            logger.warning(
                "The base model is %r, as you have chosen. %r was trained on %r (%s).",
                chosen,
                self.repository.name,
                named,
                source,
            )
        return base

    @property
    def named_base(self) -> str | None:
        """Return the name of the base model that the fine-tune names."""
        if self.adapter is not None:
            return self.adapter.base_model
        name = _settings(self.repository).get("_name_or_path") if self.kind is Kind.PROJECTOR else None
        return name if isinstance(name, str) else None

    @property
    def _source_of_name(self) -> str:
        if self.adapter is not None:
            return f"base_model_name_or_path in {ADAPTER_CONFIG}"
        return "_name_or_path in config.json"

    def overlays(self, with_tower: bool = False) -> list[Overlay]:
        """Map the tensors, which are downloaded first.

        Args:
            with_tower: whether the vision tower was trained too. Otherwise the original ignores its tensors.

        Raises:
            [`InvalidCheckpointError`], [`UnsupportedCheckpointError`]: a file is missing or damaged, or is of a kind
                that is not merged.
        """
        if self.kind is Kind.DELTA:
            overlay = Overlay(f"The delta of {self.repository.name!r}", self._differences())
            return [overlay]
        overlays = []
        for name in (NON_LORA_FILE,) if self.kind is Kind.LORA else (PROJECTOR_FILE,):
            if (file := self.repository.get(name)) is not None:
                tensors = {without_peft(key): Replacement(tensor) for key, tensor in map_tensors(file).items()}
                kept = {key: update for key, update in tensors.items() if with_tower or "vision_tower." not in key}
                overlays.append(Overlay(str(file), kept))
        if self.adapter is not None:
            overlays += read_adapter(adapter_file(self.repository), self.adapter)
        return overlays

    def _differences(self) -> dict[str, Difference]:
        tensors = map_files(weight_files(self.repository, "the delta weights"))
        if not is_delta(tensors):
            raise InvalidCheckpointError(
                f"{self.repository.name!r} holds the whole weights of a model, not differences to a base: the weights "
                "of its last norm are not near 0. Leave `base_model` out."
            )
        # Rotary frequencies, which old checkpoints store, are not weights
        return {name: Difference(tensor) for name, tensor in tensors.items() if not name.endswith(".inv_freq")}


def is_delta(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether tensors are differences to a base, which look like the weights of a model.

    The weights of the last norm tell them apart: they are about 1 in a model, and near 0 in a delta.
    """
    norm = next((tensors[name] for name in _LAST_NORMS if name in tensors), None)
    return norm is not None and norm.float().abs().max().item() < _LARGEST_IN_DELTA


@dataclass(frozen=True)
class Lineage:
    """
    Attributes:
        repository ([`Repository`]): the checkpoint itself.
        root ([`Repository`]): whole weights: a language model or a LLaVA.
        steps (`tuple[FineTune, ...]`): what is merged into them, in this order. Empty for a whole checkpoint.
    """

    repository: Repository
    root: Repository
    steps: tuple[FineTune, ...]

    @classmethod
    def trace(cls, repository: Repository, base_model: str | None = None, adapters: Sequence[str] = ()) -> Lineage:
        """Follow a checkpoint to its base, and its base to its own. Only small files are downloaded.

        Args:
            repository: the checkpoint.
            base_model: folder or model id of its base, instead of the one that it names.
            adapters: folders or model ids of further LoRA adapters or projectors, which are merged after it.

        Raises:
            [`InvalidCheckpointError`], [`UnsupportedCheckpointError`], [`HubError`]: a base or an adapter is not
                found, does not fit, or is of a kind that is not supported.
        """
        steps: list[FineTune] = []
        root, chosen = _pinned(repository), base_model
        while (step := FineTune.recognise(root, has_base=chosen is not None)) is not None:
            steps.insert(0, step)
            if len(steps) > MAX_STEPS:
                raise InvalidCheckpointError(
                    f"{repository.name!r} is more than {MAX_STEPS} steps from a whole model. Is one of its bases a "
                    f"fine-tune of itself? {_ADVICE}"
                )
            if step.is_unfinished:
                raise InvalidCheckpointError(_missing_projector(step.repository))
            root, chosen = _pinned(step.base(chosen)), None
        own = steps[-1].repository if steps else root
        for name in adapters:
            what = f"The adapter {shown(name)}"
            folder = find_related(own, name, what, "Check its name in `adapters`.", chosen=True)
            step = FineTune.recognise(_pinned(folder))
            if step is None:
                raise InvalidCheckpointError(
                    f"{what} is not an adapter: it has neither {ADAPTER_CONFIG} nor {PROJECTOR_FILE} alone."
                )
            steps.append(step)
        lineage = cls(own, root, tuple(steps))
        if steps:
            lineage._check()
        return lineage

    @property
    def settings(self) -> Repository:
        """Return the repository of the LLaVA's `config.json`: of the last step that has one, or of the root."""
        holders = (step.repository for step in reversed(self.steps) if _is_llava(_settings(step.repository)))
        return next(holders, self.root)

    @property
    def tokenizer(self) -> Repository:
        """Return the repository of the tokenizer: the root's, as in the original. Delta weights bring their own."""
        deltas = (step.repository for step in reversed(self.steps) if step.kind is Kind.DELTA)
        return next(deltas, self.root)

    @property
    def base_models(self) -> list[str]:
        """Return the names of the models that the checkpoint was trained from: those in its files, then the root's."""
        names = [step.named_base for step in self.steps] if self.steps else [_settings(self.root).get("_name_or_path")]
        names += [self.root.name] if self.steps else []
        return [name for name in names if isinstance(name, str)]

    @property
    def has_projector(self) -> bool:
        """Return whether the root is a LLaVA, which has a projector of its own."""
        return _is_llava(_settings(self.root))

    @property
    def vocab_size(self) -> int | None:
        """Return the number of rows of the root's embedding table."""
        size = _settings(self.root).get("vocab_size")
        return size if isinstance(size, int) else None

    @property
    def is_trained_in_4_bits(self) -> bool:
        """Return whether the training had loaded the base in fewer bits (QLoRA)."""
        return any(_settings(step.repository).get("quantization_config") for step in self.steps)

    def overlays(self, with_tower: bool = False) -> list[Overlay]:
        """Return what to merge into the tensors of the root, in this order (see [`FineTune.overlays`])."""
        return [overlay for step in self.steps for overlay in step.overlays(with_tower)]

    def _check(self) -> None:
        """Check the configurations, before weights are downloaded."""
        base = _settings(self.root)
        if not base:
            raise InvalidCheckpointError(f"{self.root.name!r} has no config.json, which says what the model is.")
        if base.get("quantization_config"):
            raise UnsupportedCheckpointError(
                f"The weights of the base model {self.root.name!r} are quantized (quantization_config in its "
                f"config.json). Adapters are merged into the full-precision weights of the same model. {_ADVICE}"
            )
        if base.get("vision_config") is not None or base.get("text_config") is not None:
            raise UnsupportedCheckpointError(
                f"The base model {self.root.name!r} is in the format of transformers. Name the same model in the "
                f"original's format, such as liuhaotian/llava-v1.5-7b. {_ADVICE}"
            )
        for step in self.steps:
            _check_sizes(step, _settings(step.repository), self.root, base)
        if not any(step.has_projector for step in self.steps):
            if not self.has_projector:
                raise InvalidCheckpointError(_missing_projector(self.steps[-1].repository))
            logger.warning(
                "%r has no %s, so the projector is that of the base model %r.",
                self.steps[-1].repository.name,
                NON_LORA_FILE,
                self.root.name,
            )


def is_adapter_of_llava(repository: Repository, base_model: str | None = None) -> bool:
    """Return whether a repository without a `config.json` holds an adapter of a LLaVA in the original's format.

    Such are the `checkpoint-N` folders of the original's training, and adapters that PEFT has trained. The former lie
    in the folder of the LLaVA's configuration, the latter name a base model, or the user does.
    """
    file = repository.get(ADAPTER_CONFIG)
    if file is None:
        return False
    if base_model is not None:
        return True
    try:
        step = FineTune(Kind.LORA, repository, AdapterConfig.read(file))
        return step.is_unfinished or _is_llava(_settings(step.base()))
    except ValueError:  # of another model, about which this package has nothing to say
        return False


def _check_sizes(step: FineTune, values: Mapping[str, Any], root: Repository, base: Mapping[str, Any]) -> None:
    problems = [
        f"{name} is {shown(values[name])}, and {shown(base[name])} in the base"
        for name in _SIZES
        if values.get(name) is not None and base.get(name) is not None and values[name] != base[name]
    ]
    kinds = [_LANGUAGE_MODELS.get(str(config.get("model_type"))) for config in (values, base)]
    if all(kinds) and kinds[0] != kinds[1]:
        problems.insert(0, f"its language model is a {kinds[0]}, and a {kinds[1]} in the base")
    if problems:
        raise InvalidCheckpointError(
            f"{step.repository.name!r} does not fit the base model {root.name!r}: {'; '.join(problems)}. {_ADVICE}"
        )


def _missing_projector(repository: Repository) -> str:
    message = (
        f"{repository.name!r} has no {NON_LORA_FILE}, so the trained projector is missing. The training writes it "
        "only at its end, into the folder above its `checkpoint-N` folders."
    )
    above = repository.folder.resolve().parent if repository.is_local else None
    if above is not None and (above / NON_LORA_FILE).is_file():
        return f"{message} It is in {above}: export this folder."
    return (
        f"{message} Copy it from there. If the training was interrupted, DeepSpeed's `global_step` folder holds the "
        "projector."
    )


def _pinned(repository: Repository) -> Repository:
    return repository.at_one_commit("config.json", ADAPTER_CONFIG)


def _settings(repository: Repository) -> dict[str, Any]:
    """Return the content of `config.json`; empty if there is none."""
    file = repository.get("config.json")
    return {} if file is None else read_json(file)


def _is_llava(values: Mapping[str, Any]) -> bool:
    return isinstance(values.get("mm_vision_tower"), str)


def _is_same(named: str, chosen: str, base: Repository) -> bool:
    """Return whether two names may be of one model: the last parts are equal, or the chosen one was copied from it."""
    names = {PurePath(name).name for name in (chosen, str(_settings(base).get("_name_or_path") or ""))}
    if base.is_local:
        names.add(Path(base.name).resolve().name)
    return PurePath(named).name in names
