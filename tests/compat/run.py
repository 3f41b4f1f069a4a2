"""Run the tools and tests of openvino.genai and optimum-intel against our bundles, and write `docs/compatibility.md`.

    python tests/compat/run.py <folder with checkouts of openvino.genai and optimum-intel> [--only WORD]

What the tools need beside this environment is installed beside the checkouts, in `<folder>/venv`; bundles are exported to
`<folder>/bundles` anew each time. Nothing of the checkouts is changed. With `--only`, checks with this word in their name are
run, and the table is printed but not written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path


HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SHAPES = ROOT / "examples" / "shapes"
TABLE = ROOT / "docs" / "compatibility.md"


@dataclass(frozen=True)
class Peers:
    """
    Attributes:
        folder: holds the checkouts.
        python: of the environment with what the tools need.
    """

    folder: Path
    python: Path

    @property
    def genai(self) -> Path:
        return self.folder / "openvino.genai"

    @property
    def optimum(self) -> Path:
        return self.folder / "optimum-intel"

    @property
    def samples(self) -> Path:
        return self.genai / "samples" / "python" / "visual_language_chat"

    @property
    def checkpoint(self) -> Path:
        """The shapes checkpoint, in float32."""
        return self.folder / "bundles" / "checkpoint"

    def bundle(self, name: str) -> Path:
        return self.folder / "bundles" / name

    def run(
        self, *command: str | Path, cwd: Path | None = None, stdin: str | None = None, seconds: int = 1800
    ) -> Output:
        environment = {**os.environ, "CI": "true", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join(
            map(str, (self.genai / "tools" / "who_what_benchmark", self.genai / "tools" / "llm_bench", HERE))
        )
        try:
            result = subprocess.run(
                [str(self.python), *map(str, command)],
                cwd=cwd,
                input=stdin,
                env=environment,
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return Output("", f"did not end within {seconds} s", False)
        return Output(result.stdout, result.stderr, result.returncode == 0)


@dataclass(frozen=True)
class Output:
    stdout: str
    stderr: str
    ok: bool

    @property
    def last_words(self) -> str:
        return ([line.strip() for line in (self.stderr or self.stdout).splitlines() if line.strip()] or ["no output"])[
            -1
        ][:200]


@dataclass(frozen=True)
class Verdict:
    """A row of the table.

    Attributes:
        passed: `None` for a test that cannot hold.
    """

    name: str
    passed: bool | None
    why: str = ""


def wwb(peers: Peers) -> Iterator[Verdict]:
    """who_what_benchmark: the torch model and GenAI against Optimum with the bundle in fp32."""
    output = peers.run(
        HERE / "similarity.py", peers.checkpoint, peers.bundle("fp32"), peers.bundle("int8"), peers.bundle("int4")
    )
    if not output.ok:
        yield Verdict("who_what_benchmark", False, output.last_words)
        return
    for name, similarity in json.loads(output.stdout.splitlines()[-1]).items():
        least = 0.9 if "int" in name else 1.0
        yield Verdict(f"who_what_benchmark: {name}", similarity > least - 1e-6, f"similarity {similarity:.4f}")


def llm_bench(peers: Peers) -> Iterator[Verdict]:
    """llm_bench with both runtimes."""
    for name, options in {"GenAI": [], "Optimum": ["--optimum"]}.items():
        output = peers.run(
            *(
                peers.genai / "tools" / "llm_bench" / "benchmark.py",
                "-m",
                peers.bundle("fp32"),
                "-d",
                "cpu",
                "-n",
                "1",
                "-ic",
                "8",
            ),
            *("-p", "What colour is the circle?", "-i", SHAPES / "pictures" / "a.png", *options),
        )
        measured = re.search(r"First token latency: ([\d.]+)", output.stdout + output.stderr)
        yield Verdict(
            f"llm_bench: {name}",
            output.ok and measured is not None,
            "" if output.ok and measured else output.last_words,
        )


QUESTION, ANSWER = "What colour is the circle?", "The circle is red."
PICTURE = SHAPES / "pictures" / "a.png"


def chat_samples(peers: Peers) -> Iterator[Verdict]:
    """GenAI's visual_language_chat, with and without prompt lookup: both answer, and alike."""
    questions = f"{QUESTION}\nWhere is the star?\n"
    script = peers.samples / "visual_language_chat.py"
    plain = peers.run(script, peers.bundle("fp32"), PICTURE, stdin=questions)
    lookup = peers.run(script, peers.bundle("fp32"), PICTURE, "CPU", "true", stdin=questions)
    yield Verdict("sample visual_language_chat", plain.ok and ANSWER in plain.stdout, _unless(plain, ANSWER))
    yield Verdict(
        "sample visual_language_chat, prompt lookup",
        lookup.ok and lookup.stdout == plain.stdout,
        _unless(lookup, ANSWER),
    )


