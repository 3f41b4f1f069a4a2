"""Open an original LLaVA checkpoint: read and check everything except the weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from optimum_llava_ov.checkpoint.config import LlavaMptConfig, names_our_model, read_config
from optimum_llava_ov.checkpoint.image_processor import read_image_processor
from optimum_llava_ov.checkpoint.repository import HUB_OPTIONS, Repository
from optimum_llava_ov.checkpoint.tensors import index_shards, map_tensors
from optimum_llava_ov.checkpoint.tokenizer import load_tokenizer
from optimum_llava_ov.checkpoint.vision_tower import find_vision_tower, read_vision_config
from optimum_llava_ov.errors import InvalidCheckpointError, UnsupportedCheckpointError


logger = logging.getLogger(__name__)

# Name of a single file and name of an index of several, in the order of preference
_WEIGHT_FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


@dataclass(frozen=True)
class OriginalCheckpoint:
    """
    Attributes:
        repository ([`Repository`]): where the language model and the projector are.
        vision_repository ([`Repository`]): where the vision tower is.
        config ([`LlavaMptConfig`]): with `vision_config` and the ids of the image tokens filled in.
        tokenizer ([`PreTrainedTokenizerFast`]): with `<image>` added after the checkpoint's vocabulary.
        image_processor (`dict`): options of `preprocessor_config.json` of the vision tower.
    """

    repository: Repository
    vision_repository: Repository
    config: LlavaMptConfig
    tokenizer: PreTrainedTokenizerFast
    image_processor: dict[str, Any]

    @classmethod
    def open(cls, name_or_path: str | Path, vision_tower: str | None = None, **kwargs) -> OriginalCheckpoint:
        """Read configurations and tokenizer, and check that they can be converted. Weights are not downloaded yet.

        Args:
            name_or_path: a folder, or a model id on the Hub.
            vision_tower: folder or model id of the vision tower, instead of `mm_vision_tower`.
            kwargs: `subfolder`, `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`.
        """
        options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        repository = Repository(str(name_or_path), **options)
        config_file = repository.require("config.json", "it says what the model is")
        repository = repository.pinned(config_file)

        config = read_config(config_file)
        config._name_or_path = str(name_or_path)

        vision_repository = find_vision_tower(repository, config.mm_vision_tower, vision_tower)
        vision_file = vision_repository.require("config.json", "it is the vision tower's configuration")
        vision_repository = vision_repository.pinned(vision_file)
        config.vision_config = read_vision_config(vision_file)
        _check_vision_config(config)
        processor_file = vision_repository.require("preprocessor_config.json", "it says how images are prepared")
        image_processor = read_image_processor(
            processor_file, config.vision_config.image_size, pads=config.image_aspect_ratio == "pad"
        )

        tokenizer = load_tokenizer(repository, config)
        return cls(repository, vision_repository, config, tokenizer, image_processor)

    @cached_property
    def weight_files(self) -> list[Path]:
        """Paths of the language model's weights, which are downloaded first."""
        return _weight_files(self.repository, "the weights")

    @cached_property
    def vision_weight_files(self) -> list[Path]:
        """Paths of the vision tower's weights, which are downloaded first."""
        return _weight_files(self.vision_repository, "the vision tower's weights")

    def tensors(self) -> dict[str, torch.Tensor]:
        """Map the tensors of the language model and the projector, by their names. A vision tower is left out."""
        tensors = _merge(self.weight_files)
        # Fine-tuned checkpoints may contain the tower, but the original code loads it from its own repository.
        return {name: tensor for name, tensor in tensors.items() if ".vision_tower." not in f".{name}"}

    def vision_tensors(self) -> dict[str, torch.Tensor]:
        """Map the tensors of the vision tower, by their names in `CLIPVisionModel`. CLIP's text model is left out."""
        return {
            name: tensor
            for name, tensor in _merge(self.vision_weight_files).items()
            if name.startswith("vision_model.")
        }


def is_original_checkpoint(name_or_path: str | Path, **kwargs) -> bool:
    """Return whether `name_or_path` is an original-format LLaVA-MPT checkpoint. `False` if it cannot be read."""
    try:
        return holds_original_checkpoint(name_or_path, **kwargs)
    except (ValueError, OSError):  # Optimum reports what is wrong with it
        return False


def holds_original_checkpoint(name_or_path: str | Path, any_name: bool = False, **kwargs) -> bool:
    """Do the same as [`is_original_checkpoint`], but raise if there is no such folder or model.

    Returns `False` if its configuration is missing or does not name a LLaVA-MPT.

    Args:
        name_or_path: a folder, or a model id on the Hub.
        any_name: also ask the Hub for names without an owner (`gpt2`), which some other models have.
        kwargs: `subfolder`, `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`.

    Raises:
        [`InvalidCheckpointError`], [`HubError`]: there is no such folder or model, or the Hub cannot be reached or
            refuses it.
    """
    options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
    config_file = Repository(str(name_or_path), any_name=any_name, **options).get("config.json")
    return config_file is not None and names_our_model(config_file)


def _check_vision_config(config: LlavaMptConfig) -> None:
    vision = config.vision_config
    if config.mm_hidden_size is not None and config.mm_hidden_size != vision.hidden_size:
        raise UnsupportedCheckpointError(
            f"The checkpoint's projector takes {config.mm_hidden_size} features (mm_hidden_size), its vision tower "
            f"{config.mm_vision_tower!r} gives {vision.hidden_size}. Name the tower it was trained with: "
            '--model-kwargs \'{"vision_tower": "<folder or model id>"}\'.'
        )
    if config.projector_type == "identity" and vision.hidden_size != config.d_model:
        raise UnsupportedCheckpointError(
            f"mm_projector_type='identity' needs a vision tower as wide as the language model: {vision.hidden_size} "
            f"!= {config.d_model}."
        )
    if not -vision.num_hidden_layers - 1 <= config.mm_vision_select_layer <= vision.num_hidden_layers:
        raise UnsupportedCheckpointError(
            f"mm_vision_select_layer={config.mm_vision_select_layer}, but the vision tower has "
            f"{vision.num_hidden_layers} layers."
        )


def _weight_files(repository: Repository, what: str) -> list[Path]:
    for single, index in _WEIGHT_FILES:
        if (path := repository.get(single)) is not None:
            return [path]
        if (path := repository.get(index)) is not None:
            shards = index_shards(path)
            return [
                repository.require(shard, f"{index} says that {what} are in {len(shards)} files") for shard in shards
            ]
    names = ", ".join(name for names in _WEIGHT_FILES for name in names)
    raise InvalidCheckpointError(f"{repository.name!r} has none of {names}: {what} are not there.")


def _merge(files: list[Path]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        logger.debug("Mapping %s", file)
        tensors.update(map_tensors(file))
    return tensors
