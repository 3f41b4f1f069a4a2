"""Small files are written as a whole or not at all."""

import resource

import pytest

from optimum_llava_ov import HubError, HubUnreachableError
from optimum_llava_ov.bundle.card import update_card
from optimum_llava_ov.bundle.settings import write_json
from optimum_llava_ov.files import replace_text


@pytest.fixture
def full_disk():
    """No file may have more than 100 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_mode_and_link_stay(tmp_path):
    (tmp_path / "file").write_text("a")
    (tmp_path / "file").chmod(0o640)
    (tmp_path / "link").symlink_to("file")
    replace_text(tmp_path / "link", "é")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "é"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("write", [replace_text, lambda file, text: write_json(file, {"accuracy": text})])
def test_full_disk(tmp_path, full_disk, write):
    file = tmp_path / "eval.json"
    file.write_text("before")
    with pytest.raises(OSError, match=r"Not saved\. The earlier content of the file is unchanged: .*eval.json"):
        write(file, "a" * 200)
    assert file.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["eval.json"]


def test_card_on_a_full_disk(bundles, tmp_path, full_disk):
    bundle = bundles["linear_fp16_sharded"]
    for file in bundle.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").write_text("Of the user.")
    with pytest.raises(OSError, match=r"Not saved\. The earlier content of the file is unchanged: .*README.md"):
        update_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == "Of the user."


def test_no_network_has_an_error_of_its_own():
    assert issubclass(HubUnreachableError, HubError)
