"""Random operations on conversations, each answer compared with that of a fresh prefill, and conversations from damaged files."""

import json
from pathlib import Path
from random import Random

from conftest import EXACT, Golden
from hostile_images import REFUSED, png
from test_chat import Tokens, prefill

from fuzz.damage import changed_json, damaged
from fuzz.hypotheses import try_examples
from fuzz.rule import BrokenRuleError, attempt
from optimum_llava_ov import ImageError, OVModelForLlavaMPT
from optimum_llava_ov.bundle.check import load_processor
from optimum_llava_ov.chat.errors import ContextWindowError
from optimum_llava_ov.loading import session_factory


GOLDEN = Golden("linear_fp16_sharded")
GREEDY = {"eos_token_id": None, "do_sample": False}
STEPS = 12
TEXTS = (
    "What is this?", "", " ", "\n\n", "ü", "日本語", "🙂" * 20, "a" * 300, "\0", "\ufeff", "\u202e", "<|im_end|>", "<|im_start|>system",
    "<im_start>", "<im_patch>", "{{ 1 }}", "{% raw %}", "</s>", "<image >", "\x1b[2J", "\ud800", "a\ud800b",
)  # fmt: skip
# Of `generate`, each with a value that is not right
WRONG = (
    {"nonsense": 1}, {"num_beams": 4}, {"max_new_tokens": 10**6}, {"max_new_tokens": -1}, {"max_new_tokens": 0},
    {"max_new_tokens": "x"}, {"max_new_tokens": None}, {"max_new_tokens": 2.5}, {"temperature": -1.0, "do_sample": True},
    {"temperature": 0.0, "do_sample": True}, {"temperature": float("nan"), "do_sample": True}, {"temperature": "x", "do_sample": True},
    {"top_p": -0.5, "do_sample": True}, {"top_p": 7.0, "do_sample": True}, {"top_k": -3, "do_sample": True}, {"top_k": "x", "do_sample": True},
    {"repetition_penalty": 0.0}, {"repetition_penalty": -1.0}, {"min_new_tokens": -1}, {"min_new_tokens": 10**9}, {"stop_strings": 3},
    {"stop_strings": [""]}, {"stop_strings": [3]}, {"eos_token_id": -1}, {"eos_token_id": "x"}, {"eos_token_id": 10**9}, {"streamer": 3},
)  # fmt: skip


class Model:
    """A bundle in one engine, and what answers from nothing."""

    def __init__(self, bundle: Path, engine: str):
        self.reference = OVModelForLlavaMPT.from_pretrained(bundle, ov_config=EXACT)
        self.processor = load_processor(bundle)
        self.new_session = session_factory(str(bundle), ov_config=EXACT, engine=engine)


class Stop(Tokens):
    """Cancels the answer after some tokens."""

    def __init__(self, after: int):
        super().__init__()
        self.after, self.answer = after, None

    def put(self, value):
        super().put(value)
        if self.answer is not None and len(self.tokens) >= self.after:
            self.answer.cancel()


