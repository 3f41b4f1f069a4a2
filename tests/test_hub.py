"""Publishing bundles and using published ones, against a Hub on loopback (`hub_server.py`) and with the real client."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import programs
import pytest
from conftest import EXAMPLES, Golden, run, run_stock
from hub_server import HubServer

from optimum_llava_ov.bundle.card import card_text
from optimum_llava_ov.bundle.layout import EXTRA_FILES, FILES
from optimum_llava_ov.hub.push import plan_push


pytestmark = pytest.mark.hub


SOURCE, TOWER, PUBLISHED = (
    "liuhaotian/LLaVA-Lightning-MPT-7B-preview",
    "openai/clip-vit-large-patch14",
    "me/llava-mpt-ov",
)
SHAPES = EXAMPLES / "shapes"
GOLDEN, VICUNA = Golden("linear_fp16_sharded"), Golden("llava15_vicuna")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

# Evaluates lines as they come, so that many things can be tried for the price of one start
CLIENT = """
import json, os, sys
answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
from optimum.intel import OVModelForVisualCausalLM
from optimum_llava_ov import OVModelForLlavaMPT, main_export
from optimum_llava_ov.hub.push import plan_push, push_bundle
for line in sys.stdin:
    try:
        answer = [None, str(eval(line))]
    except Exception as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps(answer), file=answers, flush=True)
