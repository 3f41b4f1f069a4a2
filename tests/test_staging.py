"""Writing a bundle: stopped at every call of the operating system, nothing of the user's is lost and the bundle is the old or the new one."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import files

from optimum_llava_ov import BundleError
from optimum_llava_ov.bundle.card import update_card
from optimum_llava_ov.bundle.layout import EXTRA_FILES, FILES, PARTS, check_bundle
from optimum_llava_ov.bundle.staging import complete_replacement, prepare_output, staged


pytestmark = pytest.mark.slow


LAST = PARTS["language_model"]


def write_bundle(folder: Path, version: str) -> None:
    """All files of a bundle, each of which says which version it belongs to."""
    for name in FILES:
        (folder / name).write_text(version)
    marks = {"version": version, "converted_from": {"optimum_llava_ov_version": "0.1.0"}}
    (folder / "config.json").write_text(json.dumps(marks))


def version_of(folder: Path) -> str | None:
    """Version of a whole bundle; `None` for a mixture."""
    try:
        check_bundle(folder)
    except BundleError:
        return None
    versions = {
        (folder / name).read_text()
        for name in (*FILES, *EXTRA_FILES)
        if name != "config.json" and (folder / name).exists()
    }
    versions.add(json.loads((folder / "config.json").read_text())["version"])
    return versions.pop() if len(versions) == 1 else None


class Calls:
    """Counts what Python asks of the operating system, before it is done, and does `action` in place of call number `at`."""

    EVENTS = ("open", "os.", "shutil.", "tempfile.")

    def __init__(self):
        self.at, self.number, self.action = None, 0, None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if self.at is None or not event.startswith(self.EVENTS) or event == "os.fork":
            return
        self.number += 1
        if self.number == self.at or (self.number > self.at and self.action in (die, disk_is_gone)):
            self.action()

    @contextmanager
    def interrupted(self, at: int, action):
        self.at, self.number, self.action = at, 0, action
        try:
            yield
        finally:
            self.at = None


@pytest.fixture(scope="session")
def calls():
    return Calls()


class Dead(BaseException):
    """Of a process that can do nothing any more."""


def die():
    raise Dead


def kill():
    os._exit(9)


def interrupt():
    raise KeyboardInterrupt


def disk_error():
    raise OSError(errno.EIO, "Input/output error")


def disk_is_gone():
    raise OSError(errno.EROFS, "Read-only file system")


def export(output: Path, version: str, fill=lambda: None) -> None:
    with staged(output) as folder:
        write_bundle(folder, version)
        fill()


def run_until(calls: Calls, at: int, action, output: Path, version: str, fill) -> bool:
    """Export until call number `at`; whether it came so far."""
    if action is not kill:
        with calls.interrupted(at, action), suppress(BundleError, OSError, KeyboardInterrupt, Dead):
            export(output, version, fill)
        return calls.number >= at
    if (child := os.fork()) == 0:  # whose clean-up does not run
        try:
            with calls.interrupted(at, kill):
                export(output, version, fill)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


class Place:
    """An output with an old bundle, and everything of the user's that is in it and around it."""

    def __init__(self, output: Path, around: Path, with_git: bool):
        self.output, self.around, self.target = output, around, output.resolve()
        self.version = 0
        for folder, version in ((around / ".out.partial", "mine"), (around / ".out.previous", "mine")):
            folder.mkdir()
            write_bundle(folder, version)
        if with_git:
            subprocess.run(["git", "init", "--quiet", "--template=", self.target], check=True)
        export(output, "0")
        if with_git:
            (self.target / ".gitattributes").write_text("*.bin filter=lfs\n")
            (self.target / ".notes").mkdir()
            (self.target / ".notes" / "link").symlink_to(around / ".out.partial")
            (self.target / ".optimum-llava-ov" / "mine").mkdir(parents=True)  # a name like ours, but without a marker
            (self.target / ".optimum-llava-ov" / "mine" / "thesis.tex").write_text("ten years of work")
        self.before = self.of_the_user()
        self.entries = files(around), files(self.target)
        (self.target / "eval.json").write_text("0")

    def of_the_user(self) -> dict[Path, bytes]:
        """All but the bundle's files and those of an export."""
        found = {}
        for folder in {self.around, self.target}:
            for file in folder.rglob("*"):
                is_bundle = file.parent == self.target and (file.name in FILES or file.name in EXTRA_FILES)
                is_exports = any(part in (".optimum-llava-ov", ".out.optimum-llava-ov") for part in file.parts)
                if (not is_exports or "mine" in file.parts) and not is_bundle:
                    found[file] = file.read_bytes() if file.is_file() else b""
        return found

    def check(self) -> tuple[bool, bool]:
        """Whether something of the user's is missing, and whether the bundle cannot be used; both after the next export, too."""
        old_or_new = str(self.version), str(self.version + 1)
        lost = self.of_the_user() != self.before
        # Engines that know nothing of this package never see a mixture of two bundles
        unusable = version_of(self.output) not in old_or_new and (self.output / LAST).exists()
        complete_replacement(self.output)
        unusable |= version_of(self.output) not in old_or_new
        self.version += 2
        export(self.output, str(self.version))
        lost |= self.of_the_user() != self.before
        unusable |= (
            version_of(self.output) != str(self.version) or (files(self.around), files(self.target)) != self.entries
        )
        (self.target / "eval.json").write_text(str(self.version))
        return lost, unusable


