"""Compare GGUF files with the checkpoint that they were written from, computed by transformers in fp32.

`python benchmarks/llama.py check` runs it. It needs 4 bytes of memory for each weight, so it is for small models.

llama.cpp puts the class token after the patches, but numbers positions and picks features as if it were before them
(ggml-org/llama.cpp issue 25814). It takes the same time, so nothing is changed for the measurements. Here the torch
model does the same.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from llama import MMPROJ, VisionModel
from llama_files import PROJECTOR, tensors
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.checkpoint.sentencepiece import load_sentencepiece_tokenizer


PROMPT = "A chat. USER: <image>\nWhat is shown in the picture? ASSISTANT:"


class TorchModel:
    """Compute logits and image features with transformers' modules.

    Args:
        checkpoint: Original checkpoint with `mlp2x_gelu` and its tower.
    """

    def __init__(self, checkpoint: Path):
        self.config = json.loads((checkpoint / "config.json").read_text())
        weights = {name: tensor.float() for name, tensor in tensors(checkpoint) if not name.endswith("inv_freq")}
        names = ("weight", "bias")
        self.projector = [[weights.pop(f"model.{PROJECTOR}{layer}.{name}") for name in names] for layer in (0, 2)]
        known = LlamaConfig().to_dict().keys() - {"architectures", "model_type", "dtype", "torch_dtype"}
        values = {name: value for name, value in self.config.items() if name in known}
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": self.config.get("rope_theta", 10000.0)}
        self.language_model = LlamaForCausalLM(LlamaConfig(**values)).eval()
        self.language_model.load_state_dict(weights)
        tower = checkpoint / self.config["mm_vision_tower"]
        self.vision_tower = CLIPVisionModel.from_pretrained(tower).eval()
        embeddings = self.vision_tower.vision_model.embeddings
        embeddings.forward = partial(_class_token_last, embeddings)
        self.processor = CLIPImageProcessorPil.from_pretrained(tower)
        tokenizer = load_sentencepiece_tokenizer(
            Repository(str(checkpoint)),
            fast=self.config["model_type"] == "llava_mistral",
            use_im_patch=self.config["mm_use_im_patch_token"],
        )
        self.tokenizer, self.image_token_id = tokenizer, tokenizer.convert_tokens_to_ids("<image>")

    def encode(self, image: Image.Image) -> torch.Tensor:
        """Return image features `(patches, hidden_size)`, as llama.cpp picks them."""
        pixel_values = self.processor(image, return_tensors="pt")["pixel_values"]
        states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        features = states[self.config["mm_vision_select_layer"]][0, 1:]
        (first, first_bias), (second, second_bias) = self.projector
        features = torch.nn.functional.gelu(features @ first.T + first_bias)
        return features @ second.T + second_bias

    def ask(self, prompt: str, image: Image.Image) -> tuple[int, torch.Tensor]:
        """Return the number of tokens of a prompt with one image, and the logits `(vocab_size,)` of the last one."""
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"][0]
        place = ids.tolist().index(self.image_token_id)
        embed = self.language_model.get_input_embeddings()
        embeds = torch.cat([embed(ids[:place]), self.encode(image), embed(ids[place + 1 :])])
        return len(embeds), self.language_model(inputs_embeds=embeds[None]).logits[0, -1]


def _class_token_last(embeddings: CLIPVisionEmbeddings, pixel_values: torch.Tensor, **_) -> torch.Tensor:
    """Replace `CLIPVisionEmbeddings.forward`. Return `(1, patches + 1, hidden_size)`."""
    patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
    tokens = torch.cat([patches, embeddings.class_embedding.expand(1, 1, -1)], dim=1)
    return tokens + embeddings.position_embedding(embeddings.position_ids)


@torch.no_grad()
def check(checkpoint: Path, folder: Path, threads: int) -> None:
    """Print how close llama.cpp is to torch: cosines of image features, and logits of the last token.

    Raises:
        `SystemExit`: The files are not those of the checkpoint.
    """
    torch_model = TorchModel(checkpoint)
    size = torch_model.vision_tower.config.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)  # neither engine resizes it
    model = VisionModel(folder / "F16.gguf", folder / MMPROJ, 2048, threads)

    cosines = torch.nn.functional.cosine_similarity(torch_model.encode(image), torch.from_numpy(model.encode(image)))
    ids = torch_model.tokenizer(PROMPT.replace("<image>", ""))["input_ids"]
    model.decode(ids)
    text = _distance(torch_model.language_model(torch.tensor([ids])).logits[0, -1], model.logits())
    model.forget()
    found_tokens = model.ask(PROMPT, image)
    expected_tokens, expected = torch_model.ask(PROMPT, image)
    with_image = _distance(expected, model.logits())
    print(f"image features: cosine {cosines.min():.5f} or more")
    print(f"prompt of text: logits differ by {text:.4f} of their standard deviation")
    print(
        f"prompt with an image: {found_tokens} tokens, expected {expected_tokens}; logits differ by {with_image:.4f}"
    )
    if cosines.min() < 0.99 or max(text, with_image) > 0.1 or found_tokens != expected_tokens:
        raise SystemExit("The GGUF files are not those of the checkpoint.")


def _distance(expected: torch.Tensor, found: np.ndarray) -> float:
    """Return the standard deviation of the difference, divided by that of the expected values."""
    return float((torch.from_numpy(found) - expected).std() / expected.std())
