"""A question about an image that was seen computes only its own tokens: in a session, and in calls of `generate`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import EXACT, Golden
from PIL import Image
from test_chat import ask

from optimum_llava_ov import OVModelForLlava


TILES, SQUARE = Golden("llava16_mistral_anyres"), Golden("llava15_vicuna")
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
by_golden = pytest.mark.parametrize("golden", [TILES, SQUARE], ids=lambda golden: golden.name)


class Work:
    """Count what a model computes: tiles or images in its tower, tokens in its language model."""

    def __init__(self, model: OVModelForLlava, monkeypatch):
        self.tower = self.tokens = 0
        encoder, forward = model.vision_embeddings, model.language_model.forward

        def encode(pixels):
            self.tower += len(pixels)
            return encoder(pixels)

        def run(inputs_embeds, *args, **kwargs):
            self.tokens += inputs_embeds.shape[0] * inputs_embeds.shape[1]
            return forward(inputs_embeds, *args, **kwargs)

        monkeypatch.setattr(model, "vision_embeddings", encode)
        monkeypatch.setattr(model.language_model, "forward", run)

    def take(self) -> tuple[int, int]:
        """Return what was counted since the last call: runs of the tower, and tokens."""
        taken = self.tower, self.tokens
        self.tower = self.tokens = 0
        return taken


@pytest.fixture(params=["PA", "SDPA"])
def model_of(request, bundles):
    return lambda golden: OVModelForLlava.from_pretrained(
        bundles[golden.name], ov_config={**EXACT, "ATTENTION_BACKEND": request.param}
    )


def inputs_of(processor, question: str, images: list[Image.Image]):
    messages = [{"role": "user", "content": [*[{"type": "image"}] * len(images), {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    return processor(text=prompt, images=images or None, return_tensors="pt")


def answer(model, inputs, **options) -> list[int]:
    output = model.generate(**inputs, **{**GREEDY, **options})
    return output[:, inputs["input_ids"].shape[1] :].flatten().tolist()


@by_golden
def test_generate(golden, model_of, models, processors, monkeypatch):
    """Each answer is that of a model that has computed nothing before. Only the tokens after the common ones are computed."""
    model, fresh, processor = model_of(golden), models[golden.name], processors[golden.name]
    monkeypatch.setattr(fresh, "prefix_caching", False)
    wide, tall = (golden.image(name) for name in ("img0_300x200", "img1_64x480"))
    work = Work(model, monkeypatch)

    def check(question: str, images: list[Image.Image], **options) -> tuple[int, int]:
        inputs = inputs_of(processor, question, images)
        expected = answer(fresh, inputs, **options)
        work.take()
        assert answer(model, inputs, **options) == expected
        tower, tokens = work.take()
        return tower, tokens - (GREEDY["max_new_tokens"] - 1)  # of the prompt

    prompts = [inputs_of(processor, question, [wide]) for question in ("What is this?", "Why?")]
    first, second = (len(inputs["input_ids"][0]) for inputs in prompts)
    image = int((prompts[0]["input_ids"] == model.config.image_token_index).sum())
    tower, tokens = check("What is this?", [wide])
    assert tower == (5 if golden is TILES else 1)
    assert tokens == first
    tower, tokens = check("Why?", [wide])
    assert tower == 0
    assert tokens < second - image
    assert check("Why?", [wide]) == (0, 1)  # the same again: its last token

    tower, tokens = check("Why?", [tall])  # another image
    assert tower > 0
    assert tokens > int((inputs_of(processor, "Why?", [tall])["input_ids"] == model.config.image_token_index).sum())
    tower, tokens = check("Why?", [tall, wide])  # one more
    assert (tower, tokens > image) == (5 if golden is TILES else 1, True)
    tower, tokens = check("What else?", [tall, wide])
    assert tower == 0
    assert tokens < 20
    assert check("Why?", [], num_beams=1)[0] == 0


def test_an_image_with_equal_tiles_and_another_size_is_another_image(models, processors):
    """Black images: all tiles are equal, but another number of rows is left out as padding."""
    model, processor = models[TILES.name], processors[TILES.name]
    for size in [(112, 112), (112, 100), (112, 84), (112, 112)]:
        inputs = inputs_of(processor, "What is this?", [Image.new("RGB", size, "black")])
        found = answer(model, inputs)
        model.prefix_caching = False
        assert found == answer(model, inputs)
        model.prefix_caching = True


def test_what_cannot_be_continued(models, processors, monkeypatch):
    """Batches and beams are computed as a whole, and so is what follows them. Padding of a single prompt does not matter."""
    model, processor = models[SQUARE.name], processors[SQUARE.name]
    image = SQUARE.image("img0_300x200")
    inputs = inputs_of(processor, "What is this?", [image])
    length = inputs["input_ids"].shape[1]
    expected = answer(model, inputs)
    padded = {**inputs}
    padded["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (3, 0), value=processor.tokenizer.pad_token_id)
    padded["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (3, 0))
    twice = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
    work = Work(model, monkeypatch)
    for others, options, is_whole in (
        (padded, {}, False),
        (twice, {}, True),
        (inputs, {"num_beams": 2}, True),
        (inputs, {"num_return_sequences": 1}, False),
    ):
        work.take()
        found = answer(model, others, **options)
        assert (work.take()[1] >= length) == is_whole
        if "num_beams" not in options:
            assert found == expected * len(others["input_ids"])
        if is_whole:
            assert answer(model, inputs) == expected
            assert work.take()[1] >= length
    monkeypatch.setattr(model, "prefix_caching", False)
    answer(model, inputs)
    work.take()
    answer(model, inputs)
    assert work.take()[1] >= length


def test_a_cache_of_an_earlier_call_is_not_taken_over(models, processors):
    """`past_key_values` of a call is valid until the next call, also if that continues the same tokens."""
    model, processor = models[SQUARE.name], processors[SQUARE.name]
    inputs = inputs_of(processor, "What is this?", [SQUARE.image("img0_300x200")])
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    again = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(first.sequences, again.sequences)
    with pytest.raises(ValueError, match="past_key_values belong to an earlier prompt"):
        first.past_key_values.get_seq_length()
    assert again.past_key_values.get_seq_length() == again.sequences.shape[1] - 1
    one_more = model.forward(
        input_ids=again.sequences[:, -1:],
        attention_mask=torch.ones_like(again.sequences),
        past_key_values=again.past_key_values,
    )
    assert np.isfinite(one_more.logits.numpy()).all()
    assert answer(model, inputs) == first.sequences[0, inputs["input_ids"].shape[1] :].tolist()


@by_golden
def test_session(golden, model_of, processors, monkeypatch):
    """A later question costs its own tokens. An image that was shown before is not encoded again."""
    model = model_of(golden)
    chat = model.chat(processors[golden.name], max_new_tokens=4, eos_token_id=None, stop_strings=None)
    work = Work(model, monkeypatch)
    image = golden.image("img0_300x200")
    ask(chat, "What is this?", [image])
    tower, tokens = work.take()
    assert tower == (5 if golden is TILES else 1)
    image_tokens = tokens - 3
    ask(chat, "Why?", [])
    tower, tokens = work.take()
    assert tower == 0
    assert tokens < 40 < image_tokens + 40
    ask(chat, "And again?", [image])
    tower, tokens = work.take()
    assert tower == 0
    chat.reset()
    ask(chat, "Why?", [image])
    assert work.take()[0] == 0
