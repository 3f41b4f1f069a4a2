"""Build and save the small files of a bundle: configuration, processor, tokenizer and generation settings."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from optimum_llava_ov.bundle.licenses import repository_license
from optimum_llava_ov.bundle.tiling import (
    LlavaNextProcessor,
    build_tiling_processor,
    original_order,
    tiling_options,
)
from optimum_llava_ov.checkpoint.fine_tune import Lineage
from optimum_llava_ov.checkpoint.options import read_json
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.checkpoint.tokenizer_place import TokenizerPlace
from optimum_llava_ov.files import replace_text
from optimum_llava_ov.models.image_layout import ImageLayout


def context_length(text_config: PretrainedConfig) -> int:
    """Return the number of tokens that the language model was trained on at a time. MPT has its own name for it."""
    return getattr(text_config, "max_position_embeddings", None) or text_config.max_seq_len


def build_config(
    checkpoint: OriginalCheckpoint, image_newline: torch.Tensor | None = None
) -> LlavaConfig | LlavaNextConfig:
    """Build `config.json` of the bundle: a language model in a "llava", which optimum-intel and GenAI support.

    If images are cut into tiles, it is a "llava_next". `converted_from` names the source of the bundle.

    Args:
        image_newline: `(hidden_size,)`, if the model has it.
    """
    config = checkpoint.config
    layout = ImageLayout.of_original(config)
    tiling = layout.tiling
    config_class = LlavaConfig if tiling is None else LlavaNextConfig
    return config_class(
        **({} if tiling is None else tiling_options(tiling, image_newline)),
        text_config=config.text_config.to_dict(),
        vision_config=config.vision_config.to_dict(),
        image_token_index=config.image_token_id,
        # Must be exact: with a larger value, optimum-intel merges images in its legacy way.
        image_seq_length=layout.num_tokens,
        vision_feature_layer=config.mm_vision_select_layer,
        # "full": patches and additional tokens. The graph itself drops the class token if it is not kept.
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        tie_word_embeddings=config.text_config.tie_word_embeddings,
        pad_token_id=checkpoint.tokenizer.pad_token_id,
        # The original writes the borders into the prompt. Such prompts are recognised by these ids.
        im_start_token_id=config.im_start_token_id,
        im_end_token_id=config.im_end_token_id,
        architectures=[f"{config_class.__name__.removesuffix('Config')}ForConditionalGeneration"],
        converted_from={
            "model": _public_name(checkpoint.repository),
            "revision": _revision(checkpoint.repository),
            "model_type": config.model_type,
            "conversation": checkpoint.choice.conversation.name,
            "vision_tower": _public_name(checkpoint.vision_repository),
            "unfreeze_mm_vision_tower": bool(config.unfreeze_mm_vision_tower),
            "vision_tower_revision": _revision(checkpoint.vision_repository),
            **({"vision_tower_chosen": True} if checkpoint.has_chosen_tower else {}),
            "mm_projector_type": config.projector_type,
            "mm_vision_select_feature": config.select_feature,
            "mm_use_im_start_end": bool(config.mm_use_im_start_end),
            "image_aspect_ratio": config.image_aspect_ratio,
            "optimum_llava_ov_version": version("optimum-llava-ov"),
            **({"image_tokens": asdict(config.reduction)} if config.reduction else {}),
            **_tokenizer(checkpoint.tokenizer_place),
            **_fine_tune(checkpoint.lineage),
            **({"lora": "separate"} if checkpoint.has_separate_lora else {}),
        },
    )


def _tokenizer(place: TokenizerPlace) -> dict[str, Any]:
    """Return where the tokenizer is from; empty if it is the checkpoint's own."""
    if place.is_own:
        return {}
    return {"tokenizer": _public_name(place.repository), "tokenizer_revision": _revision(place.repository)}


def _fine_tune(lineage: Lineage) -> dict[str, Any]:
    """Return what was merged into which base model; empty for a whole checkpoint."""
    if not lineage.steps:
        return {}
    facts = {
        "base_model": _public_name(lineage.root),
        "base_model_revision": _revision(lineage.root),
        "base_model_license": repository_license(lineage.root),
        "adapters": [
            {
                "model": _public_name(step.repository),
                "revision": _revision(step.repository),
                "license": repository_license(step.repository),
                "kind": step.kind.value,
                "rank": step.adapter.rank if step.adapter else None,
                "alpha": step.adapter.alpha if step.adapter else None,
            }
            for step in lineage.steps
        ],
    }
    return facts | ({"quantized_training": True} if lineage.is_trained_in_4_bits else {})


