"""Build, read and write conversations in the form of transformers: lists of `{"role": ..., "content": ...}`."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from optimum_llava_ov.chat.images import to_base64
from optimum_llava_ov.checkpoint.options import shown
from optimum_llava_ov.files import replace_text


Message = dict[str, Any]
PLACEHOLDER = "<image>"


def system_message(text: str) -> Message:
    return {"role": "system", "content": [_text(text)]}


def user_message(text: str, images: Sequence[Image.Image] = ()) -> Message:
    """Return a user message with its images before the text.

    Raises:
        `ValueError`: The text contains `<image>`, which would need an image, or is not Unicode.
    """
    if PLACEHOLDER in text:
        raise ValueError(
            f"The text contains {PLACEHOLDER}, which stands for an image. Remove it, and give the image separately."
        )
    content = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, _text(text)]}


def assistant_message(text: str) -> Message:
    # If a model writes `<image>` as text, there is no image for it
    return {"role": "assistant", "content": [{"type": "text", "text": text.replace(PLACEHOLDER, "<image >")}]}


def text_of(message: Message) -> str:
    return "\n".join(item["text"] for item in message["content"] if item["type"] == "text")


def images_of(messages: Sequence[Message]) -> list[Image.Image]:
    return [item["image"] for message in messages for item in message["content"] if item["type"] == "image"]


def without_oldest_turns(messages: Sequence[Message], dropped: int) -> list[Message]:
    """Remove the first `dropped` questions and their answers. Their images move to the first question that stays."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    removed, kept = turns[: 2 * dropped], turns[2 * dropped :]
    images = [{"type": "image", "image": image} for image in images_of(removed)]
    if not images:
        return [*system, *kept]
    return [*system, {**kept[0], "content": [*images, *kept[0]["content"]]}, *kept[1:]]


def read_messages(source: str | Path | Sequence[Message], open_image: Callable[[Any], Image.Image]) -> list[Message]:
    """Read messages from a JSON file or a list, check them and open their images.

    The content of a message is a string, or a list of texts and images. An image is `{"type": "image", "image": ...}`,
    or in JSON `{"type": "image", "base64": ...}`.

    Raises:
        `ValueError`: The messages are not complete turns, or an item is neither text nor image.
    """
    try:
        messages = _load(Path(source)) if isinstance(source, (str, Path)) else source
        messages = [
            {"role": message["role"], "content": _content(message["content"], open_image)} for message in messages
        ]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f'Expected messages {{"role": ..., "content": ...}}, but found something else: {shown(error)}'
        ) from error
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(
            f"Expected messages of user and assistant in turn, after at most one system message. Found {shown(roles)}."
        )
    return messages


def write_messages(messages: Sequence[Message], file: str | Path) -> None:
    """Write messages with their images as JSON that [`read_messages`] reads.

    Raises:
        `OSError`: The file cannot be written. Its earlier content is unchanged.
    """
    replace_text(Path(file), json.dumps(messages_as_json(messages), indent=2, ensure_ascii=False) + "\n")


def messages_as_json(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose images are base64, as JSON can hold them and [`read_messages`] reads them."""
    return [{**message, "content": [_as_json(item) for item in message["content"]]} for message in messages]


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is not a saved conversation: {error}. Give a file that was written by save()."
        ) from error


def _content(content: Any, open_image: Callable[[Any], Image.Image]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [_text(content)]
    return [_item(item, open_image) for item in content]


def _item(item: dict[str, Any], open_image: Callable[[Any], Image.Image]) -> dict[str, Any]:
    if item["type"] == "text":
        return _text(str(item["text"]))
    if item["type"] == "image" and "base64" in item:
        return {"type": "image", "image": open_image(_decoded(item["base64"]))}
    if item["type"] == "image" and "image" in item:
        return {"type": "image", "image": open_image(item["image"])}
    raise ValueError(
        "Expected a text, or an image as 'image' or 'base64'. "
        f"Found {shown(sorted(item))} of type {shown(item['type'])}."
    )


def _text(text: str) -> dict[str, Any]:
    """Return a text item. A tokenizer does not accept half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The text is not Unicode: the character {text[error.start]!a} at position {error.start} is half of a "
            "pair. Remove it."
        ) from error
    return {"type": "text", "text": text}


def _decoded(text: Any) -> bytes:
    try:
        return base64.b64decode(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The base64 of an image cannot be decoded: {error}. Check the file.") from error


def _as_json(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image", "base64": to_base64(item["image"])} if item["type"] == "image" else item
