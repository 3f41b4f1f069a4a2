"""The chat template writes what the original writes."""

import json

import pytest
from conftest import GOLDEN


PROMPTS = json.loads((GOLDEN / "prompts.json").read_text())["v1.1.3:mpt"]
HELLO = {"role": "user", "content": "Hello there"}
HI = {"role": "assistant", "content": "Hi!"}
WHAT = {"role": "user", "content": "What is this?"}


@pytest.fixture(scope="module")
def render(processors):
    processor = processors["linear_fp16_sharded"]
    return lambda messages, **kwargs: processor.apply_chat_template(messages, **{"add_generation_prompt": True, **kwargs})


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
    assert prompt == "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nHello there<|im_end|><|im_start|>assistant\n"
    assert prompt == render([{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, HELLO])


def test_pictures_and_text_are_separated_by_newlines(render):
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which is red?"}]
    assert render([{"role": "user", "content": content}]).endswith(
        "<|im_start|>user\n<image>\n<image>\nWhich is red?<|im_end|><|im_start|>assistant\n"
    )
    assert "user\nLook:\n<image><|im_end|>" in render(
        [{"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image"}]}]
    )


def test_borders_in_a_message_are_taken_as_the_image(render):
    assert "user\n<image>\nWhat?<|im_end|>" in render([{"role": "user", "content": "<im_start><image><im_end>\nWhat?"}])
