"""Open an original LLaVA checkpoint: read and check everything except the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from optimum_llava_ov.checkpoint.config import OriginalLlavaConfig
from optimum_llava_ov.checkpoint.conversation import Choice, choose_conversation, conversation_named
from optimum_llava_ov.checkpoint.families import names_original, read_config
from optimum_llava_ov.checkpoint.fine_tune import Lineage, is_adapter_of_llava, is_delta
from optimum_llava_ov.checkpoint.image_processor import read_image_processor
from optimum_llava_ov.checkpoint.image_tokens import MERGE, ImageTokens
from optimum_llava_ov.checkpoint.merge import (
    EMBEDDING_TABLES,
    LowRank,
    Overlay,
    check_fit,
    merge,
    with_rows,
    without_low_rank,
)
from optimum_llava_ov.checkpoint.options import MAX_INDEX_BYTES, read_json
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.checkpoint.tensors import WEIGHT_FILES, map_files, weight_files
from optimum_llava_ov.checkpoint.tiling import ANYRES, grid_problems, processor_problems
from optimum_llava_ov.checkpoint.tokenizer import fill_in_token_ids
from optimum_llava_ov.checkpoint.tokenizer_place import TokenizerPlace
from optimum_llava_ov.checkpoint.vision_tower import find_vision_tower, read_vision_config
from optimum_llava_ov.errors import InvalidCheckpointError, UnsupportedCheckpointError


# Options of a checkpoint that a user may give: keys of --model-kwargs
CHECKPOINT_OPTIONS = (
    "vision_tower", "conversation", "tokenizer", "base_model", "adapters", "lora", "image_tokens",
    "image_token_method",
)  # fmt: skip
# What to do with LoRA of the language model: merge it, or leave it out, for an engine that adds it at run time
LORA_MODES = ("merged", "separate")

_OWN_TOWER = "model.vision_tower.vision_tower."


@dataclass(frozen=True)
class OriginalCheckpoint:
    """
    Attributes:
        lineage ([`Lineage`]): where the language model and the projector are, and what is merged into them.
        vision_repository ([`Repository`]): where the vision tower is.
        config ([`OriginalLlavaConfig`]): with `vision_config` and the ids of tokens filled in.
        tokenizer ([`PreTrainedTokenizerFast`]): with `<image>` added after the checkpoint's vocabulary.
        tokenizer_place ([`TokenizerPlace`]): where the tokenizer's files are.
        image_processor (`dict`): options of `preprocessor_config.json` of the vision tower.
        choice ([`Choice`]): the conversation that its prompts are written as, and why.
        workspace (`Path`, *optional*): folder for the files of weights that the checkpoint does not hold as they are
            needed: merged ones, and the tables with a row for `<image>`. If `None`, they are in memory.
        merge_dtype (`torch.dtype`, *optional*): dtype of merged weights, as for [`merge`].
        has_separate_lora (`bool`): whether LoRA of the language model is left out of its tensors.
        has_chosen_tower (`bool`): whether the user has named another vision tower than the checkpoint does.
    """

    lineage: Lineage
    vision_repository: Repository
    config: OriginalLlavaConfig
    tokenizer: PreTrainedTokenizerFast
    tokenizer_place: TokenizerPlace
    image_processor: dict[str, Any]
    choice: Choice
    workspace: Path | None = None
    merge_dtype: torch.dtype | None = None
    has_separate_lora: bool = False
    has_chosen_tower: bool = False

    @property
    def repository(self) -> Repository:
        """Where the checkpoint itself is."""
        return self.lineage.repository

    @classmethod
    def open(
        cls,
        name_or_path: str | Path | Repository,
        vision_tower: str | None = None,
        conversation: str | None = None,
        tokenizer: str | None = None,
        base_model: str | None = None,
        adapters: Sequence[str] = (),
        lora: str = "merged",
        image_tokens: int | None = None,
        image_token_method: str = MERGE,
        **kwargs,
    ) -> OriginalCheckpoint:
        """Read configurations and tokenizer, and check that they can be converted. Weights are not downloaded yet.

        Args:
            name_or_path: a folder, a model id on the Hub, or its [`Repository`].
            vision_tower: folder or model id of the vision tower, instead of `mm_vision_tower`.
            conversation: name of the conversation, instead of the one that the checkpoint's files and names say.
            tokenizer: folder or model id of the tokenizer, instead of the checkpoint's own.
            base_model: folder or model id of the base model of a fine-tune, instead of the one that it names.
            adapters: folders or model ids of LoRA adapters or projectors to merge into the checkpoint, in this order.
            lora: "merged", or "separate" to leave out the LoRA of the language model's linear layers.
            image_tokens: number of tokens that the patches of an image become. All patches if not given.
            image_token_method: how they are reduced, see [`ImageTokens`].
            kwargs: `subfolder`, `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`.

        Raises:
            [`InvalidCheckpointError`], [`UnsupportedCheckpointError`], [`HubError`]: the checkpoint is incomplete or
                damaged, is of a kind that is not computed, or cannot be downloaded.
            `ValueError`: there is no such conversation, or no such value of `lora`.
        """
        if lora not in LORA_MODES:
            raise ValueError(f"lora is {lora!r}. Expected {' or '.join(map(repr, LORA_MODES))}.")
        repository = Repository.of(name_or_path, **kwargs)
        if (own_file := repository.get("config.json")) is not None and names_original(own_file):
            read_config(own_file)  # what is not computed is refused before the Hub is asked for more
        lineage = Lineage.trace(repository, base_model, adapters)
        config_file = lineage.settings.require("config.json", "it says what the model is")
        config = read_config(config_file)
        config._name_or_path = repository.name
        named = conversation_named(conversation) if conversation else None

        vision_repository = find_vision_tower(lineage.settings, config.mm_vision_tower, vision_tower)
        vision_file = vision_repository.require("config.json", "it is the vision tower's configuration")
        vision_repository = vision_repository.pinned(vision_file)
        config.vision_config = read_vision_config(vision_file)
        _check_vision_config(config)
        processor_file = vision_repository.require("preprocessor_config.json", "it says how images are prepared")
        image_processor = read_image_processor(
            processor_file, config.vision_config.image_size, pads=config.image_aspect_ratio == "pad"
        )
        if config.image_aspect_ratio == ANYRES:
            _check_tiles(config, config_file, image_processor, processor_file)
        if image_tokens is not None:
            reduction = ImageTokens(image_tokens, image_token_method)
            reduction.check(config.num_patches, has_tiles=config.image_aspect_ratio == ANYRES)
            config.image_tokens, config.image_token_method = reduction.count, reduction.method

        place = TokenizerPlace.find(lineage.tokenizer, config.vocabulary, tokenizer)
        loaded = config.load_tokenizer(place.repository)
        fill_in_token_ids(place.repository, config, loaded)
        choice = Choice(named, "It was chosen by name.") if named else _choose(lineage, config_file, loaded)
        config.eos_token_id, _ = choice.conversation.stops(loaded)
        # Some loaders of a bundle read only `eos_token` of the tokenizer, so it must be the one that ends a turn
        loaded.eos_token = loaded.convert_ids_to_tokens(config.eos_token_id[0])
        checkpoint = cls(
            lineage,
            vision_repository,
            config,
            loaded,
            place,
            image_processor,
            choice,
            has_separate_lora=lora == "separate" and bool(lineage.steps),
            has_chosen_tower=vision_tower not in (None, config.mm_vision_tower),
        )
        checkpoint._check_own_tower()
        return checkpoint

    def working_in(self, workspace: Path | None, merge_dtype: torch.dtype | None = None) -> OriginalCheckpoint:
        """Return this checkpoint with a place for new weights, and a dtype for merged ones (see [`merge`])."""
        return replace(self, workspace=workspace, merge_dtype=merge_dtype)

    def without_lora(self) -> OriginalCheckpoint:
        """Return this checkpoint without the LoRA of its language model (see [`separate_lora`])."""
        return replace(self, has_separate_lora=True)

    @cached_property
    def weight_files(self) -> list[Path]:
        """Paths of the language model's weights, which are downloaded first.

        What is merged into them is downloaded and checked before, because it is much smaller.
        """
        check_fit(self._overlays, self._shapes())
        return weight_files(self.lineage.root, "the weights")

    @cached_property
    def vision_weight_files(self) -> list[Path]:
        """Paths of the vision tower's weights, which are downloaded first."""
        if self.config.unfreeze_mm_vision_tower:
            return self.weight_files
        return weight_files(self.vision_repository, "the vision tower's weights")

    @cached_property
    def separate_lora(self) -> dict[str, list[LowRank]]:
        """Return the LoRA of the language model's linear layers, by the names of their weights.

        Reads only the fine-tune, which is downloaded first. If something was trained in several steps, in this order.
        """
        overlays = self.lineage.overlays(self.config.unfreeze_mm_vision_tower)
        return without_low_rank(overlays, self._shapes(), _is_linear_of_language_model)[1]

    @cached_property
    def _overlays(self) -> list[Overlay]:
        overlays = self.lineage.overlays(self.config.unfreeze_mm_vision_tower)
        if self.has_separate_lora:
            overlays, _ = without_low_rank(overlays, self._shapes(), _is_linear_of_language_model)
        return overlays

    @cached_property
    def _all_tensors(self) -> dict[str, torch.Tensor]:
        tensors = map_files(self.weight_files)
        if not self.lineage.steps:
            if is_delta(tensors):
                raise InvalidCheckpointError(
                    f"{self.repository.name!r} holds delta weights, which are differences to a base model: the "
                    "weights of its last norm are near 0. Name the base: --model-kwargs "
                    '\'{"base_model": "<folder or model id>"}\'.'
                )
            return tensors
        if not self.config.unfreeze_mm_vision_tower:  # adapters of others may be for the tower, too
            tensors = {name: tensor for name, tensor in tensors.items() if not _is_of_tower(name)}
            tower = map_files(self.vision_weight_files)
            tensors |= {
                f"{_OWN_TOWER}{name}": tensor for name, tensor in tower.items() if name.startswith("vision_model.")
            }
        merged = merge(tensors, self._overlays, self.merge_dtype, self.workspace)
        rows = self.config.padded_vocab_size
        assert rows is not None  # filled in with the tokenizer
        for name in (f"{self.config.prefix}{self.config.table}", "lm_head.weight"):
            if name in merged:
                merged[name] = with_rows(merged[name], rows)
        return merged

    def _shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of the tensors that a fine-tune may change, from the configuration of its base."""
        if not self.lineage.steps:
            return {}
        from transformers import AutoModelForCausalLM, CLIPVisionModel

        text_config = self.config.text_config
        text_config.vocab_size = self.lineage.vocab_size or text_config.vocab_size
        with torch.device("meta"):
            language_model = AutoModelForCausalLM.from_config(text_config)
            tower = CLIPVisionModel(self.config.vision_config)
        shapes = {name: tensor.shape for name, tensor in language_model.state_dict().items()}
        shapes |= {f"{_OWN_TOWER}{name}": tensor.shape for name, tensor in tower.state_dict().items()}
        if self.lineage.has_projector:
            shapes |= {
                f"{self.config.prefix}mm_projector.{name}": torch.Size(shape)
                for name, shape in self.config.projector_shapes.items()
            }
        return shapes

    def tensors(self) -> dict[str, torch.Tensor]:
        """Map the tensors of the language model and the projector, by their names. A vision tower is left out.

        Rotary frequencies, which old checkpoints store, are left out too: the original computes them.
        """
        return {
            name: tensor
            for name, tensor in self._all_tensors.items()
            if not _is_of_tower(name) and not name.endswith(".rotary_emb.inv_freq")
        }

    def vision_tensors(self) -> dict[str, torch.Tensor]:
        """Map the tensors of the vision tower, by their names in `CLIPVisionModel`. CLIP's text model is left out.

        A checkpoint that says `unfreeze_mm_vision_tower` holds the tower. Others may hold one too, but the original
        loads it from its own repository.
        """
        if self.config.unfreeze_mm_vision_tower or self.lineage.steps:
            tensors = {name.removeprefix(_OWN_TOWER): tensor for name, tensor in self._all_tensors.items()}
        else:
            tensors = map_files(self.vision_weight_files)
        return {name: tensor for name, tensor in tensors.items() if name.startswith("vision_model.")}

    def _check_own_tower(self) -> None:
        """Check, before weights are downloaded, that a checkpoint holds its tower if it says so.

        The original goes on with random weights if it does not.
        """
        if not self.config.unfreeze_mm_vision_tower or self.lineage.steps:
            return
        for _, name in WEIGHT_FILES:
            if (index := self.repository.get(name)) is not None:
                names = read_json(index, MAX_INDEX_BYTES).get("weight_map") or {}
                if not any(name.startswith(_OWN_TOWER) for name in names):
                    raise InvalidCheckpointError(
                        f"config.json of {self.repository.name!r} has unfreeze_mm_vision_tower=true, but {index.name} "
                        f"has no tensors {_OWN_TOWER}*: the trained vision tower is missing. If the tower was not "
                        "trained, set unfreeze_mm_vision_tower to false in config.json."
                    )
                return


def check_checkpoint_options(options: Mapping[str, Any] | None, more: Sequence[str] = ()) -> None:
    """Check the names and types of options of a checkpoint, which are `model_kwargs` and `--model-kwargs`.

    Args:
        more: names of other options that are accepted.

    Raises:
        `ValueError`: an option is unknown, has a value of the wrong type, or needs another one.
    """
    known = (*CHECKPOINT_OPTIONS, *more)
    if unknown := set(options or {}) - {*known}:
        raise ValueError(f"--model-kwargs has {', '.join(sorted(unknown))}. Expected only {', '.join(known)}.")
    if "image_token_method" in (options or {}) and "image_tokens" not in (options or {}):
        raise ValueError("--model-kwargs: image_token_method needs image_tokens, the number of tokens of an image.")
    for name, value in (options or {}).items():
        if name == "image_tokens":
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"--model-kwargs has {name}={value!r}. Expected a whole number.")
            continue
        names = value if name == "adapters" else [value]
        if not isinstance(names, (list, tuple)) or not all(isinstance(item, str) for item in names):
            expected = "a list of names" if name == "adapters" else "a name"
            raise ValueError(f"--model-kwargs has {name}={value!r}. Expected {expected}.")


def _is_of_tower(name: str) -> bool:
    return ".vision_tower." in f".{name}"


def _is_linear_of_language_model(name: str) -> bool:
    return not (_is_of_tower(name) or ".mm_projector." in name or name.endswith(EMBEDDING_TABLES))


def is_original_checkpoint(name_or_path: str | Path | Repository, **kwargs) -> bool:
    """Return whether `name_or_path` is an original-format LLaVA checkpoint. `False` if it cannot be read."""
    try:
        return holds_original_checkpoint(name_or_path, **kwargs)
    except (ValueError, OSError):  # Optimum reports what is wrong with it
        return False


def holds_original_checkpoint(name_or_path: str | Path | Repository, **kwargs) -> bool:
    """Do the same as [`is_original_checkpoint`], but raise errors as [`find_original`]."""
    return find_original(name_or_path, **kwargs) is not None


def find_original(name_or_path: str | Path | Repository, **kwargs) -> Repository | None:
    """Return the repository of an original-format LLaVA checkpoint or fine-tune, at the commit of its configuration.

    Returns `None` if the configuration is missing or is not in LLaVA's original format.

    Args:
        name_or_path: a folder, a model id on the Hub, or its [`Repository`].
        kwargs: `subfolder`, `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`; `any_name` to ask
            the Hub also for names without an owner (`gpt2`), which some other models have; `base_model` of a
            fine-tune.

    Raises:
        [`InvalidCheckpointError`], [`HubError`]: there is no such folder or model, or the Hub cannot be reached or
            refuses it.
    """
    repository = Repository.of(name_or_path, **kwargs)
    config_file = repository.get("config.json")
    if config_file is not None:
        return repository.pinned(config_file) if names_original(config_file) else None
    return repository if is_adapter_of_llava(repository, kwargs.get("base_model")) else None


def _check_tiles(
    config: OriginalLlavaConfig, config_file: Path, image_processor: dict[str, Any], processor_file: Path
) -> None:
    tile_size = config.vision_config.image_size
    for file, problems in (
        (config_file, grid_problems(config.image_grid_pinpoints, tile_size)),
        (processor_file, processor_problems(image_processor, tile_size)),
    ):
        if problems:
            raise UnsupportedCheckpointError(f"{file} does not fit the vision tower: {'; '.join(problems)}.")


def _choose(lineage: Lineage, config_file: Path, tokenizer: PreTrainedTokenizerFast) -> Choice:
    """Choose the conversation from the architecture, the tokenizer and the names of a checkpoint."""
    values, repository = read_json(config_file), lineage.repository
    architectures = values.get("architectures")
    return choose_conversation(
        architectures[0] if isinstance(architectures, list) and architectures else values.get("model_type"),
        tokenizer,
        lineage.base_models,
        Path(repository.name).resolve().name if repository.is_local else repository.name,
    )


def _check_vision_config(config: OriginalLlavaConfig) -> None:
    vision = config.vision_config
    if config.mm_hidden_size is not None and config.mm_hidden_size != vision.hidden_size:
        raise UnsupportedCheckpointError(
            f"The checkpoint's projector takes {config.mm_hidden_size} features (mm_hidden_size), its vision tower "
            f"{config.mm_vision_tower!r} gives {vision.hidden_size}. Name the tower it was trained with: "
            '--model-kwargs \'{"vision_tower": "<folder or model id>"}\'.'
        )
    width = config.text_config.hidden_size
    if config.projector_type == "identity" and vision.hidden_size != width:
        raise UnsupportedCheckpointError(
            f"mm_projector_type='identity' needs a vision tower as wide as the language model: {vision.hidden_size} "
            f"!= {width}."
        )
    if not -vision.num_hidden_layers - 1 <= config.mm_vision_select_layer <= vision.num_hidden_layers:
        raise UnsupportedCheckpointError(
            f"mm_vision_select_layer={config.mm_vision_select_layer}, but the vision tower has "
            f"{vision.num_hidden_layers} layers."
        )
