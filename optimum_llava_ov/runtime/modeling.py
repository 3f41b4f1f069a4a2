"""Run the parts of a bundle together: `forward` and `generate`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import compress, islice
from typing import Any

import numpy as np
import openvino
import torch
from optimum.intel import OVModelForVisualCausalLM
from transformers import (
    AutoTokenizer,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from optimum_llava_ov.bundle.layout import weights_file
from optimum_llava_ov.kernels.extension import AUTO, MATMUL_KERNEL, uses_extension
from optimum_llava_ov.models.generation import ImageGenerationMixin
from optimum_llava_ov.models.image_layout import ImageLayout, images_per_sequence, widths_and_heights
from optimum_llava_ov.models.merge import check_token_ids, merge_image_features
from optimum_llava_ov.runtime.cache import DecoderCache
from optimum_llava_ov.runtime.canonical import (
    ORIGINAL_IMAGE_TOKEN_ID,
    CountImages,
    canonical_prompts,
    equal_images,
    tiled_images,
)
from optimum_llava_ov.runtime.image_encoder import ImageEncoder
from optimum_llava_ov.runtime.language_model import PA, LanguageModel
from optimum_llava_ov.runtime.prefix import Key, digest_of, prompt_keys, reusable
from optimum_llava_ov.samples.files import question_inputs
from optimum_llava_ov.system.mapped import read_once
from optimum_llava_ov.system.threads import one_torch_thread


ATTENTION_BACKEND = "ATTENTION_BACKEND"  # GenAI's name
# Images or tiles that the image encoder gets together: more take more memory, and no less time for each
MAX_IMAGES_AT_ONCE = 8
_IMAGES = ("pixel_values", "image_features", "image_sizes")


def _one_at_a_time(method):
    """Run calls that use the same cache one after the other. Calls with different caches run in parallel."""

    @functools.wraps(method)
    def locked(self, *args, **kwargs):
        cache = kwargs.get("past_key_values")
        with (cache if isinstance(cache, DecoderCache) else self.language_model.cache).lock:
            return method(self, *args, **kwargs)

    return locked


class OVLlavaModel(ImageGenerationMixin, OVModelForVisualCausalLM):
    """Run a LLaVA on OpenVINO: an image encoder, an embedding table and a language model.

    [`~optimum_llava_ov.OVModelForLlava`] adds loading, saving and publishing.

    Attributes:
        prefix_caching (`bool`): Whether [`generate`] without `past_key_values` computes only what a prompt has after
            the tokens and images that it has in common with the last one. This is for single prompts without beams.
            Set it to `False` to measure how long a prompt takes.
    """

    def __init__(
        self,
        language_model: openvino.Model,
        text_embeddings: openvino.Model,
        vision_embeddings: openvino.Model,
        config: PretrainedConfig,
        device: str = "CPU",
        compile: bool = True,  # noqa: A002  Optimum's name
        **kwargs,
    ):
        self._parts_lock = threading.Lock()  # the image encoder and the embedding table have one request each
        self._differs_from_files = False
        self.prefix_caching = True
        self.name_or_path = getattr(config, "name_or_path", None)
        # Keep what the caller gave: Optimum would replace it by a default for the model's name
        self._quantization_config = kwargs.get("quantization_config")
        ov_config = {**(kwargs.pop("ov_config", None) or {})}
        attention_backend = kwargs.pop("attention_backend", None) or ov_config.pop(ATTENTION_BACKEND, PA)
        matmul_kernel = kwargs.pop("matmul_kernel", None) or ov_config.pop(MATMUL_KERNEL, AUTO)
        super().__init__(
            language_model,
            text_embeddings,
            vision_embeddings,
            config,
            device,
            compile=False,
            ov_config=ov_config,
            **kwargs,
        )
        # Replace Optimum's parts before anything is compiled
        uses_kernel = uses_extension(matmul_kernel, device, ov_config)
        if not self._compile_only:
            self.vision_embeddings = ImageEncoder(vision_embeddings, self, uses_kernel)
        self.language_model = LanguageModel(
            language_model,
            text_embeddings,
            config=config,
            device=device,
            ov_config=ov_config,
            model_save_dir=self.model_save_dir,
            quantization_config=kwargs.get("quantization_config"),
            compile=self._compile_only,
            compile_only=self._compile_only,
            attention_backend=attention_backend,
            uses_extension=uses_kernel,
        )
        if compile and not self._compile_only:
            self.compile()

    def compile(self) -> None:
        """Compile all parts and run each once, so that the first image and the first token do not take longer."""
        is_new = self.vision_embeddings.request is None
        super().compile()
        if is_new:
            size = self.config.vision_config.image_size
            file = weights_file(self.model_save_dir, "vision_embeddings_model")
            with read_once(file) if self.vision_embeddings.packs_weights else nullcontext():
                self._encode(torch.zeros(1, 3, size, size))

    @_one_at_a_time
    @one_torch_thread()
    def generate(self, inputs: torch.LongTensor | None = None, *args, images: Any = None, **kwargs):
        """Generate answers. The arguments are those of [`~transformers.GenerationMixin.generate`].

        Code that was written for the original LLaVA or the OpenVINO notebook runs too.

        Args:
            inputs, input_ids: `(batch, tokens)`. An image is written as the processor writes it, or as one -200.
            pixel_values, images: `(images, 3, height, width)`, the images of all prompts in order. If the model cuts
                images into tiles, `(images, tiles, 3, height, width)`, or a list with the tiles of each image.
            image_sizes: `(images, 2)`, height and width of each image as the processor returns them; only with tiles.
                Beside `images`, the argument of the original code, it is width and height, as there.
            past_key_values: The cache that the last call with `return_dict_in_generate=True` returned, or
                [`new_cache`]. The former is valid until the next call. As in transformers, `inputs` is the whole
                conversation.

        Returns:
            As in transformers: the prompt as it was given, followed by the new tokens.

        Raises:
            `ValueError`: The number of images differs from the number of images in the prompts, an id is not in the
                embedding table, `past_key_values` belongs to an earlier call than the last, or `assistant_model` is
                this model.
        """
        if kwargs.get("assistant_model") is self:
            raise ValueError(
                "assistant_model is the model itself, which has one cache. Load the assistant as a separate model."
            )
        if "tokenizer" not in kwargs and (kwargs.get("stop_strings") or self.generation_config.stop_strings):
            kwargs["tokenizer"] = self._tokenizer
        prompt = kwargs.pop("input_ids", None) if inputs is None else inputs
        if kwargs.get("pixel_values") is None and images is not None:
            kwargs["pixel_values"] = _stack(images) if self.image_layout.tiling is None else images
            if kwargs.get("image_sizes") is not None:  # of the original code, which has PIL's order
                kwargs["image_sizes"] = torch.as_tensor(kwargs["image_sizes"]).flip(-1)
        if prompt is None or kwargs.get("inputs_embeds") is not None:
            return super().generate(prompt, *args, **kwargs)

        check_token_ids(prompt, self._num_embeddings, others=(ORIGINAL_IMAGE_TOKEN_ID,))
        mask = kwargs.pop("attention_mask", None)
        mask = torch.ones_like(prompt) if mask is None else mask
        if mask.shape != prompt.shape:  # with `past_key_values`, `input_ids` may hold the new tokens only
            return super().generate(prompt, *args, attention_mask=mask, **kwargs)
        canonical, mask = self._canonical_prompts(prompt, mask, kwargs.get("image_sizes"))
        keys = self._keys(canonical, mask, kwargs) if self._uses_own_cache_alone(*args, **kwargs) else None
        if keys is not None and (length := reusable(self.language_model.cache.keys, keys)):
            kwargs["past_key_values"] = self.language_model.continue_after(length)
        output = super().generate(canonical, *args, attention_mask=mask, **kwargs)
        if keys is not None:
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            self.language_model.cache.name_tokens([*keys, *sequences[0, len(keys) :].tolist()])
        return output if canonical is prompt else _with_prompt(output, prompt, canonical.shape[1])

    @functools.cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer of the bundle, with which `generate` looks for stop strings."""
        return AutoTokenizer.from_pretrained(self.model_save_dir)

    def new_cache(self) -> DecoderCache:
        """Return an empty cache for `past_key_values` of [`generate`] and [`forward`].

        Calls with different caches run in parallel. A call continues after the tokens that are in its cache.

        The next call takes the whole conversation, and computes only its new tokens:

        ```python
        cache = model.new_cache()
        output = model.generate(**inputs, past_key_values=cache)
        ```
        """
        return self.language_model.new_cache()

    @property
    def attention_backend(self) -> str:
        """Return the attention that runs: `"PA"` (paged attention) or `"SDPA"` (the attention of the bundle's graph).

        Compiles the model if needed.
        """
        return self.language_model.attention_backend

    def _reorder_cache(self, past_key_values: DecoderCache, beam_idx: torch.LongTensor) -> DecoderCache:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values

    def _canonical_prompts(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor, image_sizes: Any = None):
        config = self.config
        start, end = getattr(config, "im_start_token_id", None), getattr(config, "im_end_token_id", None)
        ids, mask = canonical_prompts(
            input_ids,
            attention_mask,
            config.image_token_index,
            self._count_images(image_sizes),
            None if start is None or end is None else (start, end),
            self.generation_config.pad_token_id or 0,
        )
        unchanged = ids.shape == input_ids.shape and torch.equal(ids * mask, input_ids * attention_mask)
        return (input_ids, attention_mask) if unchanged else (ids, mask)

    @_one_at_a_time
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: DecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | Sequence[torch.Tensor] | None = None,
        image_sizes: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Compute logits.

        Args:
            input_ids: `(batch, tokens)`. With a cache, the new tokens only.
            pixel_values: `(images, 3, height, width)`, the images in `input_ids` in order.
                With tiles: `(images, tiles, 3, height, width)`.
            attention_mask: `(batch, past + tokens)`, 0 for padding. Padding takes no position in its sequence: the
                distance between the tokens before and after it is the same as without it. Default: all ones.
            past_key_values: The cache that the last call returned, or [`new_cache`]. `None` begins a new batch in the
                model's own cache.
            inputs_embeds: `(batch, tokens, hidden_size)`, instead of `input_ids` and images.
            image_features: `(num_image_tokens, hidden_size)` for each image, instead of `pixel_values`.
            image_sizes: `(images, 2)`, height and width of each image; only with tiles. If the processor has counted
                other rows than the original, which occurs for few sizes, the prompts and the logits have the
                original's.
            position_ids: Ignored. Positions are counted from `attention_mask`.
            logits_to_keep: Number of last positions to compute logits for; 0 for all.

        Returns:
            `logits`: `(batch, tokens or logits_to_keep, vocab_size)` float32.

        Raises:
            `ValueError`: An id is not in the embedding table, or the number of images differs from the number of
                images in `input_ids`.
        """
        if inputs_embeds is None:
            if image_sizes is not None:
                input_ids, attention_mask = self._with_counted_rows(input_ids, attention_mask, image_sizes)
            check_token_ids(input_ids, self._num_embeddings)
            if pixel_values is not None:
                image_features = self.get_image_features(pixel_values, image_sizes)
            inputs_embeds = self._embed(input_ids, image_features)
        inputs_embeds = inputs_embeds.detach().float()
        return self.language_model.forward(inputs_embeds, attention_mask, past_key_values, logits_to_keep)

    def _with_counted_rows(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None, image_sizes: Any
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """Return prompts with as many `<image>` as the images have rows. One that continues a cache is unchanged."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            return input_ids, attention_mask
        return self._canonical_prompts(input_ids, mask, image_sizes)

    @property
    def _num_embeddings(self) -> int:
        """Return the size of the embedding table. Its last token is `<image>`, unless the table was made larger."""
        return max(self.config.image_token_index + 1, self.config.text_config.vocab_size)

    def _embed(
        self, input_ids: torch.LongTensor, image_features: torch.Tensor | Sequence[torch.Tensor] | None
    ) -> torch.Tensor:
        if input_ids.shape[1] == 1 and (inputs_embeds := self.language_model.look_up(input_ids)) is not None:
            return inputs_embeds
        with self._parts_lock:
            inputs_embeds = torch.from_numpy(np.array(self.get_text_embeddings(input_ids)))
        image_token_id = self.config.image_token_index
        if image_features is None:
            if input_ids.shape[1] == 1 or not (input_ids == image_token_id).any():
                return inputs_embeds
            image_features = []
            if self.image_layout.tiling is None:
                image_features = inputs_embeds.new_empty(0, self.image_layout.num_tokens, inputs_embeds.shape[-1])
        return merge_image_features(input_ids, inputs_embeds, image_features, image_token_id)

    @functools.cached_property
    def image_layout(self) -> ImageLayout:
        """Return how many rows an image has, and in which order."""
        return ImageLayout.of_bundle(self.config)

    def _count_images(self, image_sizes: Any) -> CountImages:
        """Return the function for [`canonical_prompts`] that says which images stand for runs of `<image>`."""
        tiling = self.image_layout.tiling
        if tiling is None:
            return functools.partial(equal_images, self.image_layout.num_tokens)
        sizes = widths_and_heights(image_sizes)
        return functools.partial(
            tiled_images,
            [tiling.num_image_tokens(size) for size in sizes],
            [tiling.num_placeholders(size) for size in sizes],
        )

    def get_image_features(self, pixel_values: Any, image_sizes: Any = None) -> torch.Tensor | list[torch.Tensor]:
        """Encode images `(images, 3, height, width)` to `(images, image_seq_length, hidden_size)` float32.

        With tiles, `(images, tiles, 3, height, width)` with height and width of each image in `image_sizes` to a list
        of `(num_image_tokens, hidden_size)` for each image. See [`ImageLayout.features`].

        Features of `<im_start>` and `<im_end>` are included. Equal images, as in a batch of questions about one image,
        are encoded once, and so are equal tiles.
        """
        return self.image_layout.features(self._encode, pixel_values, image_sizes)

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode `(images, 3, height, width)`, at most [`MAX_IMAGES_AT_ONCE`] at a time."""
        pixel_values = pixel_values.float()
        indices_by_image: dict[bytes, list[int]] = {}
        for index, image in enumerate(pixel_values):
            indices_by_image.setdefault(image.numpy().tobytes(), []).append(index)
        groups = list(indices_by_image.values())
        repeated: np.ndarray | None = None
        for start in range(0, len(groups), MAX_IMAGES_AT_ONCE):
            batch = groups[start : start + MAX_IMAGES_AT_ONCE]
            with self._parts_lock:
                features = self.vision_embeddings(pixel_values[[indices[0] for indices in batch]]).last_hidden_state
                if repeated is None:
                    repeated = np.empty((len(pixel_values), *features.shape[1:]), dtype=np.float32)
                for indices, image_features in zip(batch, features):
                    repeated[indices] = image_features
        return torch.from_numpy(repeated)

    def get_vision_embeddings(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        """Encode images or tiles `(images, 3, height, width)`, by Optimum's name."""
        return self._encode(torch.as_tensor(pixel_values))

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        logits_to_keep=None,
        is_first_iteration=False,
        **kwargs,
    ) -> dict[str, Any]:
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        inputs: dict[str, Any] = {"past_key_values": past_key_values, "attention_mask": attention_mask}
        if logits_to_keep is not None:
            inputs["logits_to_keep"] = logits_to_keep
        if past_length and (input_ids.shape[1] == 0 or attention_mask.shape[1] <= past_length):
            raise ValueError(
                f"past_key_values has {past_length} tokens, and no new tokens follow: attention_mask has "
                f"{attention_mask.shape[1]}, input_ids {input_ids.shape[1]}. Give input_ids and attention_mask of the "
                "whole conversation."
            )
        if inputs_embeds is not None and not past_length:
            return {**inputs, "inputs_embeds": inputs_embeds}
        num_new_tokens = attention_mask.shape[1] - past_length
        if is_first_iteration or not past_length:
            images = {name: kwargs[name] for name in _IMAGES if kwargs.get(name) is not None}
            inputs.update(self._images_of_new_tokens(images, input_ids, num_new_tokens))
        return {**inputs, "input_ids": input_ids[:, -num_new_tokens:]}

    def _uses_own_cache_alone(self, *args, **kwargs) -> bool:
        """Return whether `generate` with these arguments keeps one sequence in the model's own cache.

        With candidates of an assistant or from the prompt, it needs logits at positions that may be in the cache.
        """
        config = kwargs.get("generation_config") or (args[0] if args else None) or self.generation_config
        options = [
            kwargs.get(name, getattr(config, name, None))
            for name in ("num_beams", "num_return_sequences", "prompt_lookup_num_tokens")
        ]
        others = [kwargs.get(name) for name in ("past_key_values", "assistant_model", "image_features")]
        is_single = (options[0] or 1) == (options[1] or 1) == 1 and not options[2]
        return self.prefix_caching and is_single and all(value is None for value in others)

    def _keys(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor, images: dict[str, Any]
    ) -> list[Key] | None:
        """Return the keys of a prompt, or `None` for several prompts, and for padding.

        Args:
            images: `pixel_values` and `image_sizes`, if the prompt has images.
        """
        if len(input_ids) != 1 or not attention_mask.all():
            return None
        lengths: list[int] = []
        digests: list[str] = []
        if (pixel_values := images.get("pixel_values")) is not None:
            image_sizes = images.get("image_sizes")
            lengths = self._lengths(pixel_values, image_sizes=image_sizes)
            digests = [digest_of(*image) for image in self.image_layout.images(pixel_values, image_sizes)]
        return prompt_keys(input_ids[0].tolist(), self.config.image_token_index, lengths, digests)

    def _images_of_new_tokens(
        self, images: dict[str, Any], input_ids: torch.LongTensor, num_new_tokens: int
    ) -> dict[str, Any]:
        """Leave out images whose tokens are in the cache, unless the caller gave the new images only."""
        lengths = self._lengths(**images)
        is_image = input_ids == self.config.image_token_index
        if not lengths or sum(lengths) != is_image.sum():
            return images
        rows, new_rows = is_image.sum(dim=1).tolist(), is_image[:, -num_new_tokens:].sum(dim=1).tolist()
        keep, remaining = [], iter(lengths)
        for count, cached in zip(images_per_sequence(rows, lengths), (a - b for a, b in zip(rows, new_rows))):
            for length in islice(remaining, count):
                keep.append(cached <= 0)
                cached -= length
        if not any(keep):
            return {}
        return {
            name: values[keep] if isinstance(values, torch.Tensor) else list(compress(values, keep))
            for name, values in images.items()
        }

    def _lengths(self, pixel_values: Any = None, image_features: Any = None, image_sizes: Any = None) -> list[int]:
        """Return the number of image tokens of each image."""
        if image_features is not None:
            return [len(image) for image in image_features]
        if self.image_layout.tiling is None:
            return [self.image_layout.num_tokens] * (0 if pixel_values is None else len(pixel_values))
        return [self.image_layout.num_image_tokens(size) for size in widths_and_heights(image_sizes)]

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        """Return the processors of transformers.

        Classifier-free guidance runs the model a second time at each step, so it gets its own cache.
        """
        processors = super()._get_logits_processor(*args, **kwargs)
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                processor.unconditional_context.update(use_cache=True, past_key_values=self.new_cache())
        return processors

    @staticmethod
    def preprocess_inputs(
        text: str,
        image=None,
        processor=None,
        tokenizer=None,  # noqa: ARG004  Optimum passes it
        config=None,  # noqa: ARG004  Optimum passes it
        video=None,
        audio=None,
    ):
        """Return the model inputs of one user turn, for the calibration and evaluation code of Optimum."""
        if processor is None or video is not None or audio is not None:
            raise ValueError("LLaVA takes text and images, and needs its processor for them.")
        return question_inputs(processor, text, [] if image is None else [image])


def _stack(images: Any) -> torch.Tensor:
    """Return `(images, 3, height, width)` of a list of image tensors, or of a tensor with a batch dimension."""
    if isinstance(images, (list, tuple)):
        images = torch.stack([torch.as_tensor(image).squeeze(0) for image in images])
    return images.flatten(0, 1) if images.ndim == 5 else images


def _with_prompt(output: Any, prompt: torch.LongTensor, length: int) -> Any:
    """Replace the canonical prompt, which has `length` tokens, by the caller's prompt."""
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    repeats = sequences.shape[0] // prompt.shape[0]
    sequences = torch.cat([prompt.repeat_interleave(repeats, dim=0), sequences[:, length:]], dim=1)
    if isinstance(output, torch.Tensor):
        return sequences
    output.sequences = sequences
    return output
