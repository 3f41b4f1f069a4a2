"""The chat template writes what the original writes."""

import json

import openvino_genai
import pytest
from conftest import GOLDEN


PROMPTS = json.loads((GOLDEN / "prompts.json").read_text())["v1.1.3:mpt"]
HELLO = {"role": "user", "content": "Hello there"}
HI = {"role": "assistant", "content": "Hi!"}
WHAT = {"role": "user", "content": "What is this?"}


@pytest.fixture(scope="module")
def render(bundles, processors):
    """The prompt by transformers, which must be that by GenAI, whose template engine is its own."""
    processor, genai = processors["linear_fp16_sharded"], openvino_genai.Tokenizer(bundles["linear_fp16_sharded"])

    def render(messages, add_generation_prompt=True):
        prompt = processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
        assert genai.apply_chat_template(messages, add_generation_prompt) == prompt
        return prompt

    return render


@pytest.mark.parametrize(
    ("messages", "expected"),
    [([HELLO], "user_assistant_none"), ([HELLO, HI, WHAT], "user_assistant_user_none")],
)
def test_prompts_are_the_originals(render, messages, expected):
    assert render(messages) == PROMPTS[expected]


def test_without_generation_prompt(render):
    assert render([HELLO, HI, WHAT], add_generation_prompt=False) == PROMPTS["user_assistant_user"]


def test_own_system_message_replaces_the_default(render):
    prompt = render([{"role": "system", "content": "Be brief."}, HELLO])
    assert (
        prompt
        == "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nHello there<|im_end|><|im_start|>assistant\n"
    )
    assert prompt == render([{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, HELLO])


def test_pictures_and_text_are_separated_by_newlines(render):
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which is red?"}]
    assert render([{"role": "user", "content": content}]).endswith(
        "<|im_start|>user\n<image>\n<image>\nWhich is red?<|im_end|><|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("ti", "<image>\nLook:"),
        ("tii", "<image>\n<image>\nLook:"),
        ("titi", "<image>\n<image>\nLook:\nLook:"),
        ("i", "<image>"),
        ("tt", "Look:\nLook:"),
    ],
)
def test_images_stand_before_the_text(render, content, expected):
    """As in the original, in whatever order a message has its parts."""
    parts = {"i": {"type": "image"}, "t": {"type": "text", "text": "Look:"}}
    assert f"user\n{expected}<|im_end|>" in render([{"role": "user", "content": [parts[part] for part in content]}])


def test_borders_in_a_message_are_taken_as_the_image(render):
    assert "user\n<image>\nWhat?<|im_end|>" in render(
        [{"role": "user", "content": "<im_start><image><im_end>\nWhat?"}]
    )
