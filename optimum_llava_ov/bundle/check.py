"""Check that the files of a bundle can be read. Errors name the damaged file, whichever library reads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import openvino
import openvino_tokenizers  # noqa: F401  registers the operations of tokenizers with OpenVINO
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoProcessor, LlavaProcessor

from optimum_llava_ov.bundle.layout import FILES, PARTS, TOKENIZERS, check_bundle
from optimum_llava_ov.bundle.tiling import LlavaNextProcessor
from optimum_llava_ov.checkpoint.config import MAX_LAYERS, MAX_VOCABULARY, MAX_WIDTH
from optimum_llava_ov.checkpoint.image_processor import MAX_SIDE, broken_options
from optimum_llava_ov.checkpoint.options import (
    MAX_TOKENIZER_BYTES,
    Rule,
    broken_rules,
    either,
    integer,
    list_of,
    optional,
    read_json,
)
from optimum_llava_ov.errors import BundleError
from optimum_llava_ov.models.image_layout import ImageLayout


_AGAIN = "Export it again, or download it again."
MODEL_TYPES = ("llava", "llava_next")  # of bundles; the second cuts images into tiles
# Names of the inputs and outputs of each part
_PORTS = {
    PARTS["language_model"]: ({"inputs_embeds", "attention_mask", "beam_idx"}, {"logits"}),
    PARTS["text_embeddings_model"]: ({"input"}, {"inputs_embeds"}),
    PARTS["vision_embeddings_model"]: ({"pixel_values"}, {"last_hidden_state"}),
}
_OBJECT = Rule(lambda value: isinstance(value, dict), "an object")
_LIST = Rule(lambda value: isinstance(value, list), "a list")
_TOKEN = integer(0, MAX_VOCABULARY)
# Settings of our bundles that would cause wrong answers or late errors if they were missing. transformers checks the
# others. Bundles that Optimum writes leave out what has the default of transformers.
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
# By the names that transformers uses for every model. A model may store them under names of its own.
_RULES_OF_PARTS = {
    "text_config": {"num_hidden_layers": integer(1, MAX_LAYERS), "hidden_size": integer(1, MAX_WIDTH)},
    "vision_config": {"image_size": integer(1, MAX_SIDE)},
}
_NOT_READ = ("README.md", "openvino_config.json")  # files that are not needed to run a bundle
# Files of our bundles that others leave out
_NOT_IN_OTHERS = (*_NOT_READ, "special_tokens_map.json", "chat_template.jinja", "preprocessor_config.json")


def check_readable(folder: Path, tokenizers: bool = False) -> None:
    """Check that the files exist and that the settings are those of a LLaVA bundle. This is fast.

    Args:
        folder: folder of the bundle.
        tokenizers: whether the OpenVINO models of the tokenizer, which only GenAI needs, must exist.

    Raises:
        [`BundleError`]: a file is missing or damaged; names it.
    """
    check_bundle(folder, tokenizers, unneeded=_NOT_IN_OTHERS)
    if is_our_bundle(check_settings(folder)):
        check_bundle(folder, tokenizers, unneeded=_NOT_READ)
    template = folder / "chat_template.jinja"
    if not template.exists():
        return
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
    files = [file for file in files if file.exists()]
    if not files or files[0].name != "config.json":
        raise BundleError(f"{folder} has no config.json, so it is not a bundle. {_AGAIN}")
    values = _read_settings(files[0], is_ours=True)
    for file in files[1:]:
        _read_settings(file, is_our_bundle(values))
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # damaged settings make transformers stumble anywhere
        raise BundleError(f"{folder / 'config.json'} does not load: {_reason(error)}. {_AGAIN}") from error
    return values


def is_our_bundle(config: dict[str, Any]) -> bool:
    """Return whether the `config.json` of a LLaVA bundle was written by this package, not by Optimum."""
    text_config = config.get("text_config")
    return "converted_from" in config or (isinstance(text_config, dict) and text_config.get("model_type") == "mpt")


def _read_settings(file: Path, is_ours: bool) -> dict[str, Any]:
    values = read_json(file, MAX_TOKENIZER_BYTES, BundleError)
    if file.name == "config.json":
        check_is_llava(file.parent, values)
        is_ours = is_our_bundle(values)
    if not values:
        raise BundleError(f"{file} holds an empty object, expected settings. {_AGAIN}")
    problems = _broken_rules(values, _RULES.get(file.name, {}), is_ours)
    if file.name == "config.json" and not problems:
        for part, rules in _RULES_OF_PARTS.items():
            settings = values.get(part) or {}
            names = _own_names(settings.get("model_type"))
            own_rules = {names.get(name, name): rule for name, rule in rules.items()}
            problems += _broken_rules(settings, own_rules, is_ours, f"{part}.")
    if file.name == "preprocessor_config.json":
        problems = problems or broken_options(values)
    if file.name == "processor_config.json" and isinstance(image_processor := values.get("image_processor"), dict):
        problems += broken_options(image_processor)
    if problems:
        raise BundleError(f"{file} does not belong to a bundle: {'; '.join(problems)}. {_AGAIN}")
    return values


def _own_names(model_type: Any) -> dict[str, str]:
    """Return the names of options that a model type of transformers stores under names of its own."""
    is_known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    return CONFIG_MAPPING[model_type].attribute_map if is_known else {}


def _broken_rules(values: dict[str, Any], rules: dict[str, Rule], is_ours: bool, prefix: str = "") -> list[str]:
    """Describe options with wrong values. Bundles of others may leave options out."""
    return broken_rules(values, rules if is_ours else {name: optional(rule) for name, rule in rules.items()}, prefix)


def check_is_llava(name: str | Path, config: dict[str, Any], text_model_type: str | None = None) -> None:
    """Check that a configuration is that of a LLaVA bundle.

    Args:
        text_model_type: the only type of language model that is accepted.

    Raises:
        [`BundleError`]: it is the configuration of another model.
    """
    text_config = config.get("text_config")
    found = text_config.get("model_type") if isinstance(text_config, dict) else None
    if config.get("model_type") not in MODEL_TYPES or not isinstance(found, str):
        raise BundleError(
            f"{name} is a {config.get('model_type')!r} model with a {found!r} language model, not a LLaVA bundle. "
            "Load it with optimum.intel.OVModelForVisualCausalLM."
        )
    if text_model_type not in (None, found):
        raise BundleError(
            f"{name} is a LLaVA with a {found!r} language model, expected {text_model_type!r}. Load it with "
            "optimum_llava_ov.OVModelForLlava."
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

    Image tokens are counted as in the original, for which transformers' own class has another number at few sizes.

    Raises:
        [`BundleError`]: the processor or the tokenizer does not load.
    """
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        return _counting_as_original(processor, folder)
    except Exception as error:  # tokenizers raises plain `Exception`
        raise BundleError(
            f"The processor or the tokenizer in {folder} does not load: {_reason(error)}. {_AGAIN}"
        ) from error


def _counting_as_original(processor: Any, folder: str | Path) -> Any:
    if not isinstance(processor, transformers.LlavaNextProcessor):
        return processor
    tiling = ImageLayout.of_bundle(AutoConfig.from_pretrained(folder)).tiling
    return processor if tiling is None else LlavaNextProcessor.like(processor, tiling)


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
