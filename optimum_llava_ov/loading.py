"""Sessions for the programs, with messages that say what there is."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from optimum_llava_ov.bundle.check import check_readable, load_processor, naming_damage
from optimum_llava_ov.bundle.layout import EXTRA_FILES, FILES, PARTS, TOKENIZERS
from optimum_llava_ov.bundle.staging import complete_replacement
from optimum_llava_ov.chat.session import ChatSession
from optimum_llava_ov.checkpoint.reader import holds_original_checkpoint
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.system.devices import check_device


AUTO, OPENVINO, GENAI = ENGINES = ("auto", "openvino", "genai")


def session_factory(
    bundle: str, device: str = "CPU", ov_config: dict[str, str] | None = None, engine: str = AUTO
) -> Callable[..., ChatSession]:
    """Load a bundle once. What comes back makes a session each time it is called, with the arguments of [`ChatSession`].

    Args:
        engine: "openvino", this package's own model; "genai", OpenVINO GenAI; or "auto", see [`choose_engine`].

    Raises:
        `ValueError`: there is no such device or engine, or the folder is no bundle.
        `ImportError`: the engine is not installed.
    """
    if resolve_engine(bundle, device, engine) == GENAI:
        return _genai_factory(bundle, device, ov_config)
    from optimum_llava_ov.modeling import OVModelForLlavaMPT

    model = OVModelForLlavaMPT.from_pretrained(bundle, device=device, ov_config=ov_config)
    with naming_damage(Path(model.model_save_dir)):
        processor = load_processor(model.model_save_dir)
    return lambda **kwargs: model.chat(processor, **kwargs)


def resolve_engine(bundle: str, device: str, engine: str) -> str:
    """The engine that an option means, once there is such a device and such an engine.

    Raises:
        `ValueError`: there is no such device or engine.
        `ImportError`: the engine is not installed.
    """
    check_device(device)
    complete_replacement(bundle)
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; expected one of {', '.join(ENGINES)}.")
    if engine == AUTO:
        engine = choose_engine(bundle)
    if engine == GENAI:
        try:
            import openvino_genai  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f'The genai engine needs OpenVINO GenAI ({error}). Install it with: pip install "optimum-llava-ov[genai]"'
            ) from error
    return engine


def choose_engine(bundle: str) -> str:
    """GenAI, which is faster, where it is installed and can read the model; else this package's own, which converts, too."""
    if find_spec("openvino_genai") is None:
        return OPENVINO
    if Path(bundle).is_dir():
        return GENAI if all((Path(bundle) / name).exists() for name in (*PARTS.values(), *TOKENIZERS)) else OPENVINO
    return OPENVINO if holds_original_checkpoint(bundle) else GENAI


def bundle_folder(bundle: str, reason: str) -> Path:
    """Folder of a bundle, downloaded if it is on the Hub.

    Raises:
        `ValueError`: it is no bundle. Gives `reason` for why it must be one.
    """
    message = (
        f"{bundle} has no {PARTS['language_model']}, so it is no bundle, and {reason}. "
        f"Convert it first: optimum-cli export openvino --model {bundle} llava-mpt-ov"
    )
    folder = Path(bundle) if Path(bundle).is_dir() else Repository(bundle).download((*FILES, *EXTRA_FILES))
    if not (folder / PARTS["language_model"]).exists():
        raise ValueError(message)
    return folder


def _genai_factory(bundle: str, device: str, ov_config: dict[str, str] | None) -> Callable[..., ChatSession]:
    from transformers import AutoConfig

    from optimum_llava_ov.chat.genai_engine import GenAIEngine, GenAIModel

    folder = bundle_folder(bundle, "the genai engine converts nothing on the fly")
    check_readable(folder, tokenizers=True)
    with naming_damage(folder, tokenizers=True):
        config, processor = AutoConfig.from_pretrained(folder), load_processor(folder)
        model = GenAIModel(folder, device, ov_config)
    return lambda **kwargs: ChatSession(GenAIEngine(model, processor), processor, config, **kwargs)


def sampling_options(temperature: float, top_p: float, max_new_tokens: int) -> dict[str, Any]:
    """As `generate` takes them; a temperature of 0 is the likeliest word each time."""
    if not temperature:
        return {"do_sample": False, "max_new_tokens": max_new_tokens}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
