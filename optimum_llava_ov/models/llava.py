"""Load a LLaVA in torch from an original checkpoint: embedding table, image encoder and language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from optimum_llava_ov.checkpoint.config import OriginalLlavaConfig
from optimum_llava_ov.checkpoint.families.mpt import LlavaMptConfig
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint
from optimum_llava_ov.errors import UnsupportedCheckpointError
from optimum_llava_ov.models.anyres import SPATIAL_UNPAD
from optimum_llava_ov.models.generation import ImageGenerationMixin
from optimum_llava_ov.models.image_layout import ImageLayout
from optimum_llava_ov.models.language import build_language_model, compute_buffers
from optimum_llava_ov.models.merge import check_token_ids, merge_image_features
from optimum_llava_ov.models.projector import build_projector
from optimum_llava_ov.models.reduction import build_reduction
from optimum_llava_ov.models.vision import ClipFeatures, ImageEncoder
from optimum_llava_ov.models.weights import load_weights


class OriginalLlavaForConditionalGeneration(ImageGenerationMixin, PreTrainedModel):
    """The torch model of any family: the reference, and the source of the export.

    It takes the same prompts as the bundle: `<image>` occurs `image_seq_length` times for each image. The image
    features that replace it include the borders. [`from_pretrained`] takes an original checkpoint.
    """

    config_class = OriginalLlavaConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: OriginalLlavaConfig):
        super().__init__(config)
        text_config = config.text_config
        # One row more than in the checkpoint's table, for <image>, which the head never chooses
        self.embed_tokens = nn.Embedding(text_config.vocab_size, text_config.hidden_size)
        self.language_model = build_language_model(text_config)
        self.image_encoder = ImageEncoder(
            ClipFeatures(config.vision_config, config.mm_vision_select_layer, config.select_feature),
            build_projector(config.projector_type, config.vision_config.hidden_size, text_config.hidden_size),
            text_config.hidden_size,
            config.num_border_tokens,
            build_reduction(config.reduction, config.num_patches) if config.reduction else None,
        )
        # The row after each row of patches of an image that is cut into tiles
        tiling = ImageLayout.of_original(config).tiling
        has_newline = tiling is not None and tiling.merge_type == SPATIAL_UNPAD
        self.image_newline = nn.Parameter(torch.empty(text_config.hidden_size)) if has_newline else None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,  # noqa: ARG003  part of the signature in transformers
        config: OriginalLlavaConfig | None = None,
        **kwargs,
    ) -> OriginalLlavaForConditionalGeneration:
        """Load an original LLaVA checkpoint without copying its weights.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): a folder, or a model id on the Hub.
            vision_tower, conversation, tokenizer, base_model, adapters, image_tokens, image_token_method (*optional*):
                As for [`OriginalCheckpoint.open`].
            dtype, torch_dtype (`torch.dtype` or `str`, *optional*):
                Dtype to convert all weights to. They stay as stored if it is `"auto"` or not given.
            config ([`OriginalLlavaConfig`], *optional*):
                The checkpoint's configuration, which the Auto classes pass. Only its `dtype` is read, if `dtype`
                is not given: the Auto classes store there the dtype that their caller asked for.
            device_map (`str` or `torch.device`, *optional*): device of the model. The CPU if it is `"auto"` or not
                given.
            subfolder, revision, cache_dir, token, local_files_only, force_download: as everywhere in transformers.

        Raises:
            [`UnsupportedCheckpointError`], [`InvalidCheckpointError`]: the checkpoint cannot be loaded. Most errors
                are raised before weights are downloaded.
        """
        checkpoint = OriginalCheckpoint.open(pretrained_model_name_or_path, **kwargs)
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype") or getattr(config, "dtype", None)
        model = cls.from_checkpoint(
            checkpoint, getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        )
        device = kwargs.get("device_map")
        return model if device in (None, "auto") else model.to(device)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: OriginalCheckpoint, dtype: torch.dtype | str | None = None
    ) -> OriginalLlavaForConditionalGeneration:
        """Build the model of an open checkpoint. Its weights stay memory-mapped.

        Args:
            dtype: dtype to convert the weights to, which copies them. They stay as stored if it is `None` or `"auto"`.

        Raises:
            [`InvalidCheckpointError`]: the weights do not fit the configuration.
            [`UnsupportedCheckpointError`]: the checkpoint is of another family than this class.
        """
        if not isinstance(checkpoint.config, cls.config_class):
            raise UnsupportedCheckpointError(
                f"{checkpoint.repository.name!r} is a LLaVA with {checkpoint.config.family}, which {cls.__name__} "
                "does not load. Use OriginalLlavaForConditionalGeneration."
            )
        if checkpoint.merge_dtype is None and dtype == torch.float32:
            checkpoint = checkpoint.working_in(checkpoint.workspace, torch.float32)
        with torch.device("meta"):
            model = cls(checkpoint.config)
        load_weights(model, checkpoint)
        if dtype not in (None, "auto"):
            model.to(dtype)
            compute_buffers(model.language_model)  # rotary frequencies stay in float32
            model.config.dtype = dtype
        model.requires_grad_(False).eval()
        model.generation_config = generation_config(checkpoint)
        return model

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        return self.language_model.lm_head

    def get_image_features(self, pixel_values: Any, image_sizes: Any = None) -> torch.Tensor | list[torch.Tensor]:
        """Encode images, borders included. See [`ImageLayout.features`]."""
        layout = ImageLayout.of_original(self.config, self.image_newline)
        return layout.features(self._encode, pixel_values, image_sizes)

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.image_encoder(pixel_values.to(self.image_encoder.features.embeddings.patch_embedding.weight.dtype))

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | Sequence[torch.Tensor] | None = None,
        image_sizes: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids: `(batch, tokens)`.
            attention_mask: `(batch, past + tokens)`, 0 for padding. All ones if not given.
            pixel_values: `(images, 3, height, width)`, the images of all sequences in order; only with the prompt.
                With tiles: `(images, tiles, 3, height, width)`.
            image_features: `(num_image_tokens, hidden_size)` for each image, instead of `pixel_values`.
            image_sizes: `(images, 2)`, height and width of each image; only with tiles.
            logits_to_keep: number of last positions to compute logits for; 0 for all.

        Raises:
            `ValueError`: an id is not in the table, or the number of images is not the one that `input_ids` expects.
        """
        if inputs_embeds is None:
            check_token_ids(input_ids, self.embed_tokens.num_embeddings)
            inputs_embeds = self.embed_tokens(input_ids)
            if pixel_values is not None:
                image_features = self.get_image_features(pixel_values, image_sizes)
            if image_features is not None:
                inputs_embeds = merge_image_features(
                    input_ids, inputs_embeds, image_features, self.config.image_token_id
                )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if attention_mask is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            attention_mask = inputs_embeds.new_ones(
                inputs_embeds.shape[0], past_length + inputs_embeds.shape[1], dtype=torch.long
            )
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            # Padding takes no position
            position_ids=(attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :],
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
        )

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, pixel_values=None, image_features=None, image_sizes=None, **kwargs
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            inputs.update(pixel_values=pixel_values, image_features=image_features, image_sizes=image_sizes)
        return inputs


class LlavaMptForConditionalGeneration(OriginalLlavaForConditionalGeneration):
    """The torch model of a LLaVA with an MPT."""

    config_class = LlavaMptConfig
    _no_split_modules = ["MptBlock"]


def generation_config(checkpoint: OriginalCheckpoint) -> GenerationConfig:
    """Return settings for greedy generation that ends where the conversation ends a turn, or at the end of text."""
    _, stop_strings = checkpoint.choice.conversation.stops(checkpoint.tokenizer)
    return GenerationConfig(
        bos_token_id=checkpoint.tokenizer.bos_token_id,
        eos_token_id=checkpoint.config.eos_token_id,
        pad_token_id=checkpoint.tokenizer.pad_token_id,
        stop_strings=stop_strings or None,
    )
