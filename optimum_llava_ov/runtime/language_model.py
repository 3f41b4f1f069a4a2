"""The language model of a bundle at run time: a step of `generate` costs what the engine's arithmetic costs, and little else."""

from __future__ import annotations

import copy
import logging

import numpy as np
import openvino
import torch
from optimum.intel.openvino.modeling_visual_language import OVModelWithEmbedForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from optimum_llava_ov.bundle.layout import weights_file
from optimum_llava_ov.runtime.decoder import Decoder
from optimum_llava_ov.runtime.embedding_table import EmbeddingTable
from optimum_llava_ov.runtime.graph import paged, with_logit_positions
from optimum_llava_ov.runtime.mapped import read_once
from optimum_llava_ov.runtime.paged import PagedDecoder
from optimum_llava_ov.runtime.stateful import StatefulDecoder


logger = logging.getLogger(__name__)

PA, SDPA = "PA", "SDPA"  # GenAI's names


class Past(tuple):
    """Stands for the cache, which is inside the model, with what transformers asks a cache for.

    A model has one cache. What stands for an earlier prompt is refused once the model has begun another one.
    """

    is_compileable = False

    def __new__(cls, model: LanguageModel) -> Past:
        past = super().__new__(cls, ((),))
        past._model, past._sequence = model, model._sequence
        return past

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens in each row of the cache, padding included."""
        self.check(self._model)
        return self._model._past_length

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens, padding included."""
        self.check(self._model)
        self._model.cut(length)

    def check(self, model: LanguageModel) -> None:
        """
        Raises:
            `ValueError`: the cache of `model` has other tokens now.
        """
        if model is not self._model or model._sequence is not self._sequence:
            raise ValueError(
                "past_key_values are of an earlier prompt, and the model has begun another one since. A model has one cache. Leave "
                "past_key_values out and give the whole prompt, or use model.chat(): each conversation has a cache of its own."
            )


class LanguageModel(OVModelWithEmbedForCausalLM):
    """The host's language model on paged attention where OpenVINO has that, with logits only where they are asked for.

    The graph it was loaded from stays as it is, for saving and compressing. What is compiled is a copy that shares its weights.

    Args:
        attention_backend: `"PA"`, or `"SDPA"` for attention as the bundle's graph has it.
    """

    _decoder: Decoder | None = None
    _embedding_table: EmbeddingTable | None = None
    _sequence: object = None  # another one for each prompt that begins anew

    def __init__(self, *args, attention_backend: str = PA, **kwargs):
        if attention_backend not in (PA, SDPA):
            raise ValueError(f"ATTENTION_BACKEND is {attention_backend!r}. It may be {PA!r} or {SDPA!r}.")
        self._attention_backend = attention_backend
        super().__init__(*args, **kwargs)
        if self._compile_only:
            self._decoder = StatefulDecoder(self.model)
            self.request = self._decoder.request

    def compile(self) -> None:
        """Compile, and run once: OpenVINO packs the weights when a graph first runs, seconds that belong to loading, at half the memory."""
        if self.request is not None:
            return
        self._decoder = self._compiled_decoder()
        self.request = self._decoder.request
        self._compile_text_emb()
        if isinstance(self.text_emb_model, openvino.Model):
            self._embedding_table = EmbeddingTable.of(self.text_emb_model, lambda ids: self.text_emb_request(ids)[0])
        logger.info("Packing the weights of the language model ...")
        with read_once(weights_file(self.model_save_dir, "language_model")):
            self.forward(torch.zeros(1, 1, self.config.text_config.d_model), logits_to_keep=1)
        self.reset()

    def clear_requests(self) -> None:
        super().clear_requests()
        self._decoder = self._embedding_table = None

    def _compiled_decoder(self) -> Decoder:
        graph = paged(self.model) if self._attention_backend == PA and self._device == "CPU" else None
        if graph is not None:
            try:
                return PagedDecoder(self._compiled(with_logit_positions(graph, axis=0)))
            except RuntimeError as error:  # a processor that it was not written for
                logger.warning(
                    "Paged attention does not compile here; the slower attention takes its place. OpenVINO said: %s", error
                )
        return StatefulDecoder(self._compiled(with_logit_positions(self.model, axis=1)))

    def _compiled(self, graph: openvino.Model) -> openvino.CompiledModel:
        return self._compile_model(graph, self._device, {**self.ov_config}, self.model_save_dir)

    def with_own_cache(self) -> LanguageModel:
        """The same compiled model, with a request and a cache that nobody else uses."""
        other = copy.copy(self)
        other._decoder = type(self._decoder)(self.request.get_compiled_model())
        other.request = other._decoder.request
        other._past_length, other._sequence = 0, object()
        return other

    def reset(self) -> None:
        """Forget all tokens, and give their memory back."""
        self._decoder.free()
        self._past_length, self._sequence = 0, object()

    def cut(self, length: int) -> None:
        """Keep the first `length` tokens, padding included."""
        if length < self._past_length:
            self._decoder.take_back(self._past_length - length)
            self._past_length = length

    @property
    def past(self) -> Past | None:
        """What `forward` takes to go on behind the tokens that it has."""
        return Past(self) if self._past_length else None

    @property
    def piece(self) -> int:
        """How many tokens to give in the next call when a prompt is processed piece by piece, so that it can be cancelled."""
        return self._decoder.piece if self._past_length else self._decoder.first_piece

    def look_up(self, input_ids: torch.LongTensor) -> torch.Tensor | None:
        """Embeddings `(batch, tokens, d_model)` float32 of a few tokens, or `None` where only a call of OpenVINO gives them."""
        if self._embedding_table is None:
            return None
        return torch.from_numpy(self._embedding_table(input_ids.numpy()))

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: tuple | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            inputs_embeds: `(batch, tokens, d_model)` float32.
            attention_mask: `(batch, past + tokens)`, 0 for padding, which has no place in the row. All ones if not given.
            past_key_values: what the last call returned; `None` begins anew. The cache itself is inside.
            logits_to_keep: compute logits of so many last positions only; 0 for all.

        Returns:
            `logits`: `(batch, tokens or logits_to_keep, vocab_size)` float32. Those of padding mean nothing.

        Raises:
            `ValueError`: `attention_mask` is not about these tokens, or `past_key_values` are of other tokens than the cache.
        """
        if self.request is None:
            self.compile()
        batch_size, length = inputs_embeds.shape[:2]
        if past_key_values is None:
            self._decoder.begin(batch_size)
            self._past_length, self._sequence = 0, object()
            self.next_beam_idx = np.arange(batch_size)
        elif isinstance(past_key_values, Past):
            past_key_values.check(self)
        if len(self.next_beam_idx) != batch_size:
            raise ValueError(f"The cache has {len(self.next_beam_idx)} row(s), but {batch_size} row(s) of new tokens were given.")
        shape = (batch_size, self._past_length + length)
        if attention_mask is None:
            attention_mask = torch.ones(shape, dtype=torch.long)
        if attention_mask.shape != shape:
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, expected (batch, past + new tokens): {shape}.")

        wanted = min(logits_to_keep or length, length)
        logits = self._decoder(inputs_embeds.contiguous().numpy(), attention_mask.long().numpy(), self.next_beam_idx, wanted)
        self._past_length += length
        self.next_beam_idx = np.arange(batch_size)  # `generate` sets another order before the next call, if it wants one
        return CausalLMOutputWithPast(logits=torch.from_numpy(logits), past_key_values=self.past)
