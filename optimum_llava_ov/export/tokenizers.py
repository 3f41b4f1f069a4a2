"""Export the tokenizer as OpenVINO models, for GenAI and Model Server."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import openvino
import openvino_tokenizers
from openvino_tokenizers.tokenizer_pipeline import RegexNormalizationStep
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from optimum_llava_ov.bundle.layout import TOKENIZERS
from optimum_llava_ov.errors import UnsupportedCheckpointError


if TYPE_CHECKING:
    from transformers import LlavaProcessor


def export_tokenizers(processor: LlavaProcessor, folder: Path) -> None:
    """Write tokenizer and detokenizer as OpenVINO models. They give the same ids and texts as `processor.tokenizer`.

    openvino_tokenizers splits a text at special tokens, then it normalizes the parts between them. Rules that match
    special tokens, such as those of `checkpoint/sentencepiece.py`, need the whole text, so they are moved before the
    split.

    Raises:
        [`UnsupportedCheckpointError`]: the tokenizer has a step that openvino-tokenizers does not support.
    """
    tokenizer, rules = _without_rules(processor.tokenizer)
    try:
        models = openvino_tokenizers.convert_tokenizer(tokenizer, with_detokenizer=True, skip_special_tokens=True)
    except Exception as error:  # openvino-tokenizers has no common error class
        raise UnsupportedCheckpointError(
            f"openvino-tokenizers cannot convert this tokenizer.json ({error}). Take it from the original checkpoint, "
            "or export with --disable-convert-tokenizer: the bundle then runs everywhere except in GenAI."
        ) from error
    _prepend(models[0], rules)
    # GenAI reads the chat template from here if the bundle has no other
    models[0].set_rt_info(processor.chat_template, "chat_template")
    for model, name in zip(models, TOKENIZERS):
        openvino.save_model(model, os.fspath(folder / name))


def _without_rules(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedTokenizerFast, list[tuple[str, str]]]:
    """Remove the regular expressions from the normalizer of a tokenizer.

    Returns:
        A copy without them, and a list of `(pattern, replacement)`.
    """
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    normalizer = values["normalizer"]
    if normalizer is None or normalizer["type"] != "Sequence":
        return tokenizer, []
    steps = normalizer["normalizers"]
    rules = [step for step in steps if step["type"] == "Replace" and "Regex" in step["pattern"]]
    values["normalizer"] = {"type": "Sequence", "normalizers": [step for step in steps if step not in rules]}
    plain = copy.deepcopy(tokenizer)
    plain.backend_tokenizer.normalizer = Tokenizer.from_str(json.dumps(values)).normalizer
    return plain, [(step["pattern"]["Regex"], step["content"]) for step in rules]


def _prepend(model: openvino.Model, rules: list[tuple[str, str]]) -> None:
    """Insert one normalization for each rule between the input text and all nodes that read it."""
    (unpacked,) = (node for node in model.get_ops() if node.get_type_name() == "StringTensorUnpack")
    outputs = unpacked.outputs()
    readers = [output.get_target_inputs() for output in outputs]
    for pattern, replacement in rules:
        outputs = RegexNormalizationStep(pattern, replacement).get_ov_subgraph(list(outputs))
    for targets, output in zip(readers, outputs):
        for target in targets:
            target.replace_source_output(output)
    model.validate_nodes_and_infer_types()
