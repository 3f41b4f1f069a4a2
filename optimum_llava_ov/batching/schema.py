"""Check JSON schemas before a request needs them."""

from __future__ import annotations

import re
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from openvino import opset13 as ops

from optimum_llava_ov.batching.options import structured_output


class SchemaChecker:
    """Check JSON schemas with GenAI itself.

    GenAI compiles a schema inside a step of the batch. If it does not accept the schema, the pipeline cannot go on,
    and all its requests are lost. So a schema is first given to a model that only has the tokenizer of the bundle: all
    its logits are 0.

    Args:
        bundle: Folder of the bundle.
    """

    def __init__(self, bundle: Path):
        tokenizer = openvino_genai.Tokenizer(bundle)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "model.xml")
            openvino.save_model(_model_without_weights(len(tokenizer.get_vocab())), file)
            weights = openvino.Tensor(np.fromfile(file.with_suffix(".bin"), dtype=np.uint8))
            graph = file.read_text(encoding="utf-8")
        self._pipeline = openvino_genai.LLMPipeline(graph, weights, tokenizer, "CPU", ATTENTION_BACKEND="SDPA")
        self._turn = threading.Lock()

    def check(self, schema: dict[str, Any]) -> None:
        """Check a schema.

        Raises:
            `ValueError`: GenAI does not accept the schema; says why.
        """
        config = openvino_genai.GenerationConfig(max_new_tokens=1, apply_chat_template=False)
        config.structured_output_config = structured_output(schema)
        try:
            with self._turn:
                self._pipeline.generate("a", config)
        except RuntimeError as error:
            reason = re.sub(r"^.*?\.cc:\d+: (Check failed: \(.*?\) is false: )?", "", " ".join(str(error).split()))
            raise ValueError(f"The JSON schema is not supported: {reason}") from error


def _model_without_weights(vocabulary: int) -> openvino.Model:
    """Build a language model for GenAI whose logits are 0."""
    ids, mask, positions = (ops.parameter([-1, -1], np.int64, name) for name in _INPUTS[:3])
    beams = ops.parameter([-1], np.int32, _INPUTS[3])
    for parameter, name in zip((ids, mask, positions, beams), _INPUTS):
        parameter.output(0).set_names({name})
    shape = ops.concat([ops.shape_of(ids), ops.constant(np.array([vocabulary], dtype=np.int64))], 0)
    logits = ops.broadcast(ops.constant(np.float32(0)), shape)
    logits.output(0).set_names({"logits"})
    return openvino.Model([logits], [ids, mask, positions, beams], "without_weights")


_INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")
