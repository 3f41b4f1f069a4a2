"""Whether the files of a bundle can be read: what is damaged is named, whichever library stumbles over it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import openvino
import openvino_tokenizers  # noqa: F401  lets OpenVINO read tokenizers
from transformers import AutoConfig, AutoProcessor, LlavaProcessor

from optimum_llava_ov.bundle.layout import FILES, PARTS, TOKENIZERS, check_bundle
from optimum_llava_ov.checkpoint.config import MAX_LAYERS, MAX_VOCABULARY, MAX_WIDTH
from optimum_llava_ov.checkpoint.image_processor import MAX_SIDE, broken_options
from optimum_llava_ov.checkpoint.options import (
    MAX_TOKENIZER_BYTES,
    Rule,
    broken_rules,
    either,
    integer,
    list_of,
    read_json,
)
from optimum_llava_ov.errors import BundleError


_AGAIN = "Export it again, or download it again."
# Names of what goes in and comes out of each part
_PORTS = {
    PARTS["language_model"]: ({"inputs_embeds", "attention_mask", "beam_idx"}, {"logits"}),
    PARTS["text_embeddings_model"]: ({"input"}, {"inputs_embeds"}),
    PARTS["vision_embeddings_model"]: ({"pixel_values"}, {"last_hidden_state"}),
}
_OBJECT = Rule(lambda value: isinstance(value, dict), "an object")
_LIST = Rule(lambda value: isinstance(value, list), "a list")
_TOKEN = integer(0, MAX_VOCABULARY)
# Settings without which a bundle would answer something else, or fail only when it answers. transformers checks the rest.
_RULES = {
    "config.json": {
        "text_config": _OBJECT,
        "vision_config": _OBJECT,
        "image_seq_length": integer(1, 1 << 20),
        "image_token_index": _TOKEN,
    },
    "generation_config.json": {"eos_token_id": either(_TOKEN, list_of(_TOKEN))},
    "preprocessor_config.json": {"size": _OBJECT, "crop_size": _OBJECT, "image_mean": _LIST, "image_std": _LIST},
}
_RULES_OF_PARTS = {
    "text_config": {"n_layers": integer(1, MAX_LAYERS), "d_model": integer(1, MAX_WIDTH)},
    "vision_config": {"image_size": integer(1, MAX_SIDE)},
}
_NOT_READ = ("README.md", "openvino_config.json")  # by nothing that runs a bundle


def check_readable(folder: Path, tokenizers: bool = False) -> None:
    """Check what costs next to nothing: the files are there, and the settings are JSON objects of a LLaVA-MPT.

    Args:
        tokenizers: whether the tokenizers' OpenVINO models, which only GenAI needs, must be there.

    Raises:
        [`BundleError`]: names the file.
    """
    check_bundle(folder, tokenizers, unneeded=_NOT_READ)
    for name in FILES:
        if name.endswith(".json") and (folder / name).exists():
            read_settings(folder / name)
    template = folder / "chat_template.jinja"
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, jinja2.TemplateSyntaxError) as error:
        raise BundleError(f"{template} is not a template ({error}). {_AGAIN}") from error


def read_settings(file: Path) -> dict[str, Any]:
    """Read one of the JSON files of a bundle.

    Raises:
        [`BundleError`]: it is damaged, or not that of a bundle.
    """
    values = read_json(file, MAX_TOKENIZER_BYTES, BundleError)
    if not values:
        raise BundleError(f"{file} holds an empty object, expected one with settings. {_AGAIN}")
    problems = broken_rules(values, _RULES.get(file.name, {}))
    if file.name == "config.json" and not problems:
        check_is_llava_mpt(file.parent, values)
        for part, rules in _RULES_OF_PARTS.items():
            problems += broken_rules(values[part], rules, f"{part}.")
    if file.name == "preprocessor_config.json":
        problems = problems or broken_options(values)
    if file.name == "processor_config.json" and isinstance(image_processor := values.get("image_processor"), dict):
        problems += broken_options(image_processor)
    if problems:
        raise BundleError(f"{file} is not that of a bundle: {'; '.join(problems)}. {_AGAIN}")
    return values


def check_is_llava_mpt(name: str | Path, config: dict[str, Any]) -> None:
    """Check that a configuration is that of a LLaVA-MPT bundle.

    Raises:
        [`BundleError`]: it is another model's.
    """
    text_config = config.get("text_config")
    text_model_type = text_config.get("model_type") if isinstance(text_config, dict) else None
    if (config.get("model_type"), text_model_type) != ("llava", "mpt"):
        raise BundleError(
            f"{name} is a {config.get('model_type')!r} model around a {text_model_type!r} language model, not a LLaVA-MPT bundle. Load it "
            "with optimum.intel.OVModelForVisualCausalLM."
        )


def check_loads(folder: Path, tokenizers: bool = False) -> None:
    """Check that every library reads its files.

    Raises:
        [`BundleError`]: names the file, and what its library says about it.
    """
    check_readable(folder, tokenizers)
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # damaged settings make transformers stumble anywhere
        raise BundleError(f"{folder / 'config.json'} does not load: {_reason(error)}. {_AGAIN}") from error
    load_processor(folder)
    for name in (*PARTS.values(), *TOKENIZERS):
        if (folder / name).exists():
            read_graph(folder / name)


def load_processor(folder: str | Path) -> LlavaProcessor:
    """Load tokenizer and image processor of a bundle. Its settings may not name code.

    Raises:
        [`BundleError`]: they do not load.
    """
    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain `Exception`
        raise BundleError(f"The processor or the tokenizer in {folder} does not load: {_reason(error)}. {_AGAIN}") from error


def read_graph(file: Path) -> openvino.Model:
    """Read a graph of a bundle. Its weights are mapped.

    Raises:
        [`BundleError`]: it does not load, or is another graph than its name says.
    """
    try:
        model = openvino.Core().read_model(file)  # maps the weights, and checks that they are all there
    except (RuntimeError, UnicodeDecodeError) as error:  # it cites names of the file, of whatever bytes
        reason = str(error).strip().splitlines()[-1]
        raise BundleError(f"{file} does not load ({reason}). {_AGAIN}") from error
    inputs, outputs = _PORTS.get(file.name, (set(), set()))
    missing = inputs - _names(model.inputs) | outputs - _names(model.outputs)
    if missing:
        raise BundleError(f"{file} has no input or output {', '.join(sorted(missing))}, so it is another graph. {_AGAIN}")
    return model


def _names(ports: list[openvino.Output]) -> set[str]:
    return {name for port in ports for name in port.get_names()}


@contextmanager
def naming_damage(folder: Path, tokenizers: bool = False) -> Iterator[None]:
    """Load a bundle in it: if that fails, a [`BundleError`] names the file that is damaged. Other errors stay as they are."""
    try:
        yield
    except BundleError:
        raise
    except Exception as error:
        check_loads(folder, tokenizers)
        if isinstance(error, RuntimeError):  # of OpenVINO or GenAI
            raise BundleError(
                f"{folder} does not load: {_reason(error)}. Check the device and its options (ov_config). If nothing is wrong with "
                f"these, a file of the bundle is damaged. {_AGAIN}"
            ) from error
        raise


@contextmanager
def naming_failure() -> Iterator[None]:
    """Run a bundle in it: if OpenVINO fails, a [`BundleError`] says so. Other errors stay as they are."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(("Exception from ", "Check '")):  # as all of OpenVINO's do
            raise
        raise BundleError(
            f"OpenVINO cannot run the bundle: {_reason(error)}. If the device has memory left, a file of the bundle is damaged. {_AGAIN}"
        ) from error


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
