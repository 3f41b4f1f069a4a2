"""Run a bundle with OpenVINO GenAI, for measurements."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import openvino
import openvino_genai
from transformers import AutoConfig

from optimum_llava_ov.benchmark.engine import SETTINGS, read_settings
from optimum_llava_ov.bundle.check import load_processor
from optimum_llava_ov.bundle.layout import PARTS
from optimum_llava_ov.chat.genai_engine import image_tensor, scheduler_config
from optimum_llava_ov.chat.messages import images_of, text_of
from optimum_llava_ov.chat.prompt import Prompt


class GenAIEngine:
    """Run paged attention as in a chat, but without prefix caching, which would make repeated prompts free."""

    def __init__(self, bundle: Path, device: str, ov_config: dict[str, str] | None = None):
        self.bundle = bundle
        self.device = device
        self.ov_config = ov_config or {}
        scheduler = scheduler_config(prefix_caching=False)
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(bundle, scheduler, device, self.ov_config)
        self.processor = load_processor(bundle)
        self.config = AutoConfig.from_pretrained(bundle)

    def arrivals(self, prompts: Sequence[Prompt], new_tokens: int) -> list[list[float]]:
        options = openvino_genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True)
        started = time.perf_counter()
        handles = []
        for number, prompt in enumerate(prompts):
            images = [image_tensor(image, self.processor) for image in images_of(prompt.messages)]
            # GenAI adds the chat template and the image tokens to the text, as the processor does
            handles.append(self.pipeline.add_request(number, text_of(prompt.messages[-1]), images, options))
        times: list[list[float]] = [[] for _ in prompts]
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            now = time.perf_counter() - started
            for times_of_prompt, handle in zip(times, handles):
                if handle.can_read():
                    times_of_prompt += [now] * sum(len(output.generated_ids) for output in handle.read().values())
        return times

    def settings(self) -> dict[str, str | int | None]:
        """Return the device's defaults, overridden by options of the bundle and of the user.

        GenAI does not tell which settings it uses in the end.
        """
        core = openvino.Core()
        settings = read_settings(lambda key: core.get_property(self.device, key))
        options = {**_runtime_options(core.read_model(self.bundle / PARTS["language_model"])), **self.ov_config}
        settings |= {name: options[key] for name, key in SETTINGS.items() if key in options}
        return {**settings, "threads": settings["threads"] or None}


def _runtime_options(model: openvino.Model) -> dict[str, str]:
    """Return the properties that the language model's file requests from every engine."""
    path = ["runtime_options"]
    return dict(model.get_rt_info(path).value) if model.has_rt_info(path) else {}
