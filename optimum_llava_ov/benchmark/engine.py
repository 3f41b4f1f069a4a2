"""Run a bundle with this package's own model, for measurements."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers.generation.streamers import BaseStreamer

from optimum_llava_ov.bundle.check import load_processor
from optimum_llava_ov.chat.messages import images_of
from optimum_llava_ov.chat.prompt import Prompt
from optimum_llava_ov.modeling import OVModelForLlava


# Settings of a device, and the names of its properties
SETTINGS = {
    "inference_precision": "INFERENCE_PRECISION_HINT",
    "kv_cache_precision": "KV_CACHE_PRECISION",
    "dynamic_quantization_group_size": "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "threads": "INFERENCE_NUM_THREADS",
}


class Engine(Protocol):
    """Answer several prompts at once, and measure when each token arrives."""

    processor: Any
    config: Any

    def arrivals(self, prompts: Sequence[Prompt], new_tokens: int) -> list[list[float]]:
        """Return the seconds from the questions to each of `new_tokens` tokens, as one list for each prompt.

        Preprocessing of images and texts is included. Answers do not end at the end-of-text token.
        """

    def settings(self) -> dict[str, str | int | None]:
        """Return the values of [`SETTINGS`]; `None` if the device does not tell."""


class OpenVINOEngine:
    """Call `generate` of transformers, as a user's code does."""

    def __init__(self, bundle: Path, device: str, ov_config: dict[str, str] | None = None):
        self.model = OVModelForLlava.from_pretrained(bundle, device=device, ov_config=ov_config)
        self.processor = load_processor(bundle)
        self.config = self.model.config

    def arrivals(self, prompts: Sequence[Prompt], new_tokens: int) -> list[list[float]]:
        clock = _Clock()
        images = [image for prompt in prompts for image in images_of(prompt.messages)]
        inputs = self.processor(text=[prompt.text for prompt in prompts], images=images, return_tensors="pt")
        self.model.generate(**inputs, do_sample=False, eos_token_id=None, max_new_tokens=new_tokens, streamer=clock)
        return [clock.times] * len(prompts)

    def settings(self) -> dict[str, str | int | None]:
        compiled = self.model.language_model.request.get_compiled_model()
        return read_settings(compiled.get_property)


class _Clock(BaseStreamer):
    """Measure when tokens arrive. The first call brings the prompt, and each other call one token of each sequence."""

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
    """Read [`SETTINGS`] of a compiled model or a device with its function `get_property`."""
    values = {}
    for name, key in SETTINGS.items():
        try:
            value = get_property(key)
        except RuntimeError:
            value = None
        values[name] = value.to_string() if hasattr(value, "to_string") else value
    return values