@pytest.fixture
def tmpfs(tmp_path):
    """A function that mounts a small file system of its own."""
    mounted = []

    def mount(name: str, size: str = "1m") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        result = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
        )
        if result.returncode:
            pytest.skip(f"cannot mount here: {result.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def fast_folder():
    """In memory where possible, as hundreds of thousands of files are written here."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def place(request, fast_folder):
    """Place, and what happens when the new bundle is written: the rest of the disk is filled."""
    around = fast_folder / "around"
    around.mkdir()
    if request.param == "symlink":
        (around / "out").symlink_to(fast_folder / "elsewhere" / "out")
        (fast_folder / "elsewhere" / "out").mkdir(parents=True)
    if request.param in ("mount point", "full disk"):
        (around / "out").symlink_to(request.getfixturevalue("tmpfs")("volume"))
    place = Place(around / "out", around, with_git=request.param != "plain")

    def fill() -> None:
        if request.param == "full disk":
            with suppress(OSError), (place.target / ".fill").open("wb") as file:
                file.write(bytes(2 << 20))

    return place, fill


@pytest.mark.parametrize(
    ("place", "action"),
    [
        *((place, die) for place in ("plain", "git", "symlink", "mount point", "full disk")),
        ("git", kill),
        ("git", interrupt),
        ("symlink", disk_error),
        ("mount point", disk_is_gone),
    ],
    indirect=["place"],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_stopped_at_every_call(place, calls, action):
    place, fill = place
    tried = lost = unusable = 0
    while run_until(calls, tried + 1, action, place.output, str(place.version + 1), fill):
        tried += 1
        (place.target / ".fill").unlink(missing_ok=True)
        results = place.check()
        lost, unusable = lost + results[0], unusable + results[1]
    print(f"tried {tried}, files lost {lost}, bundles unusable {unusable}")
    assert tried > 60
    assert (lost, unusable) == (0, 0)


class TestFullDisk:
    """Nothing can be written any more: that is a sentence, and the old bundle is as it was."""

    @pytest.fixture
    def output(self, tmpfs):
        output = tmpfs("volume") / "out"
        export(output, "old")
        return output

    def test_while_the_bundle_is_written(self, output):
        def fill():
            (output.parent / "more").write_bytes(bytes(2 << 20))

        with pytest.raises(
            BundleError, match="failed: No space left on device. The folder is unchanged. Free some space"
        ):
            export(output, "new", fill)
        assert version_of(output) == "old"
        assert files(output) == set(FILES)

    def test_errors_of_libraries(self, output):
        import numpy as np
        import openvino
        from openvino import opset13

        parameter = opset13.parameter([1, 1024], np.float32)
        weight = opset13.constant(np.random.default_rng(0).random((1024, 1024), np.float32))
        model = openvino.Model([opset13.matmul(parameter, weight, False, False)], [parameter])
        with pytest.raises(BundleError, match="the disk is full"), staged(output) as folder:
            openvino.save_model(model, folder / LAST, compress_to_fp16=False)
        assert version_of(output) == "old"
        assert files(output) == set(FILES)

    def test_card_of_the_users(self, tmpfs, bundles):
        folder = shutil.copytree(bundles["mlp2x_fp32_pad"], tmpfs("small", "8m") / "out")
        card = folder / "README.md"
        card.write_text(card.read_text() + "\nWords of the user's.\n")
        before = card.read_text()
        with suppress(OSError), (folder.parent / "more").open("wb") as more:
            more.write(bytes(8 << 20))
        with pytest.raises(OSError, match="No space left on device"):
            update_card(folder)
        assert card.read_text() == before
        assert files(folder) == set(FILES)


class TestWhatMayBeReplaced:
    @pytest.mark.parametrize(
        "names",
        [
            (".bashrc", ".ssh/id_ed25519"),
            (".git/HEAD", "README.md"),
            ("config.json", "tokenizer.json"),
            ("config.json", "openvino_config.json", "openvino_language_model.xml"),
            ("model_cache/a.blob",),
        ],
        ids=["home directory", "repository with a README", "another model", "another model for OpenVINO", "cache"],
    )
    def test_something_else(self, tmp_path, names):
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(
                '{"model_type": "llava", "converted_from": "x", "versions": ["optimum-llava-ov"]}'
            )
        with pytest.raises(BundleError, match=r"contains files that are not part of a bundle \("):
            export(tmp_path, "new")
        assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()} == set(names)

    @pytest.mark.parametrize(
        "names", [(), (".git", ".gitattributes"), ("lost+found",)], ids=["nothing", "git", "mounted"]
    )
    def test_empty_folders(self, tmp_path, names):
        for name in names:
            (tmp_path / name).mkdir()
        export(tmp_path, "new")
        assert version_of(tmp_path) == "new"
        assert files(tmp_path) == {*FILES, *names}

    @pytest.mark.parametrize("name", ["thesis.tex", "README.txt", "eval.json.bak"])
    def test_bundle_with_something_of_the_users(self, tmp_path, name):
        export(tmp_path, "old")
        (tmp_path / name).write_text("ten years of work")
        with pytest.raises(BundleError, match=rf"contains files that are not part of a bundle \({name}\)"):
            export(tmp_path, "new")
        assert version_of(tmp_path) == "old"

    def test_folder_with_the_name_of_a_file(self, tmp_path):
        export(tmp_path, "old")
        (tmp_path / "eval.json").mkdir()
        with pytest.raises(BundleError, match=r"contains files that are not part of a bundle \(eval.json\)"):
            export(tmp_path, "new")

    def test_cache_of_the_old_weights(self, tmp_path):
        """What a device has compiled goes; what somebody else has put there stays."""
        export(tmp_path, "old")
        (tmp_path / "model_cache").mkdir()
        for name in ("a.blob", "notes.txt"):
            (tmp_path / "model_cache" / name).write_text("")
        export(tmp_path, "new")
        assert files(tmp_path / "model_cache") == {"notes.txt"}


class TestNames:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("/", "^/ contains files that are not part of a bundle"),
            ("x" * 300, "cannot be a folder: File name too long. Choose another name"),
            ("a\0b", "cannot be a folder: .* Choose another name"),
            ("file/out", "cannot be created, because .*/file is a file"),
        ],
        ids=["root", "too long", "null", "below a file"],
    )
    def test_refused_before_any_work(self, tmp_path, name, message):
        (tmp_path / "file").write_text("")
        with pytest.raises(BundleError, match=message):
            export(tmp_path / name, "new")
        assert files(tmp_path) == {"file"}

    def test_not_writable(self, tmpfs):
        volume = tmpfs("volume")
        subprocess.run(["mount", "-o", "remount,ro", volume], check=True)
        for output in (volume, volume / "out"):
            with pytest.raises(BundleError, match=f"{volume} is not writable. Choose another folder"):
                prepare_output(output)

    def test_as_long_as_the_file_system_takes(self, tmp_path):
        export(tmp_path / ("x" * 255), "new")
        assert version_of(tmp_path / ("x" * 255)) == "new"

    def test_here(self, tmp_path, monkeypatch):
        """The folder that a shell is in stays that folder."""
        monkeypatch.chdir(tmp_path)
        for version in ("old", "new"):
            export(Path("."), version)
            assert version_of(Path(".")) == version


def test_two_at_a_time(tmp_path):
    for output in (tmp_path / "out", tmp_path / "out"):  # a new one, and one that is replaced
        with staged(output) as folder:
            write_bundle(folder, "first")
            with pytest.raises(BundleError, match="Another process is exporting to"):
                export(output, "second")
        assert version_of(output) == "first"
    assert files(tmp_path) == {"out"}


class TestHostileFolders:
    """A bundle that comes from somebody else may hold what looks like an interrupted replacement. It moves nothing from outside."""

    @pytest.fixture
    def bundle(self, tmp_path):
        export(tmp_path / "bundle", "theirs")
        export(tmp_path / "mine", "mine")
        return tmp_path / "bundle"

    def test_names_that_lead_outside(self, bundle, tmp_path):
        workspace = bundle / ".optimum-llava-ov" / "abc"
        workspace.mkdir(parents=True)
        names = ("../../../mine/config.json", str(tmp_path / "mine" / "tokenizer.json"), *FILES)
        workspace.with_suffix(".whole").write_text("\n".join(names))
        complete_replacement(bundle)
        assert version_of(bundle) == "theirs"
        assert version_of(tmp_path / "mine") == "mine"

    @pytest.mark.parametrize("state", ["partial", "whole"])
    def test_links(self, bundle, tmp_path, state):
        home = bundle / ".optimum-llava-ov"
        home.mkdir()
        (home / "abc").symlink_to(tmp_path / "mine")
        (home / f"abc.{state}").write_text("\n".join(FILES))
        complete_replacement(bundle)
        export(bundle, "new")
        assert version_of(bundle) == "new"
        assert version_of(tmp_path / "mine") == "mine"

    def test_link_in_place_of_our_folder(self, bundle, tmp_path):
        (tmp_path / "mine" / "abc").mkdir()
        write_bundle(tmp_path / "mine" / "abc", "other")
        (tmp_path / "mine" / "abc.whole").write_text("\n".join(FILES))
        (bundle / ".optimum-llava-ov").symlink_to(tmp_path / "mine")
        complete_replacement(bundle)
        assert version_of(bundle) == "theirs"
        assert version_of(tmp_path / "mine" / "abc") == "other"


def test_nothing_to_complete(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere", "owner/name"):
        complete_replacement(folder)
    assert prepare_output(tmp_path / "out") == (tmp_path / "out").resolve()
    assert files(tmp_path) == set()
