"""Prompts with pictures, from a folder or a JSONL file of the user's: for calibration and for evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from optimum_llava_ov.images import see_image


# Keys that data sets of the field use, in the order in which they are looked for
_IMAGE_KEYS = ("image", "images", "image_path", "image_file", "file_name")
_PROMPT_KEYS = ("prompt", "question", "text", "instruction", "query", "caption")
_ANSWER_KEYS = ("answer", "response", "output")
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

# For pictures that come without a question
DEFAULT_PROMPTS = (
    "Describe the picture in detail.",
    "What is in this picture?",
    "What stands out in this picture, and why?",
)


@dataclass(frozen=True)
class Sample:
    """A prompt with any number of pictures, and the expected answer if there is one."""

    prompt: str
    images: tuple[Path | Image.Image, ...] = ()
    answer: str | None = None

    def inputs(self, processor: Any) -> Any:
        """The sample as one user's turn, ready for `generate`."""
        return question_inputs(processor, self.prompt, self.images)


def question_inputs(processor: Any, text: str, images: Sequence[Any]) -> Any:
    """A user's first turn, pictures before the text, as inputs of the model.

    Args:
        images: each a `PIL.Image`, a path, or the bytes of a file.
    """
    images = [see_image(image, processor.image_processor) for image in images]
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=prompt, images=images or None, return_tensors="pt")


def read_samples(dataset: str | Path) -> list[Sample]:
    """
    Args:
        dataset: a folder of pictures, or a JSONL file of `{"image": ..., "prompt": ...}` with paths relative to the file. The
            usual other keys work too, and LLaVA's `conversations`.

    Raises:
        `ValueError`: there is no such folder or file, it holds no samples, or a line cannot be read (says which).
    """
    path = Path(dataset)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _PICTURES)
        samples = [Sample(DEFAULT_PROMPTS[index % len(DEFAULT_PROMPTS)], (file,)) for index, file in enumerate(files)]
    elif path.is_file():
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        samples = [_sample(line, path, number) for number, line in lines if line.strip()]
    else:
        raise ValueError(f"The data set {str(dataset)!r} is neither a folder of pictures nor a JSONL file.")
    if not samples:
        raise ValueError(f"The data set {str(dataset)!r} holds no pictures and no prompts.")
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
            f"Line {number} of {file} has no prompt. Expected one of the keys {', '.join(_PROMPT_KEYS)}, conversations."
        )
    paths = [images] if isinstance(images, str) else images
    prompt = prompt.replace("<image>", "").strip()
    return Sample(prompt, tuple(file.parent / path for path in paths), _first(values, _ANSWER_KEYS))


def _first(values: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((values[key] for key in keys if values.get(key)), None)


def _first_human_turn(values: dict[str, Any]) -> str | None:
    return next((turn["value"] for turn in values.get("conversations", []) if turn["from"] in ("human", "user")), None)
