"""Conversations are written as the original writes them, by transformers and by GenAI, and the right one is chosen."""

import json
from types import SimpleNamespace

import openvino_genai
import pytest
from conftest import GOLDEN, Golden

from optimum_llava_ov.checkpoint.conversation import CONVERSATIONS, choose_conversation, conversation_named
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.checkpoint.sentencepiece import load_sentencepiece_tokenizer
from optimum_llava_ov.export.tokenizers import export_tokenizers


# The golden prompts of the original for each conversation, and what was said in them
ORIGINAL = json.loads((GOLDEN / "conversations.json").read_text())
QUESTION, ANSWER, QUESTION_2 = '<image>\nWhat is "this"?\n', "It's a boat.", "Which colour? \\n {{ x }}"
SYSTEM = {"role": "system", "content": "Be brief.\nÄ"}
DIALOGUES = {
    "one": [QUESTION],
    "two": [QUESTION, ANSWER, QUESTION_2],
    "three": [QUESTION, ANSWER, QUESTION_2, ANSWER, QUESTION],
    "answered": [QUESTION, ANSWER, QUESTION_2, ANSWER],
}
CASES = [(conversation, dialogue) for conversation in ORIGINAL for dialogue in ORIGINAL[conversation]]
by_conversation = pytest.mark.parametrize("name", CONVERSATIONS)

# case of the other goldens: what was said in it
GOLDEN_CASES = {
    "text_only": ["Write a short poem about the sea."],
    "image_start": ["<image>\nWhat is shown in this image?"],
    "image_middle": ["Please look at <image> and count the chairs."],
    "same_shape_twice": ["<image>\n<image>\nCompare them."],
    "multi_turn": ["<image>\nWhat is in the picture?", "A red boat on the water.", "What colour is it?"],
    "multi_turn_two_images": ["<image>\nWhat is this?", "A photo.", "<image>\nAnd this?"],
}
CHECKPOINTS = {
    "llava15_vicuna": "vicuna_v1",
    "llava1_llama2chat": "llava_llama_2",
    "llava16_mistral_anyres": "mistral_instruct",
}


def messages_of(texts):
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_sentencepiece_tokenizer(Repository(str(GOLDEN / "llava15_vicuna" / "checkpoint")))


@pytest.fixture(scope="module")
def yi_tokenizer():
    return load_sentencepiece_tokenizer(Repository(str(GOLDEN / "yi_tokenizer")))


@pytest.fixture(scope="module")
def render(tokenizer, tmp_path_factory):
    """Writes messages as transformers does, and checks that GenAI does the same."""
    folder = tmp_path_factory.mktemp("genai")
    export_tokenizers(SimpleNamespace(tokenizer=tokenizer, chat_template="{{ messages }}"), folder)
    genai = openvino_genai.Tokenizer(folder)

    def render(name, messages, add_generation_prompt=True):
        template = CONVERSATIONS[name].chat_template
        options = {"add_generation_prompt": add_generation_prompt, "chat_template": template}
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        assert genai.apply_chat_template(messages, **options) == prompt
        return prompt

    return render


@pytest.mark.parametrize(("name", "dialogue"), CASES)
def test_prompts_are_the_originals(render, name, dialogue):
    key = dialogue.removesuffix("_system")
    messages = [SYSTEM] * (dialogue != key) + messages_of(DIALOGUES[key])
    assert render(name, messages, add_generation_prompt=key != "answered") == ORIGINAL[name][dialogue]


@pytest.mark.parametrize("case", GOLDEN_CASES)
@pytest.mark.parametrize(("golden", "name"), CHECKPOINTS.items())
def test_golden_prompts(render, golden, name, case):
    original = Golden(golden).cases[case]["prompt"]
    expected = original.replace("<im_start><image><im_end>", "<image>")  # the borders are part of the image here
    assert render(name, messages_of(GOLDEN_CASES[case])) == expected
    texts = [text.replace("<image>", "<im_start><image><im_end>") for text in GOLDEN_CASES[case]]
    assert render(name, messages_of(texts)) == expected


@pytest.mark.parametrize(("key", "expected"), json.loads((GOLDEN / "prompts.json").read_text()).items())
def test_older_mpt_prompts_by_their_system_text(render, key, expected):
    system = {"role": "system", "content": expected["system"].removeprefix("<|im_start|>system\n")}
    turns = messages_of(["Hello there", "Hi!", "What is this?"])
    assert render("mpt", [system, *turns[:1]]) == expected["user_assistant_none"]
    assert render("mpt", [system, *turns]) == expected["user_assistant_user_none"]
    assert render("mpt", [system, *turns], add_generation_prompt=False) == expected["user_assistant_user"]
    assert (render("mpt", turns) == expected["user_assistant_user_none"]) == (key == "v1.1.3:mpt")


@by_conversation
def test_images_come_first_in_a_message(render, name):
    text, image = {"type": "text", "text": "Which is red?"}, {"type": "image"}
    expected = render(name, messages_of(["<image>\n<image>\nWhich is red?"]))
    for content in ([image, image, text], [image, text, image], [text, image, image]):
        assert render(name, [{"role": "user", "content": content}]) == expected
    later = [{"type": "text", "text": "Say."}]
    assert render(name, [{"role": "user", "content": [text, image, *later]}]) == render(
        name, messages_of(["<image>\nWhich is red?\nSay."])
    )


@by_conversation
def test_a_message_may_be_empty_or_a_list(render, name):
    as_list = [{"role": "system", "content": [{"type": "text", "text": SYSTEM["content"]}]}, *messages_of(["Hi"])]
    assert render(name, as_list) == render(name, [SYSTEM, *messages_of(["Hi"])])
    assert "Hi" in render(name, [{"role": "system", "content": ""}, *messages_of(["Hi"])])


