"""Describe the three parts of a LLaVA, with their inputs and outputs, as Optimum's export configurations."""

from __future__ import annotations

from typing import Any

from optimum.exporters.openvino.base import OpenVINOConfig
from optimum.exporters.openvino.config import TextDecoderWithPositionIdsOpenVINOConfig
from optimum.exporters.openvino.model_configs import (
    BaseVLMOpenVINOConfig,
    VLMConfigBehavior,
    get_vlm_text_generation_config,
)
from optimum.exporters.tasks import TasksManager
from optimum.utils import DummyPastKeyValuesGenerator, DummyTextInputGenerator, DummyVisionInputGenerator
from optimum.utils.normalized_config import NormalizedTextConfig, NormalizedVisionConfig
from torch import nn
from transformers import PretrainedConfig

from optimum_llava_ov.checkpoint.families import FAMILIES


register_for_openvino = TasksManager.create_register("openvino")

# As Optimum sets them for every language model: activations are scaled down to fit into f16 on GPU, and the cache is
# f16 unless the weights are compressed.
RUNTIME_OPTIONS = {"ACTIVATIONS_SCALE_FACTOR": "8.0", "KV_CACHE_PRECISION": "f16"}

NormalizedMptConfig = NormalizedTextConfig.with_args(
    num_attention_heads="n_heads", hidden_size="d_model", num_layers="n_layers", vocab_size="vocab_size"
)


class DummyInputsEmbedsGenerator(DummyTextInputGenerator):
    """Generate `inputs_embeds`: float `(batch_size, sequence_length, hidden_size)`."""

    SUPPORTED_INPUT_NAMES = ("inputs_embeds",)

    def generate(self, input_name: str, framework: str = "pt", int_dtype: str = "int64", float_dtype: str = "fp32"):
        shape = [self.batch_size, self.sequence_length, self.normalized_config.hidden_size]
        return self.random_float_tensor(shape, framework=framework, dtype=float_dtype)


class MptLanguageOpenVINOConfig(TextDecoderWithPositionIdsOpenVINOConfig):
    """Describe MPT's decoder: `inputs_embeds`, `attention_mask`, `position_ids`, past -> `logits`, present."""

    NORMALIZED_CONFIG_CLASS = NormalizedMptConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyInputsEmbedsGenerator, DummyTextInputGenerator, DummyPastKeyValuesGenerator)

    def __init__(self, config: PretrainedConfig, **kwargs):
        super().__init__(config, task="text-generation", use_past=True, use_past_in_inputs=True, **kwargs)

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        inputs = super().inputs
        return {"inputs_embeds": inputs.pop("input_ids"), **inputs}


class TextEmbeddingsOpenVINOConfig(OpenVINOConfig):
    """Describe the embedding table: `input` (token ids; Optimum's bundles use this name) -> `inputs_embeds`."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator,)
    values_override = None  # the table is an `nn.Embedding`, which has no configuration

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return {"input_ids": {0: "batch_size", 1: "sequence_length"}}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return {"inputs_embeds": {0: "batch_size", 1: "sequence_length"}}

    def rename_ambiguous_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"input": inputs["input_ids"]}


class ImageEncoderOpenVINOConfig(OpenVINOConfig):
    """Describe vision tower, projector and image borders: `pixel_values` -> `last_hidden_state`."""

    NORMALIZED_CONFIG_CLASS = NormalizedVisionConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyVisionInputGenerator,)

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return {"pixel_values": {0: "batch_size"}}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return {"last_hidden_state": {0: "batch_size"}}


class LlavaOpenVINOConfig(BaseVLMOpenVINOConfig):
    """Describe the whole model, which is exported in parts. See [`with_behavior`] and [`get_model_for_behavior`]."""

    def with_behavior(self, behavior: str | VLMConfigBehavior) -> OpenVINOConfig:
        behavior = VLMConfigBehavior(behavior)
        dtypes = {"int_dtype": self.int_dtype, "float_dtype": self.float_dtype}
        if behavior == VLMConfigBehavior.LANGUAGE:
            config = self._language(self._config.text_config, dtypes)
            config.runtime_options = dict(RUNTIME_OPTIONS)
            return config
        if behavior == VLMConfigBehavior.TEXT_EMBEDDINGS:
            return TextEmbeddingsOpenVINOConfig(self._config.text_config, **dtypes)
        return ImageEncoderOpenVINOConfig(self._config.vision_config, **dtypes)

    @staticmethod
    def _language(text_config: PretrainedConfig, dtypes: dict[str, str]) -> OpenVINOConfig:
        """Describe the language model: Optimum's way for this type, or that of our own module."""
        if text_config.model_type == "mpt":
            return MptLanguageOpenVINOConfig(text_config, **dtypes)
        return get_vlm_text_generation_config(text_config.model_type, text_config, **dtypes)

    def get_model_for_behavior(self, model: nn.Module, behavior: str | VLMConfigBehavior) -> nn.Module:
        behavior = VLMConfigBehavior(behavior)
        if behavior == VLMConfigBehavior.LANGUAGE:
            return model.language_model
        if behavior == VLMConfigBehavior.TEXT_EMBEDDINGS:
            return model.embed_tokens
        return model.image_encoder


for family in FAMILIES:
    register_for_openvino(family.model_type, "image-text-to-text", library_name="transformers")(LlavaOpenVINOConfig)
