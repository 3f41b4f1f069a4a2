"""A bundle under measurement, run by this package's own model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers.generation.streamers import BaseStreamer

from optimum_llava_ov.bundle.check import load_processor
from optimum_llava_ov.chat.messages import pictures_of
from optimum_llava_ov.chat.prompt import Prompt
from optimum_llava_ov.runtime.modeling import OVModelForLlavaMPT


# What a device chose, or was told, by the names of its properties
SETTINGS = {
    "inference_precision": "INFERENCE_PRECISION_HINT",
    "kv_cache_precision": "KV_CACHE_PRECISION",
    "dynamic_quantization_group_size": "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "threads": "INFERENCE_NUM_THREADS",
}


class Engine(Protocol):
    """Answers any number of prompts at once, and says when each token came."""

    processor: Any
    config: Any

    def arrivals(self, prompts: Sequence[Prompt], new_tokens: int) -> list[list[float]]:
        """Seconds from the questions to each of the `new_tokens` tokens, a list for each prompt. Preparing the pictures and the
        texts is part of it; the end-of-text token ends nothing.
        """

    def settings(self) -> dict[str, str | int | None]:
        """What [`SETTINGS`] are; `None` where the device does not tell."""


class OpenVINOEngine:
    """`generate` of transformers, as in a user's code."""

    def __init__(self, bundle: Path, device: str, ov_config: dict[str, str] | None = None):
        self.model = OVModelForLlavaMPT.from_pretrained(bundle, device=device, ov_config=ov_config)
        self.processor = load_processor(bundle)
        self.config = self.model.config

    def arrivals(self, prompts: Sequence[Prompt], new_tokens: int) -> list[list[float]]:
        clock = _Clock()
        images = [picture for prompt in prompts for picture in pictures_of(prompt.messages)]
        inputs = self.processor(text=[prompt.text for prompt in prompts], images=images, return_tensors="pt")
        self.model.generate(**inputs, do_sample=False, eos_token_id=None, max_new_tokens=new_tokens, streamer=clock)
        return [clock.times] * len(prompts)

    def settings(self) -> dict[str, str | int | None]:
        compiled = self.model.language_model.request.get_compiled_model()
        return read_settings(compiled.get_property)


class _Clock(BaseStreamer):
    """Notes when tokens come: first the prompt, then one for all rows at a time."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._started = time.perf_counter()
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter() - self._started)
        self._prompt_seen = True

    def end(self) -> None:
        pass


def read_settings(get_property: Any) -> dict[str, str | int | None]:
    """[`SETTINGS`] of a compiled model or a device, which is asked by `get_property`."""
    values = {}
    for name, key in SETTINGS.items():
        try:
            value = get_property(key)
        except RuntimeError:  # a device without it, such as AUTO
            value = None
        values[name] = value.to_string() if hasattr(value, "to_string") else value
    return values
