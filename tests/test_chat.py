"""Sessions: a turn processes only its new tokens, and answers what a prefill of the whole conversation answers."""

import json
import resource
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import EXACT, EXAMPLES, Golden, by_golden
from PIL import Image
from transformers import AutoProcessor, StoppingCriteria, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from optimum_llava_ov import OVModelForLlavaMPT
from optimum_llava_ov.chat.errors import ContextWindowError
from optimum_llava_ov.chat.messages import assistant_message, images_of, text_of
from optimum_llava_ov.chat.openvino_engine import OpenVINOEngine
from optimum_llava_ov.chat.session import ChatSession
from optimum_llava_ov.chat.streaming import StopStringFilter
from optimum_llava_ov.runtime.language_model import LanguageModel
from optimum_llava_ov.samples.shapes import held_out


GOLDEN = Golden("linear_fp16_sharded")
PICTURES = EXAMPLES / "shapes" / "pictures"
A, B, C = (Image.open(PICTURES / name).convert("RGB") for name in ("a.png", "b.png", "c.png"))
ENDLESS = {"eos_token_id": None, "do_sample": False}


class Tokens(BaseStreamer):
    """A streamer that keeps the new tokens."""

    def __init__(self):
        self.tokens = []
        self.prompt = None

    def put(self, value):
        if self.prompt is None:
            self.prompt = value
        else:
            self.tokens += value.tolist()

    def end(self):
        pass


@pytest.fixture(scope="module")
def shapes(shapes_bundle):
    return OVModelForLlavaMPT.from_pretrained(shapes_bundle, ov_config=EXACT), AutoProcessor.from_pretrained(
        shapes_bundle
    )


@pytest.fixture
def chat(shapes):
    model, processor = shapes
    return model.chat(processor)


def prefill(model, processor, messages, **options):
    """The answer to the last message by way of the whole conversation."""
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=images_of(messages) or None, return_tensors="pt")
    output = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 48, **options})
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def ask(chat, text, images=None, **options):
    streamer = Tokens()
    text = chat.send(text, images, streamer=streamer, **options).result()
    return text, streamer.tokens


@by_golden
@pytest.mark.parametrize("case", ["multi_turn", "multi_turn_two_images"])
def test_golden_conversations(golden, case, models, processors):
    """Earlier turns as messages, the last one asked: the original's tokens."""
    images = golden.images(case)
    turns = {
        "multi_turn": ["What is in the picture?", "A red boat on the water.", "What colour is it?"],
        "multi_turn_two_images": ["What is this?", "A photo.", "And this?"],
    }[case]
    engine = OpenVINOEngine(models[golden.name], processors[golden.name])
    conversation = engine.new_conversation()
    engine.new_conversation = lambda: conversation
    # The first question is asked, so that there is a cache; its answer is replaced, so that the cache must be cut.
    first = ChatSession(engine)
    first.send(turns[0], images[:1], max_new_tokens=8, **ENDLESS).result()
    chat = ChatSession(engine, messages=[first.messages[0], assistant_message(turns[1])])
    answer = chat.send(turns[2], images[1:], max_new_tokens=32, streamer=(streamer := Tokens()), **ENDLESS)
    answer.result()
    assert streamer.tokens == golden.cases[case]["greedy"]
    assert answer.stats.reused_tokens >= 30


@by_golden
def test_answers_of_a_random_model_equal_a_prefill(golden, models, processors):
    """Its answers are no text a tokenizer would give back, so the cache is cut in the middle of them."""
    model, processor = models[golden.name], processors[golden.name]
    chat = model.chat(processor, max_new_tokens=24, **ENDLESS)
    for text, images in [
        ("What is this?", [golden.image("img0_300x200")]),
        ("And\nthis?", [golden.image("img1_64x480"), golden.image("img2_224x224")]),
        ("Compare them.", []),
        ("Again!", [golden.image("img0_300x200")]),
    ]:
        _, tokens = ask(chat, text, images)
        assert tokens == prefill(model, processor, chat.messages[:-1], max_new_tokens=24, eos_token_id=None)
        assert len(tokens) == 24


