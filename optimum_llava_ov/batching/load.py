"""Load a bundle for continuous batching, by its folder or model id."""

from __future__ import annotations

from typing import Any

from optimum_llava_ov.batching.engine import BatchEngine
from optimum_llava_ov.bundle.check import check_readable, naming_damage
from optimum_llava_ov.loading import GENAI, bundle_folder, resolve_engine


def load_batch_engine(
    bundle: str, device: str = "CPU", ov_config: dict[str, str] | None = None, **options: Any
) -> BatchEngine:
    """Load a bundle.

    Args:
        options: See [`BatchEngine`].

    Raises:
        `ValueError`: The device does not exist, or the folder is not a bundle.
    """
    repository, _ = resolve_engine(bundle, device, GENAI)
    folder = bundle_folder(repository, "Only bundles are answered in batches.")
    check_readable(folder, tokenizers=True)
    with naming_damage(folder, tokenizers=True):
        return BatchEngine(folder, device, ov_config, **options)