def test_an_empty_system_text_is_not_written_for_llama_2(render):
    assert render("llava_llama_2", [{"role": "system", "content": ""}, *messages_of(["Hi"])]) == "[INST] Hi [/INST]"


@by_conversation
def test_other_roles_are_an_error(tokenizer, name):
    with pytest.raises(Exception, match="roles system, user and assistant, found tool"):
        tokenizer.apply_chat_template(
            [{"role": "tool", "content": "x"}], chat_template=CONVERSATIONS[name].chat_template
        )


@pytest.mark.parametrize("golden", CHECKPOINTS)
def test_prompt_has_the_originals_ids(render, golden):
    """Conversation and tokenizer together, turn by turn."""
    arguments = {
        "llava15_vicuna": {"use_im_patch": False},
        "llava1_llama2chat": {"use_im_start_end": True},
        "llava16_mistral_anyres": {"use_im_patch": False, "fast": True},
    }
    tokenizer = load_sentencepiece_tokenizer(Repository(str(Golden(golden).checkpoint)), **arguments[golden])
    borders = tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"]) if "llama2" in golden else []
    for case, texts in GOLDEN_CASES.items():
        prompt = render(CHECKPOINTS[golden], messages_of(texts))
        ids = [-200 if id == len(tokenizer) - 1 else id for id in tokenizer(prompt)["input_ids"]]
        assert ids == [id for id in Golden(golden).cases[case]["input_ids"] if id not in borders]


def test_stops(tokenizer, yi_tokenizer):
    eos = tokenizer.eos_token_id
    assert CONVERSATIONS["vicuna_v1"].stops(tokenizer) == ([eos], [])
    assert CONVERSATIONS["llava_v0"].stops(tokenizer) == ([eos], ["###"])
    assert CONVERSATIONS["chatml_direct"].stops(tokenizer) == ([eos], ["<|im_end|>"])
    assert CONVERSATIONS["chatml_direct"].stops(yi_tokenizer) == (
        [yi_tokenizer.convert_tokens_to_ids("<|im_end|>")],
        [],
    )


def test_name_of_a_conversation():
    assert conversation_named("vicuna_v1").name == "vicuna_v1"
    with pytest.raises(ValueError, match="conversation 'vicuna' does not exist.*vicuna_v1, llava_v1"):
        conversation_named("vicuna")


LLAMA, MISTRAL, MPT = "LlavaLlamaForCausalLM", "LlavaMistralForCausalLM", "LlavaMPTForCausalLM"


@pytest.mark.parametrize(
    ("architecture", "base_model", "name", "expected", "reason"),
    [
        (MPT, None, "liuhaotian/LLaVA-Lightning-MPT-7B-preview", "mpt", MPT),
        (LLAMA, "lmsys/vicuna-7b-v1.5", "liuhaotian/llava-v1.5-7b", "vicuna_v1", "base model 'lmsys/vicuna-7b-v1.5'"),
        (LLAMA, None, "liuhaotian/llava-v1.5-13b", "vicuna_v1", "name 'liuhaotian/llava-v1.5-13b'"),
        (LLAMA, None, "liuhaotian/llava-v1.6-vicuna-7b", "vicuna_v1", "Vicuna"),
        (LLAMA, None, "Lin-Chen/ShareGPT4V-7B", "vicuna_v1", "ShareGPT4V-7B"),
        (LLAMA, "./llava-7b-v1-1", "my-model", "vicuna_v1", "base model './llava-7b-v1-1'"),
        (LLAMA, None, "LLaVA-Lightning-7B-delta-v1-1", "vicuna_v1", "version 1"),
        (LLAMA, None, "liuhaotian/LLaVA-13b-delta-v0-science_qa", "llava_v0", "version 0"),
        (LLAMA, "lmsys/vicuna-7b-v1.5", "my-tune-v0", "vicuna_v1", "base model"),
        (LLAMA, "meta-llama/Llama-2-7b-chat-hf", "my-llava-v1", "llava_llama_2", "Llama 2 Chat"),
        (LLAMA, None, "liuhaotian/llava-llama-2-13b-chat-lightning-preview", "llava_llama_2", "Llama 2 Chat"),
        (LLAMA, "meta-llama/Llama-2-7b-hf", "mine", "vicuna_v1", "training scripts"),
        (LLAMA, None, None, "vicuna_v1", "training scripts"),
        (None, None, "/models/llava-v10", "vicuna_v1", "training scripts"),
        (MISTRAL, None, "microsoft/llava-med-v1.5-mistral-7b", "mistral_instruct", MISTRAL),
        (MISTRAL, None, "a-renamed-folder/", "mistral_instruct", MISTRAL),
        (MISTRAL, None, "SkunkworksAI/BakLLaVA-1", "vicuna_v1", "BakLLaVA"),
    ],
)
def test_choice(tokenizer, architecture, base_model, name, expected, reason):
    choice = choose_conversation(architecture, tokenizer, [base_model] if base_model else [], name)
    assert choice.conversation.name == expected
    assert reason in choice.reason
    assert choice.reason.endswith(".")


def test_a_tokenizer_with_chatml_decides(yi_tokenizer):
    choice = choose_conversation(LLAMA, yi_tokenizer, ["lmsys/vicuna-7b-v1.5"], "liuhaotian/llava-v1.6-34b")
    assert choice.conversation.name == "chatml_direct"
    assert "<|im_start|>" in choice.reason
