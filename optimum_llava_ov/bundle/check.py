"""Whether the files of a bundle can be read: what is damaged is named, whichever library stumbles over it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openvino
import openvino_tokenizers  # noqa: F401  lets OpenVINO read tokenizers
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
_NOT_READ = ("README.md", "openvino_config.json")  # by nothing that runs a bundle


def check_readable(folder: Path, tokenizers: bool = False) -> None:
    """Check what costs next to nothing: the files are there, and the settings are JSON objects of a LLaVA-MPT.

    Args:
        tokenizers: whether the tokenizers' OpenVINO models, which only GenAI needs, must be there.

    Raises:
        [`BundleError`]: names the file.
    """
    check_bundle(folder, tokenizers, unneeded=_NOT_READ)
    settings = {file: _read_object(folder / file) for file in FILES if file.endswith(".json") and (folder / file).exists()}
    config = settings["config.json"]
    check_is_llava_mpt(folder, config)
    for name in ("image_token_index", "image_seq_length"):
        if not isinstance(config.get(name), int):
            raise BundleError(f"{folder / 'config.json'} has {name}={config.get(name)!r}, expected an integer. {_AGAIN}")


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
    if not isinstance(values, dict):
        raise BundleError(f"{file} is a JSON {type(values).__name__}, expected an object. {_AGAIN}")
    return values


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).rstrip(".")