"""


class Client:
    """A user's Python, in a process of its own."""

    def __init__(self, env: dict[str, str], cwd: Path):
        self.process = subprocess.Popen(
            programs.quick([sys.executable, "-c", CLIENT]),
            env={**os.environ, **env},
            cwd=cwd,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def result(self) -> list[str | None]:
        return json.loads(self.process.stdout.readline())

    def run(self, line: str) -> str:
        self.start(line)
        error, answer = self.result()
        assert error is None, f"{line}: {error}: {answer}"
        return answer

    def error(self, line: str) -> str:
        self.start(line)
        error, answer = self.result()
        assert error in (
            "HubError",
            "HubUnreachableError",
            "BundleError",
            "InvalidCheckpointError",
            "UnsupportedCheckpointError",
        ), f"{error}: {answer}"
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def checkpoint_files(folder: Path, **config) -> dict[str, bytes]:
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    values = {**json.loads(files["config.json"]), "mm_vision_tower": TOWER, **config}
    card = b"---\nlicense: cc-by-nc-sa-4.0\ninference: false\n---\n# LLaVA\n"
    return {**files, "config.json": json.dumps(values).encode(), "README.md": card}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.add(SOURCE, {**checkpoint_files(SHAPES / "checkpoint"), "other_weights.msgpack": b"x" * 200_000})
        server.add(
            TOWER,
            {**{file.name: file.read_bytes() for file in (SHAPES / "clip").iterdir()}, "tf_model.h5": b"x" * 200_000},
        )
        yield server


@pytest.fixture(scope="module")
def on_the_hub(hub, bundle):
    """What the tests of downloading download."""
    files = {name: (bundle / name).read_bytes() for name in FILES}
    hub.add("me/bundle", {**files, "pytorch_model.bin": b"x" * 1000, "notes.txt": b"x"})
    hub.add("me/secret", files, private=True)
    hub.add("me/many", {f"{folder}/{name}": content for folder in ("int4", "int8") for name, content in files.items()})
    hub.add(
        "me/llama",
        {"config.json": b'{"model_type": "llava", "text_config": {"model_type": "llama"}}', "model.bin": b"x"},
    )


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    """The command of the README, then a push. Where it was done, and what the Hub was asked."""
    folder, env = tmp_path_factory.mktemp("author"), hub.env()
    run("optimum-cli", "export", "openvino", "--model", SOURCE, "llava-mpt-ov", env=env, cwd=folder)
    requests = list(hub.requests)
    (folder / "llava-mpt-ov" / ".eval").mkdir()
    (folder / "llava-mpt-ov" / ".eval" / "stray.npz").write_bytes(b"x")
    (folder / "llava-mpt-ov" / "model_cache").mkdir()
    (folder / "llava-mpt-ov" / "notes.txt").write_text("do not publish")
    output = run("optimum-cli", "llava-ov", "push", "llava-mpt-ov", PUBLISHED, env=env, cwd=folder, fresh=True).stdout
    return folder / "llava-mpt-ov", requests, output


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    client = Client(hub.env(), tmp_path_factory.mktemp("client"))
    yield client
    client.close()


@pytest.fixture(scope="module")
def bundle(bundles):
    return bundles[GOLDEN.name]


@pytest.fixture(scope="module", autouse=True)
def dying(bundle, tmp_path_factory):
    """A push of 100 MB to a server that dies in the middle. Begun here, for the client waits half a minute before it gives up."""
    folder = tmp_path_factory.mktemp("dying")
    big = shutil.copytree(bundle, folder / "big")
    with open(
        big / "openvino_language_model.bin", "ab"
    ) as file:  # what is behind the weights, the graph does not mind
        file.write(os.urandom(100_000_000))
    with HubServer(folder / "server") as hub:
        hub.fail("PUT /lfs/.*/3$", cut=5_000_000, dies=True)
        client = Client(hub.env(), folder)
        client.start(f"push_bundle({str(big)!r}, 'me/big')")
        yield hub, client, big
        client.close()


@pytest.fixture
def faults(hub):
    """Nothing that one test breaks stays broken for the next."""
    yield hub
    hub.faults.clear()


class TestReadme:
    """The command of the README, from the Hub; a push; use elsewhere."""

    def test_only_what_is_needed_was_downloaded(self, published):
        asked = {path for method, path, *_ in published[1] if "/resolve/" in path}
        names = {path.split("/")[-1] for path in asked}
        assert not names & {"other_weights.msgpack", "tf_model.h5"}

    def test_settings_and_license_come_before_weights(self, published):
        paths = [path for method, path, status, _ in published[1] if status in (200, 302)]
        first_weights = next(index for index, path in enumerate(paths) if path.endswith(".bin"))
        for name in (f"{SOURCE}/resolve/main/config.json", "README.md", "tokenizer.json", "preprocessor_config.json"):
            assert any(path.endswith(name) for path in paths[:first_weights]), name

    def test_one_commit_with_the_bundle_and_nothing_else(self, hub, published):
        assert hub.commits(PUBLISHED) == ["Upload LLaVA for OpenVINO"]
        files = hub.files(PUBLISHED)
        assert files.keys() == set(FILES)
        assert all(files[name] == (published[0] / name).read_bytes() for name in FILES if name != "README.md")
        assert f"{hub.url}/{PUBLISHED}/commit/" in published[2]

    def test_second_push_uploads_nothing(self, hub, client, published):
        before = hub.uploaded(), hub.commits(PUBLISHED)
        client.run(f"push_bundle({str(published[0])!r}, {PUBLISHED!r})")
        assert (hub.uploaded(), hub.commits(PUBLISHED)) == before

    def test_a_card_edited_on_the_hub_stays(self, hub, client, bundle, tmp_path):
        client.run(f"push_bundle({str(bundle)!r}, 'me/edited')")
        card = hub.files("me/edited")["README.md"].decode().replace("## Legal\n", "## Legal, as I see it\n")
        repo = hub.repos["me/edited"]
        hub.commit(repo, "main", "Edit", {**repo.commit("main").files, "README.md": hub.store([card.encode()])})
        changed = shutil.copytree(bundle, tmp_path / "changed")
        (changed / "generation_config.json").write_text((changed / "generation_config.json").read_text() + "\n")
        client.run(f"push_bundle({str(changed)!r}, 'me/edited')")
        assert hub.files("me/edited")["README.md"].decode() == card
        assert len(hub.commits("me/edited")) == 3

    def test_offline(self, hub, published, tmp_path):
        """What was downloaded once is enough, for the model and for its processor."""
        code = (
            "from optimum_llava_ov import OVModelForLlavaMPT\n"
            "from transformers import AutoProcessor\n"
            f"print(type(OVModelForLlavaMPT.from_pretrained({PUBLISHED!r}, compile=False)).__name__)\n"
            f"print(type(AutoProcessor.from_pretrained({PUBLISHED!r})).__name__)\n"
        )
        env = hub.env(tmp_path / "home")
        assert run_in(code, env, tmp_path).split() == ["OVModelForLlavaMPT", "LlavaProcessor"]
        before = len(hub.requests)
        assert run_in(code, {**env, "HF_HUB_OFFLINE": "1"}, tmp_path).split() == [
            "OVModelForLlavaMPT",
            "LlavaProcessor",
        ]
        assert len(hub.requests) == before

    def test_changed_card_is_one_small_commit(self, hub, client, published, tmp_path):
        bundle = shutil.copytree(published[0], tmp_path / "bundle")
        client.run(f"push_bundle({str(bundle)!r}, 'me/small')")
        before = hub.uploaded()
        (bundle / "README.md").write_text((bundle / "README.md").read_text() + "\nMore.\n")
        client.run(f"push_bundle({str(bundle)!r}, 'me/small', commit_message='Say more')")
        assert hub.commits("me/small") == ["Upload LLaVA for OpenVINO", "Say more"]
        assert hub.uploaded() == before

    def test_metadata(self, hub, published):
        from huggingface_hub import ModelCard

        data = ModelCard(hub.files(PUBLISHED)["README.md"].decode()).data
        assert data.license == "cc-by-nc-sa-4.0"
        assert data.base_model == SOURCE
        assert (data.library_name, data.pipeline_tag) == ("openvino", "image-text-to-text")
        assert data.tags == ["openvino", "llava", "llava-mpt", "fp16"]
        assert "base_model_relation" not in data.to_dict()  # not compressed

    def test_every_snippet_of_the_card_runs(self, hub, published, tmp_path):
        """As strangers would: with an empty cache, and where the card does not ask for this package, without it."""
        card = hub.files(PUBLISHED)["README.md"].decode()
        assert "<this model>" not in card
        answers = []
        for language, code in BLOCK.findall(card):
            env = hub.env(token=None)
            if language == "python":
                start = run_stock_in if "optimum_llava_ov" not in code else run_in
                answers.append(start(code, env, tmp_path).splitlines()[-1])
            elif code.startswith("hf "):
                for line in code.splitlines():
                    said = run(*shlex.split(line), env=env, cwd=tmp_path).stdout
                assert {entry.name for entry in (tmp_path / "models" / "llava-mpt").iterdir()} >= set(FILES)
                answers.append(said.strip())
            else:
                assert code.split() == [
                    "optimum-cli",
                    "export",
                    "openvino",
                    "--model",
                    SOURCE,
                    f"{SOURCE.split('/')[1]}-ov",
                ]
        assert len(answers) == 4
        assert set(answers) == {"The circle is red."}

    def test_every_snippet_runs_for_other_families(self, hub, bundles, tmp_path):
        """LLaVA-1.5 with a stop string, without which Optimum's class needs no tokenizer; its images are padded."""
        bundle = shutil.copytree(bundles[VICUNA.name], tmp_path / "bundle")
        generation = json.loads((bundle / "generation_config.json").read_text())
        (bundle / "generation_config.json").write_text(json.dumps({**generation, "stop_strings": ["###"]}))
        card = card_text(bundle, "llama2", None, "me/llava-1.5-ov")
        files = {name: (bundle / name).read_bytes() for name in FILES}
        hub.add("me/llava-1.5-ov", {**files, "README.md": card.encode()})
        ours, stock, genai = (code for language, code in BLOCK.findall(card) if language == "python")
        # In one process, because most of the time is spent on imports
        code = f"exec({stock!r}, {{}})\nexec({genai!r}, {{}})\nsys.meta_path.pop(0)\nexec({ours!r}, {{}})\n"
        code = code.replace("exec(", "print('answer:', end=''); exec(")
        output = run_stock(code, env=hub.env(token=None), cwd=tmp_path)
        answers = [answer.strip() for answer in output.split("answer:")[1:]]
        # Equal in exact arithmetic only (test_card.py, test_family_engines.py): keys and values have 16 bits here
        assert len(answers) == 3
        assert all(len(answer) > 3 for answer in answers)


def run_in(code: str, env: dict[str, str], cwd: Path) -> str:
    return run(sys.executable, "-c", code, env=env, cwd=cwd).stdout


def run_stock_in(code: str, env: dict[str, str], cwd: Path) -> str:
    return run_stock(code, env=env, cwd=cwd)


class TestPush:
    """What can be said about a push, and what can go wrong."""

    def push(self, bundle, name, **options):
        arguments = "".join(f", {key}={value!r}" for key, value in options.items())
        return f"push_bundle({str(bundle)!r}, {name!r}{arguments})"

    def test_license_and_base_model(self, hub, client, bundle):
        """Given once, they stay on the Hub. The folder is not changed."""
        before = (bundle / "README.md").read_bytes()
        options = ("--license", "mit", "--base-model", "me/trained")
        run("optimum-cli", "llava-ov", "push", bundle, "me/licensed", *options, env=hub.env())
        for _ in range(2):
            card = hub.files("me/licensed")["README.md"].decode()
            assert {"license: mit", "base_model: me/trained"} <= set(card.splitlines())
            assert "License: **mit**" in card
            client.run(self.push(bundle, "me/licensed"))
        assert (bundle / "README.md").read_bytes() == before

    @pytest.mark.parametrize("license_id", ["Apache 2.0", "MIT License", "", "-"])
    def test_license_that_is_not_an_id(self, bundle, license_id):
        with pytest.raises(ValueError, match="Expected an id of the Hub in lower case, such as apache-2.0"):
            plan_push(bundle, "me/licensed", license_id)

    def test_base_model_that_is_not_a_name(self, bundle):
        with pytest.raises(ValueError, match="'a b' is not a valid name"):
            plan_push(bundle, "me/licensed", base_model="a b")

    def test_private(self, hub, client, bundle):
        client.run(self.push(bundle, "me/private", private=True))
        assert hub.repos["me/private"].private
        assert "is neither a folder here nor a model on the Hub" in client.error(
            "OVModelForLlavaMPT.from_pretrained('me/private', token='hf_you')"
        )

    def test_name_without_owner(self, hub, client, bundle):
        client.run(self.push(bundle, "mine"))
        assert hub.commits("me/mine")

    def test_revision(self, hub, client, bundle):
        client.run(self.push(bundle, "me/revisions", revision="int4"))
        assert hub.commits("me/revisions") == []
        assert hub.commits("me/revisions", "int4") == ["Upload LLaVA for OpenVINO"]

    def test_pull_request(self, hub, client, bundle):
        hub.create("you/theirs")
        assert "discussions/1" in client.run(self.push(bundle, "you/theirs", create_pr=True) + ".pr_url")
        assert hub.commits("you/theirs") == []
        assert hub.files("you/theirs", "refs/pr/1").keys() == set(FILES)

    def test_python(self, hub, client, bundle):
        """transformers' signature, Optimum's older one, and `save_pretrained(push_to_hub=True)`."""
        model = f"OVModelForLlavaMPT.from_pretrained({str(bundle)!r}, compile=False)"
        client.run(f"{model}.push_to_hub('me/new', private=True, commit_message='New', tags=['mine'])")
        assert (hub.commits("me/new"), hub.repos["me/new"].private) == (["New"], True)
        assert "- mine\n" in hub.files("me/new")["README.md"].decode()
        client.run(f"{model}.push_to_hub('folder', 'me/old')")
        client.run(f"{model}.save_pretrained('saved', push_to_hub=True, repo_id='me/saved')")
        for name in ("me/old", "me/saved"):
            assert hub.files(name).keys() == set(FILES)
            assert len(hub.commits(name)) == 1

    def test_dry_run_needs_no_network(self, bundle):
        env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
        output = run("optimum-cli", "llava-ov", "push", bundle, "me/dry", "--dry-run", env=env).stdout
        assert all(name in output for name in FILES)
        assert "Nothing was published" in output

    def test_the_command_says_what_is_wrong(self, bundle):
        result = run("optimum-cli", "llava-ov", "push", bundle, "me/not valid", check=False)
        assert result.returncode == 1
        assert result.stderr.startswith("error: 'me/not valid' is not a valid name")
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda bundle: (bundle / "tokenizer.json").unlink(), "it lacks tokenizer.json"),
            (
                lambda bundle: os.truncate(bundle / "openvino_language_model.bin", 1000),
                "openvino_language_model.xml does not load",
            ),
            (lambda bundle: (bundle / "config.json").write_text("{"), "config.json is not valid JSON"),
            (
                lambda bundle: (bundle / "README.md").write_text("# Hello\n"),
                "lacks license, library_name, pipeline_tag, tags",
            ),
            (lambda bundle: (bundle / "README.md").write_text("---\n: [\n---\n"), "The metadata of .* is not YAML"),
            (shutil.rmtree, "is not a folder"),
        ],
        ids=["missing", "truncated", "settings", "metadata", "yaml", "nothing"],
    )
    def test_folder_is_checked_first(self, hub, client, bundle, tmp_path, damage, message):
        copy = shutil.copytree(bundle, tmp_path / "bundle")
        damage(copy)
        before = len(hub.requests)
        assert re.search(message, client.error(self.push(copy, "me/bad")))
        assert len(hub.requests) == before

    @pytest.mark.parametrize("name", ["me/not valid", "a/b/c", "me/--", "me/x.git", "-me/x"])
    def test_invalid_name(self, client, bundle, name):
        assert "is not a valid name for a repository" in client.error(self.push(bundle, name))

    def test_not_logged_in(self, client, bundle):
        assert "You are not logged in to the Hub" in client.error(self.push(bundle, "me/x", token="hf_nobody"))
        assert "You are not logged in to the Hub" in client.error(self.push(bundle, "me/x", token=False))

    def test_token_that_may_only_read(self, hub, client, bundle):
        assert "may only read" in client.error(self.push(bundle, "me/unwritten", token="hf_me_read"))
        assert "me/unwritten" not in hub.repos

    @pytest.mark.parametrize("exists", [True, False])
    def test_somebody_elses(self, hub, client, bundle, exists):
        name = f"you/{'taken' if exists else 'free'}"
        if exists:
            hub.create(name)
        uploaded = hub.uploaded()
        message = client.error(self.push(bundle, name))
        assert "belongs to 'you', and you are 'me'" in message
        assert "--create-pr" in message
        assert hub.uploaded() == uploaded
        assert not exists or hub.commits(name) == []

    @pytest.mark.parametrize(
        ("pattern", "status", "message"),
        [
            ("POST /api/repos/create", 500, r"internal problem \(HTTP 500\)"),
            ("POST /api/repos/create", 429, "too many requests"),
            ("POST .*/preupload/", 403, "may not write to me/status"),
            ("POST .*/preupload/", 404, "me/status or this revision of it does not exist"),
            ("POST .*/commit/", 409, "Someone else is changing me/status"),
            ("POST .*/commit/", 412, "Someone else is changing me/status"),
            ("POST .*/commit/", 500, r"internal problem \(HTTP 500\)"),
            ("POST .*/commit/", 413, r"refused me/status \(HTTP 413\)"),
        ],
    )
    def test_refusals(self, faults, client, bundle, pattern, status, message):
        faults.create("me/status")
        faults.fail(pattern, status=status)
        assert re.search(message, client.error(self.push(bundle, "me/status")))
        assert faults.commits("me/status") == []

    def test_hiccups_are_overcome(self, faults, client, bundle, published):
        """A 500, a 429, a lost connection and a damaged upload: each is tried again, by the client or by the user."""
        for pattern, fault in (
            ("PUT /lfs/", {"status": 500}),
            (
                "POST .*/preupload/",
                {"status": 429, "headers": {"RateLimit": '"api";r=0;t=0', "RateLimit-Policy": '"api";q=1;w=1'}},
            ),
            ("PUT /lfs/", {"cut": 1000}),
        ):
            faults.fail(pattern, **fault)
        faults.repos.pop("me/hiccups", None)
        forget_uploads(faults, bundle)
        client.run(self.push(bundle, "me/hiccups"))
        assert len(faults.commits("me/hiccups")) == 1

    def test_damaged_upload_is_refused_then_repeated(self, faults, client, bundle):
        forget_uploads(faults, bundle)
        faults.fail("PUT /lfs/", damage=True)
        assert "not " in client.error(self.push(bundle, "me/damaged"))
        assert faults.commits("me/damaged") == []
        before = faults.uploaded()
        client.run(self.push(bundle, "me/damaged"))
        assert 0 < faults.uploaded() - before < sum((bundle / name).stat().st_size for name in FILES)
        assert len(faults.commits("me/damaged")) == 1


