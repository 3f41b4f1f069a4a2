"""Measure the server against the engine driven directly.

    python benchmarks/random_checkpoint.py random --size 1.3b
    optimum-cli export openvino --model random/checkpoint --weight-format int4 random-ov
    python benchmarks/serve.py random-ov

In turns: tokens per second of `--concurrency` requests over HTTP and by GenAI's continuous batching driven by hand;
the first token of a lone request over HTTP and by GenAI's `VLMPipeline`. `--rounds 0` leaves this out.

Then what the server adds to a request for one token, which a tiny model shows best: its time over HTTP, minus the
time of such an image by hand, minus the time of such a body in an application of FastAPI that only parses it as JSON.
The last one is what HTTP, the framework and the client cost, whatever the server does. The client is the one of the
standard library, on a connection that is open. `--singles 0` leaves this out.

Each request has an image of its own. Linux; needs the extra `serve` and memory for three copies of the model.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openvino_genai
from batches import ByHand, line, median, new_image, parse, question_of
from fastapi import FastAPI
from PIL import Image

from optimum_llava_ov.chat.genai_engine import image_tensor
from optimum_llava_ov.images import fit_to_model


PATH = "/v1/chat/completions"


@contextmanager
def server(bundle: Path, *options: str) -> Iterator[str]:
    """Run `optimum-cli llava-ov serve`, and give its address when it is ready."""
    program = Path(sys.executable).parent / "optimum-cli"
    with running([program, "llava-ov", "serve", f"--model=model={bundle}", "--no-page", *options]) as url:
        yield url


@contextmanager
def running(command: list) -> Iterator[str]:
    """Run a server that takes `--port`, and give its address when it is ready."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    process = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL)
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


def empty_app() -> FastAPI:
    """Return an application that does nothing but what FastAPI does."""
    app = FastAPI()

    @app.get("/health/ready")
    async def ready() -> dict:
        return {}

    @app.post(PATH)
    async def parse(body: dict) -> dict:
        return {"number": len(body)}

    return app


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
                    reply = await client.post(f"{url}{PATH}", content=request)
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
        with client.stream("POST", f"{url}{PATH}", content=request) as reply:
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
    connection.request("POST", PATH, request, {"Content-Type": "application/json"})
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


def measure_large(args: argparse.Namespace, url: str, by_hand: ByHand, question: str, images: Callable) -> None:
    lone = openvino_genai.VLMPipeline(args.bundle, "CPU")
    throughput: dict[str, list[float]] = {"http": [], "by hand": []}
    first: dict[str, list[float]] = {"http": [], "VLMPipeline": []}
    for number in range(args.rounds + 1):
        tokens = args.requests * args.new_tokens
        new = {
            "http": tokens / over_http(url, images(args.requests), question, args.new_tokens, args.concurrency),
            "by hand": tokens / by_hand.run(images(args.requests), args.new_tokens),
        }
        begin: dict[str, list[float]] = {"http": [], "VLMPipeline": []}
        for _ in range(args.firsts):
            begin["http"].append(first_token_over_http(url, *images(1), question))
            begin["VLMPipeline"].append(first_token_of_genai(lone, by_hand.processor, *images(1), question))
        shown = {name: round(median(values), 3) for name, values in begin.items()}
        print(f"round {number}: tokens/s {new}, first token {shown}", flush=True)
        if number:  # the first round warms up
            for name, value in new.items():
                throughput[name].append(value)
            for name, values in begin.items():
                first[name] += values
    ratio = median([a / b for a, b in zip(throughput["http"], throughput["by hand"])])
    line(f"tokens/s at concurrency {args.concurrency}, HTTP / by hand", ratio, "at least 0.97", ratio >= 0.97)
    ratio = median([a / b for a, b in zip(first["http"], first["VLMPipeline"])])
    line("first token of a lone request, HTTP / VLMPipeline", ratio, "at most 1.05", ratio <= 1.05)


def measure_added(args: argparse.Namespace, url: str, by_hand: ByHand, question: str, images: Callable) -> None:
    times: dict[str, list[float]] = {"http": [], "by hand": [], "empty": []}
    code = "import sys, serve, uvicorn; uvicorn.run(serve.empty_app(), port=int(sys.argv[-1]), access_log=False)"
    with running(
        [sys.executable, "-c", f"import sys; sys.path.append({str(Path(__file__).parent)!r}); {code}"]
    ) as empty:
        connections = {
            name: http.client.HTTPConnection(address.removeprefix("http://"))
            for name, address in (("http", url), ("empty", empty))
        }
        for number in range(args.singles + 5):
            one = {name: one_token_over_http(to, *images(1), question) for name, to in connections.items()}
            one["by hand"] = by_hand.run(images(1), 1)
            if number >= 5:
                for name, value in one.items():
                    times[name].append(1000 * value)
    ours, hand, framework = (median(times[name]) for name in ("http", "by hand", "empty"))
    print(f"one token: HTTP {ours:.1f} ms, by hand {hand:.1f} ms; an empty application {framework:.1f} ms")
    added = ours - hand - framework
    line("added to a request by the server itself, ms", added, "at most 5", added <= 5)
    print(f"added with HTTP, the framework and the client, ms: {ours - hand:.3f}")


def main() -> None:
    args = parse(
        __doc__,
        ("--concurrency", 8, "requests at a time"),
        ("--requests", 16, "in each round"),
        ("--firsts", 4, "lone requests in each round"),
        ("--singles", 30, "requests for one token; more for a tiny model"),
    )
    question = question_of(args.bundle, args.prompt_tokens)
    by_hand = ByHand(args.bundle, question, args.concurrency)
    numbers = itertools.count()

    def images(number: int) -> list[Image.Image]:
        return [new_image(next(numbers)) for _ in range(number)]

    with server(args.bundle, "--max-running", str(args.concurrency), "--max-queue", str(args.requests)) as url:
        if args.rounds:
            measure_large(args, url, by_hand, question, images)
        if args.singles:
            measure_added(args, url, by_hand, question, images)


if __name__ == "__main__":
    main()
