"""`optimum-cli llava-ov serve` under the load of Locust, a generator of others."""

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from conftest import EXACT, run
from test_serve import Program, metric


pytestmark = [
    pytest.mark.slow,
    pytest.mark.genai,
    pytest.mark.skipif(find_spec("locust") is None, reason="needs Locust: make test-load"),
]


def test_users_who_ask_all_the_time(shapes_bundle, tmp_path):
    """More users than places: all wait their turn, and no request is lost."""
    limits = ["--max-running", 8, "--max-queue", 32]
    program = Program(tmp_path / "log", f"--model=shapes={shapes_bundle}", *limits, "--ov-config", json.dumps(EXACT))
    try:
        users = ["--users", "24", "--spawn-rate", "24", "--run-time", "8s", "--stop-timeout", "60"]
        locustfile = Path(__file__).parent / "locustfile.py"
        report = run(
            *(sys.executable, "-m", "locust", "--headless", "--json", "--only-summary", "--locustfile", locustfile),
            *("--host", program.url, *users),
            fresh=True,
        )  # fails if a request has failed
        kinds = json.loads(report.stdout)
        assert {kind["name"] for kind in kinds} == {"/v1/chat/completions", "stream"}
        assert all(kind["num_requests"] > 24 and not kind["num_failures"] for kind in kinds)
        counted = re.findall(
            r'requests_total{path="/v1/chat/completions",status="(\d+)"} (\S+)',
            httpx.get(f"{program.url}/metrics").text,
        )
        assert [(status, float(number)) for status, number in counted] == [
            ("200", sum(kind["num_requests"] for kind in kinds))
        ]
        assert metric(program.url, "requests_running") == metric(program.url, "requests_waiting") == 0
    finally:
        program.stop()
