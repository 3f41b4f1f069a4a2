"""What the benchmarks of batches share: options, new images, prompts of a length, and GenAI driven by hand."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino_genai
from PIL import Image

from optimum_llava_ov.batching.engine import MAX_BATCHED_TOKENS
from optimum_llava_ov.bundle.check import load_processor
from optimum_llava_ov.chat.genai_engine import image_tensor
from optimum_llava_ov.chat.messages import user_message
from optimum_llava_ov.images import fit_to_model


def parse(
    description: str | None, *more: tuple[str, int, str], only: Sequence[str] | None = None
) -> argparse.Namespace:
    """Read the options that these benchmarks share, and `more`: name, default and help of numbers.

    Args:
        only: Values of the option `--only`, if there is one.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    shared = (
        ("--prompt-tokens", 300, "with the image"),
        ("--new-tokens", 64, "of each answer"),
        ("--rounds", 3, "that are counted"),
    )
    for name, default, text in (*shared, *more):
        parser.add_argument(name, type=int, default=default, help=f"{text} (default: %(default)s)")
    if only is not None:
        parser.add_argument("--only", choices=only)
    return parser.parse_args()


def new_image(number: int) -> Image.Image:
    """Return an image that no other number has, so that no cache has seen it."""
    values = np.random.default_rng(number).integers(0, 256, (224, 300, 3), dtype=np.uint8)
    return Image.fromarray(values)


def question_of(bundle: Path, num_tokens: int) -> str:
    """Return a question whose prompt has about `num_tokens` tokens with its image."""
    from transformers import AutoConfig

    from optimum_llava_ov.chat.prompt import build_prompt

    processor, config = load_processor(bundle), AutoConfig.from_pretrained(bundle)
    text = "Describe the image."
    while len(build_prompt([user_message(text, [new_image(0)])], processor, config)) < num_tokens:
        text += " word"
    return text


class ByHand:
    """GenAI's continuous batching, as a program would use it that has nothing else to do."""

    def __init__(self, bundle: Path, question: str, places: int):
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = places
        scheduler.max_num_batched_tokens = MAX_BATCHED_TOKENS
        self.processor = load_processor(bundle)
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(bundle, scheduler, "CPU", {})
        self.places = places
        content = [{"type": "image"}, {"type": "text", "text": question}]
        self.prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )

    def run(self, images: list[Image.Image], new_tokens: int) -> float:
        """Return the seconds for all images, with `places` of them at a time."""
        config = self.pipeline.get_config()
        config.max_new_tokens, config.ignore_eos, config.apply_chat_template = new_tokens, True, False
        waiting, handles, began = list(enumerate(images)), [], time.perf_counter()
        while waiting or handles:
            while waiting and len(handles) < self.places:
                number, image = waiting.pop(0)
                tensor = image_tensor(fit_to_model(image, self.processor.image_processor), self.processor)
                handles.append(self.pipeline.add_request(number, self.prompt, [tensor], config))
            self.pipeline.step()
            for handle in handles:
                while handle.can_read():
                    handle.read()
            running = openvino_genai.GenerationStatus.RUNNING
            handles = [handle for handle in handles if handle.get_status() == running]
        return time.perf_counter() - began


def line(name: str, value: float, target: str, is_met: bool) -> None:
    print(f"{name}: {value:.3f} (target: {target}) {'ok' if is_met else 'MISSED'}")


def median(values: list[float]) -> float:
    return statistics.median(values)