def test_conversations_about_shapes(shapes):
    """Over several turns with new pictures: token for token, only new tokens processed, and right."""
    model, processor = shapes
    asked = right = 0
    for conversation in held_out(20, seed=3):
        chat, length = model.chat(processor), 0
        for turn in conversation:
            text, tokens = ask(chat, turn["question"], turn["images"])
            assert tokens == prefill(model, processor, chat.messages[:-1])
            stats = chat.last_answer.stats
            assert stats.reused_tokens == length
            length = stats.prompt_tokens + stats.new_tokens - 1  # the last token was generated, not processed
            asked, right = asked + 1, right + (text == turn["answer"])
    assert right / asked >= 0.9


def test_a_picture_is_encoded_once(shapes, monkeypatch):
    model, processor = shapes
    encoded = []
    original = model.get_image_features
    monkeypatch.setattr(model, "get_image_features", lambda pixels: encoded.append(len(pixels)) or original(pixels))
    chat = model.chat(processor)
    chat.send("What colour is the circle?", A).result()
    chat.send("Where is the star?").result()
    chat.retry().result()
    chat.undo(), chat.undo()
    assert chat.send("Where is the star?", A).result() == "The star is at the top right."
    chat.reset()
    chat.send("How many shapes are there?", [A, B]).result()
    assert encoded == [1, 1]


def test_computes_no_logits_but_those_of_the_next_token(chat, monkeypatch):
    wanted, forward = [], LanguageModel.forward
    monkeypatch.setattr(
        LanguageModel, "forward", lambda self, *args, **kwargs: wanted.append(args[3]) or forward(self, *args)
    )
    chat.send("What colour is the circle?", A).result()
    assert set(wanted) == {1}


def test_pieces_come_word_by_word(chat):
    answer = chat.send("Where is the star?", A)
    assert list(answer) == ["The ", "star ", "is ", "at ", "the ", "top ", "right."]
    assert answer.result() == "The star is at the top right."
    assert list(answer) == []
    assert answer.done()
    assert answer.stats.new_tokens == 9
    assert 0 < answer.stats.time_to_first_token <= answer.stats.seconds


def test_any_streamer_of_transformers(chat, shapes, capsys):
    tokenizer = shapes[1].tokenizer
    chat.send(
        "Where is the star?", A, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ).result()
    assert capsys.readouterr().out == "The star is at the top right.\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    chat.send("What colour is the circle?", streamer=streamer)
    assert "".join(streamer) == "The circle is red."


