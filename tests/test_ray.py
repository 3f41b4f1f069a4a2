"""Captions and the server on a Ray cluster of several processes, some of which are killed."""

import itertools
import json
import os
import random
import shlex
import shutil
import signal
import textwrap
import threading
import time
from argparse import ArgumentParser
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from conftest import EXACT
from test_caption import PROMPT
from test_chat_demo import free_port
from test_serve import QUESTION, Program, ask, is_openai_error, picture, question

from optimum_llava_ov.captions.captioner import Captioner
from optimum_llava_ov.captions.job import Job, run_job
from optimum_llava_ov.captions.output import read_rows
from optimum_llava_ov.captions.sources import Source
from optimum_llava_ov.cli.caption import CaptionCommand
from optimum_llava_ov.samples.shapes import random_scene, render
from optimum_llava_ov.serving.settings import Settings


ray = pytest.importorskip("ray", reason="needs Ray: make test-ray")

from ray import serve  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from optimum_llava_ov.captions.ray_job import run_ray_job  # noqa: E402
from optimum_llava_ov.serving.ray_app import build_deployment, conversation_id, run_on_ray  # noqa: E402
from optimum_llava_ov.system.cluster import limit_threads  # noqa: E402


pytestmark = [pytest.mark.slow, pytest.mark.genai]


@pytest.fixture(scope="module")
def cluster():
    """A head and two nodes, each a group of processes of its own."""
    os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


