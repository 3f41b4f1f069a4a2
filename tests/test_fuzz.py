"""The fuzz campaign for a short time, and that it finds what it looks for. `make fuzz` runs it for as long as one likes."""

import os
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from fuzz.damage import changed_json, damaged
from fuzz.hypotheses import try_examples
from fuzz.rule import BrokenRuleError, attempt

from optimum_llava_ov import ImageError, InvalidCheckpointError
from optimum_llava_ov.images import see_image


TESTS = Path(__file__).parent


def fuzz(*options):
    command = [sys.executable, "-m", "fuzz", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(TESTS)})


@pytest.mark.slow
def test_campaign(bundles):
    """One round of everything, the same each time: nothing found."""
    result = fuzz("--bundle", bundles["linear_fp16_sharded"])
    assert result.returncode == 0, result.stdout + result.stderr
    table = {
        row.split("|")[1].strip(): row.split("|")[2:-1] for row in result.stdout.splitlines() if row.startswith("| ")
    }
    assert all(int(cells[0]) > 0 for name, cells in table.items() if name not in ("what", "---")), result.stdout
    for name in ("chat-openvino", "chat-genai"):
        assert 2 * int(table[name][1]) > int(table[name][0]), result.stdout
    tried, right, refused, _, findings = (int(cell.replace(",", "")) for cell in table["together"])
    assert (tried > 600, right > 200, refused > 200, findings) == (True, True, True, 0), result.stdout


class TestRule:
    def test_answers_and_refusals(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"no image")
        assert attempt(lambda: "answer", tmp_path) == "answer"
        assert isinstance(attempt(lambda: see_image(tmp_path / "a.png", None), tmp_path), ImageError)

    @pytest.mark.parametrize(
        "error", [KeyError("a"), RuntimeError("a\nb"), OSError(28, "No space left"), ValueError("of a library")]
    )
    def test_raw_exceptions(self, error):
        def work():
            raise error

        with pytest.raises(BrokenRuleError, match="A raw exception: "):
            attempt(work)
        assert attempt(work, also=(type(error),)) is error

    @pytest.mark.parametrize("message", ["", "Bad.", "Two lines,\nwhere a sentence was expected.", "a" * 5000])
    def test_what_is_no_sentence(self, message):
        def work():
            raise InvalidCheckpointError(message)

        with pytest.raises(BrokenRuleError, match="is not a sentence"):
            attempt(work)

    def test_time(self):
        def work():
            end = time.process_time() + 0.2
            while time.process_time() < end:
                pass

        with pytest.raises(BrokenRuleError, match="seconds of the processor"):
            attempt(work, seconds=0.1)

    def test_memory(self):
        with pytest.raises(BrokenRuleError, match=r"It took [56]\d\d MB"):
            attempt(lambda: len(bytearray(b"x") * 600_000_000))

    def test_changed_files(self, tmp_path):
        file = tmp_path / "folder" / "file"
        file.parent.mkdir()
        file.write_text("a")
        for work in (
            lambda: file.write_text("b"),
            lambda: (tmp_path / "ran").touch(),
            lambda: file.replace(tmp_path / "moved"),
            lambda: (tmp_path / "ran").unlink(),
        ):
            with pytest.raises(BrokenRuleError, match="Files have changed: "):
                attempt(work, tmp_path)


def test_a_finding_is_the_same_each_time():
    def find(seed):
        tried = []

        def example(text):
            tried.append(text)
            if '"c": null' not in text:
                raise BrokenRuleError(text)

        with pytest.raises(BrokenRuleError) as error:
            try_examples(example, changed_json({"a": 1, "b": [1, 2, {"c": None}]}), 50, seed)
        return str(error.value), tried

    assert find("0") == find("0")
    assert find("0")[1] != find("1")[1]


def test_damage_is_never_none_and_the_same_each_time():
    content = bytes(range(256)) * 40
    for number in range(200):
        assert damaged(content, Random(number)) == damaged(content, Random(number)) != content
