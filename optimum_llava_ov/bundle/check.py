"""Whether the files of a bundle can be read: what is damaged is named, whichever library stumbles over it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import openvino
from transformers import AutoConfig, AutoProcessor

from optimum_llava_ov.bundle.layout import FILES, PARTS, TOKENIZERS, check_bundle
from optimum_llava_ov.errors import BundleError


_AGAIN = "Export it again, or download it again."
# Names of what goes in and comes out of each part
_PORTS = {
    PARTS["language_model"]: ({"inputs_embeds", "attention_mask", "beam_idx"}, {"logits"}),
    PARTS["text_embeddings_model"]: ({"input"}, {"inputs_embeds"}),
    PARTS["vision_embeddings_model"]: ({"pixel_values"}, {"last_hidden_state"}),
}
# Settings without which a bundle would answer something else, or fail only when it answers
_TYPES = {
    "config.json": {"image_token_index": "an integer", "image_seq_length": "an integer", "vision_config": "an object"},
    "generation_config.json": {"eos_token_id": "an integer or a list of them"},
    "preprocessor_config.json": {
        "size": "an object",
        "crop_size": "an object",
        "image_mean": "a list of numbers",
        "image_std": "a list of numbers",
    },
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
    for file in FILES:
        if file.endswith(".json") and (folder / file).exists():
            values = _read_object(folder / file)
            if file == "config.json":
                check_is_llava_mpt(folder, values)
            for name, types in _TYPES.get(file, {}).items():
                if not _is_one_of(types, values.get(name)):
                    raise BundleError(f"{folder / file} has {name}={values.get(name)!r}, which is not {types}. {_AGAIN}")
    template = folder / "chat_template.jinja"
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, jinja2.TemplateSyntaxError) as error:
        raise BundleError(f"{template} is not a template ({error}). {_AGAIN}") from error


def check_is_llava_mpt(name: str | Path, config: dict) -> None:
    """Raises [`BundleError`] if a configuration is another model's."""
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
    for load in (AutoConfig.from_pretrained, AutoProcessor.from_pretrained):
        try:
            load(folder)
        except Exception as error:  # damaged settings make transformers stumble anywhere
            raise BundleError(f"The settings in {folder} do not load: {_reason(error)}. {_AGAIN}") from error
    core = openvino.Core()
    for name in (*PARTS.values(), *TOKENIZERS):
        if (folder / name).exists():
            _check_graph(core, folder / name)


def _check_graph(core: openvino.Core, file: Path) -> None:
    import openvino_tokenizers  # noqa: F401  lets OpenVINO read tokenizers

    try:
        model = core.read_model(file)  # maps the weights, and checks that they are all there
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise BundleError(f"{file} does not load ({reason}). {_AGAIN}") from error
    inputs, outputs = _PORTS.get(file.name, (set(), set()))
    missing = inputs - _names(model.inputs) | outputs - _names(model.outputs)
    if missing:
        raise BundleError(f"{file} has no input or output {', '.join(sorted(missing))}, so it is another graph. {_AGAIN}")


def _names(ports: list[openvino.Output]) -> set[str]:
    return {name for port in ports for name in port.get_names()}


@contextmanager
def naming_damage(folder: Path, tokenizers: bool = False) -> Iterator[None]:
    """Load a bundle in it: if that fails, a [`BundleError`] names the file that is damaged. Other errors stay as they are."""
    try:
        yield
    except BundleError:
        raise
    except Exception:
        check_loads(folder, tokenizers)
        raise


def _read_object(file: Path) -> dict:
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} is not valid JSON ({error}). {_AGAIN}") from error
    if not isinstance(values, dict) or not values:
        found = "an empty object" if values == {} else f"a JSON {type(values).__name__}"
        raise BundleError(f"{file} holds {found}, expected an object with settings. {_AGAIN}")
    return values


def _is_one_of(types: str, value: Any) -> bool:
    if "object" in types:
        return isinstance(value, dict)
    if "list of numbers" in types:
        return isinstance(value, list) and all(isinstance(number, (int, float)) for number in value)
    numbers = value if isinstance(value, list) and "list" in types else [value]
    return all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
