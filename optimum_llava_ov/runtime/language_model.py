"""The language model of a bundle at run time: a step of `generate` costs what the engine's arithmetic costs, and little else."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset8 as ops
from optimum.intel.openvino.modeling_visual_language import OVModelWithEmbedForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from optimum_llava_ov.bundle.layout import weights_file
from optimum_llava_ov.runtime.embedding_table import EmbeddingTable
from optimum_llava_ov.runtime.mapped import read_once


logger = logging.getLogger(__name__)

FIRST_LOGIT = "first_logit"
POSITIONWISE = ("Add", "Convert", "Gelu", "MVN", "MatMul", "Multiply")  # all that a block has after its attention


class LanguageModel(OVModelWithEmbedForCausalLM):
    """The host's language model, with logits only where they are asked for.

    The graph it was loaded from stays as it is, for saving and compressing. What is compiled is a copy that shares its weights.
    """

    _input_names: frozenset[str] = frozenset()
    _embedding_table: EmbeddingTable | None = None

    @staticmethod
    def _compile_model(model: Any, *args, **kwargs) -> openvino.CompiledModel:
        if isinstance(model, openvino.Model) and _names(model.outputs) == {"logits"}:
            model = with_first_logit(model)
        return OVModelWithEmbedForCausalLM._compile_model(model, *args, **kwargs)

    def compile(self) -> None:
        """Compile, and run once: OpenVINO packs the weights when a graph first runs, seconds that belong to loading, at half the memory."""
        if self.request is not None and self._input_names:
            return
        super().compile()
        self._input_names = _names(self.request.model_inputs)
        if isinstance(self.text_emb_model, openvino.Model):
            self._embedding_table = EmbeddingTable.of(self.text_emb_model, lambda ids: self.text_emb_request(ids)[0])
        logger.info("Packing the weights of the language model ...")
        with read_once(weights_file(self.model_save_dir, "language_model")):
            self.forward(torch.zeros(1, 1, self.config.text_config.d_model), logits_to_keep=1)
        self.request.reset_state()

    def look_up(self, input_ids: torch.LongTensor) -> torch.Tensor | None:
        """Embeddings `(batch, tokens, d_model)` float32 of a few tokens, or `None` where only a call of OpenVINO gives them."""
        if self.request is None or self._embedding_table is None:  # without a request, the table may be that of an earlier graph
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
            attention_mask: `(batch, past + tokens)`, 0 for padding. All ones if not given.
            past_key_values: what the last call returned; `None` begins anew. The cache itself is inside the request.
            logits_to_keep: compute logits of so many last positions only; 0 for all.

        Returns:
            `logits`: `(batch, tokens or logits_to_keep, vocab_size)` float32.
        """
        if self.request is None:
            self.compile()
        batch_size, length = inputs_embeds.shape[:2]
        if past_key_values is None:
            self.request.reset_state()
            self.next_beam_idx = np.arange(batch_size, dtype=np.int32)
            self._past_length = 0
        if attention_mask is None:
            attention_mask = torch.ones(batch_size, self._past_length + length, dtype=torch.long)
        first_logit = max(length - logits_to_keep, 0) if logits_to_keep else 0

        # A prompt goes in at once: where there is a past, OpenVINO's attention takes one position after the other. In pieces,
        # 2,000 tokens take more than twice as long.
        inputs = {
            "inputs_embeds": inputs_embeds.numpy(),
            "attention_mask": attention_mask.long().numpy(),
            "beam_idx": self.next_beam_idx,
        }
        if FIRST_LOGIT in self._input_names:
            inputs[FIRST_LOGIT] = np.array([first_logit])
        if "position_ids" in self._input_names:  # compiled elsewhere; nothing in the graph consumes it
            inputs["position_ids"] = np.zeros((batch_size, length), dtype=np.int64)
        self.request.infer(inputs, share_inputs=True, share_outputs=True)
        self._past_length += length

        # The request overwrites its output at the next step
        logits = torch.from_numpy(self.request.get_tensor("logits").data.copy())
        if FIRST_LOGIT not in self._input_names:
            logits = logits[:, first_logit:]
        return CausalLMOutputWithPast(logits=logits, past_key_values=((),))


def with_first_logit(model: openvino.Model) -> openvino.Model:
    """A copy of the graph, sharing its weights, with logits from a position on: that of the new input `first_logit`, `(1,)` int64.

    The last matrix is 200 million numbers at 7B, and a row of logits is 200 KB; `generate` needs one row of a prompt's thousands.
    What else serves these logits alone, the last block after its attention, is computed for these positions alone, too.
    An input that nothing consumes, `position_ids`, is left out.
    """
    model = model.clone()
    first = ops.parameter([1], np.int64, name=FIRST_LOGIT)
    first.output(0).get_tensor().set_names({FIRST_LOGIT})
    end, one = ops.constant(np.array([np.iinfo(np.int64).max])), ops.constant(np.array([1]))
    cut: dict[str, openvino.Node] = {}
    tail = _positionwise_tail(model)
    for node in tail.values():
        for port in node.inputs():
            source = port.get_source_output()
            name = source.get_node().get_friendly_name()
            if name not in tail and _has_positions(source):
                cut[name] = cut.get(name) or ops.slice(source, first, end, one, one)
                port.replace_source_output(cut[name].output(0))
    model.add_parameters([first])
    for parameter in model.get_parameters():
        if not parameter.output(0).get_target_inputs():
            model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()
    return model


def _positionwise_tail(model: openvino.Model) -> dict[str, openvino.Node]:
    """Nodes, by name, that treat every position by itself and whose results go into the logits and nowhere else."""
    tail = {node.get_friendly_name(): node for node in model.get_results()}
    for node in reversed(model.get_ordered_ops()):
        if node.get_type_name() in POSITIONWISE and _has_positions(node.output(0)):
            consumers = {port.get_node().get_friendly_name() for port in node.output(0).get_target_inputs()}
            if consumers <= tail.keys():
                tail[node.get_friendly_name()] = node
    return tail


def _has_positions(output: openvino.Output) -> bool:
    """Whether it is `(batch, tokens, ...)`, not made of weights alone: their shapes are known."""
    return output.get_partial_shape().is_dynamic


def _names(ports: list[Any]) -> frozenset[str]:
    return frozenset(name for port in ports for name in port.get_names())
