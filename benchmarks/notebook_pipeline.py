"""Run the models of [`notebook_conversion`] as the OpenVINO notebook's `OVLlavaMPTForCausalLM` does, with our own
code.

The prompt is processed by the image encoder, the token embedding and the first copy of the language model. Every
further token is processed by the second copy, whose outputs of one step are the inputs of the next. The loop is greedy
and minimal, which favours the notebook over its own `GenerationMixin`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


IMAGE_TOKEN_INDEX = -200
BORDERS = ("<im_start>", "<im_end>")


class NotebookPipeline:
    """Generate with the notebook's models.

    Args:
        folder (`Path`): Folder of the four models.
        ov_config (`dict`): Properties to compile them with. The notebook uses none.
    """

    def __init__(self, folder: Path, device: str = "CPU", ov_config: dict[str, str] | None = None):
        core, properties = ov.Core(), ov_config or {}
        self.image_encoder = core.compile_model(folder / "image_encoder.xml", device, properties)
        self.token_embed = core.compile_model(folder / "token_embed.xml", device, properties)
        self.first_stage = core.compile_model(folder / "llava_input_embed.xml", device, properties)
        second_stage = core.read_model(folder / "llava_with_past.xml")
        self.past_names = [name for port in second_stage.inputs if "key_values" in (name := port.get_any_name())]
        self.present_names = [name for port in second_stage.outputs if "present" in (name := port.get_any_name())]
        self.request = core.compile_model(second_stage, device, properties).create_infer_request()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.image_processor = CLIPImageProcessorPil.from_pretrained(folder)

    def prepare(self, prompt: str, images: list[Image.Image] | None) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """Tokenize a prompt and preprocess its images.

        Args:
            prompt: Contains `<im_start><image><im_end>` for each image.

        Returns:
            Ids `(1, tokens)` with -200 for each image, and `pixel_values`.
        """
        ids: list[int] = []
        for number, text in enumerate(prompt.split("<image>")):
            ids += [IMAGE_TOKEN_INDEX] * (number > 0) + self.tokenizer(text).input_ids
        pixel_values = self.image_processor(images, return_tensors="pt")["pixel_values"] if images else None
        return torch.tensor([ids]), pixel_values

    def generate(
        self,
        input_ids: torch.LongTensor,
        images: torch.Tensor | None,
        max_new_tokens: int,
        on_tokens: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.LongTensor:
        """Generate greedily.

        Args:
            input_ids: `(batch, tokens)`, -200 for each image.
            images: `(images, 3, height, width)`, the images of all sequences in order.
            on_tokens: Called with the new token of each sequence, `(batch,)`.

        Returns:
            Generated tokens `(batch, max_new_tokens)`. Generation does not stop at end tokens.
        """
        logits, past = self._first(input_ids, images)
        generated = []
        while True:
            token = logits[:, -1].argmax(dim=-1)
            generated.append(token)
            if on_tokens is not None:
                on_tokens(token)
            if len(generated) == max_new_tokens:
                return torch.stack(generated, dim=1)
            logits, past = self._next(token[:, None], past)

    def _first(
        self, input_ids: torch.LongTensor, images: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[np.ndarray]]:
        inputs_embeds = self._embed(input_ids, images)
        attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long)
        logits, *past = self.first_stage([inputs_embeds, attention_mask]).values()
        return torch.from_numpy(logits), past

    def _next(self, input_ids: torch.LongTensor, past: list[np.ndarray]) -> tuple[torch.Tensor, list[np.ndarray]]:
        attention_mask = np.ones((input_ids.shape[0], past[-1].shape[-2] + 1), dtype=np.int64)
        inputs = dict(zip(self.past_names, past))
        inputs |= {"input_ids": input_ids.numpy(), "attention_mask": attention_mask}
        self.request.start_async(inputs, share_inputs=True)
        self.request.wait()
        logits = torch.from_numpy(self.request.get_tensor("logits").data)
        return logits, [self.request.get_tensor(name).data for name in self.present_names]

    def _embed(self, input_ids: torch.LongTensor, images: torch.Tensor | None) -> torch.Tensor:
        """Join embeddings of the text and features of the images, sequence by sequence."""
        features = iter(torch.from_numpy(self.image_encoder(images)[0]) if images is not None else [])
        sequences = []
        for ids in input_ids:
            positions = torch.where(ids == IMAGE_TOKEN_INDEX)[0].tolist()
            parts, start = [], 0
            for position in [*positions, len(ids)]:
                if position > start:
                    parts.append(torch.from_numpy(self.token_embed(ids[None, start:position])[0][0]))
                if position < len(ids):
                    parts.append(next(features))
                start = position + 1
            sequences.append(torch.cat(parts))
        return torch.stack(sequences)
