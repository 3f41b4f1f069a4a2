"""Write the model card, `README.md`, from data and a template, and keep what users change in it.

The card has sections between the comments `<!-- optimum-llava-ov: run 1a2b3c4d -->` and `<!-- /optimum-llava-ov: run
-->`. The number is a hash of the section as this package wrote it. When an existing card is updated:

- A section is updated if nobody changed it. Sections that users changed or removed stay changed or removed.
- Text between and around the sections stays.
- Metadata values that users changed stay. Keys and tags that users added stay.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from optimum_llava_ov.bundle.facts import BundleFacts
from optimum_llava_ov.bundle.licenses import CARD, FRONT_MATTER, UNKNOWN_LICENSE, repository_license
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint
from optimum_llava_ov.errors import BundleError
from optimum_llava_ov.files import replace_text


TEMPLATE = Path(__file__).with_name("card_template.md")
THIS_MODEL = "<this model>"  # placeholder until the model has an id
REQUIRED_METADATA = ("license", "library_name", "pipeline_tag", "tags")

_SECTION = re.compile(
    r"<!-- optimum-llava-ov: (\w+)(?: ([0-9a-f]{8}))? -->\n(.*?)<!-- /optimum-llava-ov: \1 -->", re.DOTALL
)
_METADATA = re.compile(r"<!-- optimum-llava-ov metadata: (\{.*?\}) -->\n?")


def source_license(checkpoint: OriginalCheckpoint) -> str:
    """Return the license of a checkpoint, which the bundle inherits: from its card, else what is known about it.

    A fine-tune without a license has that of its base model.
    """
    licenses = map(repository_license, (checkpoint.repository, checkpoint.lineage.root))
    return next((license_id for license_id in licenses if license_id != UNKNOWN_LICENSE), UNKNOWN_LICENSE)


def read_card(file: Path) -> str | None:
    """Read an existing card; return `None` if there is none.

    Raises:
        [`BundleError`]: the card is not UTF-8, or its metadata is not YAML, so that an update could lose changes of
            users.
    """
    if not file.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise BundleError(
            f"{file} is not UTF-8. Save it as UTF-8, or delete the file to get a new one. ({error})"
        ) from error
    try:
        _split(text)
    except ValueError as error:
        raise BundleError(
            f"The metadata of {file} is not YAML. Correct it, or delete the file to get a new one. ({error})"
        ) from error
    return text


def write_card(folder: Path, license_id: str, previous: str | None = None) -> None:
    """Write the card of the bundle in `folder`.

    Args:
        folder: folder of the bundle.
        license_id: license of the checkpoint.
        previous: text of the card that is replaced.
    """
    (folder / CARD).write_text(card_text(folder, license_id, previous), encoding="utf-8")


def update_card(folder: Path) -> None:
    """Update the card of a bundle to its files, if it has a card. If the disk is full, the old card stays."""
    if (previous := read_card(folder / CARD)) is not None:
        replace_text(folder / CARD, card_text(folder, None, previous))


def card_text(
    folder: Path, license_id: str | None = None, previous: str | None = None, model_id: str | None = None
) -> str:
    """Return the text of a card for the bundle in `folder`, with measured quality if there is an `eval.json`.

    Args:
        folder: folder of the bundle.
        license_id: license of the checkpoint; by default, the license in `previous`.
        previous: text of the existing card. Changes by users are kept.
        model_id: model id in the snippets; by default, the model id in `previous`, or a placeholder.

    Raises:
        [`BundleError`]: a settings file of the bundle lacks data for the card.
    """
    metadata, body = _split(previous) if previous else ({}, "")
    written = _written(body)
    model_id = model_id or written.get("model_id") or THIS_MODEL
    facts = BundleFacts.read(folder)
    card_license = _choose_license(license_id, metadata, written)
    base_models = _choose_base_models(facts.base_models, metadata, written)
    try:
        card = ModelCard.from_template(
            _card_data(facts, card_license, model_id, base_models),
            template_path=str(TEMPLATE),
            model_id=model_id,
            license=card_license,
            title=_title(facts, model_id, base_models),
            base_models=base_models,
            **facts.values(),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"config.json, openvino_config.json or eval.json in {folder} lacks data for the card ({error!r}). Export "
            "the bundle again."
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
    # Record the hash of the source's license, so that a different license is recognized as a change by the user
    hashes["license"] = _hash(license_id) if license_id else written.get("license", hashes["license"])
    if base_models != facts.base_models:
        hashes.pop("base_model")  # the same for the base model
    body = _METADATA.sub("", body).strip("\n")
    note = f"<!-- optimum-llava-ov metadata: {json.dumps(hashes, sort_keys=True)} -->"
    return _join(metadata, f"{body}\n\n{note}\n")


def is_untouched(folder: Path, text: str) -> bool:
    """Return whether the card `text` of the bundle in `folder` is unchanged since this package wrote it."""
    metadata, body = _split(text)
    written = _written(body)
    return card_text(folder, metadata.get("license"), None, written.get("model_id")) == card_text(folder, None, text)


def missing_metadata(text: str) -> list[str]:
    """Return the names of the required metadata that a card lacks. The Hub needs them to find the model."""
    metadata, _ = _split(text)
    return [name for name in REQUIRED_METADATA if not metadata.get(name)]


def license_of(text: str) -> str | None:
    """Return the license in the metadata of a card; `None` if there is none."""
    return _split(text)[0].get("license")


def with_metadata(text: str, **values: Any) -> str:
    """Return the card with other values in its metadata, as if a user had written them. Skip those that are `None`."""
    metadata, body = _split(text)
    return _join(metadata | {name: value for name, value in values.items() if value is not None}, body)


def add_tags(text: str, tags: list[str] | None) -> str:
    """Return the card with additional tags."""
    metadata, body = _split(text)
    metadata["tags"] = list(dict.fromkeys([*metadata.get("tags", []), *(tags or [])]))
    return _join(metadata, body) if tags else text


def _join(metadata: dict[str, Any], body: str) -> str:
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n\n{body}"


def _split(text: str) -> tuple[dict[str, Any], str]:
    match = FRONT_MATTER.match(text)
    if match is None:
        return {}, text
    try:
        metadata = yaml.safe_load(match[1]) or {}
    except Exception as error:  # not only YAMLError: `!!int ""` is an IndexError
        raise ValueError(str(error)) from error
    if not isinstance(metadata, dict):
        raise ValueError("expected `key: value` lines between the two `---`")  # noqa: TRY004  callers catch ValueError
    return metadata, match[2].strip("\n") + "\n"


def _title(facts: BundleFacts, model_id: str, base_models: list[str]) -> str:
    """Return the name of the repository. Before there is one: that of the model, with its precision.

    The name of a folder counts only if it says that it is a LLaVA, as the original code expects.
    """
    if model_id != THIS_MODEL:
        return model_id.split("/")[-1]
    names = [name.split("/")[-1] for name in (*base_models, facts.source)]
    name = next(
        (name for name in names if "llava" in name.lower()), names[0] if base_models else f"LLaVA-{facts.family}"
    )
    return f"{name}, {facts.precision}, for OpenVINO"


def _choose_license(source: str | None, metadata: dict[str, Any], written: dict[str, str]) -> str:
    """Return the license of the source, unless a user changed the license in the card."""
    current = metadata.get("license")
    if current and (source is None or _hash(current) != written.get("license")):
        return current
    return source or UNKNOWN_LICENSE


def _choose_base_models(source: list[str], metadata: dict[str, Any], written: dict[str, str]) -> list[str]:
    """Return the base models of the source, unless a user changed them in the card."""
    current = metadata.get("base_model")
    if current and _hash(current) != written.get("base_model"):
        return [current] if isinstance(current, str) else list(current)
    return source


def _card_data(facts: BundleFacts, license_id: str, model_id: str, base_models: list[str]) -> ModelCardData:
    eval_results = facts.eval_results()
    return ModelCardData(
        license=license_id,
        base_model=base_models[0] if len(base_models) == 1 else base_models or None,
        base_model_relation="quantized" if base_models and facts.compressed else None,
        library_name="openvino",
        pipeline_tag="image-text-to-text",
        tags=["openvino", "llava", facts.kind, *(["nncf"] if facts.compressed else []), facts.precision],
        model_name=_title(facts, model_id, base_models) if eval_results else None,
        eval_results=eval_results,
    )


def _merge(existing: dict[str, Any], new: dict[str, Any], written: dict[str, str]) -> dict[str, Any]:
    """Merge metadata: take the existing values that users changed, and the new values of the others."""
    merged = {name: value for name, value in new.items() if name in existing or name not in written}
    for name, value in existing.items():
        if _hash(value) == written.get(name):
            continue  # unchanged by users: the new value is used, if there is one
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
    """Return the hashes of the metadata as this package wrote it, from the comment in the card."""
    match = _METADATA.search(body)
    try:
        return json.loads(match[1]) if match else {}
    except ValueError:
        return {}


def _hash(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