def test_stopping_criteria_and_limits(chat):
    class AfterTwo(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            calls.append(1)
            return torch.tensor([len(calls) == 2])

    calls = []
    chat.send("Where is the star?", A, stopping_criteria=[AfterTwo()]).result()
    assert len(calls) == chat.last_answer.stats.new_tokens == 2
    chat.retry(max_new_tokens=3).result()
    assert chat.last_answer.stats.new_tokens == 3
    assert chat.retry().result() == "The star is at the top right."


@pytest.mark.parametrize(
    ("stop", "expected"), [(" at", "The star is"), (["nothing", "top right"], "The star is at the ")]
)
def test_stop_strings_end_the_answer_and_are_no_part_of_it(chat, shapes, stop, expected):
    answer = chat.send("Where is the star?", A, stop_strings=stop)
    assert "".join(answer) == answer.result() == expected
    assert text_of(chat.messages[-1]) == expected
    _, tokens = ask(chat, "What colour is the circle?")
    assert tokens == prefill(*shapes, chat.messages[:-1])


def test_stop_string_filter():
    text = StopStringFilter(["###", "STOP"])
    assert [text(piece) for piece in ("a #", "# b S", "TO", "P c")] == ["a ", "## b ", "", ""]
    assert text.text == "a ## b "
    text = StopStringFilter(["###"])
    assert text("end ##") + text.flush() == "end ##"


def test_sampling_of_a_turn(chat, shapes):
    torch.manual_seed(0)
    sampled = {
        chat.send("Where is the star?", A, do_sample=True, temperature=50.0, max_new_tokens=6).result()
        for _ in range(3)
    }
    assert len(sampled) == 3
    [chat.undo() for _ in range(3)]
    assert chat.send("Where is the star?", A, do_sample=True, top_k=1).result() == "The star is at the top right."


def cancel_at_the_tenth_token(chat):
    """Ask, and cancel while the tenth token is being handed over. The answer, and the tokens it came to."""
    tenth, go_on = threading.Event(), threading.Event()

    class Pause(Tokens):
        def put(self, value):
            super().put(value)
            if len(self.tokens) == 10:
                tenth.set()
                go_on.wait()

    answer = chat.send("Hello", streamer=(streamer := Pause()))
    tenth.wait()
    answer.cancel()
    go_on.set()
    answer.wait()
    return answer, streamer.tokens


def test_cancel_stops_within_one_token(models, processors):
    model, processor = models[GOLDEN.name], processors[GOLDEN.name]
    chat = model.chat(processor, **ENDLESS, max_new_tokens=1500)
    answer, tokens = cancel_at_the_tenth_token(chat)
    assert answer.result() == text_of(chat.messages[-1])
    assert len(tokens) == 10
    assert answer.cancelled
    _, tokens = ask(chat, "Go on", max_new_tokens=16)
    assert tokens == prefill(model, processor, chat.messages[:-1], max_new_tokens=16, eos_token_id=None)


def test_to_stop_reading_cancels(models, processors):
    chat = models[GOLDEN.name].chat(processors[GOLDEN.name], **ENDLESS, max_new_tokens=1500)
    for _ in chat.send("Hello"):
        break
    assert chat.last_answer.cancelled
    assert chat.last_answer.stats.new_tokens < 1500
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    chat.send("Hello", max_new_tokens=4).result()


def test_cancelled_before_the_first_word(models, processors):
    """In the middle of a long prompt."""
    model, processor = models[GOLDEN.name], processors[GOLDEN.name]
    chat = model.chat(processor, context_window=100_000, **ENDLESS)
    answer = chat.send("Hello " * 8000, max_new_tokens=1500)
    answer.cancel()
    assert answer.result() == ""
    assert chat.messages == []
    _, tokens = ask(chat, "Hello", max_new_tokens=16)
    assert tokens == prefill(model, processor, chat.messages[:-1], max_new_tokens=16, eos_token_id=None)


def test_one_answer_at_a_time(models, processors):
    chat = models[GOLDEN.name].chat(processors[GOLDEN.name], **ENDLESS, max_new_tokens=1500)
    answer = chat.send("Hello")
    for call in (lambda: chat.send("And?"), chat.undo, chat.reset, chat.retry, lambda: chat.save("file")):
        with pytest.raises(RuntimeError, match="Read it to its end, or cancel"):
            call()
    chat.cancel()
    assert answer.done()
    chat.reset()
    assert chat.messages == []


def test_a_retry_that_fails_loses_nothing(shapes):
    """The old answer stays until the new one has taken its place."""
    model, processor = shapes
    chat = model.chat(SlowProcessor(processor))
    chat.send("What colour is the circle?", A).result()
    chat.send("Where is the star?").result()
    check_failing_retries(chat, lambda: cancelled_before_the_first_word(chat.retry, chat.processor))


def check_failing_retries(chat, cancelled_retry):
    before = chat.messages

    class Broken(Tokens):
        def put(self, value):
            super().put(value)
            if len(self.tokens) == 3:
                raise OSError("no room")

    with pytest.raises(ContextWindowError):
        chat.retry(max_new_tokens=100_000)
    with pytest.raises(ValueError, match="num_beams is 2"):
        chat.retry(num_beams=2)
    with pytest.raises(ValueError, match="nonsense"):
        chat.retry(nonsense=1).result()
    answer = chat.retry(streamer=Broken())
    with pytest.raises(OSError, match="no room"):
        answer.result()
    assert not answer.kept
    assert chat.messages == before
    answer = cancelled_retry()
    assert not answer.kept
    assert chat.messages == before
    answer = chat.retry(max_new_tokens=3)
    answer.result()
    assert answer.kept
    assert len(chat.messages) == len(before)
    assert chat.messages[:-1] == before[:-1]
    assert chat.messages[-1] != before[-1]
    assert chat.retry().result() == text_of(before[-1])


class SlowProcessor:
    """A processor that can be told to keep an answer waiting before its first word."""

    def __init__(self, processor):
        self.processor = processor
        self.asked, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def __getattr__(self, name):
        return getattr(self.processor, name)

    @property
    def tokenizer(self):
        if threading.current_thread().name == "answer":
            self.asked.set()
            self.go_on.wait()
        return self.processor.tokenizer


def cancelled_before_the_first_word(ask, processor):
    processor.asked.clear()
    processor.go_on.clear()
    answer = ask()
    processor.asked.wait()
    answer.cancel()
    processor.go_on.set()
    answer.wait()
    return answer


def test_undo(chat, shapes):
    assert chat.undo() is None
    with pytest.raises(ValueError, match="no question yet"):
        chat.retry()
    chat.send("What colour is the circle?", A).result()
    chat.send("How many shapes are there?", C).result()
    question = chat.undo()
    assert (text_of(question), len(images_of([question]))) == ("How many shapes are there?", 1)
    answer = chat.send("Where is the star?")
    assert answer.result() == "The star is at the top right."
    assert answer.stats.reused_tokens > 50


def test_save_and_restore(chat, shapes, tmp_path):
    model, processor = shapes
    chat.send("What colour is the circle?", A).result()
    chat.save(tmp_path / "chat.json")
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert [message["role"] for message in saved] == ["user", "assistant"]
    assert saved[1]["content"] == [{"type": "text", "text": "The circle is red."}]
    for messages in (tmp_path / "chat.json", chat.messages):
        restored = model.chat(processor, messages=messages)
        assert restored.send("Where is the star?").result() == "The star is at the top right."
        restored.save(tmp_path / "again.json")
        assert json.loads((tmp_path / "again.json").read_text())[:2] == saved


def test_saving_on_a_full_disk_keeps_the_file(chat, tmp_path):
    file, link = tmp_path / "chat.json", tmp_path / "link.json"
    chat.send("Where is the star?", A).result()
    chat.save(file)
    file.chmod(0o640)
    link.symlink_to(file)
    chat.send("What colour is the circle?").result()
    chat.save(link)
    saved = file.read_bytes()
    assert len(json.loads(saved)) == 4
    assert file.stat().st_mode & 0o777 == 0o640
    assert link.is_symlink()

    chat.send("What is at the bottom?", B).result()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(saved) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"Not saved\. The earlier content of the file is unchanged: .*chat.json"):
            chat.save(link)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == saved
    assert {entry.name for entry in tmp_path.iterdir()} == {"chat.json", "link.json"}


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([{"role": "user", "content": "Hi"}], "in turn"),
        ([{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Hi"}], "in turn"),
        ([{"text": "Hi"}], "found something else"),
        ([{"role": "a" * 5000, "content": "Hi"}], r"Found \['a{30,50}\.\.\.a{30,50}'\]\.$"),
        (
            [
                {"role": "user", "content": [{"type": "image", "url": "http://x"}]},
                {"role": "assistant", "content": ""},
            ],
            "'url'",
        ),
        ([{"role": "user", "content": [{"type": "image", "base64": "eHg="}]}], "cannot be read"),
        ([{"role": "user", "content": [{"type": "image", "base64": "é"}]}], "cannot be decoded"),
        ([{"role": "user", "content": [{"type": "image", "base64": "a"}]}], "cannot be decoded"),
        ([{"role": "user", "content": [{"type": "image", "base64": 3}]}], "cannot be decoded"),
        ([{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": ""}], "is not Unicode"),
    ],
)
def test_messages_that_are_no_conversation(shapes, messages, error):
    with pytest.raises(ValueError, match=error):
        shapes[0].chat(shapes[1], messages=messages)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
def test_file_that_is_no_conversation(shapes, tmp_path, content):
    (tmp_path / "chat.json").write_bytes(content)
    with pytest.raises(
        ValueError, match="chat.json is not a saved conversation: .*Give a file that was written by save"
    ):
        shapes[0].chat(shapes[1], messages=tmp_path / "chat.json")


@pytest.mark.parametrize("value", [0, -1, "8", None, 2.5])
def test_max_new_tokens_that_is_no_number_of_tokens(chat, value):
    with pytest.raises(ValueError, match=f"max_new_tokens is {value!r}, expected an integer above 0"):
        chat.send("Hi", max_new_tokens=value)


def test_text_that_is_no_unicode(chat):
    """As Python makes of bytes that a terminal or a file name has."""
    with pytest.raises(ValueError, match=r"the character '\\udcff' at position 2 is half of a pair"):
        chat.send("a \udcff")
    with pytest.raises(ValueError, match="is not Unicode"):
        chat.reset("\ud800")
    assert chat.messages == []


def test_system_prompt(shapes):
    model, processor = shapes
    chat = model.chat(processor, system="You see shapes.")
    chat.send("What colour is the circle?", A).result()
    assert chat.messages[0] == {"role": "system", "content": [{"type": "text", "text": "You see shapes."}]}
    _, tokens = ask(chat, "Where is the star?")
    assert tokens == prefill(model, processor, chat.messages[:-1])
    chat.reset()
    assert [message["role"] for message in chat.messages] == ["system"]
    chat.reset(system="Other")
    assert text_of(chat.messages[0]) == "Other"


def test_context_window_error(shapes):
    model, processor = shapes
    chat = model.chat(processor, context_window=130, max_new_tokens=48)
    chat.send("What colour is the circle?", A).result()
    chat.send("Where is the star?").result()
    with pytest.raises(ContextWindowError, match=r"context window of 130.*when_full=\"drop_oldest\""):
        chat.send("What is at the bottom?")
    assert len(chat.messages) == 4
    assert chat.send("What is at the bottom?", max_new_tokens=16).result() == "A green triangle is at the bottom."


def test_context_window_drop_oldest(shapes):
    """The oldest turns go, the picture stays, and the answers are those of a prefill of what is left."""
    model, processor = shapes
    chat = model.chat(processor, context_window=130, max_new_tokens=48, when_full="drop_oldest")
    questions = ["What colour is the circle?", "Where is the star?", "What is at the bottom?", "Where is the star?"]
    for number, question in enumerate(questions):
        text, tokens = ask(chat, question, A if number == 0 else None)
        left = chat.messages[2 * chat.dropped_turns : -1]
        if chat.dropped_turns:
            left[0]["content"].insert(0, {"type": "image", "image": A})
            assert chat.last_answer.stats.reused_tokens >= 40  # system prompt and picture, where they were
        assert tokens == prefill(model, processor, left)
    assert text == "The star is at the top right."
    assert chat.dropped_turns >= 2
    assert len(chat.messages) == 8
    with pytest.raises(ContextWindowError):
        chat.send("word " * 100)


def test_wrong_arguments(chat, shapes, tmp_path):
    model, processor = shapes
    with pytest.raises(ValueError, match="when_full"):
        model.chat(processor, when_full="explode")
    with pytest.raises(ValueError, match="<image>"):
        chat.send("Look at <image>")
    with pytest.raises(ValueError, match="cannot be read"):
        chat.send("Hi", tmp_path / "missing.png")
    with pytest.raises(ValueError, match="num_beams is 2"):
        chat.send("Hi", num_beams=2)
    with pytest.raises(ValueError, match="nonsense"):
        chat.send("Hi", nonsense=1).result()
    assert chat.messages == []
    assert chat.send("Where is the star?", A).result() == "The star is at the top right."


def test_sessions_in_parallel(shapes):
    """Eight at once, each with its own picture and history, and `generate` beside them."""
    model, processor = shapes
    conversations = list(held_out(8, seed=5))
    alone = [[ask_all(model.chat(processor), conversation)] for conversation in conversations]
    sessions = [model.chat(processor) for _ in conversations]
    with ThreadPoolExecutor(9) as pool:
        messages = [
            {
                "role": "user",
                "content": [{"type": "image", "image": A}, {"type": "text", "text": "Where is the star?"}],
            }
        ]
        beside = pool.submit(lambda: [prefill(model, processor, messages) for _ in range(10)])
        together = list(pool.map(lambda pair: [ask_all(*pair)], zip(sessions, conversations)))
    assert together == alone
    assert len({str(answers) for answers in together}) > 4
    assert {processor.decode(tokens, skip_special_tokens=True) for tokens in beside.result()} == {
        "The star is at the top right."
    }


def ask_all(chat, conversation):
    return [chat.send(turn["question"], turn["images"]).result() for turn in conversation]