def benchmark_sample(peers: Peers) -> Iterator[Verdict]:
    """GenAI's benchmark_vlm."""
    output = peers.run(
        peers.samples / "benchmark_vlm.py", "-m", peers.bundle("fp32"), "-p", QUESTION, "-i", PICTURE, "-n", "1"
    )
    yield Verdict("sample benchmark_vlm", output.ok and "Throughput" in output.stdout, _unless(output, "Throughput"))


def encrypted_sample(peers: Peers) -> Iterator[Verdict]:
    """GenAI's encrypted_model_vlm, which gives the pipeline graphs instead of files: the answer must stop."""
    output = peers.run(peers.samples / "encrypted_model_vlm.py", peers.bundle("fp32"), PICTURE, QUESTION)
    passed = output.ok and output.stdout.strip() == ANSWER
    why = (
        output.last_words
        if not output.ok
        else ""
        if passed
        else f"goes on after the answer: {output.stdout.strip()[:80]!r}"
    )
    yield Verdict("sample encrypted_model_vlm", passed, why)


def lora_sample(peers: Peers) -> Iterator[Verdict]:
    """GenAI's visual_language_lora with an adapter in the names of PEFT: it must change the answer, and only while it is on.

    With paged attention, its default, GenAI cannot do the second.
    """
    adapter = peers.folder / "bundles" / "adapter.safetensors"
    made = peers.run(HERE / "adapter.py", peers.bundle("fp32"), adapter)
    output = (
        peers.run(peers.samples / "visual_language_lora.py", peers.bundle("fp32"), PICTURE, QUESTION, adapter, "1.0")
        if made.ok
        else made
    )
    parts = output.stdout.split("----------")
    changed = len(parts) > 1 and ANSWER not in parts[0]
    restored = len(parts) > 1 and ANSWER in parts[1]
    unused = "Unused LoRA tensor" in output.stdout + output.stderr
    why = "" if output.ok else output.last_words
    why = why or (
        "the adapter's tensors are not used" if unused else "" if changed else "the answer is that without the adapter"
    )
    yield Verdict("sample visual_language_lora", not why, why)
    prefix_cache = (
        "GenAI's prefix cache does not know of adapters ([for upstream](upstream.md)). "
        'It holds with `ATTENTION_BACKEND="SDPA"` (`tests/test_lora.py`)'
    )
    yield Verdict(
        "sample visual_language_lora, without the adapter again", restored or None, "" if restored else prefix_cache
    )


def _unless(output: Output, expected: str) -> str:
    if not output.ok:
        return output.last_words
    return "" if expected in output.stdout else f"answered {output.stdout.strip()[-80:]!r}"


# Tests of optimum-intel, by the name of a model of theirs in whose place ours is; or why one cannot hold
HOSTS_TESTS: dict[str, str | None] = {
    "test_seq2seq.py::OVModelForVisualCausalLMIntegrationTest::test_find_untested_architectures": (
        "fails without this package too: it lists 13 models that the exporter knows with this version of transformers and the checkout does not test"
    ),
    "test_seq2seq.py::OVModelForVisualCausalLMIntegrationTest::test_compare_to_transformers": None,
    "test_seq2seq.py::OVModelForVisualCausalLMIntegrationTest::test_generate_utils": None,
    "test_seq2seq.py::OVModelForVisualCausalLMIntegrationTest::test_model_can_be_loaded_after_saving": None,
    "test_seq2seq.py::OVModelForVisualCausalLMIntegrationTest::test_llava_with_new_preprocessing": (
        "makes a processor for a model whose image features are patches and one class token; ours are patches and two borders, as the "
        "checkpoint's own processor knows"
    ),
    "test_modeling.py::OVModelIntegrationTest::test_load_from_hub_and_save_visual_language_model": None,
    "test_export.py::ExportModelTest::test_export": None,
    "test_export.py::ExportModelTest::test_export_with_custom_gen_config": None,
    "test_genai.py::VLMPipelineTestCase::test_compare_outputs": None,
}


