"""`optimum-cli llava-ov serve`, with the official client of OpenAI and over plain HTTP."""

import asyncio
import base64
import http.client
import io
import json
import os
import random
import re
import shlex
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import openai
import programs
import psutil
import pytest
import schemathesis
import torch
import uvicorn
from conftest import EXACT, EXAMPLES, Once, run
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis.checks import positive_data_acceptance
from test_chat_demo import free_port

from optimum_llava_ov.batching.engine import BatchEngine
from optimum_llava_ov.batching.options import RequestOptions
from optimum_llava_ov.chat.messages import user_message
from optimum_llava_ov.chat.prompt import build_prompt
from optimum_llava_ov.errors import EngineFailureError
from optimum_llava_ov.images import ImageLimits
from optimum_llava_ov.samples.files import question_inputs
from optimum_llava_ov.samples.shapes import random_scene, render
from optimum_llava_ov.serving.app import build_app
from optimum_llava_ov.serving.models import ServedModel
from optimum_llava_ov.serving.settings import Settings


# Clients and programs on a busy machine may take longer than a test waits
pytestmark = [pytest.mark.slow, pytest.mark.genai, pytest.mark.flaky(reruns=1)]

PICTURES = EXAMPLES / "shapes" / "pictures"
DOCS = Path(__file__).parent.parent / "docs"
NAMES = {"llama": "llava15_vicuna", "mistral": "llava16_mistral_anyres"}
QUESTION = "What is in the image?"