def forget_uploads(hub, bundle: Path) -> None:
    """As if the Hub had never seen these large files."""
    for file in bundle.iterdir():
        (hub.folder / hashlib.sha256(file.read_bytes()).hexdigest()).unlink(missing_ok=True)


@pytest.mark.usefixtures("on_the_hub")
class TestDownload:
    """Bundles from the Hub, by id."""

    def load(self, name, cache, **options):
        arguments = "".join(f", {key}={value!r}" for key, value in {"cache_dir": str(cache), **options}.items())
        return f"OVModelForLlavaMPT.from_pretrained({name!r}, compile=False{arguments})"

    def test_saving_what_was_downloaded_gives_the_same_bytes(self, client, bundle, tmp_path):
        client.run(self.load("me/bundle", tmp_path / "cache") + f".save_pretrained({str(tmp_path / 'saved')!r})")
        assert {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()} == {
            name: (bundle / name).read_bytes() for name in FILES
        }

    def test_saving_what_the_host_downloaded(self, client, bundle, tmp_path):
        """Through optimum-intel's class, which downloads only what it needs to run."""
        line = self.load("me/bundle", tmp_path / "cache").replace("OVModelForLlavaMPT", "OVModelForVisualCausalLM")
        client.run(f"{line}.save_pretrained({str(tmp_path / 'saved')!r})")
        assert {file.name for file in (tmp_path / "saved").iterdir()} == set(FILES)

    def test_only_files_of_the_bundle(self, hub, client, tmp_path):
        start = len(hub.requests)
        client.run(self.load("me/bundle", tmp_path))
        asked = {path.split("/")[-1] for method, path, *_ in hub.requests[start:] if "/resolve/" in path}
        assert asked == {*FILES, *EXTRA_FILES}

    def test_private(self, client, tmp_path):
        client.run(self.load("me/secret", tmp_path / "a"))
        assert "If it is private, log in" in client.error(self.load("me/secret", tmp_path / "b", token="hf_you"))
        assert "If it is private, log in" in client.error(self.load("me/secret", tmp_path / "c", token=False))

    def test_subfolder(self, hub, client, tmp_path):
        start = len(hub.requests)
        client.run(
            self.load("me/many", tmp_path / "cache", subfolder="int4")
            + f".save_pretrained({str(tmp_path / 'saved')!r})"
        )
        assert {file.name for file in (tmp_path / "saved").iterdir()} == set(FILES)
        assert not [path for _, path, *_ in hub.requests[start:] if "/int8/" in path]

    def test_revision(self, hub, client, bundle, tmp_path):
        hub.repos["me/bundle"].branches["v1"] = list(hub.repos["me/bundle"].branches["main"])
        client.run(self.load("me/bundle", tmp_path, revision="v1"))
        client.run(self.load("me/bundle", tmp_path, revision=hub.repos["me/bundle"].commit("main").oid))
        assert "'me/bundle' has no revision 'v2'" in client.error(self.load("me/bundle", tmp_path, revision="v2"))

    def test_cache(self, hub, client, tmp_path):
        """What is there is not asked for again; without a connection it is used."""
        assert "has no config.json in the cache" in client.error(
            self.load("me/bundle", tmp_path, local_files_only=True)
        )
        client.run(self.load("me/bundle", tmp_path))
        before = len(hub.asked("^GET /(cdn|.*/resolve/)"))
        client.run(self.load("me/bundle", tmp_path))
        client.run(self.load("me/bundle", tmp_path, local_files_only=True))
        assert len(hub.asked("^GET /(cdn|.*/resolve/)")) == before

    def test_another_model_is_refused_by_its_config(self, hub, client, tmp_path):
        start = len(hub.requests)
        assert "is a LLaVA with a 'llama' language model, expected 'mpt'" in client.error(
            self.load("me/llama", tmp_path)
        )
        asked = [path for _, path, *_ in hub.requests[start:] if "me/llama" in path]
        assert {path.split("/")[-1] for path in asked} == {"config.json"}

    def test_names_that_lead_nowhere(self, client, tmp_path):
        assert "neither a folder here nor a model on the Hub" in client.error(self.load("me/nothing", tmp_path))
        assert "There is no folder 'me/not valid'" in client.error(self.load("me/not valid", tmp_path))

    @pytest.mark.parametrize(
        "fault",
        [{"status": 500}, {"status": 429}, {"cut": 1000}, {"damage": True}],
        ids=["500", "429", "cut", "damaged"],
    )
    def test_hiccups_are_overcome(self, faults, client, bundle, tmp_path, fault):
        name = "openvino_language_model.bin"
        oid = faults.repos["me/bundle"].commit("main").files[name].oid
        faults.fail(f"GET /cdn/{oid}" if "status" not in fault else f"HEAD .*{name}", **fault)
        client.run(self.load("me/bundle", tmp_path / "cache") + f".save_pretrained({str(tmp_path / 'saved')!r})")
        assert (tmp_path / "saved" / name).read_bytes() == (bundle / name).read_bytes()

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ({"status": 401}, "denied access to openvino_language_model.bin of 'me/bundle'. Log in"),
            ({"status": 403}, "denied access to openvino_language_model.bin of 'me/bundle'. Log in"),
            ({"shorten": 100}, "The download of openvino_language_model.bin of 'me/bundle' failed"),
            ({"damage": True}, "does not match its SHA-256"),
        ],
        ids=["401", "403", "truncated", "damaged"],
    )
    def test_faults(self, faults, client, tmp_path, fault, message):
        """Nothing half-downloaded is ever taken for whole."""
        name = "openvino_language_model.bin"
        oid = faults.repos["me/bundle"].commit("main").files[name].oid
        faults.fail(f"GET /cdn/{oid}" if "status" not in fault else f"HEAD .*{name}", times=9, **fault)
        assert message in client.error(self.load("me/bundle", tmp_path))
        faults.faults.clear()
        client.run(self.load("me/bundle", tmp_path))