def actors(name):
    """Process ids of the cluster's actors of a class."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            title = " ".join(process.info["cmdline"] or [])
        except psutil.Error:
            continue
        if title.startswith("ray::") and name in title:
            found.append(process.pid)
    return found


def test_sigterm_completes_streams(shapes_bundle, tmp_path):
    """The command starts a cluster, because there is none yet, and ends it."""
    program = Program(tmp_path / "log", f"--model=shapes={shapes_bundle}", "--ray", "auto")
    streams = []
    with httpx.Client(timeout=120) as http:
        url = f"{program.url}/v1/chat/completions"
        streams = [Visitor(url, conversation(number, **LONG), http) for number in range(4)]
        for stream in streams:
            assert stream.begun.wait(60)
        # Ray's own value would let every other process interrupt the model
        assert all(psutil.Process(pid).nice() <= os.nice(0) for pid in actors("ServeReplica"))
        program.process.terminate()
        for stream in streams:
            stream.join()
            assert stream.events[-1] == "[DONE]"
            assert json.loads(stream.events[-2])["choices"][0]["finish_reason"] == "length"
    assert program.process.wait(60) == 0
    assert not actors("ServeReplica")


class TestCaptions:
    def test_an_actor_and_a_node_are_killed(self, cluster, shapes_bundle, tmp_path):
        for index in range(24):
            render(random_scene(random.Random(index))).save(tmp_path / f"{index:02}.png")
        captioner = Captioner(shapes_bundle, PROMPT, 200, ov_config=EXACT, running=2, ignore_eos=True)
        job = Job(Source(str(tmp_path)), tmp_path / "alone.jsonl", captioner, rows_per_part=3, workers=0)
        run_job(job)
        captioner.close()
        job = Job(job.source, tmp_path / "ray.jsonl", captioner, rows_per_part=3, workers=0)
        killed = []

        def kill():
            while not list(job.output.glob("*.incomplete")):
                time.sleep(0.05)
            victim = random.Random(0).choice(actors("CaptionParts"))
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)
            while len(list(job.output.glob("part-*.jsonl"))) < 2:
                time.sleep(0.05)
            cluster[0].remove_node(cluster[1].pop())
            killed.append("node")

        thread = threading.Thread(target=kill)
        thread.start()
        run_ray_job(job, "auto", models=2, cpus=1)
        thread.join()
        assert len(killed) == 2
        texts = [
            [(row["key"], row["caption"]) for row in read_rows(folder)]
            for folder in (tmp_path / "alone.jsonl", job.output)
        ]
        assert texts[0] == texts[1]
        assert run_ray_job(job, "auto", models=2, cpus=1).images == 0


class Visitor(threading.Thread):
    """Send one request, and keep the answer."""

    def __init__(self, url, body, http):
        super().__init__()
        self.url, self.body, self.http = url, body, http
        self.replica, self.begun, self.events = None, threading.Event(), []
        self.start()

    def run(self):
        with self.http.stream("POST", self.url, json=self.body) as response:
            self.response = response
            self.replica = response.headers.get("x-replica")
            self.begun.set()
            if self.body["stream"] and response.status_code == 200:
                self.events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
            else:
                response.read()


def conversation(number, turn=0, **changes):
    messages = question(f"{QUESTION} {number}", picture())
    for _ in range(turn):
        messages += [{"role": "assistant", "content": "A circle."}, *question("And now?")]
    return {"stream": False, **ask(model="shapes", messages=messages, max_tokens=4), **changes}


def process_of(replica):
    actor = ray.get_actor(f"SERVE_REPLICA::llava-ov#models#{replica}", namespace="serve")
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


LONG = {"max_tokens": 900, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def deploy(cluster, shapes_bundle):
    """Deploy the server with some options, in place of an earlier one. Gives its address."""
    port = free_port()

    def deploy(replicas=2, most=None, bundle=shapes_bundle, **limits):
        options = {"ov_config": EXACT}
        settings = Settings(**limits)
        numbers = (replicas, most or replicas)
        application = build_deployment({"shapes": str(bundle)}, settings, options, numbers, cpus=0.5)
        run_on_ray(application, "auto", port=port)
        return f"http://127.0.0.1:{port}/v1/chat/completions"

    yield deploy
    serve.shutdown()


@pytest.fixture(scope="module")
def http():
    with httpx.Client(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        yield client


class TestServer:
    def test_answers(self, deploy, http):
        url = deploy()
        whole = http.post(url, json=ask(model="shapes"))
        assert whole.status_code == 200, whole.text
        with http.stream("POST", url, json=ask(model="shapes", stream=True)) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        pieces = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines[:-1]]
        text = "".join(piece.get("content", "") for piece in pieces)
        assert text == whole.json()["choices"][0]["message"]["content"]
        is_openai_error(http.post(url, json=ask(model="other")), 404)
        own = http.post(url, json=ask(model="shapes"), headers={"x-request-id": "mine"})
        assert own.headers.get_list("x-request-id") == ["mine"]
        assert len(whole.headers.get_list("x-request-id")) == 1

    def test_conversations_stay_at_their_replica(self, deploy, http):
        url = deploy()
        replicas = []
        for turn in range(3):
            visitors = [Visitor(url, conversation(number, turn), http) for number in range(12)]
            for visitor in visitors:
                visitor.join()
            replicas.append([visitor.replica for visitor in visitors])
            time.sleep(1)  # replicas tell the front what they know, ten times a second
        assert replicas[0] == replicas[1] == replicas[2]
        assert len(set(replicas[0])) == 2

    def test_a_replica_is_killed(self, deploy, http):
        url = deploy()
        streams = [Visitor(url, conversation(number, **LONG), http) for number in range(8)]
        plain = [Visitor(url, conversation(number, **{**LONG, "stream": False}), http) for number in range(8, 12)]
        for visitor in streams:
            assert visitor.begun.wait(60)
        victim = streams[0].replica
        os.kill(process_of(victim), signal.SIGKILL)
        after = [http.post(url, json=conversation(number)) for number in range(20, 32)]
        assert [reply.status_code for reply in after] == [200] * 12
        assert victim not in {reply.headers["x-replica"] for reply in after}
        for visitor in [*streams, *plain]:
            visitor.join()
        assert {visitor.replica for visitor in streams} > {victim}
        for visitor in streams:
            if visitor.replica == victim:
                assert json.loads(visitor.events[-1])["error"]["code"] == "try_again"
            else:
                assert visitor.events[-1] == "[DONE]"
        for visitor in plain:
            if visitor.response.status_code != 200:
                assert is_openai_error(visitor.response, 503)["code"] == "try_again"
                assert visitor.response.headers["retry-after"]

    def test_a_replica_is_added_under_load(self, deploy, http):
        """Ray decides by the requests of half a minute."""
        url = deploy(replicas=1, most=2, max_running=1)
        ended, replies = threading.Event(), []

        def visit(first):
            for number in itertools.count(first, 4):
                if ended.is_set():
                    return
                replies.append(http.post(url, json=conversation(number, max_tokens=100, ignore_eos=True)))

        visitors = [threading.Thread(target=visit, args=(first,)) for first in range(4)]
        for visitor in visitors:
            visitor.start()
        end = time.monotonic() + 120
        while len(replicas := {reply.headers.get("x-replica") for reply in [*replies]}) < 2 and time.monotonic() < end:
            time.sleep(0.5)
        ended.set()
        for visitor in visitors:
            visitor.join()
        assert {reply.status_code for reply in replies} == {200}
        assert len(replicas) == 2

    def test_update_loses_no_request(self, deploy, http):
        url = deploy()
        before = {http.post(url, json=conversation(number)).headers["x-replica"] for number in range(12)}
        long = Visitor(url, conversation(0, **LONG), http)
        assert long.begun.wait(60)
        ended, answers = threading.Event(), []

        def visit(first):
            for number in itertools.count(first, 2):
                if ended.is_set():
                    return
                answers.append(http.post(url, json=conversation(number)))

        visitors = [threading.Thread(target=visit, args=(first,)) for first in range(2)]
        for visitor in visitors:
            visitor.start()
        deploy(max_tokens=700)
        ended.set()
        for visitor in [*visitors, long]:
            visitor.join()
        assert {answer.status_code for answer in answers} == {200}
        assert long.events[-1] == "[DONE]"
        assert http.post(url, json=conversation(0, max_tokens=800)).status_code == 400
        assert not before & {http.post(url, json=conversation(number)).headers["x-replica"] for number in range(12)}

    def test_all_replicas_are_full(self, deploy, http):
        url = deploy(replicas=1, max_running=1, max_queue=1)
        visitors = [Visitor(url, conversation(number, **{**LONG, "stream": False}), http) for number in range(12)]
        for visitor in visitors:
            visitor.join()
        refused = [visitor.response for visitor in visitors if visitor.response.status_code != 200]
        assert 0 < len(refused) < 12
        for response in refused:
            assert is_openai_error(response, 429)["type"] == "rate_limit_error"
            assert int(response.headers["retry-after"]) >= 1

    def test_no_replica(self, deploy, shapes_bundle, tmp_path, http):
        """The bundle has gone, so that the replica cannot be started again."""
        bundle = shutil.copytree(shapes_bundle, tmp_path / "bundle")
        url = deploy(replicas=1, bundle=bundle, timeout=2)
        replica = http.post(url, json=conversation(0)).headers["x-replica"]
        shutil.rmtree(bundle)
        os.kill(process_of(replica), signal.SIGKILL)
        end = time.monotonic() + 60
        while (answer := http.post(url, json=conversation(0))).status_code == 503:  # until Ray knows
            assert time.monotonic() < end
        assert is_openai_error(answer, 504)["code"] == "timeout"

    def test_requests_of_one_conversation(self):
        first = question("Hello")
        longer = [*first, {"role": "assistant", "content": "Hi"}, *question("And?")]
        ids = [conversation_id(json.dumps(ask(messages=messages)).encode()) for messages in (first, longer)]
        assert ids[0] == ids[1] != conversation_id(json.dumps(ask()).encode())
        assert conversation_id(b"{") == conversation_id(b"[]") == conversation_id(b"[" * 100_000) == ""


def test_a_model_keeps_to_its_processors():
    assert limit_threads("CPU", None, 3.5) == {"INFERENCE_NUM_THREADS": "3", "ENABLE_CPU_PINNING": "NO"}
    assert limit_threads("CPU", {"INFERENCE_NUM_THREADS": "2"}, 0.5)["INFERENCE_NUM_THREADS"] == "2"
    assert limit_threads("GPU", {"PERFORMANCE_HINT": "LATENCY"}, 3) == {"PERFORMANCE_HINT": "LATENCY"}


def test_manifest():
    """The manifest of docs/scale.md is well-formed, and its command exists."""
    page = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    manifest = yaml.safe_load(textwrap.dedent(page[page.index("    apiVersion") : page.index("## When something")]))
    assert manifest["kind"] == "RayJob"
    groups = [manifest["spec"]["rayClusterSpec"]["headGroupSpec"]]
    groups += manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    for group in groups:
        pod = group["template"]["spec"]
        mounts = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounts <= {volume["name"] for volume in pod["volumes"]}
    program, *command = shlex.split(manifest["spec"]["entrypoint"])
    assert [program, *command[:2]] == ["optimum-cli", "llava-ov", "caption"]
    parser = ArgumentParser()
    CaptionCommand.parse_args(parser)
    assert parser.parse_args(command[2:]).ray == "auto"
