"""Answer with this package's own model: `generate` of transformers with a cache that follows the conversation.

Before an answer, the cache is cropped to the longest prefix that it shares with the prompt, and only the rest of the
prompt is processed. This rule covers the next turn, undo, a cancelled answer, a changed system prompt and dropped
turns. The result is the same as for the whole prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from optimum_llava_ov.chat.prompt import Prompt, model_inputs
from optimum_llava_ov.chat.streaming import Answer, AnswerStreamer, Cancelled
from optimum_llava_ov.kernels.extension import MATMUL_KERNEL
from optimum_llava_ov.runtime.prefix import end_of_image, reusable
from optimum_llava_ov.system.memory import return_freed


if TYPE_CHECKING:
    from optimum_llava_ov.runtime.modeling import OVLlavaModel

LONG_PROMPT = 128  # tokens; after a longer prompt, freed memory is returned to the system
MAX_IMAGES = 16  # number of images whose features are kept; older images are encoded again when needed


class OpenVINOEngine:
    """Run a model of this package. See [`Engine`].

    Args:
        model ([`OVLlavaModel`]): A loaded model.
        processor ([`LlavaProcessor`]): Processor of the same bundle.
    """

    def __init__(self, model: OVLlavaModel, processor: Any):
        self.name = "openvino"
        self.folder = Path(model.model_save_dir)
        self.model = model
        self.processor = processor
        self.config = model.config
        self.stop_strings = model.generation_config.stop_strings

    def new_conversation(self) -> OpenVINOConversation:
        return OpenVINOConversation(self.model, self.processor)

    def generate(self, prompts: Sequence[Prompt], receive: Callable[[int, int], None], **options: Any) -> None:
        ends = options.get("eos_token_id", self.model.generation_config.eos_token_id)
        streamer = _BatchStreamer(receive, [] if ends is None else [ends] if isinstance(ends, int) else ends)
        options = {**options, "stop_strings": None}
        self.model.generate(**model_inputs(prompts, self.processor), streamer=streamer, **options)

    def get_property(self, name: str) -> str | int | None:
        if name == MATMUL_KERNEL:
            return self.model.language_model.matmul_kernel
        compiled = self.model.language_model.request.get_compiled_model()
        try:
            value = compiled.get_property(name)
        except RuntimeError:
            return None
        return value.to_string() if hasattr(value, "to_string") else value


class OpenVINOConversation:
    """Compute the answers of one conversation, with a cache of its own. See [`Conversation`].

    All options of `generate` are supported, with streamers, stopping criteria and logits processors.

    Args:
        model ([`OVLlavaModel`]): A loaded model. Its weights are shared.
        processor ([`LlavaProcessor`]): Processor of the same bundle.
    """

    def __init__(self, model: OVLlavaModel, processor: Any):
        self._model = model
        self._processor = processor
        self._cache = model.new_cache()
        self._cached_keys: list[int | str] = []
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()

    @property
    def cached_tokens(self) -> int:
        """Return the number of tokens of the conversation whose keys and values are in the cache."""
        return len(self._cached_keys)

    def answer(self, prompt: Prompt, answer: Answer, streamer=None, stopping_criteria=(), **options: Any) -> None:
        """Generate an answer to a prompt. Process only tokens that are not in the cache.

        Nothing is generated if the answer is cancelled before its first token.

        Args:
            streamer: Also receives the tokens, as in transformers.
            stopping_criteria: Additional criteria that stop the answer.
            options: Options of `generate`.
        """
        tokenizer = self._processor.tokenizer
        if options.get("stop_strings"):
            options["tokenizer"] = tokenizer
        reused = reusable(self._cached_keys, prompt.keys)
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
                return_freed()  # it is more than half of what the cache of a long prompt takes

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens of the conversation."""
        if length == 0:
            self.reset()
        else:
            self._cache.crop(length)
            self._cached_keys = self._cached_keys[:length]

    def reset(self) -> None:
        """Forget all tokens. Keep image features, because the same image may come again."""
        self._cache.reset()
        self._cached_keys = []

    def _process_beginning(self, prompt: Prompt, answer: Answer) -> bool:
        """Process the prompt up to its last chunk, which `generate` takes. Return whether the answer may go on."""
        while not answer.cancelled:
            start = self.cached_tokens
            stop = end_of_image(prompt.keys, start + self._cache.chunk_size)
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

    def _features_of(self, prompt: Prompt, start: int, stop: int) -> list[torch.Tensor] | None:
        """Return features `(num_image_tokens, hidden_size)` of each image between two positions.

        Neither position may be inside an image.
        """
        features = []
        while start < stop:
            key = prompt.keys[start]
            if isinstance(key, str):
                features.append(self._encode(key, prompt))
            start += len(features[-1]) if isinstance(key, str) else 1
        return features or None

    def _encode(self, key: str, prompt: Prompt) -> torch.Tensor:
        if key not in self._features:
            inputs = dict(self._processor.image_processor(prompt.images[key], return_tensors="pt"))
            (self._features[key],) = self._model.get_image_features(inputs.pop("pixel_values"), **inputs)
            while len(self._features) > MAX_IMAGES:
                self._features.popitem(last=False)
        self._features.move_to_end(key)
        return self._features[key]


class _BatchStreamer(BaseStreamer):
    """Pass on the tokens of a batch, each answer up to its end. `generate` pads answers that have ended."""

    def __init__(self, receive: Callable[[int, int], None], ends: Sequence[int]):
        self._receive = receive
        self._ends = frozenset(ends)
        self._ended: set[int] = set()
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompts `(batch, tokens)` in the first call, then the next token of each answer `(batch,)`."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for index, token in enumerate(value.tolist()):
            if index not in self._ended:
                self._receive(index, token)
            if token in self._ends:
                self._ended.add(index)

    def end(self) -> None:
        pass
