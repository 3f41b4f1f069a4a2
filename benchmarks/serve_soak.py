"""Trouble a server with a thousand requests, and see whether it loses one or grows.

    python benchmarks/serve_soak.py shapes-ov [--requests 1000]

Of ten requests, six are good and have an image of their own. One client vanishes, one body is malformed, one has
100 MB, and one sender is slow. Prints the memory after each tenth, what the good requests got, and errors without
OpenAI's form. Linux; needs the extra `serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
from batches import line, new_image
from serve import PATH, body, server


async def slow(url: str) -> int:
    """Send a body that never ends, and return the status."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{{".encode())
    status = int((await reader.readline()).split()[1])
    writer.close()
    return status


async def one(http: httpx.AsyncClient, url: str, number: int, seen: Counter) -> None:
    kind = number % 10
    endpoint = f"{url}{PATH}"
    if kind < 6:
        reply = await http.post(endpoint, json=body(new_image(number), f"What is it? {number}", 8))
        seen[f"good: {reply.status_code}"] += 1
    elif kind == 6:
        with suppress(asyncio.TimeoutError, httpx.HTTPError):
            await asyncio.wait_for(http.post(endpoint, json=body(new_image(number), "Hello", 1000)), 0.1)
        seen["vanished"] += 1
    elif kind == 7:
        await check(http.post(endpoint, content=b'{"model": '), 400, seen)
    elif kind == 8:
        with suppress(httpx.WriteError):  # the server has closed the connection
            await check(http.post(endpoint, content=b" " * 100_000_000), 413, seen)
    elif number % 100 == 9:  # each takes the whole time that a sender has
        seen[f"slow: {await slow(url)}"] += 1


async def check(reply, status: int, seen: Counter) -> None:
    reply = await reply
    with suppress(ValueError):
        if reply.status_code == status and set(reply.json()["error"]) == {"message", "type", "param", "code"}:
            seen[f"refused: {status}"] += 1
            return
    seen["error without OpenAI's form"] += 1


async def trouble(url: str, numbers: range, places: int, seen: Counter) -> None:
    slots = asyncio.Semaphore(places)
    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as http:

        async def limited(number: int) -> None:
            async with slots:
                await one(http, url, number, seen)

        await asyncio.gather(*map(limited, numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=32)
    args = parser.parse_args()

    seen: Counter = Counter()
    sizes = []
    tenth = args.requests // 10
    with server(args.bundle, "--max-queue", "1000", "--image-cache-mb", "10") as url:
        port = urlsplit(url).port
        connections = [entry for entry in psutil.net_connections("tcp") if entry.laddr.port == port and entry.pid]
        process = psutil.Process(connections[0].pid)
        began = time.perf_counter()
        for index in range(10):
            asyncio.run(trouble(url, range(index * tenth, (index + 1) * tenth), args.concurrency, seen))
            sizes.append(process.memory_info().rss / 1e6)
            print(
                f"{(index + 1) * tenth} requests, {time.perf_counter() - began:.0f} s, {sizes[-1]:.0f} MB", flush=True
            )
        print(json.dumps(seen, indent=2))
        ready = httpx.get(f"{url}/health/ready").status_code
    line("memory at the end / after a fifth", sizes[-1] / sizes[1], "at most 1.1", sizes[-1] <= 1.1 * sizes[1])
    good = seen["good: 200"] / (args.requests * 0.6)
    line("good requests that were answered", good, "1", good == 1 and ready == 200)


if __name__ == "__main__":
    main()
