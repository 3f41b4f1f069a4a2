"""A conversation as transformers writes it: a list of `{"role": ..., "content": ...}`, with pictures inside, and as JSON."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from optimum_llava_ov.chat.pictures import to_base64


Message = dict[str, Any]
PLACEHOLDER = "<image>"


def system_message(text: str) -> Message:
    return {"role": "system", "content": [{"type": "text", "text": text}]}


def user_message(text: str, pictures: Sequence[Image.Image] = ()) -> Message:
    """Pictures stand before the text.

    Raises:
        `ValueError`: the text spells `<image>`, for which there would be no picture.
    """
    if PLACEHOLDER in text:
        raise ValueError(
            f"The text contains {PLACEHOLDER}, which stands for a picture. Give pictures beside the text instead."
        )
    content = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def assistant_message(text: str) -> Message:
    # A model that spells `<image>` in letters means no picture.
    return {"role": "assistant", "content": [{"type": "text", "text": text.replace(PLACEHOLDER, "<image >")}]}


def text_of(message: Message) -> str:
    return "\n".join(item["text"] for item in message["content"] if item["type"] == "text")


def pictures_of(messages: Sequence[Message]) -> list[Image.Image]:
    return [item["image"] for message in messages for item in message["content"] if item["type"] == "image"]


def without_oldest_turns(messages: Sequence[Message], dropped: int) -> list[Message]:
    """Leave out the first `dropped` questions with their answers. Their pictures move to the first question that stays."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    gone, kept = turns[: 2 * dropped], turns[2 * dropped :]
    pictures = [{"type": "image", "image": picture} for picture in pictures_of(gone)]
    if not pictures:
        return [*system, *kept]
    return [*system, {**kept[0], "content": [*pictures, *kept[0]["content"]]}, *kept[1:]]


def read_messages(source: str | Path | Sequence[Message], open_image: Callable[[Any], Image.Image]) -> list[Message]:
    """Messages of a JSON file or a list, checked, with pictures opened.

    A content may be a string, or a list of texts and pictures: `{"type": "image", "image": ...}` or, in JSON, `"base64"`.

    Raises:
        `ValueError`: these are no whole turns, or something in them is neither text nor picture.
    """
    try:
        messages = json.loads(Path(source).read_text(encoding="utf-8")) if isinstance(source, (str, Path)) else source
        messages = [
            {"role": message["role"], "content": _content(message["content"], open_image)} for message in messages
        ]
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f'Expected messages {{"role": ..., "content": ...}}, found something else: {error!r}'
        ) from error
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(
            f"Expected messages of user and assistant in turn, after at most one of system; found {roles}."
        )
    return messages


def write_messages(messages: Sequence[Message], file: str | Path) -> None:
    """As JSON that [`read_messages`] reads, pictures included.

    Raises:
        `OSError`: it cannot be written. What was in the file before is still there.
    """
    values = [{**message, "content": [_as_json(item) for item in message["content"]]} for message in messages]
    _replace(Path(file), json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _replace(file: Path, text: str) -> None:
    """Write a file as a whole or not at all: beside its place first, then renamed. Keeps the mode of a file that was there."""
    if file.exists() and not file.is_file():  # a pipe or a terminal, which nothing can take the place of
        file.write_text(text, encoding="utf-8")
        return
    file = file.resolve()  # a link stays one
    partial = file.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "x", encoding="utf-8") as stream:
            if file.exists():
                shutil.copymode(file, partial)
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        raise OSError(
            error.errno, f"Not saved, and what was there before is unchanged: {error.strerror}", str(file)
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _content(content: Any, open_image: Callable[[Any], Image.Image]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [_item(item, open_image) for item in content]


def _item(item: dict[str, Any], open_image: Callable[[Any], Image.Image]) -> dict[str, Any]:
    if item["type"] == "text":
        return {"type": "text", "text": str(item["text"])}
    if item["type"] == "image" and "base64" in item:
        return {"type": "image", "image": open_image(base64.b64decode(item["base64"]))}
    if item["type"] == "image" and "image" in item:
        return {"type": "image", "image": open_image(item["image"])}
    raise ValueError(
        f"Expected a text, or a picture as 'image' or 'base64'; found {sorted(item)} of type {item['type']!r}."
    )


def _as_json(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image", "base64": to_base64(item["image"])} if item["type"] == "image" else item