class TestExportFromTheHub:
    def export(self, name, output, **options):
        arguments = "".join(f", {key}={value!r}" for key, value in options.items())
        return f"main_export({name!r}, {str(output)!r}{arguments})"

    def test_options_of_the_command(self, hub, tmp_path):
        """A private repository, a branch, a folder in it."""
        hub.add("you/checkpoints", checkpoint_files(SHAPES / "checkpoint"), private=True, subfolder="shapes")
        branches = hub.repos["you/checkpoints"].branches
        branches["v1"], branches["main"] = branches["main"], branches["main"][:1]
        options = ("--revision", "v1", "--subfolder", "shapes", "--token", "hf_you")
        run(
            "optimum-cli",
            "export",
            "openvino",
            "--model",
            "you/checkpoints",
            *options,
            tmp_path / "out",
            env=hub.env(),
        )
        converted_from = json.loads((tmp_path / "out" / "config.json").read_text())["converted_from"]
        assert converted_from["model"] == "you/checkpoints"
        assert converted_from["revision"] == branches["v1"][-1].oid
        assert converted_from["vision_tower"] == TOWER
        assert "hf_you" not in (tmp_path / "out" / "README.md").read_text()

    def test_refused_before_weights(self, hub, client, tmp_path):
        files = checkpoint_files(SHAPES / "checkpoint", norm_type="rmsnorm")
        hub.add("me/rmsnorm", files)
        start = len(hub.requests)
        assert "rmsnorm" in client.error(self.export("me/rmsnorm", tmp_path / "out"))
        asked = [path for _, path, *_ in hub.requests[start:] if "me/rmsnorm" in path]
        assert {path.split("/")[-1] for path in asked} == {"config.json"}

    def test_missing_tower(self, hub, client, tmp_path):
        hub.add("me/towerless", checkpoint_files(SHAPES / "checkpoint", mm_vision_tower="me/no-such-tower"))
        start = len(hub.requests)
        message = client.error(self.export("me/towerless", tmp_path / "out"))
        assert (
            "The vision tower 'me/no-such-tower', mm_vision_tower in config.json of 'me/towerless', was not found"
            in message
        )
        assert not [path for _, path, *_ in hub.requests[start:] if path.endswith("0002.bin")]


def test_server_that_dies_in_the_middle_of_100_mb(dying):
    """Up and down: an error that says to run it again, nothing half there, and the second try succeeds."""
    hub, client, big = dying
    assert "Run it again" in client.result()[1]
    assert hub.commits("me/big") == []

    hub.live()
    start, arrived = len(hub.requests), {file.name for file in hub.folder.iterdir()}
    client.run(f"push_bundle({str(big)!r}, 'me/big')")
    assert hub.commits("me/big") == ["Upload LLaVA for OpenVINO"]
    files = hub.repos["me/big"].commit("main").files
    large = {blob.oid for blob in files.values() if blob.is_lfs}
    oid = files["openvino_language_model.bin"].oid
    assert large & arrived
    # What had not arrived whole was sent, and nothing else
    assert {path.split("/")[2] for method, path, *_ in hub.requests[start:] if method == "PUT"} == large - arrived
    assert oid in large - arrived

    hub.fail(f"GET /cdn/{oid}", cut=50_000_000, dies=True)
    assert "Run it again" in client.error("OVModelForLlavaMPT.from_pretrained('me/big', compile=False)")
    hub.live()
    client.run("OVModelForLlavaMPT.from_pretrained('me/big', compile=False)")
