"""The site of the documentation: it is built without a warning, and loads nothing from other hosts."""

import os
import re
import sys
from pathlib import Path

import pytest
from conftest import run

import optimum_llava_ov
from optimum_llava_ov.cli.commands import LlavaOVCommand


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
LOADED = re.compile(
    r'<(?:script|img|iframe|source)[^>]+src="([^"]+)"|<link[^>]+rel="(?:stylesheet|icon|preconnect)"[^>]+href="([^"]+)"'
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run("mkdocs", "build", "--strict", "--site-dir", folder, env={"PATH": path}, cwd=ROOT)
    return folder


def test_pages_load_nothing_from_other_hosts(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = [address for pair in LOADED.findall(page.read_text()) for address in pair if address]
        assert any(address.endswith(".js") for address in loaded)
        assert [address for address in loaded if "//" in address] == [], page


def test_every_public_name_and_command_is_described(site):
    python, commands = ((site / name / "index.html").read_text() for name in ("api", "cli"))
    for name in optimum_llava_ov.__all__:
        assert re.search(rf'id="optimum_llava_ov\.[\w.]*\.?{name}"', python), name
    for command in LlavaOVCommand.SUBCOMMANDS:
        assert f"usage: optimum-cli llava-ov {command.name}" in commands, command.name


def test_search_finds_pages(site):
    index = (site / "search" / "search_index.json").read_text()
    for text in ("Fewer tokens for an image", "OVModelForLlava", "pad_to_square"):
        assert text in index, text


def test_every_page_is_in_the_navigation(site):
    """`--strict` warns of pages that are not; this also holds for links between pages and to headings."""
    home = (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        name = "." if page.stem == "index" else f"{page.stem}/"
        assert f'href="{name}"' in home, page.name
