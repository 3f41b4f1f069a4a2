"""`--engine genai`: the same conversation as with this package's own model."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import EXACT, EXAMPLES, Golden, run
from PIL import Image
from test_chat import ENDLESS, GOLDEN, Tokens, ask, cancel_at_the_tenth_token, check_failing_retries
from transformers import AutoProcessor

from optimum_llava_ov import OVModelForLlavaMPT
from optimum_llava_ov.chat.messages import text_of
from optimum_llava_ov.chat.prompt import build_prompt
from optimum_llava_ov.chat.session import ChatSession
from optimum_llava_ov.loading import GENAI, OPENVINO, choose_engine, load_engine, located, session_factory
from optimum_llava_ov.samples.shapes import held_out


pytestmark = pytest.mark.genai


PICTURES = EXAMPLES / "shapes" / "pictures"
A, B = (Image.open(PICTURES / name).convert("RGB") for name in ("a.png", "b.png"))
STAR = "The star is at the top right."


@pytest.fixture(scope="module")
def genai(shapes_bundle):
    return session_factory(shapes_bundle, ov_config=EXACT, engine=GENAI)


@pytest.fixture(scope="module")
def openvino(shapes_bundle):
    model = OVModelForLlavaMPT.from_pretrained(shapes_bundle, ov_config=EXACT)
    processor = AutoProcessor.from_pretrained(shapes_bundle)
    return lambda **kwargs: model.chat(processor, **kwargs)


def test_same_answers(genai, openvino):
    for conversation in held_out(20, seed=3):
        ours, theirs = openvino(), genai()
        for turn in conversation:
            assert ask(theirs, turn["question"], turn["images"]) == ask(ours, turn["question"], turn["images"])


@pytest.mark.parametrize("name", ["linear_fp16_sharded", "mlp2x_fp32_pad", "llava15_vicuna", "llava1_llama2chat"])
def test_same_answers_of_a_random_model(name, bundles, models, processors):
    """To pictures that must be resized, cropped or padded."""
    golden = Golden(name)
    theirs = session_factory(bundles[name], ov_config=EXACT, engine=GENAI)(max_new_tokens=16)
    ours = models[name].chat(processors[name], max_new_tokens=16)
    for text, image in [("What is this?", "img0_300x200"), ("And this?", "img1_64x480"), ("Are you sure?", None)]:
        images = [golden.image(image)] if image else []
        assert ask(theirs, text, images, do_sample=False) == ask(ours, text, images, do_sample=False)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_other_modes_are_converted(genai, openvino, mode):
    """GenAI itself takes RGB alone, and gives wrong answers to anything else."""
    image = A.convert(mode)
    for engine in (genai, openvino):
        assert ask(engine(), "Where is the star?", image) == ask(engine(), "Where is the star?", image.convert("RGB"))


@pytest.mark.parametrize("name", [OPENVINO, GENAI])
def test_a_batch_gets_the_answers_of_conversations(name, shapes_bundle):
    """Prompts of different lengths, of which one has an image in each of two turns."""
    engine = load_engine(str(shapes_bundle), ov_config=EXACT, engine=name)
    chats = [ChatSession(engine), ChatSession(engine)]
    ask(chats[0], "What colour is the circle?", A)
    ask(chats[0], "How many shapes are there?", B)
    ask(chats[1], "Where is the star?", A)
    prompts = [build_prompt(chat.messages[:-1], engine.processor, engine.config) for chat in chats]
    answers = [[], []]
    engine.generate(prompts, lambda index, token: answers[index].append(token), max_new_tokens=40)
    ends = [answer.pop() for answer in answers]
    assert ends == [engine.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")] * 2
    assert engine.processor.batch_decode(answers) == [text_of(chat.messages[-1]) for chat in chats]


def test_undo_retry_reset_and_restore(genai, tmp_path):
    chat = genai()
    assert chat.send("How many shapes are there?", B).result() == "There are two shapes."
    chat.undo()
    assert chat.send("What colour is the circle?", A).result() == "The circle is red."
    assert chat.send("Where is the star?").result() == chat.retry().result() == STAR
    chat.save(tmp_path / "chat.json")
    assert genai(messages=tmp_path / "chat.json").retry().result() == STAR
    chat.reset()
    assert chat.messages == []
    assert chat.send("Where is the star?", A).result() == STAR


def test_a_retry_that_fails_loses_nothing(genai):
    chat = genai()
    chat.send("What colour is the circle?", A).result()
    chat.send("Where is the star?").result()

    def cancelled_retry():
        """While another session's answer has the pipeline."""
        first, go_on = threading.Event(), threading.Event()

        class Pause(Tokens):
            def put(self, value):
                super().put(value)
                if self.tokens:  # the prompt comes before the pipeline is taken
                    first.set()
                    go_on.wait()

        other = genai().send("Hello", streamer=Pause())
        first.wait()
        answer = chat.retry()
        answer.cancel()
        answer.wait()
        go_on.set()
        other.wait()
        return answer

    check_failing_retries(chat, cancelled_retry)


