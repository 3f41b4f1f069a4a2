"""Measure the speed and memory of chat sessions.

    python benchmarks/random_checkpoint.py random --size 1.3b
    optimum-cli export openvino --model random/checkpoint --weight-format int8 random-ov
    python benchmarks/chat.py random-ov [--tiny shapes-ov]

With the large bundle: time to the first token of a second turn, with and without the cache of the first (interleaved);
memory of eight sessions; both engines (interleaved). With the tiny bundle: time per token, nearly all of it spent in
this package, and memory of 500 turns. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path

from measure import _kilobytes
from PIL import Image
from transformers import AutoProcessor

from optimum_llava_ov import OVModelForLlavaMPT
from optimum_llava_ov.loading import GENAI, OPENVINO, session_factory
from optimum_llava_ov.runtime.paged_cache import BLOCK


HISTORY = "Tell me what you see in this picture, from the left to the right, and what people might do there. " * 4
QUESTION = "And this?"  # 20 tokens with the chat template


def load(bundle: str):
    return OVModelForLlavaMPT.from_pretrained(bundle), AutoProcessor.from_pretrained(bundle)


def random_image(seed: int = 0) -> Image.Image:
    return Image.effect_noise((300, 224), 40 + seed).convert("RGB")


def anonymous_memory() -> int:
    gc.collect()
    return _kilobytes("self", "status")["RssAnon"]


def first_token(model, processor, rounds: int) -> None:
    times: dict[str, list[float]] = {"cache": [], "prefill": []}
    for _ in range(rounds):
        chat = model.chat(processor, do_sample=False, eos_token_id=None)
        chat.send(HISTORY, random_image(), max_new_tokens=1).result()
        for way in times:
            answer = chat.send(QUESTION, max_new_tokens=1)
            answer.result()
            times[way].append(answer.stats.time_to_first_token)
            new = answer.stats.prompt_tokens - answer.stats.reused_tokens
            print(f"  {way:8} {times[way][-1]:7.3f} s, {answer.stats.prompt_tokens} tokens, {new} of them processed")
            chat.undo()
            chat._engine.reset()  # keeps image features, so neither time includes the image encoder
    cache, prefill = (statistics.median(times[way]) for way in times)
    print(
        f"second turn, first token: {cache:.3f} s against {prefill:.3f} s: {cache / prefill:.3f} x "
        "(target: at most 0.15 x)"
    )


def engines(bundle: Path, model, processor, rounds: int) -> None:
    """Compare engines in turn, with a new image each time.

    The first answer is one token, which tokenizes back to itself, so that the cache need not be cropped.
    """
    genai = session_factory(str(bundle), engine=GENAI)
    ways = {"openvino": lambda **options: model.chat(processor, **options), "genai": genai}
    times: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, make in ways.items():
            chat = make(do_sample=False, eos_token_id=None)
            first = chat.send(HISTORY, random_image(number), max_new_tokens=1)
            first.result()
            second = chat.send(QUESTION, max_new_tokens=24)
            second.result()
            row = (
                first.stats.time_to_first_token,
                second.stats.time_to_first_token,
                1000 / second.stats.tokens_per_second,
            )
            times[way].append(row)
            print(
                f"  {way:8} first token {row[0]:.3f} s, of the second turn {row[1]:.3f} s, "
                f"then {row[2]:.1f} ms per token"
            )
    for way, rows in times.items():
        first, second, token = (statistics.median(column) for column in zip(*rows[1:]))  # the first round warms up
        print(f"{way}: first token {first:.3f} s, of the second turn {second:.3f} s, then {token:.1f} ms per token")


def crop(model, processor) -> None:
    """Measure how long it takes to crop the cache."""
    chat = model.chat(processor, do_sample=False, eos_token_id=None)
    chat.send(HISTORY, random_image(), max_new_tokens=8).result()
    start = time.perf_counter()
    chat._engine.crop(chat._engine.cached_tokens - 8)
    milliseconds = 1000 * (time.perf_counter() - start)
    print(f"cropping {chat._engine.cached_tokens + 8} tokens by 8: {milliseconds:.0f} ms")


def eight_sessions(model, processor) -> None:
    warm = model.chat(processor, do_sample=False, eos_token_id=None)
    warm.send(HISTORY, random_image(), max_new_tokens=4).result()
    before = anonymous_memory()
    sessions = [model.chat(processor, do_sample=False, eos_token_id=None) for _ in range(8)]
    answers = [chat.send(HISTORY, random_image(index), max_new_tokens=4) for index, chat in enumerate(sessions)]
    [answer.result() for answer in answers]
    added = anonymous_memory() - before
    tokens = sum(session._engine.cached_tokens for session in sessions)
    precision = model.language_model.request.get_compiled_model().get_property("KV_CACHE_PRECISION")
    cache = tokens / BLOCK * model.language_model.cache.decoder._cache.block_bytes
    print(
        f"eight sessions: {added / 1e6:.0f} MB for caches of {cache / 1e6:.0f} MB ({precision}): "
        f"{added / cache:.2f} x (target: 1.2 x)"
    )


def tiny(bundle: Path, engine: str) -> None:
    print(f"{engine}:")
    chat = session_factory(str(bundle), engine=engine)(do_sample=False, eos_token_id=None, context_window=100_000)
    chat.send("Hello", random_image(), max_new_tokens=8).result()
    times = []
    for _ in range(5):
        chat.reset()
        answer = chat.send("Hello", random_image(), max_new_tokens=200)
        answer.result()
        times.append(1000 / answer.stats.tokens_per_second)
    print(f"time per token, with the tiny model itself: {statistics.median(times):.2f} ms (target: at most 3 ms)")
    memory = {}
    for turn in range(501):
        answer = chat.send(f"Question {turn}", random_image(turn % 3) if turn % 5 == 0 else None, max_new_tokens=40)
        if turn % 3 == 0:
            chat.cancel()
        answer.result()
        if turn % 10 == 9:
            chat.reset()
        if turn % 100 == 0:
            memory[turn] = anonymous_memory()
    print("anonymous memory after turns:", {turn: f"{value / 1e6:.0f} MB" for turn, value in memory.items()})
    print(f"from turn 100 to 500: {memory[500] / memory[100] - 1:+.1%} (target: within 5%)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--tiny", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--engines", nargs="+", default=[OPENVINO, GENAI], help="Engines that run the tiny model (default: both)."
    )
    args = parser.parse_args()
    if args.bundle:
        model, processor = load(args.bundle)
        first_token(model, processor, args.rounds)
        crop(model, processor)
        eight_sessions(model, processor)
        engines(args.bundle, model, processor, args.rounds)
    if args.tiny:
        for engine in args.engines:
            tiny(args.tiny, engine)


if __name__ == "__main__":
    main()
