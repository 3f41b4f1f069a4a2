"""Everything in a bundle that is neither weights nor the card: configuration, processor, tokenizer, generation
settings.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, LlavaConfig, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.mpt.configuration_mpt import MptAttentionConfig

from optimum_llava_ov.checkpoint.config import LlavaMptConfig
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.files import replace_text


CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def image_seq_length(config: LlavaMptConfig) -> int:
    """Rows of the image encoder's output: patches, the class token if kept, and the borders."""
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return patches + _num_additional_image_tokens(config)


def _num_additional_image_tokens(config: LlavaMptConfig) -> int:
    return config.num_border_tokens + (1 if config.select_feature == "cls_patch" else 0)


def build_config(checkpoint: OriginalCheckpoint) -> LlavaConfig:
    """`config.json` of the bundle: a "llava", which optimum-intel, GenAI and Model Server all know, around an "mpt".

    Where it came from is under `converted_from`.
    """
    config = checkpoint.config
    return LlavaConfig(
        text_config=config.text_config.to_dict(),
        vision_config=config.vision_config.to_dict(),
        image_token_index=config.image_token_id,
        # Exact: a larger value pushes optimum-intel into its legacy way of merging images.
        image_seq_length=image_seq_length(config),
        vision_feature_layer=config.mm_vision_select_layer,
        # "full": as many rows as patches and additional tokens. The class token is dropped in the graph already.
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
        pad_token_id=checkpoint.tokenizer.pad_token_id,
        # The original spells the borders in the prompt; prompts written for it are recognised by these ids.
        im_start_token_id=config.im_start_token_id,
        im_end_token_id=config.im_end_token_id,
        architectures=["LlavaForConditionalGeneration"],
        converted_from={
            "model": _public_name(checkpoint.repository),
            "revision": None if checkpoint.repository.is_local else checkpoint.repository.revision,
            "model_type": config.model_type,
            "vision_tower": _public_name(checkpoint.vision_repository),
            "vision_tower_revision": None
            if checkpoint.vision_repository.is_local
            else checkpoint.vision_repository.revision,
            "mm_projector_type": config.projector_type,
            "mm_vision_select_feature": config.select_feature,
            "mm_use_im_start_end": bool(config.mm_use_im_start_end),
            "image_aspect_ratio": config.image_aspect_ratio,
            "optimum_llava_ov_version": version("optimum-llava-ov"),
        },
    )


def _public_name(repository: Repository) -> str:
    """A model id as it is; of a folder only its name, for a path tells strangers nothing but about its owner."""
    return repository.folder.resolve().name if repository.is_local else repository.name


def build_processor(checkpoint: OriginalCheckpoint) -> LlavaProcessor:
    """`LlavaProcessor`, with pictures prepared by PIL as in the original.

    The torchvision backend resamples differently, and half a grey level moves logits by 0.5 to 1.2 on the golden
    models.
    """
    config, settings = checkpoint.config, dict(checkpoint.image_processor)
    settings["do_convert_rgb"] = True
    if config.image_aspect_ratio == "pad":
        image_processor = LlavaImageProcessorPil(**settings, do_pad=True)
    else:
        image_processor = CLIPImageProcessorPil(**settings)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=checkpoint.tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=_num_additional_image_tokens(config),
        chat_template=CHAT_TEMPLATE.read_text(),
    )


class LlavaMptProcessor(LlavaProcessor):
    """What `AutoProcessor` gives for an original checkpoint: the processor that its bundle will have."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> LlavaProcessor:
        """Build it from the checkpoint's tokenizer and its vision tower's image processor.

        Args:
            pretrained_model_name_or_path: folder or model id of an original LLaVA-MPT checkpoint.
            kwargs: those of [`OriginalCheckpoint.open`].
        """
        return build_processor(OriginalCheckpoint.open(pretrained_model_name_or_path, **kwargs))


def save_settings(
    checkpoint: OriginalCheckpoint, processor: LlavaProcessor, generation: GenerationConfig, folder: Path
) -> None:
    """Write `config.json`, `generation_config.json` and all files of tokenizer and processor."""
    _save_config(build_config(checkpoint), folder)
    generation.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    _pin_image_backend(processor, folder)
    write_json(folder / "special_tokens_map.json", _special_tokens_map(processor.tokenizer))


def _save_config(config: LlavaConfig, folder: Path) -> None:
    config.save_pretrained(folder)
    file = folder / "config.json"
    values = json.loads(file.read_text())
    # transformers saves an empty `model_type` and all that configurations in general have here, and does not accept
    # all of it on loading in every version.
    attn_config = values["text_config"]["attn_config"]
    values["text_config"]["attn_config"] = {name: attn_config[name] for name in MptAttentionConfig.__annotations__}
    write_json(file, values)


def _pin_image_backend(processor: LlavaProcessor, folder: Path) -> None:
    """Name the PIL class, which transformers 5 would replace by torchvision's where that is installed.

    Only in `processor_config.json`: transformers 4 reads `preprocessor_config.json`, defaults to PIL, and knows no
    such name.
    """
    file = folder / "processor_config.json"
    values = json.loads(file.read_text())
    values["image_processor"]["image_processor_type"] = type(processor.image_processor).__name__
    write_json(file, values)


def _special_tokens_map(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """transformers 5 keeps these in `tokenizer_config.json`; other readers still look here."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write a file as a whole or not at all.

    Raises:
        `OSError`: it cannot be written. What was in the file before is still there.
    """
    replace_text(file, json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