class Program:
    """The real command, until it is ready."""

    def __init__(self, log, *arguments, env=None):
        self.port, self.log = free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        program = str(Path(sys.executable).parent / "optimum-cli")
        command = [program, "llava-ov", "serve", *map(str, arguments), "--port", str(self.port)]
        environment = {**os.environ, **(env or {})}
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                programs.quick(command, env), stdout=output, stderr=subprocess.STDOUT, env=environment
            )
        end = time.monotonic() + 90
        while not self.is_ready():
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)

    def is_ready(self):
        try:
            return httpx.get(f"{self.url}/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self):
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture(scope="module")
def program(shapes_bundle, bundles, tmp_path_factory):
    """A server with a model of each family, in exact arithmetic."""
    models = [f"--model={name}={bundles[golden]}" for name, golden in NAMES.items()]
    log = tmp_path_factory.mktemp("serve") / "log"
    program = Program(log, f"--model=mpt={shapes_bundle}", *models, "--ov-config", json.dumps(EXACT))
    yield program
    program.stop()


@pytest.fixture(scope="module")
def client(program):
    with openai.OpenAI(base_url=f"{program.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def engine(shapes_bundle):
    engine = BatchEngine(shapes_bundle, ov_config=EXACT)
    yield engine
    engine.close()


@contextmanager
def served(engine, **limits):
    """An HTTP server in this process with limits of its own, on the engine that all share."""
    settings = Settings(**limits)
    model = ServedModel("shapes", engine, settings)
    config = uvicorn.Config(build_app({"shapes": model}, settings), port=free_port(), log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{config.port}"
    finally:
        server.should_exit = True
        thread.join(30)
        model.threads.shutdown()


def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def question(text, *urls):
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def picture(name="a"):
    return data_url(Image.open(PICTURES / f"{name}.png").convert("RGB"))


def ask(**changes):
    return {
        "model": "mpt",
        "messages": question(QUESTION, picture()),
        "temperature": 0,
        "max_tokens": 30,
        **changes,
    }


def metric(url, name):
    text = httpx.get(f"{url}/metrics").text
    return sum(float(value) for value in re.findall(rf"^llava_ov_{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE))


def is_openai_error(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def images_for_questions():
    """200 questions, each about an image of its own, of many sizes."""
    rng = random.Random(0)
    noise = np.random.default_rng(0)
    for index in range(200):
        name = "mpt" if index < 120 else "llama" if index < 160 else "mistral"
        if name == "mpt":
            image = render(random_scene(rng))
        else:
            height, width = noise.integers(20, 90, 2)
            image = Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))
        yield name, f"{QUESTION} {index}", image


class TestAnswers:
    def test_200_at_a_time_are_those_of_generate(self, program, models, processors, shapes_bundle):
        from transformers import AutoProcessor

        from optimum_llava_ov import OVModelForLlava

        golden = Once(lambda name: (models[NAMES[name]], processors[NAMES[name]]))
        golden["mpt"] = (
            OVModelForLlava.from_pretrained(shapes_bundle, ov_config=EXACT),
            AutoProcessor.from_pretrained(shapes_bundle),
        )
        questions = list(images_for_questions())

        async def answers():
            async with openai.AsyncOpenAI(base_url=f"{program.url}/v1", api_key="none", max_retries=0) as client:
                places = asyncio.Semaphore(32)

                async def answer(name, text, image):
                    async with places:
                        reply = await client.chat.completions.create(
                            model=name, messages=question(text, data_url(image)), temperature=0, max_tokens=8
                        )
                        return reply.choices[0].message.content

                return await asyncio.gather(*(answer(*asked) for asked in questions))

        given = asyncio.run(answers())
        for (name, text, image), answer in zip(questions, given):
            model, processor = golden[name]
            inputs = question_inputs(processor, text, [image])
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=8, tokenizer=processor.tokenizer)
            expected = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert answer == expected, (name, text)
        assert len(set(given)) > 100

    def test_stream(self, client):
        whole = client.chat.completions.create(**ask(logprobs=True))
        chunks = list(
            client.chat.completions.create(**ask(logprobs=True), stream=True, stream_options={"include_usage": True})
        )
        choices = [chunk.choices[0] for chunk in chunks[:-1]]
        assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
        assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
        assert chunks[-1].usage == whole.usage
        assert len(choices) > 10  # word by word
        tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
        assert [token.token for token in tokens] == [token.token for token in whole.choices[0].logprobs.content]
        assert all(token.logprob <= 0 for token in tokens)
        assert whole.usage.completion_tokens == len(tokens)

    @pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
    def test_logprobs_are_those_of_the_model(self, client, shapes_bundle, options):
        """Compare with the logits of `forward`. Sampling does not change them."""
        from transformers import AutoProcessor

        from optimum_llava_ov import OVModelForLlava

        model = OVModelForLlava.from_pretrained(shapes_bundle, ov_config=EXACT)
        processor = AutoProcessor.from_pretrained(shapes_bundle)
        reply = client.chat.completions.create(**ask(logprobs=True, max_tokens=12, **options)).choices[0]
        given = reply.logprobs.content
        inputs = question_inputs(processor, QUESTION, [Image.open(PICTURES / "a.png").convert("RGB")])
        prompt = inputs["input_ids"]
        answer = processor.tokenizer(reply.message.content, add_special_tokens=False, return_tensors="pt")["input_ids"]
        texts = [processor.tokenizer.decode([token]) for token in answer[0].tolist()]
        assert [token.token for token in given][: len(texts)] == texts
        ids = torch.cat([prompt, answer], dim=1)
        logits = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
        likely = logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
        expected = likely.gather(-1, answer[0, :, None])[:, 0].tolist()
        assert [token.logprob for token in given][: len(expected)] == pytest.approx(expected, abs=1e-3)
        assert (answer[0] == likely.argmax(-1)).all() == (not options)  # sampled: another answer

    def test_conversation_of_several_turns(self, client):
        first = client.chat.completions.create(**ask()).choices[0].message.content
        messages = [
            {"role": "system", "content": "You answer."},
            *question(QUESTION, picture()),
            {"role": "assistant", "content": first},
            *question("And in this one?", picture("b")),
        ]
        reply = client.chat.completions.create(**ask(messages=messages))
        assert reply.choices[0].message.content
        assert reply.usage.prompt_tokens > client.chat.completions.create(**ask()).usage.prompt_tokens

    def test_seed_decides(self, client):
        def sample(seed):
            reply = client.chat.completions.create(**ask(temperature=2, seed=seed, n=4))
            return [choice.message.content for choice in reply.choices]

        assert sample(1) == sample(1) != sample(2)
        assert len(set(sample(1))) > 1
        greedy = client.chat.completions.create(**ask(n=2)).choices
        assert greedy[0].message.content == greedy[1].message.content == self.greedy(client)

    def greedy(self, client):
        return client.chat.completions.create(**ask()).choices[0].message.content

    def test_stop(self, client):
        reply = client.chat.completions.create(**ask(stop=["circle", "never"])).choices[0]
        assert reply.message.content == self.greedy(client).partition("circle")[0]
        assert reply.finish_reason == "stop"
        short = client.chat.completions.create(**ask(max_tokens=2)).choices[0]
        assert short.finish_reason == "length"
        assert client.chat.completions.create(**ask(max_tokens=None, max_completion_tokens=2)).choices[0] == short

    def test_json_schema(self, client):
        schema = {"enum": ["a red circle", "a blue square"]}
        reply = client.chat.completions.create(
            **ask(response_format={"type": "json_schema", "json_schema": {"name": "shape", "schema": schema}})
        )
        assert json.loads(reply.choices[0].message.content) in schema["enum"]

    def test_completions(self, client):
        prompt = "<|im_start|>user\nHello<|im_end|><|im_start|>assistant\n"
        one = client.completions.create(model="mpt", prompt=prompt, temperature=0, max_tokens=6, logprobs=0)
        both = client.completions.create(model="mpt", prompt=[prompt, "A red"], temperature=0, max_tokens=6)
        assert [choice.index for choice in both.choices] == [0, 1]
        assert both.choices[0].text == one.choices[0].text
        assert len(one.choices[0].logprobs.tokens) == one.usage.completion_tokens
        stream = client.completions.create(
            model="mpt", prompt=prompt, temperature=0, max_tokens=6, stream=True, logprobs=0
        )
        assert "".join(chunk.choices[0].text for chunk in stream) == one.choices[0].text

    def test_models(self, client):
        assert [model.id for model in client.models.list()] == ["mpt", "llama", "mistral"]
        assert client.models.retrieve("llama").id == "llama"


class TestImages:
    def test_each_content_is_prepared_once(self, client, program):
        image = data_url(render(random_scene(random.Random("once"))))
        client.chat.completions.create(**ask(messages=question(QUESTION, image)))
        misses, hits = metric(program.url, "image_cache_misses"), metric(program.url, "image_cache_hits")
        client.chat.completions.create(**ask(messages=question("And now?", image, image)))
        assert metric(program.url, "image_cache_misses") == misses
        assert metric(program.url, "image_cache_hits") == hits + 2

    def test_addresses_of_allowed_hosts(self, engine, website):
        host = website.removeprefix("http://")
        with served(engine, hosts=(host,)) as url:
            direct = httpx.post(f"{url}/v1/chat/completions", json=ask(model="shapes"))
            messages = question(QUESTION, f"{website}/a.png")
            fetched = httpx.post(f"{url}/v1/chat/completions", json=ask(model="shapes", messages=messages))
            assert fetched.json()["choices"] == direct.json()["choices"]
            for address in (f"{website}/elsewhere", "http://localhost:1/a.png", "file:///etc/passwd"):
                messages = question(QUESTION, address)
                response = httpx.post(f"{url}/v1/chat/completions", json=ask(model="shapes", messages=messages))
                is_openai_error(response, 400)

    def test_limits(self, engine):
        with served(engine, images=ImageLimits(max_pixels=1000, max_images=2)) as url:
            for urls in ([picture()], [data_url(Image.new("RGB", (9, 9)))] * 3):
                messages = question(QUESTION, *urls)
                response = httpx.post(f"{url}/v1/chat/completions", json=ask(model="shapes", messages=messages))
                assert re.search("pixels|images", is_openai_error(response, 400)["message"])


WRONG = {
    "no JSON": (b"{", 400, "invalid_json"),
    "no object": (b"[]", 400, "invalid_value"),
    "no messages": ({"model": "mpt"}, 400, "invalid_value"),
    "unknown model": (ask(model="gpt-5"), 404, "model_not_found"),
    "unknown parameter": (ask(tools=[]), 400, "unsupported_parameter"),
    "top logprobs": (ask(logprobs=True, top_logprobs=3), 400, "invalid_value"),
    "too many tokens": (ask(max_tokens=1025), 400, None),
    "too long": (ask(messages=question("word " * 3000)), 400, "context_length_exceeded"),
    "image in the text": (ask(messages=question("<image>")), 400, None),
    "address": (ask(messages=question(QUESTION, "https://example.org/a.png")), 400, None),
    "damaged image": (ask(messages=question(QUESTION, "data:image/png;base64,AAAA")), 400, None),
    "damaged base64": (ask(messages=question(QUESTION, "data:image/png;base64,***")), 400, None),
    "half a character": (ask(messages=question("\ud800")), 400, None),
    "late system": (ask(messages=[*question("a"), {"role": "system", "content": "b"}]), 400, None),
    "wrong schema": (
        ask(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}),
        400,
        "invalid_schema",
    ),
    "image of the assistant": (
        ask(messages=[{"role": "assistant", "content": question("a", picture())[0]["content"]}]),
        400,
        None,
    ),
}


class TestErrors:
    @pytest.mark.parametrize(("body", "status", "code"), WRONG.values(), ids=WRONG)
    def test_form(self, program, body, status, code):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        response = httpx.post(f"{program.url}/v1/chat/completions", content=body, headers=headers)
        assert is_openai_error(response, status)["code"] == code
        assert response.headers["x-request-id"]

    def test_paths(self, program):
        is_openai_error(httpx.get(f"{program.url}/v1/nothing"), 404)
        response = httpx.get(f"{program.url}/v1/completions")
        is_openai_error(response, 405)
        assert response.headers["allow"] == "POST"

    def test_other_likely_tokens(self, client):
        """GenAI does not give them. The error says so."""
        for create, wrong in (
            (client.chat.completions.create, ask(logprobs=True, top_logprobs=1)),
            (client.completions.create, {"model": "mpt", "prompt": "A", "logprobs": 1}),
        ):
            with pytest.raises(openai.BadRequestError, match="not those of other likely tokens"):
                create(**wrong)

    def test_client_raises_its_own(self, client):
        with pytest.raises(openai.NotFoundError, match="gpt-5"):
            client.chat.completions.create(**ask(model="gpt-5"))
        with pytest.raises(openai.BadRequestError, match="context window"):
            client.chat.completions.create(**ask(messages=question("word " * 3000)))

    def test_bodies(self, engine):
        with served(engine, max_body_bytes=100_000) as url:
            endpoint = f"{url}/v1/chat/completions"
            is_openai_error(httpx.post(endpoint, content=b" " * 100_001, timeout=60), 413)
            is_openai_error(httpx.post(endpoint, content=iter([b" " * 60_000] * 2), timeout=60), 413)
            # A body whose end arrives together with what is too much
            address = ("127.0.0.1", int(url.rpartition(":")[2]))
            with socket.create_connection(address, timeout=20) as whole:
                head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
                whole.sendall(head + b"186a1\r\n" + b" " * 100_001 + b"\r\n0\r\n\r\n")
                assert whole.recv(1000).startswith(b"HTTP/1.1 413")
        with served(engine, body_timeout=0.3) as url:
            address = ("127.0.0.1", int(url.rpartition(":")[2]))
            with socket.create_connection(address) as slow:
                slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
                assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        with served(engine, max_bodies_bytes=100_000) as url:
            is_openai_error(httpx.post(f"{url}/v1/chat/completions", content=b" " * 100_001, timeout=60), 429)

    def test_keys(self, engine):
        with served(engine, keys=("first", "second")) as url:
            for headers in ({}, {"authorization": "Bearer third"}, {"authorization": "Basic first"}):
                is_openai_error(httpx.get(f"{url}/v1/models", headers=headers), 401)
            assert httpx.get(f"{url}/health/live").status_code == 200
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="second", max_retries=0)
            assert client.models.list().data[0].id == "shapes"

    def test_names(self, engine):
        with served(engine, names=("llava.example",)) as url:
            for host, status in (("elsewhere.example", 421), ("llava.example", 200), ("localhost:1", 200)):
                assert httpx.get(f"{url}/v1/models", headers={"host": host}).status_code == status

    def test_other_sites_may_not_read(self, program):
        response = httpx.options(
            f"{program.url}/v1/models",
            headers={"origin": "https://example.org", "access-control-request-method": "GET"},
        )
        assert "access-control-allow-origin" not in response.headers


LONG = {"max_running": 4, "max_tokens": 1900}


def long(**changes):
    """A request that takes seconds, even with a tiny model."""
    return ask(model="shapes", max_tokens=1900, n=4, ignore_eos=True, stream=True, **changes)


@pytest.fixture(scope="module")
def small(shapes_bundle, tmp_path_factory):
    """A server with few places. In a process of its own: GenAI holds the interpreter, which its clients need, too."""
    limits = ["--max-running", 4, "--max-queue", 1, "--max-tokens-per-request", 1900, "--no-page"]
    program = Program(tmp_path_factory.mktemp("small") / "log", f"--model=shapes={shapes_bundle}", *limits)
    yield program.url
    program.stop()


class TestPlaces:
    def test_client_that_goes_away_frees_its_place(self, small):
        before = metric(small, "generated_tokens_total")
        with httpx.stream("POST", f"{small}/v1/chat/completions", json=long(), timeout=60) as response:
            lines = response.iter_lines()  # the connection ends with it
            for _ in zip(range(20), lines):
                pass
            assert metric(small, "requests_running") == 4
        end = time.monotonic() + 10
        while metric(small, "batch_requests") or metric(small, "requests_running"):
            assert time.monotonic() < end
        assert metric(small, "generated_tokens_total") - before < 4 * 1900
        assert metric(small, "cancelled_requests_total") == 1
        assert httpx.post(f"{small}/v1/chat/completions", json=ask(model="shapes")).status_code == 200

    def test_full_queue(self, small):
        with httpx.Client(timeout=60) as http:
            endpoint = f"{small}/v1/chat/completions"
            with http.stream("POST", endpoint, json=long()) as running:
                lines = running.iter_lines()  # the connection ends with it
                next(lines)
                waiting = []
                thread = threading.Thread(
                    target=lambda: waiting.append(httpx.post(endpoint, json=ask(model="shapes"), timeout=60))
                )
                thread.start()
                while not metric(small, "requests_waiting"):
                    assert not waiting
                refused = http.post(endpoint, json=ask(model="shapes"))
                assert is_openai_error(refused, 429)["type"] == "rate_limit_error"
                assert int(refused.headers["retry-after"]) >= 1
            thread.join()
            assert waiting[0].status_code == 200
            is_openai_error(http.post(endpoint, json=ask(model="shapes", n=5)), 400)

    def test_time_is_over(self, engine):
        with served(engine, timeout=0.2, **LONG) as url:
            endpoint = f"{url}/v1/chat/completions"
            assert is_openai_error(httpx.post(endpoint, json=long() | {"stream": False}), 504)["code"] == "timeout"
            lines = httpx.post(endpoint, json=long()).text.splitlines()
            assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"
            assert metric(url, "requests_running") == 0


def test_replies_leave_at_once(program):
    """The second part of a reply does not wait for the client's acknowledgement of the first, which takes 40 ms."""
    connection = http.client.HTTPConnection(program.url.removeprefix("http://"))
    body = json.dumps({"model": "mpt", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1})
    times = []
    for _ in range(40):
        began = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        assert b"choices" in connection.getresponse().read()
        times.append(time.perf_counter() - began)
    connection.close()
    assert sorted(times)[10] < 0.035


def test_requests_that_begin_together(engine):
    prompt = build_prompt([user_message("Hello")], engine.processor, engine.config)
    steps, ended = [], threading.Event()
    with engine.hold():
        engine.submit(
            prompt.text, [], RequestOptions(5).generation_config(engine), steps.extend, lambda error: ended.set()
        )
        assert not ended.wait(0.5)
        assert not steps
    assert ended.wait(30)
    assert steps


def test_requests_join_between_steps(engine):
    """The next step waits for a request that is prepared, but not for one that takes long."""
    prompt = build_prompt([user_message("Hello")], engine.processor, engine.config)
    steps, ended = [], threading.Event()
    config = RequestOptions(100_000, ignore_eos=True).generation_config(engine)
    request = engine.submit(prompt.text, [], config, steps.append, lambda error: ended.set())
    try:
        for _ in range(2):
            with engine.join():
                time.sleep(0.1)  # the step that had begun
                begun = len(steps)
                time.sleep(0.5)
                assert len(steps) == begun
                time.sleep(1)
                assert len(steps) > begun
    finally:
        request.cancel()
    assert ended.wait(30)


def test_model_that_fails_is_loaded_again(engine):
    """GenAI's pipeline cannot go on after a step that failed. Here a schema that nobody has checked makes it fail."""
    prompt = build_prompt([user_message("Hello")], engine.processor, engine.config)
    wrong = RequestOptions(5, schema={"type": "nonsense"}).generation_config(engine)
    ended = threading.Event()
    errors = []
    engine.submit(prompt.text, [], wrong, lambda steps: None, lambda error: (errors.append(error), ended.set()))
    assert ended.wait(30)
    assert isinstance(errors[0], EngineFailureError)
    end = time.monotonic() + 30
    while not engine.is_alive:
        assert time.monotonic() < end
        time.sleep(0.01)
    tokens = []
    engine.generate([prompt], lambda index, token: tokens.append(token), max_new_tokens=5)
    assert tokens


def test_description_of_the_interface(engine):
    """schemathesis reads the OpenAPI description, and sends what it allows and what it forbids."""
    with served(engine, max_tokens=4) as url:
        for operation in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():

            @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
            @given(case=operation.ok().as_strategy())
            def check(case):
                # Not all that has the right form is right: texts are not images
                case.call_and_validate(excluded_checks=[positive_data_acceptance])

            check()


class TestProgram:
    def test_page_is_at_the_root(self, program):
        page = httpx.get(program.url)
        assert page.status_code == 200
        assert "gradio" in page.text
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert httpx.get(f"{program.url}/docs").status_code == 200

    def test_log_has_no_contents(self, client, program):
        secret = "Xylophone"
        client.chat.completions.create(**ask(messages=question(secret, picture())))
        lines = [json.loads(line) for line in program.log.read_text().splitlines()]
        last = [line for line in lines if line["message"] == "request"][-1]
        assert last["model"] == "mpt"
        assert last["answer_tokens"] > 0
        assert last["status"] == 200
        assert secret not in program.log.read_text()

    def test_sigterm_completes_streams(self, shapes_bundle, tmp_path):
        keys = tmp_path / "keys"
        keys.write_text("secret-key\n")
        program = Program(tmp_path / "log", shapes_bundle, "--api-key-file", keys)
        commands = [" ".join(process.cmdline()) for process in psutil.Process(program.process.pid).children()]
        assert not any("secret-key" in command for command in commands)
        assert httpx.get(program.url).status_code == 404  # there is no page, because browsers send no key
        client = openai.OpenAI(base_url=f"{program.url}/v1", api_key="secret-key", max_retries=0)
        stream = client.chat.completions.create(
            **ask(model="shapes-ov", max_tokens=500, n=4, stream=True), extra_body={"ignore_eos": True}
        )
        next(stream)
        program.process.terminate()
        deadline = time.monotonic() + 5
        while program.is_ready():  # new connections are refused
            assert time.monotonic() < deadline
        reasons = [chunk.choices[0].finish_reason for chunk in stream]
        assert reasons.count("length") == 4
        assert len(reasons) > 1000
        program.process.wait(30)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "No model was given"),
            (["--model", "a"], "NAME=BUNDLE"),
            (["--model=a=x", "--model=a=y"], "Two models"),
            (["x", "--max-running", "0"], "--max-running"),
            (["x", "--ov-config", "["], "not JSON"),
            ([str(EXAMPLES / "shapes" / "checkpoint")], "not a bundle"),
        ],
    )
    def test_wrong_arguments(self, optimum_cli, arguments, message):
        status, _, err = optimum_cli("llava-ov", "serve", *arguments)
        assert status == 1
        assert err.startswith("error: ")
        assert message in err