def hosts_tests(peers: Peers) -> Iterator[Verdict]:
    """optimum-intel's tests for visual models, with our checkpoint in the place of theirs (see `hosts_tests.py`)."""
    report = peers.folder / "bundles" / "hosts-tests.xml"
    report.unlink(missing_ok=True)
    wanted = [name.split("::")[-1] for name, reason in HOSTS_TESTS.items() if reason is None]
    output = peers.run(
        *("-m", "pytest", "-p", "hosts_tests", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"),
        *sorted({name.split("::")[0] for name in HOSTS_TESTS}),
        cwd=peers.optimum / "tests" / "openvino",
        stdin="\n".join(map(str, (peers.checkpoint, peers.bundle("fp32"), PICTURE, *wanted))),
        seconds=3600,
    )
    ran = {}
    for case in ET.parse(report).iter("testcase") if report.exists() else ():
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        ran[re.sub(r"_\d+_\w+$", "", case.get("name", ""))] = (
            "" if problem is None else f"{problem.tag}: {problem.get('message', '')}"
        )
    for name, reason in HOSTS_TESTS.items():
        test = name.split("::")[-1]
        if reason is not None:
            yield Verdict(f"optimum-intel {test}", None, reason)
        else:
            why = ran.get(test, f"did not run: {output.last_words}")
            yield Verdict(f"optimum-intel {test}", not why, " ".join(why.split())[:200])


CHECKS: tuple[Callable[[Peers], Iterator[Verdict]], ...] = (
    wwb,
    llm_bench,
    chat_samples,
    benchmark_sample,
    encrypted_sample,
    lora_sample,
    hosts_tests,
)


def prepare(folder: Path) -> Peers:
    """Make the environment, if it is not there, and the bundles."""
    environment = folder / "venv"
    python = environment / "bin" / "python"
    if not (environment / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
        (packages / "base.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        install = (
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            packages,
            "-r",
            HERE / "requirements.txt",
        )
        subprocess.run([sys.executable, *install], check=True)
        (environment / "ready").touch()
    peers = Peers(folder, python)
    shutil.rmtree(folder / "bundles", ignore_errors=True)
    made = peers.run(HERE / "bundles.py", SHAPES, folder / "bundles")
    if not made.ok:
        raise SystemExit(f"The bundles could not be made:\n{made.stdout}\n{made.stderr}")
    return peers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", type=Path)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    peers = prepare(arguments.peers.resolve())
    start = time.time()
    verdicts = []
    for check in CHECKS:
        if arguments.only in check.__name__:
            print(check.__name__, flush=True)
            verdicts += check(peers)
    table = "\n".join(_row(verdict) for verdict in verdicts)
    print(table)
    print(f"{time.time() - start:.0f} s")
    if not arguments.only:
        TABLE.write_text(_page(peers, table, time.time() - start))
    return 1 if any(verdict.passed is False for verdict in verdicts) else 0


def _row(verdict: Verdict) -> str:
    word = {True: "passed", False: "failed", None: "cannot hold"}[verdict.passed]
    return f"| {verdict.name} | {word} | {verdict.why.replace('|', '/')} |"


def _page(peers: Peers, table: str, seconds: float) -> str:
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("transformers", "optimum-intel", "openvino", "openvino-genai")
    )
    commits = ", ".join(f"{checkout.name} at {_commit(checkout)}" for checkout in (peers.genai, peers.optimum))
    return f"""# Compatibility

Tools and tests that others wrote, run against bundles of the shapes model. `make compat PEERS=<folder>` writes this page; the folder
holds checkouts of [openvino.genai](https://github.com/openvinotoolkit/openvino.genai) and
[optimum-intel](https://github.com/huggingface/optimum-intel).

- who_what_benchmark compares answers with those of Optimum on the uncompressed bundle. 1.0: the same words. The encoder counts words,
  and nothing is forgiven for a similar meaning.
- The samples are GenAI's for visual language models, as they are.
- Tests of optimum-intel run with our checkpoint in the place of one of theirs.

With {versions}, and checkouts of {commits}.

On two cores, the checks took {round(seconds / 60)} minutes. The bundles, and in the first run an environment for the tools, are made before.

| | | why |
| --- | --- | --- |
{table}
"""


def _commit(checkout: Path) -> str:
    """Its first characters and its date."""
    command = ("git", "-C", str(checkout), "log", "-1", "--format=%h of %cs", "--abbrev=9")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
