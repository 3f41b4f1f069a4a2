"""Measure the server against the engine driven directly.

    python benchmarks/random_checkpoint.py random --size 1.3b
    optimum-cli export openvino --model random/checkpoint --weight-format int4 random-ov
    python benchmarks/serve.py random-ov

In turns: tokens per second of `--concurrency` requests over HTTP and by GenAI's continuous batching driven by hand;
the first token of a lone request over HTTP and by GenAI's `VLMPipeline`; the time of a request for one token over HTTP
and by hand, whose difference is what the server adds (a tiny model shows it best). Each request has an image of its
own. Linux; needs the extra `serve` and memory for three copies of the model.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import http.client
import io
import itertools
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openvino_genai
from batches import ByHand, line, median, new_image, question_of
from PIL import Image

from optimum_llava_ov.chat.genai_engine import image_tensor
from optimum_llava_ov.images import fit_to_model


@contextmanager
def server(bundle: Path, *options: str) -> Iterator[str]:
    """Run `optimum-cli llava-ov serve`, and give its address when it is ready."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    program = Path(sys.executable).parent / "optimum-cli"
    command = [program, "llava-ov", "serve", f"--model=model={bundle}", "--port", str(port), "--no-page", *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"The server ended with status {process.returncode}.")
            try:
                httpx.get(f"{url}/health/ready").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def body(image: Image.Image, question: str, new_tokens: int, stream: bool = False) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {
        "model": "model",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": new_tokens,
        "ignore_eos": True,
        "stream": stream,
    }


def over_http(url: str, images: list[Image.Image], question: str, new_tokens: int, places: int) -> float:
    """Return the seconds for all images, with `places` of them at a time, from a client that is connected."""
    requests = [json.dumps(body(image, question, new_tokens)).encode() for image in images]
    headers = {"Content-Type": "application/json"}

    async def run() -> float:
        slots = asyncio.Semaphore(places)
        async with httpx.AsyncClient(timeout=None, headers=headers) as client:

            async def one(request: bytes) -> None:
                async with slots:
                    reply = await client.post(f"{url}/v1/chat/completions", content=request)
                    reply.raise_for_status()

            await client.get(f"{url}/health/ready")
            began = time.perf_counter()
            await asyncio.gather(*map(one, requests))
            return time.perf_counter() - began

    return asyncio.run(run())


def first_token_over_http(url: str, image: Image.Image, question: str) -> float:
    request = json.dumps(body(image, question, 8, stream=True)).encode()
    with httpx.Client(timeout=None, headers={"Content-Type": "application/json"}) as client:
        client.get(f"{url}/health/ready")
        began = time.perf_counter()
        with client.stream("POST", f"{url}/v1/chat/completions", content=request) as reply:
            lines = (text for text in reply.iter_lines() if text.startswith("data: "))
            next(lines)  # the role, which is sent before
            next(lines)
            seconds = time.perf_counter() - began
            for _ in lines:
                pass
    return seconds


def one_token_over_http(connection: http.client.HTTPConnection, image: Image.Image, question: str) -> float:
    """Return the seconds for one token, from a client that does as little as possible."""
    request = json.dumps(body(image, question, 1)).encode()
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", request, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    reply.read()
    seconds = time.perf_counter() - began
    if reply.status != 200:
        raise SystemExit(f"The server answered with status {reply.status}.")
    return seconds


def first_token_of_genai(pipeline, processor, image: Image.Image, question: str) -> float:
    seconds = []
    began = time.perf_counter()

    def stream(_: str) -> bool:
        seconds.append(time.perf_counter() - began)
        return False

    tensor = image_tensor(fit_to_model(image, processor.image_processor), processor)
    pipeline.generate(question, images=[tensor], max_new_tokens=8, ignore_eos=True, streamer=stream)
    return seconds[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=16, help="in each round")
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--singles", type=int, default=30, help="requests for one token; more for a tiny model")
    args = parser.parse_args()

    question = question_of(args.bundle, args.prompt_tokens)
    by_hand = ByHand(args.bundle, question, args.concurrency)
    lone = openvino_genai.VLMPipeline(args.bundle, "CPU")
    numbers = itertools.count()
    images = lambda number: [new_image(next(numbers)) for _ in range(number)]  # noqa: E731
    throughput: dict[str, list[float]] = {"http": [], "by hand": []}
    first: dict[str, list[float]] = {"http": [], "VLMPipeline": []}
    single: dict[str, list[float]] = {"http": [], "by hand": []}
    with server(args.bundle, "--max-running", str(args.concurrency), "--max-queue", str(args.requests)) as url:
        for number in range(args.rounds + 1):
            tokens = args.requests * args.new_tokens
            new = {
                "http": tokens / over_http(url, images(args.requests), question, args.new_tokens, args.concurrency),
                "by hand": tokens / by_hand.run(images(args.requests), args.new_tokens),
            }
            begin = {
                "http": first_token_over_http(url, *images(1), question),
                "VLMPipeline": first_token_of_genai(lone, by_hand.processor, *images(1), question),
            }
            print(f"round {number}: tokens/s {new}, first token {begin}", flush=True)
            if number:  # the first round warms up
                for kept, values in ((throughput, new), (first, begin)):
                    for name, value in values.items():
                        kept[name].append(value)
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        for number in range(args.singles + 2):
            one = {
                "http": one_token_over_http(connection, *images(1), question),
                "by hand": by_hand.run(images(1), 1),
            }
            if number > 1:
                for name, value in one.items():
                    single[name].append(value)

    ratio = median([a / b for a, b in zip(throughput["http"], throughput["by hand"])])
    line(f"tokens/s at concurrency {args.concurrency}, HTTP / by hand", ratio, "at least 0.97", ratio >= 0.97)
    ratio = median([a / b for a, b in zip(first["http"], first["VLMPipeline"])])
    line("first token of a lone request, HTTP / VLMPipeline", ratio, "at most 1.05", ratio <= 1.05)
    added = 1000 * (median(single["http"]) - median(single["by hand"]))
    line("added to a request, ms", added, "at most 5", added <= 5)


if __name__ == "__main__":
    main()
