"""Run the language model of a bundle. A step of `generate` costs little more than the computation in OpenVINO."""

from __future__ import annotations

import logging
import threading
from contextlib import nullcontext
from pathlib import Path

import openvino
import torch
from optimum.intel.openvino.modeling_visual_language import OVModelWithEmbedForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from optimum_llava_ov.bundle.layout import PARTS, weights_file
from optimum_llava_ov.kernels.extension import AVX2, OPENVINO, with_compressed_matmuls
from optimum_llava_ov.runtime.cache import DecoderCache
from optimum_llava_ov.runtime.decoder import Decoder
from optimum_llava_ov.runtime.embedding_table import EmbeddingTable
from optimum_llava_ov.runtime.graph import paged, with_logit_positions
from optimum_llava_ov.runtime.paged import PagedDecoder
from optimum_llava_ov.runtime.stateful import StatefulDecoder
from optimum_llava_ov.system.mapped import read_once


logger = logging.getLogger(__name__)

PA, SDPA = PagedDecoder.attention_backend, StatefulDecoder.attention_backend


class LanguageModel(OVModelWithEmbedForCausalLM):
    """Run Optimum's language model with paged attention where OpenVINO supports it, and compute only requested logits.

    The loaded graph does not change, so that it can be saved and compressed. A copy that shares its weights is
    compiled.

    Args:
        attention_backend: `"PA"` (paged attention) or `"SDPA"` (the attention of the bundle's graph).
        uses_extension: Whether the kernel of this package multiplies compressed weights.

    Attributes:
        matmul_kernel (`str`): What multiplies compressed weights: "avx2" (the kernel of this package) or "openvino".
            It is known when the graph is compiled.
    """

    matmul_kernel: str
    _cache: DecoderCache | None = None
    _embedding_table: EmbeddingTable | None = None

    def __init__(self, *args, attention_backend: str = PA, uses_extension: bool = False, **kwargs):
        if attention_backend not in (PA, SDPA):
            raise ValueError(f"ATTENTION_BACKEND is {attention_backend!r}. Expected {PA!r} or {SDPA!r}.")
        self._attention_backend = attention_backend
        self._uses_extension = uses_extension
        self._compile_lock = threading.RLock()
        super().__init__(*args, **kwargs)
        if self._compile_only:  # Optimum has compiled the loaded graph, whose results are rounded differently
            self._use(
                self._compiled_decoder(openvino.Core().read_model(Path(self.model_save_dir) / PARTS["language_model"]))
            )
            self.model = self.request.get_compiled_model()

    def compile(self) -> None:
        """Compile the graph and run it once.

        OpenVINO packs the weights when a graph first runs. That takes seconds, which belong to loading. `read_once`
        halves the memory that it needs. This package's kernel reads the weights as they are.
        """
        with self._compile_lock:
            if self.request is not None:
                return
            self._use(self._compiled_decoder(self.model))
            self._compile_text_emb()
            if isinstance(self.text_emb_model, openvino.Model):
                self._embedding_table = EmbeddingTable.of(
                    self.text_emb_model, lambda ids: self.text_emb_request(ids)[0]
                )
            logger.info("Packing the weights of the language model ...")
            file = weights_file(self.model_save_dir, "language_model")
            with read_once(file) if self.matmul_kernel == OPENVINO else nullcontext():
                self.forward(torch.zeros(1, 1, self.config.text_config.hidden_size), logits_to_keep=1)
            self.cache.reset()

    def clear_requests(self) -> None:
        super().clear_requests()
        self._cache = self._embedding_table = None

    def _use(self, decoder: Decoder) -> None:
        self._cache = DecoderCache(decoder)
        self.request = decoder.request

    def _compiled_decoder(self, graph: openvino.Model) -> Decoder:
        """Rewrite a bundle's graph for `generate` and compile it, with paged attention if requested and possible."""
        paged_graph = paged(graph) if self._attention_backend == PA and self._device == "CPU" else None
        if paged_graph is not None:
            try:
                return PagedDecoder(self._compiled(with_logit_positions(paged_graph, axis=0)))
            except RuntimeError as error:  # OpenVINO does not support paged attention on this processor
                logger.warning(
                    "Paged attention does not compile on this machine, so the slower SDPA is used. OpenVINO said: %s",
                    error,
                )
        return StatefulDecoder(self._compiled(with_logit_positions(graph, axis=1)))

    def _compiled(self, graph: openvino.Model) -> openvino.CompiledModel:
        executed = with_compressed_matmuls(graph) if self._uses_extension else graph
        self.matmul_kernel = OPENVINO if executed is graph else AVX2
        return self._compile_model(executed, self._device, {**self.ov_config}, self.model_save_dir)

    def new_cache(self) -> DecoderCache:
        """Return a new cache, for a batch that is computed in parallel with others. The weights are shared."""
        self.compile()
        return DecoderCache(type(self.cache.decoder)(self.request.get_compiled_model()))

    @property
    def attention_backend(self) -> str:
        """Return the attention that runs: `"PA"` or `"SDPA"`."""
        return self.cache.decoder.attention_backend

    @property
    def cache(self) -> DecoderCache:
        """Return the model's own cache. Calls without `past_key_values` use it."""
        self.compile()
        assert self._cache is not None  # set by `compile`
        return self._cache

    def continue_after(self, length: int) -> DecoderCache:
        """Return the model's own cache with its first `length` tokens, for a prompt that begins with them.

        A cache that an earlier call returned cannot be used any more.
        """
        self._cache = self.cache.replaced(length)
        return self._cache

    def look_up(self, input_ids: torch.LongTensor) -> torch.Tensor | None:
        """Return embeddings `(batch, tokens, hidden_size)` float32 of a few tokens without a call of OpenVINO.

        Return `None` if the table cannot be read directly.
        """
        if self._embedding_table is None:
            return None
        return torch.from_numpy(self._embedding_table(input_ids.numpy()))

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: DecoderCache | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """Compute logits.

        Args:
            inputs_embeds: `(batch, tokens, hidden_size)` float32.
            attention_mask: `(batch, past + tokens)`, 0 for padding. Padding takes no position in its sequence.
                Default: all ones.
            past_key_values: The cache that the last call returned, or [`new_cache`]. `None` begins a new batch in the
                model's own cache.
            logits_to_keep: Number of last positions to compute logits for; 0 for all.

        Returns:
            `logits`: `(batch, tokens or logits_to_keep, vocab_size)` float32. Logits of padding are undefined.

        Raises:
            `ValueError`: The shape of `attention_mask` is wrong, or `past_key_values` cannot continue with these
                tokens.
        """
        batch_size, length = inputs_embeds.shape[:2]
        if past_key_values is None:
            self._cache = self.cache.replaced()
        cache = self._cache if past_key_values is None else past_key_values
        if not isinstance(cache, DecoderCache):
            raise ValueError(  # noqa: TRY004  all errors of arguments are ValueErrors
                f"past_key_values is a {type(cache).__name__}. Expected the cache that an earlier call returned, "
                "or one from new_cache()."
            )
        past_length = cache.get_seq_length()
        if not past_length:
            cache.begin(batch_size)
        shape = (batch_size, past_length + length)
        if attention_mask is None:
            attention_mask = torch.ones(shape, dtype=torch.long)
        if attention_mask.shape != shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}. "
                f"Expected (batch, past + new tokens): {shape}."
            )

        kept = min(logits_to_keep or length, length)
        logits = cache.extend(inputs_embeds.contiguous().numpy(), attention_mask.long().numpy(), kept)
        return CausalLMOutputWithPast(logits=torch.from_numpy(logits), past_key_values=cache)