def _revision(repository: Repository) -> str | None:
    return None if repository.is_local else repository.revision


def _public_name(repository: Repository) -> str:
    """Return a model id unchanged, but only the name of a folder: its path could reveal private data of its owner."""
    return repository.folder.resolve().name if repository.is_local else repository.name


def build_processor(checkpoint: OriginalCheckpoint) -> LlavaProcessor | LlavaNextProcessor:
    """Build a `LlavaProcessor`, or a `LlavaNextProcessor` if images are cut into tiles.

    It prepares images with PIL, as the original does. The torchvision backend resamples differently. A difference of
    half a grey level changes logits by 0.5 to 1.2 on the golden models.
    """
    config, settings = checkpoint.config, dict(checkpoint.image_processor)
    settings["do_convert_rgb"] = True
    tiling = ImageLayout.of_original(config).tiling
    processor_class = LlavaProcessor if tiling is None else LlavaNextProcessor
    if tiling is not None:
        image_processor = build_tiling_processor(settings, tiling)
    elif config.image_aspect_ratio == "pad":
        image_processor = LlavaImageProcessorPil(**settings, do_pad=True)
    else:
        image_processor = CLIPImageProcessorPil(**settings)
    processor = processor_class(
        image_processor=image_processor,
        tokenizer=checkpoint.tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=config.num_additional_image_tokens,
        chat_template=checkpoint.choice.conversation.chat_template,
    )
    if tiling is not None:
        processor.tiling = tiling
    return processor


class OriginalLlavaProcessor(LlavaProcessor):
    """The class that `AutoProcessor` uses for an original checkpoint. It builds the processor of the bundle."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> LlavaProcessor:
        """Build it from the checkpoint's tokenizer and its vision tower's image processor.

        Args:
            pretrained_model_name_or_path: folder or model id of an original LLaVA checkpoint.
            kwargs: those of [`OriginalCheckpoint.open`].
        """
        return build_processor(OriginalCheckpoint.open(pretrained_model_name_or_path, **kwargs))


def save_settings(
    checkpoint: OriginalCheckpoint,
    processor: LlavaProcessor | LlavaNextProcessor,
    generation: GenerationConfig,
    image_newline: torch.Tensor | None,
    folder: Path,
) -> None:
    """Write `config.json`, `generation_config.json` and all files of tokenizer and processor."""
    _save_config(checkpoint, image_newline, folder)
    generation.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    _pin_image_backend(processor, folder)
    if (tiling := ImageLayout.of_original(checkpoint.config).tiling) is not None:
        file = folder / "preprocessor_config.json"
        write_json(file, read_json(file) | original_order(tiling))
    write_json(folder / "special_tokens_map.json", _special_tokens_map(processor.tokenizer))


def _save_config(checkpoint: OriginalCheckpoint, image_newline: torch.Tensor | None, folder: Path) -> None:
    build_config(checkpoint, image_newline).save_pretrained(folder)
    file = folder / "config.json"
    values = json.loads(file.read_text())
    values["text_config"] = checkpoint.config.bundle_text_config(values["text_config"])
    write_json(file, values)


def _pin_image_backend(processor: LlavaProcessor, folder: Path) -> None:
    """Write the name of the PIL class. Otherwise transformers 5 uses torchvision's, if torchvision is installed.

    Only `processor_config.json` is changed: transformers 4 reads `preprocessor_config.json`, uses PIL by default, and
    does not have a class of this name.
    """
    file = folder / "processor_config.json"
    values = json.loads(file.read_text())
    values["image_processor"]["image_processor_type"] = type(processor.image_processor).__name__
    write_json(file, values)


def _special_tokens_map(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the special tokens. transformers 5 has them in `tokenizer_config.json`, but other readers look here."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write a JSON file completely or not at all.

    Raises:
        `OSError`: it cannot be written. The file then still has its old content.
    """
    replace_text(file, json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
