"""Let `generate` handle images, for the torch model and for the OpenVINO model."""

from __future__ import annotations

from itertools import islice

import torch
from transformers import GenerationMixin
from transformers.generation.candidate_generator import CandidateGenerator, PromptLookupCandidateGenerator

from optimum_llava_ov.models.image_layout import images_per_sequence
from optimum_llava_ov.models.merge import check_image_count


class ImageGenerationMixin(GenerationMixin):
    """`generate` for a batch of prompts with any number of images each.

    The class must have `config.image_token_id`, `get_image_features`, and a `forward` that takes `image_features`
    instead of `pixel_values`.
    """

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeat the sequences for beams and several answers, and encode each image once.

        transformers would repeat each image separately: a, a, b, b for a sequence with the images a and b.
        """
        pixel_values = model_kwargs.get("pixel_values")
        if expand_size > 1 and input_ids is not None and pixel_values is not None:
            del model_kwargs["pixel_values"]
            features = self.get_image_features(pixel_values, model_kwargs.pop("image_sizes", None))
            is_image, lengths = input_ids == self.config.image_token_id, [len(image) for image in features]
            check_image_count(is_image, features)
            remaining = iter(features)
            per_sequence = [
                list(islice(remaining, count)) for count in images_per_sequence(is_image.sum(dim=1).tolist(), lengths)
            ]
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixel_values is not None and "pixel_values" not in model_kwargs:
            model_kwargs["image_features"] = [
                image for images in per_sequence for _ in range(expand_size) for image in images
            ]
        return input_ids, model_kwargs

    def _get_candidate_generator(self, *args, **kwargs) -> CandidateGenerator:
        generator = super()._get_candidate_generator(*args, **kwargs)
        is_lookup = isinstance(generator, PromptLookupCandidateGenerator)
        return _TextCandidates(generator, self.config.image_token_id) if is_lookup else generator


class _TextCandidates(CandidateGenerator):
    """Hides `<image>` from prompt lookup, because a model never generates it."""

    def __init__(self, generator: PromptLookupCandidateGenerator, image_token_id: int):
        self.generator = generator
        self.image_token_id = image_token_id

    def get_candidates(self, input_ids: torch.LongTensor) -> tuple[torch.LongTensor, torch.FloatTensor | None]:
        candidates, logits = self.generator.get_candidates(_as_text(input_ids, self.image_token_id))
        return torch.cat([input_ids, candidates[:, input_ids.shape[1] :]], dim=1), logits

    def update_candidate_strategy(self, *args) -> None:
        self.generator.update_candidate_strategy(*args)


def _as_text(input_ids: torch.LongTensor, image_token_id: int) -> torch.LongTensor:
    """Replace `<image>` in each sequence by the first text token of the sequence."""
    is_image = input_ids == image_token_id
    return torch.where(is_image, input_ids.gather(1, is_image.int().argmin(dim=1, keepdim=True)), input_ids)
