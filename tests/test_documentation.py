"""Every command and snippet of the README, CONTRIBUTING.md and docs/ runs.

In a folder with the repository's `examples`, offline. Small models stand in for those on the Hub: the shapes model for
the MPT, a golden for LLaVA-1.5.
"""

import hashlib
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from conftest import EXAMPLES, GOLDEN, Golden, fill_hub_cache, run
from filelock import FileLock

from optimum_llava_ov.bundle.layout import FILES


pytestmark = pytest.mark.slow


ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def env(shared_folder):
    """Offline, with a cache of the Hub, in which the commands find what they name."""
    cache = shared_folder / "documentation-hub"
    shapes, vicuna = EXAMPLES / "shapes", Golden("llava15_vicuna").folder
    with FileLock(cache.with_suffix(".lock")):
        if not cache.exists():
            for names in (
                {
                    "liuhaotian/LLaVA-Lightning-MPT-7B-preview": shapes / "checkpoint",
                    "openai/clip-vit-large-patch14": shapes / "clip",
                },
                {
                    "liuhaotian/llava-v1.5-7b": vicuna / "checkpoint",
                    "openai/clip-vit-large-patch14-336": vicuna / "clip",
                },
            ):
                fill_hub_cache(cache, names)
    return {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}


@pytest.fixture
def folder(tmp_path):
    """Where a reader who follows the document is."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    # What somebody has trained, and its base model
    for golden, source, name in (
        ("lora", "checkpoint", "checkpoints/task-lora"),
        ("lora", "checkpoint", "checkpoints/more-lora"),
        ("projector_only", "checkpoint", "checkpoints/pretrain"),
        ("lora", "clip", "checkpoints/clip"),
        ("lora", "base", "checkpoints/base"),
        ("lora", "base", "vicuna-7b-v1.5"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(GOLDEN / golden / source)
    return tmp_path


@pytest.fixture
def shell(folder, shared_folder, env, quick_path):
    """Runs lines of a shell. An export that several pages show is made once."""

    def do(line):
        output = folder / line.split()[-1]
        made = shared_folder / "documentation" / hashlib.sha256(line.encode()).hexdigest()
        with FileLock(made.with_suffix(".lock")):
            if made.exists():
                shutil.copytree(made, output)
                return
            run("bash", "-c", line, env={**env, "PATH": quick_path}, cwd=folder)
            if line.startswith("optimum-cli export openvino"):
                shutil.copytree(output, made)

    (shared_folder / "documentation").mkdir(exist_ok=True)
    return do


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_snippets(document, folder, env, shell):
    blocks = BLOCK.findall(document.read_text())
    assert {language for language, _ in blocks} <= {"bash", "python"}, "only these are run"
    for language, code in blocks:
        if language == "python":
            run(sys.executable, "-c", code, env=env, cwd=folder)
        else:
            for line in code.replace("\\\n", " ").splitlines():
                shell(line)


def test_examples_of_the_help(folder, shell):
    """The way that `optimum-cli llava-ov --help` shows, line by line."""
    shown = run("optimum-cli", "llava-ov", "--help").stdout
    lines = [line.strip() for line in shown.splitlines() if line.startswith("  optimum-cli ")]
    assert [line.split()[2] for line in lines] == ["doctor", "openvino", "chat", "eval", "bench", "push"]
    for line in lines:
        shell(line)


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert "://" in target or (document.parent / target).exists(), f"{document.name}: {target}"


def test_model_server_page():
    """The folder it shows is a bundle, and what it gives to Kubernetes is well-formed."""
    page = (ROOT / "docs" / "model_server.md").read_text()
    assert sorted(re.findall(r"^        [├└]── (\S+)$", page, re.MULTILINE)) == sorted(FILES)
    manifest = page[page.index("    apiVersion: apps/v1") : page.index("Write this to `llava-mpt.yaml`")]
    deployment, service = yaml.safe_load_all(textwrap.dedent(manifest))
    template = deployment["spec"]["template"]
    assert (
        deployment["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"] == service["spec"]["selector"]
    )
    volumes = {volume["name"] for volume in template["spec"]["volumes"]}
    assert {mount["name"] for mount in template["spec"]["containers"][0]["volumeMounts"]} <= volumes


def test_make_targets_of_the_documents_exist():
    for document in DOCUMENTS:
        for target in re.findall(r"(?:`|^    )make\s([\w-]+)", document.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), (
                f"{document.name}: {target}"
            )


def test_wheel_holds_what_is_needed(tmp_path):
    """Built from what git tracks, as a release is."""
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "tests", "examples", "benchmarks", "build", "*-ov", "*.so")
    )
    address = {"GITHUB_SERVER_URL": "https://example.org", "GITHUB_REPOSITORY": "me/repo", "GITHUB_REF_NAME": "v1"}
    options = ("--quiet", "--no-deps", "--no-build-isolation")  # without the internet
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", tmp_path, source, env=address)
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", next(tmp_path.glob("*.whl"))], capture_output=True, text=True
    ).stdout
    for name in (
        "optimum/commands/register/register_optimum_llava_ov.py",
        "optimum_llava_ov/checkpoint/families/llama.py",
        "optimum_llava_ov/bundle/card_template.md",
        "optimum_llava_ov/hub/push.py",
        "optimum_llava_ov/runtime/modeling.py",
    ):
        assert name in names
    (wheel,) = tmp_path.glob("*.whl")
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):  # with the kernel in C++, for every Python
        assert "optimum_llava_ov/kernels/matmul.so" in names
        assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    else:
        assert wheel.name.endswith("-py3-none-any.whl")
    # On the package index, links must be absolute
    (information,) = distributions(path=[str(next(tmp_path.glob("*.whl")))])
    assert "Issues, https://example.org/me/repo/issues" in information.metadata.get_all("Project-URL")
    description = information.metadata.get_payload()
    assert "https://example.org/me/repo/blob/v1/docs/checkpoints.md" in description
    assert "![A page in the browser" in description
    assert "(https://example.org/me/repo/raw/v1/docs/demo.png)" in description
    assert re.findall(r"\]\((?!https://|#)[^)]+\)", description) == []
    assert "optimum/commands/__init__.py" not in names
    assert "register/__init__.py" not in names

    # Optimum's version is not looked up in this package, however it is installed
    wheel, editable = next(tmp_path.glob("*.whl")), tmp_path / "editable"
    build = f"from setuptools import build_meta; build_meta.prepare_metadata_for_build_editable({str(editable)!r})"
    editable.mkdir()
    run(sys.executable, "-c", build, cwd=source)
    for installed in (wheel, editable):
        look_up = "import importlib.metadata; print(*importlib.metadata.packages_distributions())"
        found = run(sys.executable, "-S", "-c", look_up, env={"PYTHONPATH": str(installed)}, cwd=tmp_path).stdout
        assert found.split() == ["optimum_llava_ov"]
