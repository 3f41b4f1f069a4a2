"""The model as one session sees it: shared weights, and a key-value cache of its own that follows the conversation.

Before an answer, the cache is cut back to the longest beginning it shares with the prompt, and only what follows is processed.
That one rule serves the next turn, undo, a cancelled answer, a changed system prompt and dropped turns alike, and gives what the
whole prompt would have given.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openvino
import torch
from PIL import Image

from optimum_llava_ov.chat.prompt import Prompt, common_prefix
from optimum_llava_ov.export.memory import return_freed
from optimum_llava_ov.runtime.modeling import OVModelForLlavaMPT


LONG = 128  # tokens; processing so many leaves buffers behind that are worth giving back
MAX_PICTURES = 16  # image features kept; older ones are computed again if they are needed again


class SessionModel(OVModelForLlavaMPT):
    """A view of a loaded model with infer requests of its own. It serves one conversation, batch size 1."""

    def __init__(self, model: OVModelForLlavaMPT):
        with model._lock:
            model.compile()
            self.__dict__.update(model.__dict__)
            self.language_model = model.language_model.with_own_cache()
        self._owner = model  # what was exported on the fly lives as long as its model
        self._lock = threading.RLock()
        self._embeddings = _request(model.language_model.text_emb_request)
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._keys: list[int | str] = []
        self._rest: torch.Tensor | None = None

    @property
    def cached_tokens(self) -> int:
        return len(self._keys)

    def answer(
        self, prompt: Prompt, prepare: Callable[[Image.Image], torch.Tensor], cancelled: Callable[[], bool], **options: Any
    ) -> tuple[list[int], int]:
        """Generate after a prompt, processing only what the cache does not hold.

        Args:
            prepare: gives `pixel_values` `(1, 3, height, width)` of a picture.
            cancelled: asked between pieces of the prompt. Later it is a stopping criterion's business.
            options: those of `generate`.

        Returns:
            The new tokens, and how many tokens of the prompt were taken from the cache. No tokens if cancelled before the first.
        """
        reused = min(common_prefix(self._keys, prompt.keys), len(prompt) - 1)
        self._cut(reused)
        rest = self._embed_keys(prompt, reused, prepare)
        try:
            while rest.shape[1] > (piece := self.language_model.piece):  # between two of them, an answer can be cancelled
                if cancelled():
                    return [], reused
                self._process(rest[:, :piece], prompt.keys)
                rest = rest[:, piece:]
            if cancelled():
                return [], reused
            self._rest = rest
            mask = torch.ones_like(prompt.input_ids)
            output = self.generate(prompt.input_ids, attention_mask=mask, **options)[0].tolist()
            self._keys = [*prompt.keys, *output[len(prompt) :]][: self.language_model._past_length]
            return output[len(prompt) :], reused
        except BaseException:
            self.reset()
            raise
        finally:
            self._rest = None
            if len(prompt) - reused > LONG:
                return_freed()  # of a long prompt's buffers, more than half of what its cache takes

    def reset(self) -> None:
        """Forget all tokens. Image features stay: the same picture may be asked about again."""
        self.language_model.reset()
        self._keys = []

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **kwargs) -> dict[str, Any]:
        if past_key_values is not None:
            return super().prepare_inputs_for_generation(input_ids, past_key_values, attention_mask, **kwargs)
        past = self.language_model.past
        return {"inputs_embeds": self._rest, "attention_mask": attention_mask, "past_key_values": past, "logits_to_keep": 1}

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # A request for the moment: pictures are rare, and an encoder's buffers large.
        request = _request(self.vision_embeddings.request)
        return torch.from_numpy(request.infer({"pixel_values": pixel_values.float().numpy()}, share_inputs=True)[0])

    def get_text_embeddings(self, input_ids: torch.LongTensor, **kwargs) -> np.ndarray:
        # `share_inputs`, as the host does: a request that copies its inputs writes them, on CPU, to where the last request that
        # shared its own had them, and that memory is gone.
        return self._embeddings.infer({0: input_ids.numpy()}, share_inputs=True)[0]

    def _process(self, inputs_embeds: torch.Tensor, keys: Sequence[int | str]) -> None:
        past, new = self.cached_tokens, inputs_embeds.shape[1]
        mask = torch.ones(1, past + new, dtype=torch.long)
        self.forward(inputs_embeds=inputs_embeds, attention_mask=mask, past_key_values=self.language_model.past, logits_to_keep=1)
        self._keys = list(keys[: past + new])

    def _embed_keys(self, prompt: Prompt, start: int, prepare: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
        keys = prompt.keys[start:]
        features = [self._features_of(key, prompt, prepare) for key in _once_each(keys, self.config.image_seq_length)]
        return self._embed(prompt.input_ids[:, start:], torch.cat(features) if features else None)

    def _features_of(self, key: str, prompt: Prompt, prepare: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
        if key not in self._features:
            self._features[key] = self.get_image_features(prepare(prompt.pictures[key]))
            while len(self._features) > MAX_PICTURES:
                self._features.popitem(last=False)
        self._features.move_to_end(key)
        return self._features[key]

    def _cut(self, length: int) -> None:
        """Keep the first `length` tokens of the cache."""
        if length == 0:
            self.reset()
        else:
            self.language_model.cut(length)
            self._keys = self._keys[:length]


def _request(part: Any) -> openvino.InferRequest:
    """A new request of a compiled model, whichever of its forms the host keeps."""
    compiled = part.get_compiled_model() if isinstance(part, openvino.InferRequest) else part
    return compiled.create_infer_request()


def _once_each(keys: Sequence[int | str], image_seq_length: int) -> list[str]:
    """The pictures among the keys, in order; one that is shown twice comes twice."""
    images = [key for key in keys if isinstance(key, str)]
    return images[::image_seq_length]
