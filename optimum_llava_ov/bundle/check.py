"""Check that the files of a bundle can be read. Errors name the damaged file, whichever library reads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import openvino
import openvino_tokenizers  # noqa: F401  registers the operations of tokenizers with OpenVINO
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
# Names of the inputs and outputs of each part
_PORTS = {
    PARTS["language_model"]: ({"inputs_embeds", "attention_mask", "beam_idx"}, {"logits"}),
    PARTS["text_embeddings_model"]: ({"input"}, {"inputs_embeds"}),
    PARTS["vision_embeddings_model"]: ({"pixel_values"}, {"last_hidden_state"}),
}
_OBJECT = Rule(lambda value: isinstance(value, dict), "an object")
_LIST = Rule(lambda value: isinstance(value, list), "a list")
_TOKEN = integer(0, MAX_VOCABULARY)
# Settings that would cause wrong answers or late errors if they were missing. transformers checks the others.
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
_NOT_READ = ("README.md", "openvino_config.json")  # files that are not needed to run a bundle


def check_readable(folder: Path, tokenizers: bool = False) -> None:
    """Check that the files exist and that the settings are those of a LLaVA-MPT bundle. This is fast.

    Args:
        folder: folder of the bundle.
        tokenizers: whether the OpenVINO models of the tokenizer, which only GenAI needs, must exist.

    Raises:
        [`BundleError`]: a file is missing or damaged; names it.
    """
    check_bundle(folder, tokenizers, unneeded=_NOT_READ)
    check_settings(folder)
    template = folder / "chat_template.jinja"
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, jinja2.TemplateSyntaxError) as error:
        raise BundleError(f"{template} is not a template ({error}). {_AGAIN}") from error


def check_settings(folder: Path) -> dict[str, Any]:
    """Check the JSON files of a bundle, those that are there.

    Returns:
        The content of `config.json`.

    Raises:
        [`BundleError`]: a file is damaged, or does not belong to a bundle; names it.
    """
    files = [folder / name for name in FILES if name.endswith(".json")]
    settings = {file.name: _read_settings(file) for file in files if file.exists()}
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # damaged settings make transformers stumble anywhere
        raise BundleError(f"{folder / 'config.json'} does not load: {_reason(error)}. {_AGAIN}") from error
    return settings["config.json"]


def _read_settings(file: Path) -> dict[str, Any]:
    values = read_json(file, MAX_TOKENIZER_BYTES, BundleError)
    if file.name == "config.json":
        check_is_llava_mpt(file.parent, values)
    if not values:
        raise BundleError(f"{file} holds an empty object, expected settings. {_AGAIN}")
    problems = broken_rules(values, _RULES.get(file.name, {}))
    if file.name == "config.json" and not problems:
        for part, rules in _RULES_OF_PARTS.items():
            problems += broken_rules(values[part], rules, f"{part}.")
    if file.name == "preprocessor_config.json":
        problems = problems or broken_options(values)
    if file.name == "processor_config.json" and isinstance(image_processor := values.get("image_processor"), dict):
        problems += broken_options(image_processor)
    if problems:
        raise BundleError(f"{file} does not belong to a bundle: {'; '.join(problems)}. {_AGAIN}")
    return values


def check_is_llava_mpt(name: str | Path, config: dict[str, Any]) -> None:
    """Check that a configuration is that of a LLaVA-MPT bundle.

    Raises:
        [`BundleError`]: it is the configuration of another model.
    """
    text_config = config.get("text_config")
    text_model_type = text_config.get("model_type") if isinstance(text_config, dict) else None
    if (config.get("model_type"), text_model_type) != ("llava", "mpt"):
        raise BundleError(
            f"{name} is a {config.get('model_type')!r} model with a {text_model_type!r} language model, not a "
            "LLaVA-MPT bundle. Load it with optimum.intel.OVModelForVisualCausalLM."
        )


def check_loads(folder: Path, tokenizers: bool = False) -> None:
    """Check that every file of a bundle loads with the library that uses it.

    Raises:
        [`BundleError`]: a file does not load; names it and the reason.
    """
    check_readable(folder, tokenizers)
    load_processor(folder)
    for name in (*PARTS.values(), *TOKENIZERS):
        if (folder / name).exists():
            read_graph(folder / name)


def load_processor(folder: str | Path) -> LlavaProcessor:
    """Load tokenizer and image processor of a bundle. Code that its settings name is not run.

    Raises:
        [`BundleError`]: the processor or the tokenizer does not load.
    """
    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain `Exception`
        raise BundleError(
            f"The processor or the tokenizer in {folder} does not load: {_reason(error)}. {_AGAIN}"
        ) from error


def read_graph(file: Path) -> openvino.Model:
    """Read a graph of a bundle. Its weights are mapped.

    Raises:
        [`BundleError`]: the graph does not load, or lacks the inputs and outputs of its part.
    """
    try:
        model = openvino.Core().read_model(file)  # maps the weights and checks their size
    except (RuntimeError, UnicodeDecodeError) as error:  # the message quotes names in the file, whatever their bytes
        reason = str(error).strip().splitlines()[-1]
        raise BundleError(f"{file} does not load ({reason}). {_AGAIN}") from error
    inputs, outputs = _PORTS.get(file.name, (set(), set()))
    missing = inputs - _names(model.inputs) | outputs - _names(model.outputs)
    if missing:
        raise BundleError(
            f"{file} has no input or output {', '.join(sorted(missing))}, so it is another graph. {_AGAIN}"
        )
    return model


def _names(ports: list[openvino.Output]) -> set[str]:
    return {name for port in ports for name in port.get_names()}


@contextmanager
def naming_damage(folder: Path, tokenizers: bool = False) -> Iterator[None]:
    """Raise a [`BundleError`] that names the damaged file if loading a bundle in this context fails.

    If no file is damaged, the original error is raised.
    """
    try:
        yield
    except BundleError:
        raise
    except Exception as error:
        check_loads(folder, tokenizers)
        if isinstance(error, RuntimeError):  # of OpenVINO or GenAI
            raise BundleError(
                f"{folder} does not load: {_reason(error)}. Check the device and its options (ov_config). If these "
                f"are right, a file of the bundle is damaged. {_AGAIN}"
            ) from error
        raise


@contextmanager
def naming_failure() -> Iterator[None]:
    """Turn errors of OpenVINO into a [`BundleError`] while a bundle runs. Other errors do not change."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(("Exception from ", "Check '")):  # OpenVINO's errors begin so
            raise
        raise BundleError(
            f"OpenVINO cannot run the bundle: {_reason(error)}. If the device has memory left, a file of the bundle "
            f"is damaged. {_AGAIN}"
        ) from error


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
