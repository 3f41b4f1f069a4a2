"""Whether a bundle can be loaded: what is damaged is named, whichever library stumbles over it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import openvino

from optimum_llava_ov.bundle.layout import PARTS, TOKENIZERS, check_bundle
from optimum_llava_ov.bundle.reading import load_processor, read_graphs, read_settings
from optimum_llava_ov.checkpoint.options import read_json
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
    """Check what costs next to nothing: the files are there, and the settings are those of a LLaVA-MPT.

    Args:
        tokenizers: whether the tokenizers' OpenVINO models, which only GenAI needs, must be there.

    Raises:
        [`BundleError`]: names the file.
    """
    check_bundle(folder, tokenizers, unneeded=_NOT_READ)
    check_is_llava_mpt(folder, read_json(folder / "config.json", error_class=BundleError))
    read_settings(folder)
    file = folder / "generation_config.json"
    ends = read_json(file, error_class=BundleError).get("eos_token_id")
    if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends])):
        raise BundleError(f"{file} has eos_token_id={ends!r}, expected an integer or a list of them. {_AGAIN}")
    template = folder / "chat_template.jinja"
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, jinja2.TemplateSyntaxError) as error:
        raise BundleError(f"{template} is not a template ({error}). {_AGAIN}") from error


def check_is_llava_mpt(name: str | Path, config: dict[str, Any]) -> None:
    """Refuse another model's configuration.

    Raises:
        [`BundleError`]: says which model it is.
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
    import openvino_tokenizers  # noqa: F401  lets OpenVINO read tokenizers

    check_readable(folder, tokenizers)
    load_processor(folder)
    names = tuple(name for name in (*PARTS.values(), *TOKENIZERS) if (folder / name).exists())
    for name, model in zip(names, read_graphs(folder, names)):
        inputs, outputs = _PORTS.get(name, (set(), set()))
        missing = inputs - _names(model.inputs) | outputs - _names(model.outputs)
        if missing:
            raise BundleError(
                f"{folder / name} has no input or output {', '.join(sorted(missing))}, so it is another graph. {_AGAIN}"
            )


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


def _names(ports: list[openvino.Output]) -> set[str]:
    return {name for port in ports for name in port.get_names()}
