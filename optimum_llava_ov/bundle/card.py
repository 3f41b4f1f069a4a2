"""The model card, `README.md`: data and a template. What users write into it stays.

The card consists of sections between comments, `<!-- optimum-llava-ov: run 1a2b3c4d -->` and `<!-- /optimum-llava-ov: run -->`. The
number is a hash of the section as it was written. When a card is written again, over one that is there,

- a section that is as it was written is brought up to date; one that somebody changed or removed stays changed or removed;
- what is between and around the sections stays;
- so with the metadata: a value that was changed stays, keys and tags that were added stay.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from optimum_llava_ov.bundle.facts import BundleFacts
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint
from optimum_llava_ov.errors import BundleError
from optimum_llava_ov.files import replace_text


logger = logging.getLogger(__name__)

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("card_template.md")
THIS_MODEL = "<this model>"  # until it has an id
UNKNOWN_LICENSE = "unknown"  # the Hub's own word for it
REQUIRED_METADATA = ("license", "library_name", "pipeline_tag", "tags")
# The one everybody means, should its card be out of reach
_KNOWN_LICENSES = {"liuhaotian/LLaVA-Lightning-MPT-7B-preview": "cc-by-nc-sa-4.0"}

_SECTION = re.compile(r"<!-- optimum-llava-ov: (\w+)(?: ([0-9a-f]{8}))? -->\n(.*?)<!-- /optimum-llava-ov: \1 -->", re.DOTALL)
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(.*?)\n?---[ \t]*(?:\n|$)(.*)", re.DOTALL)
_LICENSE = re.compile(r"""^license:[ \t]*["']?([\w.+-]{1,100})["']?[ \t]*$""", re.MULTILINE)
_METADATA = re.compile(r"<!-- optimum-llava-ov metadata: (\{.*?\}) -->\n?")


def source_license(checkpoint: OriginalCheckpoint) -> str:
    """License of the checkpoint, from its own card. A conversion inherits it.

    The card is searched, not parsed: whatever is wrong with the rest of it must not stop an export.
    """
    readme = checkpoint.repository.get(CARD)
    license = _LICENSE.search(_metadata_lines(readme)) if readme else None
    return (license and license[1]) or _KNOWN_LICENSES.get(checkpoint.repository.name) or UNKNOWN_LICENSE


def _metadata_lines(readme: Path) -> str:
    """What is between the first two lines of `---`; empty if the file cannot be read or does not begin with one."""
    try:
        with readme.open(encoding="utf-8", errors="replace") as file:
            text = file.read(1 << 20)
    except OSError as error:
        logger.warning("%s cannot be read, so it names no license. (%s)", readme, error)
        return ""
    match = _FRONT_MATTER.match(text)
    return match[1] if match else ""


def read_card(file: Path) -> str | None:
    """A card that is there already; `None` if there is none.

    Raises:
        [`BundleError`]: it is not UTF-8, or its metadata is not YAML, so nobody can tell what to keep.
    """
    if not file.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise BundleError(
            f"{file} is not a text in UTF-8. Save it as UTF-8, or delete the file to get a new one. ({error})"
        ) from error
    try:
        _split(text)
    except ValueError as error:
        raise BundleError(
            f"The metadata of {file} is not YAML. Correct it, or delete the file to get a new one. ({error})"
        ) from error
    return text


def write_card(folder: Path, license: str, previous: str | None = None) -> None:
    """Write the card of the bundle in `folder`.

    Args:
        license: of the checkpoint.
        previous: text of the card this one takes the place of.
    """
    (folder / CARD).write_text(card_text(folder, license, previous), encoding="utf-8")


def update_card(folder: Path) -> None:
    """Bring the card of a bundle up to date with its files, if it has one. What users wrote into it is not lost on a full disk."""
    if (previous := read_card(folder / CARD)) is not None:
        replace_text(folder / CARD, card_text(folder, None, previous))


def card_text(folder: Path, license: str | None = None, previous: str | None = None, model_id: str | None = None) -> str:
    """The card of the bundle in `folder` as it is now, measured quality included if there is an `eval.json`.

    Args:
        license: of the checkpoint; if not given, what `previous` says.
        previous: text of a card whose changes by users are kept.
        model_id: what the snippets load. If not given, as in `previous`, or a placeholder.
    """
    metadata, body = _split(previous) if previous else ({}, "")
    written = _written(body)
    model_id = model_id or written.get("model_id") or THIS_MODEL
    facts = BundleFacts.read(folder)
    source, license = license, _license(license, metadata, written)
    try:
        card = ModelCard.from_template(
            _card_data(facts, license, model_id),
            template_path=str(TEMPLATE),
            model_id=model_id,
            license=license,
            title=_title(facts, model_id),
            **facts.values(),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"config.json, openvino_config.json or eval.json in {folder} does not hold what a bundle's does ({error!r}), so there is "
            "nothing to write its card from. Export it again."
        ) from error
    new_metadata = card.data.to_dict()
    sections = {match[1]: _seal(match) for match in _SECTION.finditer(card.text)}
    if not previous:
        body = _SECTION.sub(lambda match: sections[match[1]], card.text).strip() + "\n"
    else:
        body = _SECTION.sub(lambda match: sections.get(match[1], "") if _is_ours(match) else match[0], body)
        body = body.replace(THIS_MODEL, model_id)
    metadata = _merge(metadata, new_metadata, written)
    hashes = {key: _hash(value) for key, value in new_metadata.items()} | {"model_id": model_id}
    # Of the source's license, so that another one is known to be the user's
    hashes["license"] = _hash(source) if source else written.get("license", hashes["license"])
    body = _METADATA.sub("", body).strip("\n")
    note = f"<!-- optimum-llava-ov metadata: {json.dumps(hashes, sort_keys=True)} -->"
    return _join(metadata, f"{body}\n\n{note}\n")


def is_untouched(folder: Path, text: str) -> bool:
    """Whether nobody has changed anything in the card `text` of the bundle in `folder` since it was written."""
    metadata, body = _split(text)
    written = _written(body)
    return card_text(folder, metadata.get("license"), None, written.get("model_id")) == card_text(folder, None, text)


def missing_metadata(text: str) -> list[str]:
    """Names of the metadata that a card must have to be found on the Hub, and this one lacks."""
    metadata, _ = _split(text)
    return [name for name in REQUIRED_METADATA if not metadata.get(name)]


def license_of(text: str) -> str | None:
    return _split(text)[0].get("license")


def add_tags(text: str, tags: list[str] | None) -> str:
    """A card with more tags."""
    metadata, body = _split(text)
    metadata["tags"] = list(dict.fromkeys([*metadata.get("tags", []), *(tags or [])]))
    return _join(metadata, body) if tags else text


def _join(metadata: dict[str, Any], body: str) -> str:
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n\n{body}"


def _split(text: str) -> tuple[dict[str, Any], str]:
    match = _FRONT_MATTER.match(text)
    if match is None:
        return {}, text
    try:
        metadata = yaml.safe_load(match[1]) or {}
    except Exception as error:  # not only YAMLError: `!!int ""` is an IndexError
        raise ValueError(str(error)) from error
    if not isinstance(metadata, dict):
        raise ValueError("expected `key: value` lines between the two `---`")
    return metadata, match[2].strip("\n") + "\n"


def _title(facts: BundleFacts, model_id: str) -> str:
    return (
        f"{facts.source.split('/')[-1]}, {facts.precision}, for OpenVINO" if model_id == THIS_MODEL else model_id.split("/")[-1]
    )


def _license(source: str | None, metadata: dict[str, Any], written: dict[str, str]) -> str:
    """The source's, unless the card says something else than what was written."""
    there = metadata.get("license")
    return there if there and (source is None or _hash(there) != written.get("license")) else source or UNKNOWN_LICENSE


def _card_data(facts: BundleFacts, license: str, model_id: str) -> ModelCardData:
    eval_results = facts.eval_results()
    return ModelCardData(
        license=license,
        base_model=facts.source if facts.source_url else None,
        base_model_relation="quantized" if facts.source_url and facts.compressed else None,
        library_name="openvino",
        pipeline_tag="image-text-to-text",
        tags=["openvino", "llava", "llava-mpt", *(["nncf"] if facts.compressed else []), facts.precision],
        model_name=_title(facts, model_id) if eval_results else None,
        eval_results=eval_results,
    )


def _merge(there: dict[str, Any], new: dict[str, Any], written: dict[str, str]) -> dict[str, Any]:
    """New metadata, and of those that are there what is not as it was written."""
    merged = {name: value for name, value in new.items() if name in there or name not in written}
    for name, value in there.items():
        if _hash(value) == written.get(name):
            continue  # as it was written: the new value, or none
        if name == "tags" and isinstance(value, list):
            merged[name] = list(dict.fromkeys([*new["tags"], *(tag for tag in value if not _is_precision(tag))]))
        else:
            merged[name] = value
    return merged


def _is_precision(tag: Any) -> bool:
    return bool(re.fullmatch(r"(int|fp|bf|nf|mxfp|cb)\d+|nncf", str(tag)))


def _seal(match: re.Match) -> str:
    return f"<!-- optimum-llava-ov: {match[1]} {_hash(match[3])} -->\n{match[3]}<!-- /optimum-llava-ov: {match[1]} -->"


def _is_ours(match: re.Match) -> bool:
    return match[2] is not None and _hash(match[3]) == match[2]


def _written(body: str) -> dict[str, str]:
    """What the card says of its metadata as it was written."""
    match = _METADATA.search(body)
    try:
        return json.loads(match[1]) if match else {}
    except ValueError:
        return {}


def _hash(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
