"""Make prompts of a given length: an image and a long question."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoProcessor


FILLER = "Tell me what you see in this picture, from the left to the right, and what people might do there. "


def make_prompts(bundle: Path, lengths: list[int]) -> dict[int, str]:
    """Make prompts in the bundle's chat template, each with one `<image>` and an exact number of tokens.

    Image tokens are counted.

    Raises:
        `ValueError`: A length is too short for the template and the image.
    """
    processor = AutoProcessor.from_pretrained(bundle)
    num_image_tokens = AutoConfig.from_pretrained(bundle).image_seq_length

    def prompt(characters: int) -> str:
        text = (FILLER * (characters // len(FILLER) + 1))[:characters]
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        return processor.apply_chat_template(messages, add_generation_prompt=True)

    def tokens(characters: int) -> int:
        return len(processor.tokenizer(prompt(characters))["input_ids"]) - 1 + num_image_tokens

    return {length: prompt(_characters(tokens, length)) for length in lengths}


def _characters(tokens, length: int) -> int:
    """Return the number of characters that make a prompt of `length` tokens."""
    if tokens(0) > length:
        raise ValueError(f"A prompt of {length} tokens is too short. Template and image take {tokens(0)} tokens.")
    low, high = 0, 16
    while tokens(high) < length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) < length else (low, middle)
    # One more character can be one token less, if it completes a word
    near = [count for count in range(max(0, high - 16), high + 17) if tokens(count) == length]
    if not near:
        raise ValueError(f"No text makes a prompt of exactly {length} tokens with this tokenizer.")
    return near[0]
