"""How commands end: what the user can mend is one sentence and status 1, Ctrl-C is status 130, a bug keeps its traceback."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openvino
import programs
import pytest
from conftest import EXAMPLES, Golden, fill_hub_cache, run
from hub_server import HubServer
from optimum.intel import OVWeightQuantizationConfig

from optimum_llava_ov.cli.exit import exit_status
from optimum_llava_ov.export.compression import compress


pytestmark = pytest.mark.slow


CHECKPOINT = EXAMPLES / "shapes" / "checkpoint"
SHORT = ("--rounds", "1", "--new-tokens", "2", "--prompt-tokens", "60")
COMMANDS = {
    "chat": ("llava-ov", "chat", "{}", "--engine", "openvino", "--max-new-tokens", "2"),
    "chat-genai": ("llava-ov", "chat", "{}", "--engine", "genai", "--max-new-tokens", "2"),
    "demo": ("llava-ov", "demo", "{}", "--engine", "openvino", "--no-browser"),
    "bench": ("llava-ov", "bench", "{}", "--engine", "openvino", *SHORT),
    "bench-genai": ("llava-ov", "bench", "{}", "--engine", "genai", *SHORT),
    "eval": ("llava-ov", "eval", "{}", "--reference", "nowhere/at-all", "--num-samples", "1"),
    "push": ("llava-ov", "push", "{}", "me/model", "--dry-run"),
}


def on(name, bundle):
    return [argument.format(bundle) for argument in COMMANDS[name]]


def deleted(name):
    return name, lambda file: file.unlink()


def halved(name):
    return name, lambda file: os.truncate(file, file.stat().st_size // 2)


def written(name, content):
    return name, lambda file: file.write_bytes(content)


def replaced(name, old, new):
    return name, lambda file: file.write_bytes(file.read_bytes().replace(old, new, 1))


def changed(name, **values):
    return name, lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# What is damaged and how, the command that finds it, and what it says besides the file's name
DAMAGES = [
    (deleted("config.json"), "chat", "lacks config.json"),
    (deleted("generation_config.json"), "chat-genai", "lacks generation_config.json"),
    (deleted("tokenizer.json"), "bench", "lacks tokenizer.json"),
    (deleted("chat_template.jinja"), "push", "lacks chat_template.jinja"),
    (deleted("preprocessor_config.json"), "bench-genai", "lacks preprocessor_config.json"),
    (deleted("openvino_tokenizer.bin"), "chat-genai", "lacks openvino_tokenizer.bin"),
    (deleted("openvino_text_embeddings_model.bin"), "eval", "lacks openvino_text_embeddings_model.bin"),
    (deleted("openvino_vision_embeddings_model.xml"), "demo", "lacks openvino_vision_embeddings_model.xml"),
    (deleted("README.md"), "push", "lacks README.md"),
    (written("config.json", b""), "bench", "lacks config.json"),
    (halved("config.json"), "chat", "config.json"),
    (halved("generation_config.json"), "eval", "generation_config.json"),
    (halved("tokenizer.json"), "chat-genai", "tokenizer.json"),
    (written("tokenizer.json", b'{"version": "1.0"}'), "chat", "bundle"),
    (written("tokenizer_config.json", b"\xff\xfe\x00"), "demo", "tokenizer_config.json"),
    (written("processor_config.json", b"[1]"), "bench", "processor_config.json"),
    (written("special_tokens_map.json", b"7"), "push", "special_tokens_map.json"),
    (written("config.json", b"[" * 100_000), "chat", "config.json"),
    (written("config.json", b'"llava"'), "push", "config.json"),
    (changed("config.json", model_type="llama"), "bench", "is a 'llama' model with a 'mpt' language model"),
    (changed("config.json", text_config="mpt"), "eval", "with a None language model"),
    (changed("config.json", image_token_index="517"), "chat-genai", "image_token_index"),
    (changed("config.json", vision_config={"model_type": "clip_vision_model", "image_size": "x"}), "eval", "bundle"),
    (changed("generation_config.json", eos_token_id=["x"]), "bench-genai", "eos_token_id=['x']"),
    (written("chat_template.jinja", b"{% if %}"), "chat", "chat_template.jinja is not a template"),
    (written("chat_template.jinja", b"\xff\xfe"), "bench", "chat_template.jinja is not a template"),
    (halved("openvino_language_model.xml"), "chat", "openvino_language_model.xml does not load"),
    (halved("openvino_language_model.bin"), "chat-genai", "openvino_language_model.xml does not load"),
    (halved("openvino_vision_embeddings_model.bin"), "bench", "openvino_vision_embeddings_model.xml does not load"),
    (
        written("openvino_text_embeddings_model.xml", b"hello"),
        "eval",
        "openvino_text_embeddings_model.xml does not load",
    ),
    (halved("openvino_detokenizer.xml"), "push", "openvino_detokenizer.xml does not load"),
    (
        replaced("openvino_language_model.xml", b'type="Result"', b'type="Nothing"'),
        "chat",
        "openvino_language_model.xml has no input or output logits",
    ),
    (written("README.md", b"\xff\xfe\xfa"), "push", "README.md is not UTF-8"),
    (written("README.md", b"---\n: [\n---\n"), "push", "The metadata of"),
]
IDS = [f"{name}-{found[:30]}-{command}" for (name, _), command, found in DAMAGES]


class TestDamagedBundles:
    @pytest.mark.parametrize(("damage", "command", "sentence"), DAMAGES, ids=IDS)
    def test_damage(self, optimum_cli, shapes_bundle, tmp_path, damage, command, sentence):
        """One sentence that names the file, and nothing changed."""
        bundle = shutil.copytree(shapes_bundle, tmp_path / "bundle")
        name, do = damage
        do(bundle / name)
        before = {file.name: file.read_bytes() for file in bundle.iterdir()}
        status, output, errors = optimum_cli(*on(command, bundle))
        assert status == 1
        errors = errors[errors.index("error: ") :]
        assert sentence in errors
        assert str(bundle) in errors
        assert "Traceback" not in errors
        assert output == ""
        assert {file.name: file.read_bytes() for file in bundle.iterdir()} == before

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command(self, optimum_cli, tmp_path, command):
        """No such folder, an empty one, and a file."""
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").write_text("x")
        for name in ("nowhere", "empty", "file"):
            status, _, errors = optimum_cli(*on(command, tmp_path / name))
            assert status == 1
            assert errors.strip().splitlines()[-1].startswith("error: ")
            assert str(tmp_path / name) in errors.splitlines()[-1]
            assert "Traceback" not in errors

    def test_nothing_is_wrong(self, optimum_cli, shapes_bundle):
        """What the checks let through does run."""
        status, output, _ = optimum_cli(*on("chat-genai", shapes_bundle))
        assert status == 0
        assert output.strip()

    def test_another_family(self, optimum_cli, bundles, tmp_path):
        """Every command with a bundle of a LLaVA-1.5, with an image that is not square."""
        golden = Golden("llava15_vicuna")
        bundle = shutil.copytree(bundles[golden.name], tmp_path / "vicuna-ov")
        image = ("--image", golden.folder / "images" / "img0_300x200.png")
        for command in ("chat", "chat-genai", "bench", "bench-genai"):
            status, output, errors = optimum_cli(*on(command, bundle), *image)
            assert (status, bool(output.strip())) == (0, True), errors
        reference = ("--reference", golden.checkpoint, "--num-samples", "2", "--max-new-tokens", "2")
        status, output, errors = optimum_cli("llava-ov", "eval", bundle, *reference)
        assert (status, "vicuna-ov" in output) == (0, True), errors
        card = (bundle / "README.md").read_text()
        assert "Measured against checkpoint on coloured shapes" in card
        assert "- llava-llama\n" in card
        status, output, errors = optimum_cli(*on("push", bundle))
        assert (status, "Nothing was published" in output) == (0, True), errors


class TestExport:
    def test_our_checkpoint(self, optimum_cli, tmp_path):
        checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
        (checkpoint / "pytorch_model-00002-of-00002.bin").unlink()
        command = (
            "export",
            "openvino",
            "--model",
            checkpoint,
            "--model-kwargs",
            json.dumps({"vision_tower": str(EXAMPLES / "shapes" / "clip")}),
        )
        status, _, errors = optimum_cli(*command, tmp_path / "out")
        assert status == 1
        assert (
            errors.strip()
            .splitlines()[-1]
            .startswith(f"error: {str(checkpoint)!r} has no pytorch_model-00002-of-00002.bin")
        )
        assert "Traceback" not in errors
        assert not (tmp_path / "out").exists()

        status, _, errors = optimum_cli(*command, tmp_path / "out", "--verbose")
        assert status == 1
        assert "Traceback" in errors
        assert "\nerror: " in errors

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            (["--ratio", "1.5"], "ratio"),
            (["--weight-format", "fp16", "--ratio", "0.5"], "need a compressed format"),
            (["--quant-mode", "int8"], "quantizes activations"),
            (["--task", "text-generation"], "is exported for the task"),
            (["--disable-stateful"], "not supported for LLaVA"),
            (["--model-kwargs", '{"tower": "x"}'], "Expected only vision_tower, conversation"),
            (["--dataset", "/no/such/file"], "/no/such/file"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_options_that_cannot_be(self, optimum_cli, tmp_path, options, sentence):
        status, _, errors = optimum_cli(
            "export", "openvino", "--model", CHECKPOINT, "--weight-format", "int4", *options, tmp_path / "out"
        )
        assert status == 1
        assert "Traceback" not in errors
        assert sentence in errors[errors.index("error: ") :]
        assert not (tmp_path / "out").exists()

    def test_what_nncf_refuses(self, shapes_bundle):
        model = openvino.Core().read_model(shapes_bundle / "openvino_language_model.xml")
        with pytest.raises(
            ValueError, match="NNCF cannot compress the weights with these options: .* group size value 17"
        ):
            compress(model, OVWeightQuantizationConfig(bits=4, group_size=17))

    @pytest.mark.parametrize(
        "name", ["./nowhere", "../nowhere", "/no/where", "~/nowhere", "a/b/c", "C:\\nowhere", "a b"]
    )
    def test_a_path_that_leads_nowhere(self, optimum_cli, tmp_path, name):
        status, _, errors = optimum_cli("export", "openvino", "--model", name, tmp_path / "out")
        assert status == 1
        assert errors.strip().splitlines()[-1] == (
            f"error: There is no folder {name!r}, and this name is not a model id of the Hub: expected `owner/name`."
        )

    def test_a_bundle_that_is_not_in_the_cache(self, tmp_path):
        """What to do is said, and not only that files are missing."""
        env = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
        result = run("optimum-cli", "llava-ov", "chat", "me/nowhere", "-p", "Hello", env=env, check=False)
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1] == (
            "error: 'me/nowhere' is not in the cache, and the Hub is not asked (offline mode). Download it first: hf "
            "download me/nowhere"
        )

    def test_other_peoples_model_keeps_optimums_errors(self, optimum_cli, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
        with pytest.raises(ValueError, match="no_such_type"):
            optimum_cli("export", "openvino", "--model", tmp_path, "--task", "text-generation", tmp_path / "out")


class TestExitStatus:
    def end(self, error, capsys, **options):
        with pytest.raises(SystemExit) as end, exit_status(**options):
            raise error
        return end.value.code, capsys.readouterr().err

    def test_bug(self, capsys):
        """Not ours, not the system's: the traceback, and where to report it."""
        status, errors = self.end(KeyError("image_seq_length"), capsys)
        assert status == 1
        assert errors.startswith("Traceback")
        assert errors.splitlines()[-1].startswith("This is a bug in optimum-llava-ov")

    def test_error_of_a_library_is_a_bug(self, capsys):
        assert self.end(ValueError("not raised in this package"), capsys)[1].startswith("Traceback")

    def test_files(self, capsys, tmp_path):
        for action in (
            lambda: (tmp_path / "nowhere" / "x").write_text(""),
            lambda: tmp_path.read_text(),
            lambda: (tmp_path / ("x" * 300)).write_text(""),
        ):
            with pytest.raises(SystemExit) as end, exit_status():
                action()
            errors = capsys.readouterr().err
            assert end.value.code == 1
            assert errors.startswith("error: ")
            assert str(tmp_path) in errors
            assert len(errors.splitlines()) == 1

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
    def test_full_disk(self, capsys):
        with pytest.raises(SystemExit), exit_status(), open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")
        assert capsys.readouterr().err == "error: No space left on device\n"

    def test_missing_package(self, capsys):
        assert self.end(ImportError("Install it with: pip install x"), capsys) == (
            1,
            "error: Install it with: pip install x\n",
        )
        with pytest.raises(SystemExit), exit_status():
            import no_such_module  # noqa: F401
        assert capsys.readouterr().err.startswith("Traceback")

    def test_broken_package(self, tmp_path):
        """transformers hides the error of torchvision, and names a module of its own instead."""
        (tmp_path / "torchvision-0.1.dist-info").mkdir()
        (tmp_path / "torchvision-0.1.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.1\n")
        (tmp_path / "torchvision").mkdir()
        error = "operator torchvision::nms does not exist"
        (tmp_path / "torchvision" / "__init__.py").write_text(f"raise RuntimeError({error!r})")
        result = run(
            "optimum-cli", "llava-ov", "chat", CHECKPOINT, "-p", "Hello", check=False, fresh=True,
            env={"PYTHONPATH": str(tmp_path)},
        )  # fmt: skip
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1] == (
            f"error: A package does not import: {error}. To see which one, and how to fix it: optimum-cli llava-ov doctor"
        )

    def test_debug(self, capsys, monkeypatch):
        monkeypatch.setenv("OPTIMUM_LLAVA_OV_DEBUG", "1")
        errors = self.end(FileNotFoundError(2, "No such file or directory", "x"), capsys)[1]
        assert errors.startswith("Traceback")
        assert errors.splitlines()[-1] == "error: No such file or directory: x"

    def test_interrupted(self, capsys):
        assert self.end(KeyboardInterrupt(), capsys) == (130, "Interrupted.\n")

    @pytest.mark.parametrize("token", ["hf_abcdefghijklmnopqrstuvwxyz012345", "short\n"])
    def test_no_token_is_shown(self, capsys, monkeypatch, token):
        """Neither in the sentence nor in the traceback."""
        for options in ({"token": token}, {"token": token, "verbose": True}):
            error = OSError(f"Illegal header value b'Bearer {token.strip()}'")
            status, errors = self.end(error, capsys, **options)
            assert status == 1
            assert token.strip() not in errors.split("error:")[-1]
            assert "Bearer hf_***" in errors
        monkeypatch.setenv("HF_TOKEN", token)
        assert token.strip() not in self.end(OSError(f"Bearer {token.strip()}"), capsys)[1]


