"""The pages of `optimum-cli llava-ov serve`, in a real browser."""

from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import expect
from test_chat_demo import browser, chromium  # noqa: F401  fixtures
from test_serve import Program


pytestmark = [pytest.mark.slow, pytest.mark.genai, pytest.mark.browser, pytest.mark.flaky(reruns=2)]

NAME = "elsewhere.example"  # the browser finds this machine under it, see test_chat_demo.py


@pytest.fixture(scope="module")
def program(shapes_bundle, tmp_path_factory):
    log = tmp_path_factory.mktemp("serve") / "log"
    program = Program(log, f"--model=shapes={shapes_bundle}", "--allow-name", NAME)
    yield program
    program.stop()


@pytest.fixture
def page(program, browser):  # noqa: F811
    """A page under a public name: Swagger asks others about descriptions that are not on localhost. Keeps addresses."""
    page = browser.new_context(base_url=f"http://{NAME}:{program.port}").new_page()
    page.asked, page.problems = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    return page


def hosts(page):
    return {urlsplit(url).hostname for url in page.asked if not url.startswith(("data:", "blob:"))}


def test_description_of_the_interface(program, page):
    page.goto("/docs")
    operations = page.locator(".opblock")
    expect(operations.first).to_be_visible(timeout=60_000)
    listed = {
        (
            operation.locator(".opblock-summary-path").get_attribute("data-path"),
            operation.locator(".opblock-summary-method").inner_text().lower(),
        )
        for operation in operations.all()
    }
    paths = httpx.get(f"{program.url}/openapi.json").json()["paths"]
    assert listed == {(path, method) for path, operations in paths.items() for method in operations}
    assert ("/v1/chat/completions", "post") in listed
    page.wait_for_load_state("networkidle")
    assert hosts(page) == {NAME}


def test_interface_can_be_tried(page):
    page.goto("/docs")
    operation = page.locator("#operations-default-list_models_v1_models_get")
    operation.locator(".opblock-summary-control").click(timeout=60_000)
    operation.get_by_role("button", name="Try it out").click()
    operation.get_by_role("button", name="Execute").click()
    expect(operation.locator(".live-responses-table")).to_contain_text('"id": "shapes"', timeout=60_000)
    page.wait_for_load_state("networkidle")
    assert hosts(page) == {NAME}
    assert not page.problems


def test_chat(page):
    page.goto("/")  # until all is loaded; its heartbeat never ends
    expect(page.locator("#question textarea")).to_be_visible(timeout=60_000)
    assert hosts(page) == {NAME}
