"""The model card, `README.md`: data and a template."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint


if TYPE_CHECKING:
    from optimum.intel.openvino.configuration import OVConfig

TEMPLATE = Path(__file__).with_name("card_template.md")


def write_card(checkpoint: OriginalCheckpoint, ov_config: OVConfig | None, folder: Path) -> None:
    """Write the card of the bundle in `folder`."""
    source = checkpoint.repository
    precision = getattr(ov_config, "dtype", None) or "as in the checkpoint"
    data = ModelCardData(
        base_model=None if source.is_local else source.name,
        library_name="openvino",
        license=source_license(checkpoint),
        pipeline_tag="image-text-to-text",
        tags=["openvino", "llava", "llava-mpt"],
        eval_results=None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        source=source.name if not source.is_local else source.folder.resolve().name,
        vision_tower=checkpoint.config.mm_vision_tower,
        precision=precision,
        versions={name: version(name) for name in ("optimum-llava-ov", "optimum-intel", "openvino", "transformers")},
    )
    card.save(folder / "README.md")


def source_license(checkpoint: OriginalCheckpoint) -> str | None:
    """License of the checkpoint, from its own card. A conversion inherits it."""
    readme = checkpoint.repository.get("README.md")
    return ModelCard.load(readme, ignore_metadata_errors=True).data.license if readme else None
