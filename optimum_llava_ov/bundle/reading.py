"""A bundle's settings and graphs, read with errors that name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openvino
from transformers import AutoConfig, AutoProcessor, LlavaProcessor

from optimum_llava_ov.bundle.layout import PARTS, SETTINGS
from optimum_llava_ov.checkpoint.config import MAX_LAYERS, MAX_VOCABULARY, MAX_WIDTH
from optimum_llava_ov.checkpoint.image_processor import MAX_SIDE
from optimum_llava_ov.checkpoint.options import MAX_TOKENIZER_BYTES, Rule, broken_rules, integer, read_json
from optimum_llava_ov.errors import BundleError


_ADVICE = "Export it again, or download it again."

_OBJECT = Rule(lambda value: isinstance(value, dict), "an object")
# What every engine, and the card, needs of `config.json`; transformers checks the rest
_OPTIONS = {
    "text_config": _OBJECT,
    "vision_config": _OBJECT,
    "image_seq_length": integer(1, 1 << 20),
    "image_token_index": integer(0, MAX_VOCABULARY),
}
_TEXT_OPTIONS = {"n_layers": integer(1, MAX_LAYERS), "d_model": integer(1, MAX_WIDTH)}
_VISION_OPTIONS = {"image_size": integer(1, MAX_SIDE)}


def read_settings(folder: Path) -> dict[str, Any]:
    """`config.json` of a bundle, after a look at all of its settings.

    Raises:
        [`BundleError`]: a file is not a JSON object, or `config.json` is not that of a bundle; names it.
    """
    for name in SETTINGS:
        if name.endswith(".json") and (folder / name).is_file():
            read_json(folder / name, MAX_TOKENIZER_BYTES, BundleError)
    file = folder / "config.json"
    config = read_json(file, error_class=BundleError)
    problems = broken_rules(config, _OPTIONS)
    if not problems:
        problems = broken_rules(config["text_config"], _TEXT_OPTIONS, "text_config.")
        problems += broken_rules(config["vision_config"], _VISION_OPTIONS, "vision_config.")
    if problems:
        raise BundleError(f"{file} is not the configuration of a bundle: {'; '.join(problems)}. {_ADVICE}")
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever transformers makes of it
        raise BundleError(f"{file} is not a configuration that loads ({_last_line(error)}). {_ADVICE}") from error
    return config


def load_processor(folder: str | Path) -> LlavaProcessor:
    """Tokenizer and image processor of a bundle. Its settings may not name code.

    Raises:
        [`BundleError`]: they do not load.
    """
    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain `Exception`
        raise BundleError(f"The processor or the tokenizer in {folder} does not load ({_last_line(error)}). {_ADVICE}") from error


def read_graphs(folder: Path, names: tuple[str, ...] = tuple(PARTS.values())) -> list[openvino.Model]:
    """The graphs of a bundle, whose weights are mapped.

    Raises:
        [`BundleError`]: a graph, or its weights, are not there or damaged; names the file.
    """
    core, graphs = openvino.Core(), []
    for name in names:
        try:
            graphs.append(core.read_model(folder / name))  # and checks that all of the weights are there
        except RuntimeError as error:
            raise BundleError(f"{folder / name} does not load ({_last_line(error)}). {_ADVICE}") from error
    return graphs


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