def interrupted(process):
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def start(*command, **kwargs):
    command = [str(Path(sys.executable).parent / "optimum-cli"), *map(str, command)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(programs.quick(command), text=True, **pipes, **kwargs)


class TestInterrupt:
    """Ctrl-C, pressed for real."""

    def test_export(self, shapes_bundle, tmp_path):
        bundle = shutil.copytree(shapes_bundle, tmp_path / "bundle")
        before = {file.name: file.read_bytes() for file in bundle.iterdir()}
        process = start("export", "openvino", "--model", CHECKPOINT, bundle)
        while "The bundle needs" not in process.stderr.readline():
            assert process.poll() is None
        status, errors = interrupted(process)
        assert status == 130
        assert errors.strip().splitlines()[-1] == "Interrupted."
        assert "Traceback" not in errors
        assert {file.name: file.read_bytes() for file in bundle.iterdir()} == before

    def test_loading(self, tmp_path):
        """While a server does not answer."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(120)
            endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
            env = {
                **os.environ,
                "HF_ENDPOINT": endpoint,
                "HF_HOME": str(tmp_path),
                "HF_HUB_OFFLINE": "0",
                "NO_PROXY": "127.0.0.1",
            }
            process = start("llava-ov", "chat", "me/model", "--engine", "openvino", env=env)
            server.accept()
            assert interrupted(process) == (130, "Interrupted.\n")


LOADS = """
import sys
from optimum_llava_ov import OVModelForLlavaMPT
for name in sys.argv[1:]:
    OVModelForLlavaMPT.from_pretrained(name, compile=False)
"""


@pytest.mark.parametrize("offline", ["0", "1"])
def test_loading_warns_of_nothing(shapes_bundle, tmp_path, offline):
    """A local folder and a Hub id, with and without a network."""
    with HubServer(tmp_path / "hub") as hub:
        hub.add("me/shapes-ov", shapes_bundle)
        env = hub.env(tmp_path)
        if offline == "1":
            fill_hub_cache(tmp_path / "hub", {"me/shapes-ov": shapes_bundle})
        result = run(
            sys.executable, "-c", LOADS, shapes_bundle, "me/shapes-ov", env={**env, "HF_HUB_OFFLINE": offline}
        )
    assert "Could not infer" not in result.stderr
    assert bool(hub.requests) == (offline == "0")
