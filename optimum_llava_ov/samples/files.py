"""Read prompts with images from a folder or a JSONL file, for calibration and evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from optimum_llava_ov.images import see_image


# Keys that data sets use, in the order in which they are searched
_IMAGE_KEYS = ("image", "images", "image_path", "image_file", "file_name")
_PROMPT_KEYS = ("prompt", "question", "text", "instruction", "query", "caption")
_ANSWER_KEYS = ("answer", "response", "output")
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

# For images without a question
DEFAULT_PROMPTS = (
    "Describe the picture in detail.",
    "What is in this picture?",
    "What stands out in this picture, and why?",
)


@dataclass(frozen=True)
class Sample:
    """Hold a prompt with its images, and the expected answer if it is known."""

    prompt: str
    images: tuple[Path | Image.Image, ...] = ()
    answer: str | None = None

    def inputs(self, processor: Any) -> Any:
        """Return the inputs of `generate` for this sample as the first turn of a user."""
        return question_inputs(processor, self.prompt, self.images)


def question_inputs(processor: Any, text: str, images: Sequence[Any]) -> Any:
    """Return the inputs of `generate` for the first turn of a user, with the images before the text.

    Args:
        images: images, each a `PIL.Image`, a path, or the bytes of a file.
    """
    images = [see_image(image, processor.image_processor) for image in images]
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=prompt, images=images or None, return_tensors="pt")


def read_samples(dataset: str | Path) -> list[Sample]:
    """Read the samples of a data set.

    Args:
        dataset: a folder of images, or a JSONL file of `{"image": ..., "prompt": ...}` with paths relative to the
            file. Other usual keys and LLaVA's `conversations` work too.

    Raises:
        `ValueError`: the folder or file does not exist, has no samples, or has a line that cannot be read; names it.
    """
    path = Path(dataset)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _IMAGE_SUFFIXES)
        samples = [Sample(DEFAULT_PROMPTS[index % len(DEFAULT_PROMPTS)], (file,)) for index, file in enumerate(files)]
    elif path.is_file():
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        samples = [_sample(line, path, number) for number, line in lines if line.strip()]
    else:
        raise ValueError(f"The data set {str(dataset)!r} is neither a folder of images nor a JSONL file.")
    if not samples:
        raise ValueError(f"The data set {str(dataset)!r} has no images and no prompts.")
    return samples


def _sample(line: str, file: Path, number: int) -> Sample:
    try:
        values = json.loads(line)
        prompt = _first(values, _PROMPT_KEYS) or _first_human_turn(values)
        images = _first(values, _IMAGE_KEYS) or []
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"Line {number} of {file} is not a JSON object: {error}") from error
    if not prompt:
        raise ValueError(
            f"Line {number} of {file} has no prompt. Expected a key {', '.join(_PROMPT_KEYS)} or conversations."
        )
    paths = [images] if isinstance(images, str) else images
    prompt = prompt.replace("<image>", "").strip()
    return Sample(prompt, tuple(file.parent / path for path in paths), _first(values, _ANSWER_KEYS))


def _first(values: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((values[key] for key in keys if values.get(key)), None)


def _first_human_turn(values: dict[str, Any]) -> str | None:
    return next((turn["value"] for turn in values.get("conversations", []) if turn["from"] in ("human", "user")), None)
