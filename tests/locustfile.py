"""What the users of test_load.py do. Locust runs this file in a process of its own."""

import base64
import io
import itertools
import json
import random

from locust import HttpUser, constant, task

from optimum_llava_ov.samples.shapes import random_scene, render


NUMBERS = itertools.count()


class Visitor(HttpUser):
    """Ask about an image of one's own. Each answer is whole, and the same as before, whoever else asks."""

    wait_time = constant(0)

    def on_start(self):
        buffer = io.BytesIO()
        render(random_scene(random.Random(next(NUMBERS)))).save(buffer, format="PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is in the image?"}]
        messages = [{"role": "user", "content": content}]
        self.body = {"model": "shapes", "messages": messages, "temperature": 0, "max_tokens": 16}
        self.answer = None

    @task(2)
    def ask(self):
        with self.client.post("/v1/chat/completions", json=self.body, catch_response=True) as reply:
            if reply.ok:
                self.compare(reply, reply.json()["choices"][0]["message"]["content"])

    @task
    def read(self):
        body = {**self.body, "stream": True}
        with self.client.post(
            "/v1/chat/completions", json=body, stream=True, name="stream", catch_response=True
        ) as reply:
            if not reply.ok:
                return
            events = [line.removeprefix(b"data: ") for line in reply.iter_lines() if line]
            if events.pop() != b"[DONE]":
                reply.failure("The stream has no end.")
                return
            deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
            self.compare(reply, "".join(delta.get("content", "") for delta in deltas))

    def compare(self, reply, answer):
        self.answer = self.answer or answer
        if not answer or answer != self.answer:
            reply.failure(f"The answer is {answer!r}, and was {self.answer!r}.")
