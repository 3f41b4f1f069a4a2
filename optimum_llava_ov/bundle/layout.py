"""The files of a bundle."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from optimum_llava_ov.errors import BundleError


PARTS = {
    "language_model": "openvino_language_model.xml",
    "text_embeddings_model": "openvino_text_embeddings_model.xml",
    "vision_embeddings_model": "openvino_vision_embeddings_model.xml",
}
# Optimum's names of the same parts, where recipes speak of them
LANGUAGE_MODEL = "lm_model"
SMALL_PARTS = ("text_embeddings_model", "vision_embeddings_model")
# A language model of so many parameters is compressed to 8 bits unless told otherwise, as all models are by Optimum
ONE_BILLION = 1_000_000_000
TOKENIZERS = ("openvino_tokenizer.xml", "openvino_detokenizer.xml")
SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    # transformers 5 writes only the first, GenAI reads only the second
    "processor_config.json",
    "preprocessor_config.json",
    "openvino_config.json",
    "README.md",
)
FILES = (
    tuple(
        Path(file).with_suffix(suffix).name for file in (*PARTS.values(), *TOKENIZERS) for suffix in (".xml", ".bin")
    )
    + SETTINGS
)

# Belong to a bundle where they are there: measured quality, tokens of fine-tuned checkpoints
EXTRA_FILES = ("added_tokens.json", "eval.json", "eval.png")


def weights_file(folder: str | Path, part: str) -> Path:
    return (Path(folder) / PARTS[part]).with_suffix(".bin")


def part_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each part's weights."""
    return {part: weights_file(folder, part).stat().st_size for part in PARTS}


def check_bundle(folder: Path, tokenizers: bool = True, unneeded: Collection[str] = ()) -> None:
    """
    Args:
        tokenizers: whether the tokenizers' OpenVINO models, which only GenAI needs, must be there.
        unneeded: names of more files that need not be there.

    Raises:
        [`BundleError`]: `folder` lacks files, or has empty ones; names them.
    """
    optional = (
        () if tokenizers else tuple(name for name in FILES if "tokenizer." in name and name.startswith("openvino_"))
    )
    missing = [name for name in FILES if name not in (*optional, *unneeded) and not _is_whole(folder / name)]
    if missing:
        raise BundleError(f"{folder} is not a whole bundle: it lacks {', '.join(missing)}. Export it again.")


def _is_whole(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0
