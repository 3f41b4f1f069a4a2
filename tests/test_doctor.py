"""`llava-ov doctor`: what it says of packages, of the machine, and of models."""

import json
import os
import re
import shutil
import sys
from importlib.metadata import version

import pytest
from conftest import EXAMPLES, Golden, run

from optimum_llava_ov.bundle.layout import part_sizes
from optimum_llava_ov.doctor.examine import examine
from optimum_llava_ov.doctor.needs import make_plan, plan_lines


pytestmark = pytest.mark.slow


CHECKPOINT = EXAMPLES / "shapes" / "checkpoint"
GB = 10**9


@pytest.fixture
def broken(tmp_path):
    """Makes a package that is found before the installed one, and returns the environment in which it is."""

    def make(name, number, code=None):
        information = tmp_path / f"{name.replace('-', '_')}-{number}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
        if code is not None:
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(code)
        return {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}

    return make


class TestPackages:
    def test_nothing_is_wrong(self, shapes_bundle):
        """The whole command: exit status 0, and no word of a problem."""
        result = run("optimum-cli", "llava-ov", "doctor", shapes_bundle)
        assert result.stdout.splitlines()[0].startswith(f"optimum-llava-ov {version('optimum-llava-ov')}, Python ")
        assert re.search(rf"^transformers +{re.escape(version('transformers'))} +\S+$", result.stdout, re.MULTILINE)
        names = re.findall(r"^(\S+) +\S+ +\S+ +for \[", result.stdout, re.MULTILINE)
        assert "openvino-genai" in names
        assert len(names) == len(set(names))  # one line, also if several extras need it
        assert f"{shapes_bundle}: a bundle with a language model of type mpt" in result.stdout
        assert result.stdout.endswith("\nNothing is wrong.\n")

    def test_version_out_of_range(self, broken):
        result = run("optimum-cli", "llava-ov", "doctor", env=broken("nncf", "2.0"), check=False)
        assert result.returncode == 1
        assert re.search(r"^nncf +2\.0 +\S+ +WRONG$", result.stdout, re.MULTILINE)
        assert "Wrong: nncf 2.0 is not supported (supported: >=3.3,<3.5).\n" in result.stdout
        assert '  To fix it: pip install "nncf>=3.3,<3.5"\n' in result.stdout

    def test_torchvision_of_another_torch(self, broken):
        """transformers does not import beside it. The command still runs, and says what to do."""
        env = broken("torchvision", "0.1", "raise RuntimeError('operator torchvision::nms does not exist')")
        result = run("optimum-cli", "llava-ov", "doctor", "--json", env=env, check=False)
        assert result.returncode == 1
        problems = json.loads(result.stdout)["problems"]
        assert [problem["fix"].split("   ")[0] for problem in problems] == ["pip uninstall torchvision"]
        assert problems[0]["found"].startswith(f"torchvision 0.1 does not work with torch {version('torch')}")


def test_cuda_without_a_gpu(tmp_path, monkeypatch):
    """torch of the package index on a machine without an NVIDIA GPU: a note, and not an error."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    (tmp_path / "torch-2.13.0.dist-info").mkdir()
    (tmp_path / "torch-2.13.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    diagnosis = examine()
    assert [problem.stops for problem in diagnosis.problems] == [False]
    assert diagnosis.works
    assert "was built for CUDA 13.0" in diagnosis.problems[0].found
    assert "https://download.pytorch.org/whl/cpu" in diagnosis.problems[0].fix


class TestModels:
    def test_json(self, optimum_cli):
        status, output, _ = optimum_cli("llava-ov", "doctor", CHECKPOINT, "--json")
        found = json.loads(output)
        assert status == 0
        assert found["computer"]["devices"]["CPU"]
        assert found["computer"]["free_memory"] <= found["computer"]["memory"]
        assert found["computer"]["disks"].keys() >= {os.getcwd()}
        plan = found["plan"]
        assert (plan["kind"], plan["family"], plan["engine"], plan["recipe"]) == (
            "checkpoint", "mpt", "openvino", "not compressed"
        )  # fmt: skip
        assert plan["conversation"].startswith("mpt (")
        assert [needs["weight_format"] for needs in plan["needs"]] == ["fp16", "int8", "int4"]

    def test_a_bundle(self, shapes_bundle):
        """The sizes are those of its files. The engine is the one that `chat` chooses."""
        plan = make_plan(str(shapes_bundle), memory=GB, bandwidth=GB)
        assert (plan.kind, plan.engine, plan.parameters) == ("bundle", "genai", None)
        [needs] = plan.needs
        sizes = part_sizes(shapes_bundle)
        assert needs.disk == sum(sizes.values())
        assert needs.token_seconds == pytest.approx(sizes["language_model"] / GB + 0.0009)
        assert needs.fits
        assert not make_plan(str(shapes_bundle), memory=GB // 2, bandwidth=GB).needs[0].fits
        assert "export" not in "".join(plan_lines(plan))

    def test_estimates_are_near_the_measurements(self, tmp_path):
        """Of a 7B, as docs/performance.md has them for int4. No weights are needed: there are none here."""
        vicuna = Golden("llava15_vicuna")
        weights = shutil.ignore_patterns("*.safetensors*", "*.bin*")
        shutil.copytree(vicuna.checkpoint, tmp_path / "checkpoint", ignore=weights)
        shutil.copytree(vicuna.folder / "clip", tmp_path / "clip", ignore=weights)
        config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
        config |= {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
        config |= {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 2048}
        (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
        plan = make_plan(str(tmp_path / "checkpoint"), memory=8 * GB, bandwidth=32 * GB)
        assert plan.recipe == "int8 for the language model"
        fp16, int8, int4 = plan.needs
        assert 4.0 < int4.disk / GB < 4.8
        assert 5.4 < int4.memory / GB < 6.4
        assert 0.12 < int4.token_seconds < 0.15
        assert 2.2 < int4.export_memory / GB < 2.5
        assert 75 < int4.export_seconds < 138
        assert fp16.export_memory == 1.1 * GB
        assert (fp16.fits, int8.fits, int4.fits) == (False, False, True)

    def test_too_little_memory(self, shapes_bundle, monkeypatch):
        monkeypatch.setattr("optimum_llava_ov.doctor.needs.BASE_MEMORY", 1e15)
        diagnosis = examine(str(shapes_bundle))
        assert not diagnosis.works
        assert "needs 1,000 TB of memory, and this machine has" in diagnosis.problems[0].found

    @pytest.mark.parametrize("name", ["nowhere", "."])
    def test_neither(self, optimum_cli, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        status, output, errors = optimum_cli("llava-ov", "doctor", name)
        assert status == 1
        assert "\nWrong: " in output
        assert name in output.split("Wrong: ")[1]
        assert "Traceback" not in errors

    def test_a_damaged_bundle(self, optimum_cli, shapes_bundle, tmp_path):
        for file in shapes_bundle.iterdir():
            (tmp_path / file.name).symlink_to(file)
        (tmp_path / "openvino_language_model.bin").unlink()
        status, output, _ = optimum_cli("llava-ov", "doctor", tmp_path)
        assert status == 1
        assert "it lacks openvino_language_model.bin" in output


def test_only_the_packages_are_examined_without_imports():
    """Versions can be read where nothing else works."""
    code = (
        "import sys\nfrom optimum_llava_ov.doctor.packages import read_packages\nread_packages()\n"
        "print(sorted({'torch', 'transformers', 'openvino', 'optimum.intel'} & sys.modules.keys()))"
    )
    assert run(sys.executable, "-c", code, fresh=True).stdout == "[]\n"
