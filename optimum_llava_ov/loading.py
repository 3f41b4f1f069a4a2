"""Load a bundle or a checkpoint by its name into an engine, and make chat sessions with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from optimum_llava_ov.bundle.check import check_readable, load_processor, naming_damage
from optimum_llava_ov.bundle.describe import describe_bundle
from optimum_llava_ov.bundle.layout import EXTRA_FILES, FILES, PARTS, TOKENIZERS
from optimum_llava_ov.bundle.staging import complete_replacement
from optimum_llava_ov.chat.engine import Engine
from optimum_llava_ov.chat.openvino_engine import OpenVINOEngine
from optimum_llava_ov.chat.session import ChatSession
from optimum_llava_ov.checkpoint.reader import holds_original_checkpoint
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.errors import BundleError
from optimum_llava_ov.kernels.extension import is_faster
from optimum_llava_ov.system.devices import check_device


AUTO, OPENVINO, GENAI = ENGINES = ("auto", "openvino", "genai")


def session_factory(
    bundle: str, device: str = "CPU", ov_config: dict[str, str] | None = None, engine: str = AUTO
) -> Callable[..., ChatSession]:
    """Load a bundle once, and return a function that makes sessions.

    The function takes the arguments of [`ChatSession`]. Its sessions share the loaded model. The arguments and errors
    of this function are those of [`load_engine`].
    """
    return partial(ChatSession, load_engine(bundle, device, ov_config, engine))


def load_engine(
    bundle: str | Repository,
    device: str = "CPU",
    ov_config: dict[str, str] | None = None,
    engine: str = AUTO,
    prefix_caching: bool = True,
) -> Engine:
    """Load a bundle into an engine.

    Args:
        engine: "openvino" (this package's own model), "genai" (OpenVINO GenAI) or "auto" (see [`choose_engine`]).
        prefix_caching: Whether the engine reuses the caches of earlier prompts that begin alike.

    Raises:
        `ValueError`: The device or the engine does not exist, or the folder is not a bundle.
        `ImportError`: The engine is not installed.
    """
    repository, engine = resolve_engine(bundle, device, engine)
    if engine == GENAI:
        from optimum_llava_ov.chat.genai_engine import GenAIEngine

        folder = bundle_folder(repository, "The genai engine does not convert checkpoints.")
        check_readable(folder, tokenizers=True)
        with naming_damage(folder, tokenizers=True):
            return GenAIEngine(folder, device, ov_config, prefix_caching)
    from optimum_llava_ov.modeling import OVModelForLlava

    model = OVModelForLlava.from_pretrained(repository, device=device, ov_config=ov_config)
    model.prefix_caching = prefix_caching
    with naming_damage(Path(model.model_save_dir)):
        return OpenVINOEngine(model, load_processor(model.model_save_dir))


def located(bundle: str | Path | Repository) -> Repository:
    """Return the repository of a bundle or a checkpoint. On the Hub, ask once which commit it has now."""
    return Repository.of(bundle).at_one_commit("config.json")


def resolve_engine(bundle: str | Path | Repository, device: str, engine: str) -> tuple[Repository, str]:
    """Check the device and the engine, and find the bundle.

    Returns:
        The repository of the bundle, and the name of the engine. "auto" is resolved by [`choose_engine`].

    Raises:
        `ValueError`: The device or the engine does not exist.
        `ImportError`: The engine is not installed.
    """
    check_device(device)
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}. Expected one of {', '.join(ENGINES)}.")
    repository = located(bundle)
    complete_replacement(repository.name)
    if engine == AUTO:
        engine = choose_engine(repository)
    if engine == GENAI:
        try:
            import openvino_genai  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"The genai engine needs OpenVINO GenAI ({error}). "
                'Install it with: pip install "optimum-llava-ov[genai]"'
            ) from error
    return repository, engine


def choose_engine(bundle: Repository) -> str:
    """Return "genai" if OpenVINO GenAI is installed and can read the model; else "openvino".

    GenAI starts faster, and each token takes about the same time. This package's own engine also reads original
    checkpoints, which it converts. It is faster for compressed weights on processors with AVX2 and without VNNI.
    """
    if find_spec("openvino_genai") is None:
        return OPENVINO
    if bundle.is_local:
        if is_faster() and _is_compressed(bundle.folder):
            return OPENVINO
        return GENAI if all((bundle.folder / name).exists() for name in (*PARTS.values(), *TOKENIZERS)) else OPENVINO
    return OPENVINO if holds_original_checkpoint(bundle) else GENAI


def _is_compressed(folder: Path) -> bool:
    try:
        return describe_bundle(folder).precision.startswith("int")
    except BundleError:  # whoever loads it says what is wrong
        return False


def bundle_folder(bundle: Repository, reason: str) -> Path:
    """Return the folder of a bundle. Download the bundle if it is on the Hub.

    Args:
        reason: A sentence that says why a bundle is needed; part of the error message.

    Raises:
        `ValueError`: It is not a bundle.
    """
    message = (
        f"{bundle.name} is not a bundle, because it has no {PARTS['language_model']}. {reason} "
        f"Convert it first: optimum-cli export openvino --model {bundle.name} llava-ov"
    )
    folder = bundle.folder if bundle.is_local else bundle.download((*FILES, *EXTRA_FILES))
    if not (folder / PARTS["language_model"]).exists():
        raise ValueError(message)
    return folder