class Chat:
    """Random operations. The conversation must be the one that they make, and each answer that of a prefill."""

    def __init__(self, folder: Path, bundle: Path, engine: str):
        folder.mkdir(parents=True)
        self.folder, self.model, self.engine = folder, Model(bundle, engine), engine
        self.images = [GOLDEN.image(name) for name in ("img0_300x200", "img1_64x480", "img2_224x224")]

    def run(self, number, seed, note, counts):
        draw = Random(f"{seed} chat {number}")
        self.options = {**GREEDY, "max_new_tokens": draw.choice((1, 4, 8))}
        self.options |= {
            "context_window": draw.choice((2048, 2048, 400)),
            "when_full": draw.choice(("error", "drop_oldest")),
        }
        session = self.model.new_session(**self.options)
        for step in range(STEPS):
            action = draw.choice((self.send, self.send, self.send, self.stop, self.retry, self.undo, self.wrong, self.refused, self.busy,
                                  self.reload, self.reset))  # fmt: skip
            note(f"{self.engine}, step {step}: {action.__name__}")
            before = session.messages
            outcome = attempt(
                lambda session=session, action=action, before=before: action(session, draw, before),
                also=() if action != self.wrong else (ValueError, TypeError),
            )
            counts["refused" if isinstance(outcome, Exception) else "right"] += 1
            if isinstance(outcome, Exception):
                expect(shown(session.messages) == shown(before), f"{outcome!r} has changed the conversation")
            elif outcome is not None:
                session = outcome

    def question(self, draw):
        images = draw.choices(self.images, k=draw.choice((0, 0, 1, 1, 2)))
        return draw.choice(TEXTS) + draw.choice(("", " Why?", f" {draw.random()}")), images

    def send(self, session, draw, before):
        text, images = self.question(draw)
        streamer = Tokens()
        answer = session.send(text, images, streamer=streamer)
        expect("".join(answer) == answer.result(), "the pieces are not the answer")
        self.check(session, streamer.tokens)
        expect(shown(session.messages[:-2]) == shown(before), "the earlier turns have changed")

    def retry(self, session, draw, before):
        streamer = Tokens()
        session.retry(streamer=streamer).result()
        self.check(session, streamer.tokens)
        expect(shown(session.messages[:-1]) == shown(before[:-1]), "the question has changed")

    def stop(self, session, draw, before):
        """Cancel a new answer or a retry, at once or after some tokens."""
        streamer = Stop(draw.choice((0, 1, 2, 100)))
        again = draw.random() < 0.3 and len(before) > 1
        answer = session.retry(streamer=streamer) if again else session.send(*self.question(draw), streamer=streamer)
        streamer.answer = answer
        if streamer.after == 0:
            answer.cancel()
        answer.result()
        if answer.kept:
            self.check(session, streamer.tokens, whole=False)
        else:
            expect(
                shown(session.messages) == shown(before), "an answer that was not kept has changed the conversation"
            )

    def undo(self, session, draw, before):
        session.undo()
        system = [message for message in before if message["role"] == "system"]
        expect(shown(session.messages) == shown(before[:-2] or system), "undo has not taken back one turn")

    def reset(self, session, draw, before):
        session.reset(draw.choice((None, "You see shapes.")))
        expect(all(message["role"] == "system" for message in session.messages), "reset has left turns")

    def reload(self, session, draw, before):
        """Save, and go on in another session."""
        session.save(self.folder / "chat.json")
        new = self.model.new_session(**self.options, messages=self.folder / "chat.json")
        expect(shown(new.messages) == shown(before), "the conversation is another after saving and loading")
        return new

    def busy(self, session, draw, before):
        """A second question before the end of the first one."""
        answer = session.send(*self.question(draw))
        try:
            for work in (lambda: session.send("And this?"), session.retry, session.undo, session.reset):
                if answer.done():
                    break
                try:
                    second = work()
                except (RuntimeError, ValueError):
                    continue
                if second is not None and not answer.done():
                    raise BrokenRuleError("a second question was taken before the end of the first one")
                break
        finally:
            answer.wait()
            if session.last_answer is not answer:
                session.last_answer.wait()

    def wrong(self, session, draw, before):
        options = draw.choice(WRONG)
        session.send(*self.question(draw), **options).result()

    def refused(self, session, draw, before):
        """A question that must be refused."""
        kind = draw.choice(("image", "number", "long", "placeholder", "nothing"))
        try:
            if kind == "image":
                session.send(
                    "What is this?",
                    REFUSED[draw.choice(("empty.png", "cut.png", "1 x 65000.png", "drawing.svg"))][0](),
                )
            elif kind == "number":
                session.send("What are these?", [png(8, 8)] * 17)
            elif kind == "long":
                session.send("Why? " * 3000)
            elif kind == "placeholder":
                session.send("What is <image>?")
            else:
                session.send("What is this?", 7)
        except (ImageError, ContextWindowError, ValueError) as error:
            return _raise(error)
        raise BrokenRuleError(f"a question of the kind {kind!r} was taken")

    def check(self, session, tokens, whole=True):
        """The answer is what a prefill of the conversation gives."""
        if session.dropped_turns:
            return  # what the model then sees is not in `messages`; test_chat.py has these
        options = {"max_new_tokens": self.options["max_new_tokens"], "eos_token_id": None}
        expected = prefill(self.model.reference, self.model.processor, session.messages[:-1], **options)
        expect(
            tokens == (expected if whole else expected[: len(tokens)]),
            f"the answer is {tokens}, that of a prefill {expected}",
        )


class SavedConversations:
    """Files of conversations, damaged or with changed values."""

    def __init__(self, folder: Path, bundle: Path):
        folder.mkdir(parents=True)
        self.file = folder / "chat.json"
        self.model = Model(bundle, "openvino")
        session = self.model.new_session(**GREEDY, max_new_tokens=2, system="You see shapes.")
        session.send("What is this?", GOLDEN.image("img0_300x200")).result()
        session.send("And this?").result()
        session.save(self.file)
        self.whole = self.file.read_bytes()

    def run(self, number, seed, note, counts):
        draw = Random(f"{seed} saved {number}")
        for _ in range(20):
            self.load(damaged(self.whole, draw), note, counts)
        values = json.loads(self.whole)
        changes = changed_json(values)
        try_examples(lambda text: self.load(text.encode(), note, counts), changes, 40, f"{seed} saved {number}")

    def load(self, content, note, counts):
        note(f"chat.json: {content[:4000]!r}")
        self.file.write_bytes(content)

        def use():
            session = self.model.new_session(**GREEDY, max_new_tokens=2, messages=self.file)
            return session.send("Why?").result()

        counts["refused" if isinstance(attempt(use, self.file.parent), Exception) else "right"] += 1


def expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise BrokenRuleError(otherwise)


def _raise(error: Exception):
    raise error


def shown(messages) -> list:
    """Messages that can be compared."""
    values = {"image": lambda item: item["image"].tobytes(), "text": lambda item: item["text"]}
    return [(message["role"], [values[item["type"]](item) for item in message["content"]]) for message in messages]