def test_soak(engine):
    """Clients that vanish, malformed bodies and large bodies beside good requests: nothing is lost, memory is flat."""
    process = psutil.Process()
    good, sizes = [], []

    async def hammer(url, rounds):
        async with httpx.AsyncClient(timeout=60) as http:
            endpoint = f"{url}/v1/chat/completions"

            async def one(index):
                kind = index % 5
                if kind == 0:
                    with suppress(asyncio.TimeoutError, httpx.HTTPError):
                        await asyncio.wait_for(http.post(endpoint, json=long() | {"stream": False}), 0.05)
                elif kind == 1:
                    is_openai_error(await http.post(endpoint, content=b'{"model": '), 400)
                elif kind == 2:
                    is_openai_error(await http.post(endpoint, content=b" " * 2_000_000), 413)
                else:
                    image = data_url(render(random_scene(random.Random(index))))
                    body = ask(model="shapes", messages=question(QUESTION, image), max_tokens=4)
                    good.append((await http.post(endpoint, json=body)).status_code)

            for start in range(0, rounds, 20):
                await asyncio.gather(*(one(index) for index in range(start, start + 20)))

    with served(engine, max_queue=100, max_body_bytes=1_000_000, image_cache_bytes=1_000_000, **LONG) as url:
        for _ in range(3):
            asyncio.run(hammer(url, 100))
            sizes.append(process.memory_info().rss)
    assert good == [200] * 120
    assert sizes[2] < 1.1 * sizes[0]


def test_commands_of_the_page(shapes_bundle, tmp_path):
    """What docs/serve.md shows as commands and Python works, in its order."""
    page = (DOCS / "serve.md").read_text()
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", page, re.MULTILINE)]
    command = next(block for block in blocks if "llava-ov serve" in block).replace("\\\n", " ")
    arguments = shlex.split(command)[3:]
    (tmp_path / "llava-ov").symlink_to(shapes_bundle)
    (tmp_path / "image.png").write_bytes((PICTURES / "a.png").read_bytes())
    arguments = [str(tmp_path / part) if part == "llava-ov" else part for part in arguments]
    program = Program(tmp_path / "log", *arguments)
    try:
        for block in blocks:
            block = block.replace("127.0.0.1:8000", f"127.0.0.1:{program.port}")
            if block.lstrip().startswith("curl"):
                assert "error" not in run("bash", "-c", block, cwd=tmp_path).stdout
            elif "import openai" in block:
                assert run(sys.executable, "-c", block, cwd=tmp_path).stdout.strip()
    finally:
        program.stop()
