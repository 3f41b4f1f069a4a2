"""Run the language model with the attention of the bundle's graph. Every device of OpenVINO can run it.

The state of the request holds one tensor of keys and one of values for each layer, padding included.
"""

from __future__ import annotations

import numpy as np
import openvino

from optimum_llava_ov.runtime.graph import LOGIT_POSITIONS, POSITION_IDS


class StatefulDecoder:
    """Compute logits with the attention of the bundle's graph. See [`Decoder`].

    Args:
        compiled: The bundle's graph, or what [`with_logit_positions`] along axis 1 makes of it.
    """

    attention_backend = "SDPA"  # GenAI's name
    # After earlier tokens, OpenVINO's attention computes one position after the other: a prompt of 2,000 tokens in
    # chunks takes more than twice as long. So the first chunk is long.
    first_chunk_size, chunk_size = 1024, 128

    def __init__(self, compiled: openvino.CompiledModel):
        self.request = compiled.create_infer_request()
        self._inputs = {name for port in compiled.inputs for name in port.get_names()}

    def begin(self, batch_size: int) -> None:
        self.request.reset_state()

    def free(self) -> None:
        self.request.reset_state()

    def crop(self, tokens: int) -> None:
        for state in self.request.query_state():
            kept = state.state.data[:, :, :-tokens]  # (batch, heads, tokens, head size)
            state.state = openvino.Tensor(np.ascontiguousarray(kept))

    def __call__(
        self, inputs_embeds: np.ndarray, attention_mask: np.ndarray, beam_idx: np.ndarray, logits_to_keep: int
    ) -> np.ndarray:
        length = inputs_embeds.shape[1]
        inputs = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "beam_idx": beam_idx.astype(np.int32),
        }
        if LOGIT_POSITIONS in self._inputs:
            inputs[LOGIT_POSITIONS] = np.arange(length - logits_to_keep, length)
        if POSITION_IDS in self._inputs:
            positions = (attention_mask != 0).cumsum(axis=1) - 1  # padding takes no position
            inputs[POSITION_IDS] = np.maximum(positions[:, -length:], 0).astype(np.int64)
        self.request.infer(inputs, share_inputs=True, share_outputs=True)
        # Copy, because the request overwrites its output in the next call
        return self.request.get_tensor("logits").data[:, -logits_to_keep:].copy()
