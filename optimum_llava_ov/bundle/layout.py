"""List the files of a bundle."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from optimum_llava_ov.errors import BundleError


PARTS = {
    "language_model": "openvino_language_model.xml",
    "text_embeddings_model": "openvino_text_embeddings_model.xml",
    "vision_embeddings_model": "openvino_vision_embeddings_model.xml",
}
# Optimum's names of these parts in recipes
LANGUAGE_MODEL = "lm_model"
SMALL_PARTS = ("text_embeddings_model", "vision_embeddings_model")
# Language models with this number of parameters or more are compressed to 8 bits by default, as in Optimum
ONE_BILLION = 1_000_000_000
TOKENIZERS = ("openvino_tokenizer.xml", "openvino_detokenizer.xml")
EXAMPLE = "example.png"  # what the card's snippets ask about
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
    EXAMPLE,
)
FILES = (
    tuple(
        Path(file).with_suffix(suffix).name for file in (*PARTS.values(), *TOKENIZERS) for suffix in (".xml", ".bin")
    )
    + SETTINGS
)

# Optional files of a bundle: measured quality and speed, additional tokens of fine-tuned checkpoints
EXTRA_FILES = ("added_tokens.json", "bench.json", "eval.json", "eval.png")


def weights_file(folder: str | Path, part: str) -> Path:
    """Return the path of a part's weights."""
    return (Path(folder) / PARTS[part]).with_suffix(".bin")


def part_sizes(folder: Path) -> dict[str, int]:
    """Return the size of each part's weights, in bytes."""
    return {part: weights_file(folder, part).stat().st_size for part in PARTS}


def check_bundle(folder: Path, tokenizers: bool = True, unneeded: Collection[str] = ()) -> None:
    """Check that the files of a bundle exist.

    Args:
        folder: folder of the bundle.
        tokenizers: whether the OpenVINO models of the tokenizer, which only GenAI needs, must exist.
        unneeded: names of other files that may be missing.

    Raises:
        [`BundleError`]: files are missing or empty; names them.
    """
    optional = (
        () if tokenizers else tuple(name for name in FILES if "tokenizer." in name and name.startswith("openvino_"))
    )
    optional += (EXAMPLE,)  # bundles of earlier versions do not have it
    missing = [name for name in FILES if name not in (*optional, *unneeded) and not _has_content(folder / name)]
    if missing:
        raise BundleError(f"{folder} is not a complete bundle: it lacks {', '.join(missing)}. Export it again.")


def _has_content(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0
