"""The documentation as a site: built strictly, without a broken link, and without anything from other servers."""

import ast
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import expect
from test_chat_demo import browser, chromium  # noqa: F401  fixtures


pytestmark = pytest.mark.slow


ROOT = Path(__file__).parent.parent


class Loaded(HTMLParser):
    """Addresses that a page loads, and those that it links to."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.links, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get("id"))
        if tag in ("script", "img", "iframe") and found.get("src"):
            self.loads.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "preload", "icon", "preconnect", "dns-prefetch"):
            self.loads.append(found["href"])
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", folder]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    return folder


def test_every_page_is_there(site):
    pages = {file.name for file in (ROOT / "docs").glob("*.md")}
    assert {Path(name).with_suffix(".html").name for name in pages} <= {file.name for file in site.glob("*.html")}
    assert "site.py" not in {file.name for file in site.rglob("*")}
    for page, words in {
        "index.html": "make quickstart",
        "commands.html": "optimum-cli llava-ov doctor",
        "api.html": "from_pretrained",
        "changelog.html": "Unreleased",
    }.items():
        assert words in re.sub(r"<[^>]+>", "", (site / page).read_text())
    assert 'href="index.html#export"' in (site / "commands.html").read_text()
    assert "[<code>" not in (site / "api.html").read_text()


def test_nothing_is_loaded_from_elsewhere(site):
    pages = {file: Loaded(file.read_text()) for file in site.glob("*.html")}
    for file, page in pages.items():
        assert [address for address in page.loads if urlsplit(address).netloc] == [], file.name
    styles = "".join(file.read_text() for file in site.rglob("*.css"))
    assert not re.search(r"(?:@import|url\()\s*[\"']?https?:", styles)


def test_links_lead_somewhere(site):
    """Also those to a part of another page."""
    pages = {file.name: Loaded(file.read_text()) for file in site.glob("*.html")}
    del pages["404.html"]  # its links begin at the root of a server
    for name, page in pages.items():
        for link in page.links:
            address = urlsplit(link)
            if address.scheme or address.netloc or not (address.path or address.fragment):
                continue
            target = unquote(address.path) or name
            assert (site / target).exists(), f"{name}: {link}"
            if address.fragment and target in pages:
                assert unquote(address.fragment) in pages[target].ids, f"{name}: {link}"


@pytest.mark.browser
def test_search_in_a_folder(site, browser):  # noqa: F811
    """Opened without a server. Browsers load no JSON and start no worker there."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    failed = []
    page.on("requestfailed", lambda request: failed.append(request.url))
    page.goto((site / "index.html").as_uri())
    page.get_by_role("textbox", name="Search").click()
    page.keyboard.type("CUDA")
    expect(page.locator("a.md-search-result__link[href*='faq.html']").first).to_be_visible(timeout=30_000)
    assert failed == []


OTHERS = {  # messages of other libraries
    "operator torchvision::nms does not exist",
    "Cannot find empty port in range",
    "address already in use",
}


def test_errors_of_the_faq_are_those_of_the_code():
    """So that who searches for a message finds it. Values are `...`."""
    code = " ".join(message for file in (ROOT / "optimum_llava_ov").rglob("*.py") for message in _texts(file))
    for heading in re.findall(r"^#### (.*)$", (ROOT / "docs" / "faq.md").read_text(), re.MULTILINE):
        for message in re.findall(r"`([^`]*)`", heading):
            for part in filter(None, (part.strip(" ().") for part in message.split("..."))):
                assert part in code or part in OTHERS, part


def _texts(file):
    """Yield the texts in a module: what is between two values."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else " ... " for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
