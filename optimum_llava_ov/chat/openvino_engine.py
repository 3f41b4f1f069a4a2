"""Answers by this package's own model: `generate` of transformers, on a cache that follows the conversation.

Before an answer, the cache is cropped to the longest prefix that it shares with the prompt, and only the rest of the prompt
is processed. That one rule serves the next turn, undo, a cancelled answer, a changed system prompt and dropped turns alike. The
result is that of the whole prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteriaList

from optimum_llava_ov.chat.prompt import Prompt, common_prefix
from optimum_llava_ov.chat.streaming import Answer, AnswerStreamer, Cancelled
from optimum_llava_ov.export.memory import return_freed


if TYPE_CHECKING:
    from optimum_llava_ov.runtime.modeling import OVModelForLlavaMPT

LONG_PROMPT = 128  # tokens; buffers of a longer prompt are worth giving back
MAX_IMAGES = 16  # images whose features are kept; older ones are encoded again if they are needed again


class OpenVINOEngine:
    """One conversation of a model that others may share. Takes every option of `generate`: streamers, stopping criteria, logits processors.

    Args:
        model ([`OVModelForLlavaMPT`]): loaded; its weights are shared, the cache is the engine's own.
        processor ([`LlavaProcessor`]): of the same bundle.
    """

    def __init__(self, model: OVModelForLlavaMPT, processor: Any):
        self._model = model
        self._processor = processor
        self._cache = model.new_cache()
        self._cached_keys: list[int | str] = []
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()

    @property
    def cached_tokens(self) -> int:
        """Number of tokens of the conversation whose keys and values are kept."""
        return len(self._cached_keys)

    def answer(self, prompt: Prompt, answer: Answer, streamer=None, stopping_criteria=(), **options: Any) -> None:
        """Generate after a prompt. Process only what the cache does not hold.

        Nothing is generated if the answer is cancelled before its first token.

        Args:
            streamer: also gets the tokens, as in transformers.
            stopping_criteria: more criteria that stop the answer.
            options: those of `generate`.
        """
        tokenizer = self._processor.tokenizer
        if options.get("stop_strings"):
            options["tokenizer"] = tokenizer
        reused = _start_of_image(prompt.keys, min(common_prefix(self._cached_keys, prompt.keys), len(prompt) - 1))
        answer.stats.reused_tokens = reused
        self.crop(reused)
        try:
            if not self._process_beginning(prompt, answer):
                return
            start = self.cached_tokens
            output = self._model.generate(
                prompt.input_ids,
                attention_mask=torch.ones_like(prompt.input_ids),
                past_key_values=self._cache,
                image_features=self._features_of(prompt, start, len(prompt)),
                streamer=AnswerStreamer(tokenizer, answer, streamer),
                stopping_criteria=StoppingCriteriaList([Cancelled(answer), *stopping_criteria]),
                **options,
            )
            new_tokens = output[0, len(prompt) :].tolist()
            self._cached_keys = [*prompt.keys, *new_tokens][: self._cache.get_seq_length()]
        except BaseException:
            self.reset()
            raise
        finally:
            if len(prompt) - reused > LONG_PROMPT:
                return_freed()  # more than half of what the cache of a long prompt takes

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens of the conversation."""
        if length == 0:
            self.reset()
        else:
            self._cache.crop(length)
            self._cached_keys = self._cached_keys[:length]

    def reset(self) -> None:
        """Forget all tokens. Image features stay, because the same image may come again."""
        self._cache.reset()
        self._cached_keys = []

    def _process_beginning(self, prompt: Prompt, answer: Answer) -> bool:
        """Process the prompt up to its last chunk, which `generate` takes. Returns `False` if the answer was cancelled meanwhile."""
        while not answer.cancelled:
            start = self.cached_tokens
            stop = _end_of_image(prompt.keys, start + self._cache.chunk_size)
            if stop >= len(prompt):
                return True
            self._model.forward(
                input_ids=prompt.input_ids[:, start:stop],
                attention_mask=torch.ones(1, stop, dtype=torch.long),
                past_key_values=self._cache,
                image_features=self._features_of(prompt, start, stop),
                logits_to_keep=1,
            )
            self._cached_keys = prompt.keys[:stop]
        return False

    def _features_of(self, prompt: Prompt, start: int, stop: int) -> torch.Tensor | None:
        """Features of the images between two positions, none of which is inside an image: `(images, image_seq_length, hidden_size)`."""
        images = [key for key in prompt.keys[start:stop] if isinstance(key, str)]
        features = [self._encode(key, prompt) for key in images[:: self._model.config.image_seq_length]]
        return torch.cat(features) if features else None

    def _encode(self, key: str, prompt: Prompt) -> torch.Tensor:
        if key not in self._features:
            pixel_values = self._processor.image_processor(prompt.pictures[key], return_tensors="pt")["pixel_values"]
            self._features[key] = self._model.get_image_features(pixel_values)
            while len(self._features) > MAX_IMAGES:
                self._features.popitem(last=False)
        self._features.move_to_end(key)
        return self._features[key]


def _start_of_image(keys: list[int | str], position: int) -> int:
    """`position`, or the first position of the image that it is inside of."""
    while 0 < position < len(keys) and isinstance(keys[position], str) and keys[position] == keys[position - 1]:
        position -= 1
    return position


def _end_of_image(keys: list[int | str], position: int) -> int:
    """`position`, or the first position after the image that it is inside of."""
    while position < len(keys) and isinstance(keys[position], str) and keys[position] == keys[position - 1]:
        position += 1
    return position
