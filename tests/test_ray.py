"""Captions and the server on a Ray cluster of several processes, some of which are killed."""

import json
import os
import random
import shlex
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
from test_serve import ask, is_openai_error, question

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


class TestServer:
    def test_a_replica_is_killed(self, cluster, shapes_bundle):
        port = free_port()
        settings = Settings(max_running=4)
        options = {"ov_config": EXACT}
        application = build_deployment({"shapes": str(shapes_bundle)}, settings, options, (2, 2), cpus=0.5)
        run_on_ray(application, "auto", port=port)
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        body = ask(model="shapes")
        try:
            whole = httpx.post(url, json=body, timeout=60)
            assert whole.status_code == 200, whole.text
            with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as stream:
                lines = [line for line in stream.iter_lines() if line]
            assert lines[-1] == "data: [DONE]"
            pieces = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines[:-1]]
            assert (
                "".join(piece.get("content", "") for piece in pieces)
                == (whole.json()["choices"][0]["message"]["content"])
            )
            is_openai_error(httpx.post(url, json=ask(model="other")), 404)

            answers = []
            long = ask(model="shapes", max_tokens=900, ignore_eos=True)
            clients = [
                threading.Thread(target=lambda: answers.append(httpx.post(url, json=long, timeout=120)))
                for _ in range(4)
            ]
            for client in clients:
                client.start()
            time.sleep(0.3)
            os.kill(actors("ServeReplica:llava-ov:models")[0], signal.SIGKILL)
            for client in clients:
                client.join()
            assert len(answers) == 4
            failed = [answer for answer in answers if answer.status_code != 200]
            for answer in failed:
                assert is_openai_error(answer, 503)["code"] == "try_again"
            assert len(failed) < 4
            for _ in range(10):
                assert httpx.post(url, json=body, timeout=60).status_code == 200
        finally:
            serve.shutdown()

    def test_requests_of_one_conversation(self):
        first = question("Hello")
        longer = [*first, {"role": "assistant", "content": "Hi"}, *question("And?")]
        ids = [conversation_id(json.dumps(ask(messages=messages)).encode()) for messages in (first, longer)]
        assert ids[0] == ids[1] != conversation_id(json.dumps(ask()).encode())
        assert conversation_id(b"{") == conversation_id(b"[]") == ""


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