def test_system_prompt_and_dropped_turns(genai, openvino):
    options = {"system": "You see shapes.", "context_window": 130, "max_new_tokens": 40, "when_full": "drop_oldest"}
    ours, theirs = openvino(**options), genai(**options)
    for number, question in enumerate(
        ["What colour is the circle?", "Where is the star?", "What is at the bottom?"] * 2
    ):
        images = A if number == 0 else None
        assert ask(theirs, question, images) == ask(ours, question, images)
    assert theirs.dropped_turns >= 2


def test_options(genai):
    chat = genai()
    assert chat.send("Where is the star?", A, stop_strings=" at").result() == "The star is"
    assert chat.retry(max_new_tokens=3).stats.new_tokens <= 3
    chat.cancel()
    torch.manual_seed(0)
    sampled = [
        chat.send("Where is the star?", do_sample=True, temperature=50.0, max_new_tokens=6).result() for _ in range(3)
    ]
    assert len(set(sampled)) == 3
    with pytest.raises(
        ValueError, match=r"not support penalty_alpha\. It supports max_new_tokens, .*openvino engine supports all"
    ):
        chat.send("Hi", penalty_alpha=0.5).result()
    chat.reset()
    for options, message in (
        ({"do_sample": True, "temperature": 0.0}, "does not take these options: Check 'temperature > 0' failed"),
        ({"do_sample": True, "top_p": -0.5}, "does not take these options: Check 'top_p"),
        ({"repetition_penalty": 0.0}, "does not take these options: Check 'repetition_penalty"),
        ({"min_new_tokens": "x"}, "min_new_tokens is 'x', which has a type"),
    ):
        with pytest.raises(ValueError, match=message):
            chat.send("Where is the star?", **options).result()
    assert chat.messages == []
    assert chat.send("Where is the star?", A, do_sample=True, top_k=1).result() == STAR
    assert "from the cache" not in str(chat.last_answer.stats)


def test_cancel(bundles):
    chat = session_factory(bundles[GOLDEN.name], ov_config=EXACT, engine=GENAI)(**ENDLESS, max_new_tokens=1500)
    answer, tokens = cancel_at_the_tenth_token(chat)
    assert answer.result() == text_of(chat.messages[-1])
    assert len(tokens) == 10
    chat.undo()
    _, again = ask(chat, "Hello", max_new_tokens=10)
    assert again == tokens

    class Broken(Tokens):
        def put(self, value):
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        chat.send("Hello", streamer=Broken()).result()
    chat.reset()
    assert ask(chat, "Hello", max_new_tokens=10)[1] == again


def test_sessions_in_parallel(genai):
    conversations = list(held_out(8, seed=5))

    def answers(conversation):
        chat = genai()
        return [chat.send(turn["question"], turn["images"]).result() for turn in conversation]

    alone = list(map(answers, conversations))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answers, conversations)) == alone


def test_the_other_engine_in_the_program(shapes_bundle):
    """What the other tests of the programs run with is GenAI, the default."""
    command = [
        "optimum-cli",
        "llava-ov",
        "chat",
        shapes_bundle,
        "--engine",
        "openvino",
        "--stats",
        "--image",
        PICTURES / "a.png",
    ]
    result = run(*command, input="What colour is the circle?\n")
    assert result.stdout == "The circle is red.\n"
    assert "(0 from the cache)" in result.stderr


def test_default(shapes_bundle, tmp_path):
    assert choose_engine(located(shapes_bundle)) == GENAI
    assert choose_engine(located(EXAMPLES / "shapes" / "checkpoint")) == OPENVINO
    for file in shapes_bundle.iterdir():
        if "tokenizer." not in file.name:
            (tmp_path / file.name).symlink_to(file)
    assert choose_engine(located(tmp_path)) == OPENVINO


def test_no_bundle():
    with pytest.raises(ValueError, match="is not a bundle, because it has no openvino_language_model.xml"):
        session_factory(str(EXAMPLES / "shapes" / "checkpoint"), engine=GENAI)
    with pytest.raises(ValueError, match="Expected one of auto, openvino, genai"):
        session_factory("x", engine="vllm")
