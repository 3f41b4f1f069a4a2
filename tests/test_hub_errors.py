"""No network, and a Hub that says no: sentences, told apart. Only the client runs here, so each user's process starts at once."""

import json
import socket
import sys

import pytest
from conftest import run
from hub_server import HubServer

from optimum_llava_ov.errors import HubError
from optimum_llava_ov.hub_errors import clean_token, redacted


pytestmark = pytest.mark.hub


# Evaluates the lines it is given. The client waits between its tries, which nobody needs to see here.
USER = """
import json, sys, time
time.sleep = lambda seconds: None
from optimum_llava_ov.checkpoint.repository import Repository
for line in sys.argv[1:]:
    try:
        answer = [None, str(eval(line))]
    except Exception as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps(answer))
"""
FILES = {"config.json": b"{}", "weights.bin": b"x" * 200_000}


def user(env, *lines):
    """What each line gives in a user's Python: `[None, value]`, or `[name of the error, message]`."""
    output = run(sys.executable, "-c", USER, *lines, env={"HF_HUB_OFFLINE": "0", "HF_TOKEN": "", **env}).stdout
    return [json.loads(line) for line in output.splitlines()]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.add("me/model", FILES)
        server.add("me/secret", FILES, private=True)
        yield server


def refusing():
    """Address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [(refusing(), "refused"), ("http://no-such-host.invalid", "not known|resol|address")],
    ids=["refused", "unknown name"],
)
class TestUnreachable:
    def test_nothing_cached(self, tmp_path, endpoint, reason):
        env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
        for error, message in user(
            env, "Repository('me/model').get('config.json')", "Repository('me/model').require('config.json', 'why')"
        ):
            assert error == "HubUnreachableError"
            assert f"The Hub ({endpoint}) cannot be reached: " in message
            assert any(word in message for word in reason.split("|"))
            assert "config.json of 'me/model' is neither in a folder here nor in the cache" in message
            assert "hf download me/model" in message

    def test_cached(self, hub, tmp_path, endpoint, reason):
        """What was downloaded once is found, also at a commit, and what the repository lacks is known to be missing."""
        lines = [
            "Repository('me/model').get('config.json')",
            "Repository('me/model').pinned(Repository('me/model').get('config.json')).get('weights.bin')",
            "Repository('me/model').get('added_tokens.json')",
        ]
        env = hub.env(tmp_path)
        online = user(env, *lines)
        assert [error for error, _ in online] == [None, None, None]
        assert online[2] == [None, "None"]
        env["HF_ENDPOINT"] = endpoint
        assert user(env, *lines) == online
        error, message = user(env, "Repository('me/model').require('other.json', 'it says more')")[0]
        assert error == "HubUnreachableError"
        assert "other.json of 'me/model' is neither in a folder here nor in the cache" in message


def test_offline_mode(tmp_path):
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    error, message = user(env, "Repository('me/model').require('config.json', 'it says what the model is')")[0]
    assert error == "InvalidCheckpointError"
    assert "has no config.json in the cache (offline mode)" in message


def test_answers_that_say_no(hub, tmp_path):
    """Each status has its own sentence, and none is called unreachable."""
    expected = {
        401: "Log in with `hf auth login`",
        403: "Log in with `hf auth login`",
        404: "does not know config.json of 'me/model' (HTTP 404)",
        418: "refused config.json of 'me/model' (HTTP 418)",
        429: "too many requests (HTTP 429). Wait a few minutes",
        500: "has an internal problem (HTTP 500). Run it again later",
        503: "has an internal problem (HTTP 503). Run it again later",
    }
    env = hub.env(tmp_path)
    for status, sentence in expected.items():
        hub.fail("HEAD .*/config.json", status=status, times=99)
        error, message = user(env, "Repository('me/model').require('config.json', 'why')")[0]
        hub.faults.clear()
        assert error == "HubError"
        assert sentence in message, message
        assert "cannot be reached" not in message


def test_repositories_that_are_not_there(hub, tmp_path):
    answers = user(
        hub.env(tmp_path),
        "Repository('me/nothing').get('config.json')",
        "Repository('me/secret', token='hf_you').get('config.json')",
        "Repository('me/model', revision='v9').get('config.json')",
        "Repository('nope', any_name=True).get('config.json')",
    )
    assert [error for error, _ in answers] == ["HubError"] * 4
    for _, message in (answers[0], answers[1]):
        assert "is neither a folder here nor a model on the Hub" in message
    assert answers[2][1] == "'me/model' has no revision 'v9'."


def test_names_that_cannot_be_on_the_hub(hub, tmp_path):
    """Refused before any request; a name without an owner is none of ours."""
    before = len(hub.requests)
    names = ("./nowhere", "../nowhere", "/no/where", "~/nowhere", "a/b/c", "a\\b", "nope", "me/not valid")
    for name, (error, message) in zip(
        names, user(hub.env(tmp_path), *(f"Repository({name!r}).get('config.json')" for name in names))
    ):
        assert (error, message) == (
            "InvalidCheckpointError",
            f"There is no folder {name!r}, and this name is not a model id of the Hub: expected `owner/name`.",
        )
    assert len(hub.requests) == before


class TestTokens:
    SECRET = "hf_" + "aB3" * 10

    def test_white_space_is_stripped(self, hub, tmp_path):
        """A token that was read from a file has a newline at its end."""
        answers = user(hub.env(tmp_path, token=None), "Repository('me/secret', token='hf_me\\n').get('config.json')")
        assert answers[0][0] is None

    def test_never_shown(self, hub, tmp_path):
        answers = user(
            hub.env(tmp_path, token=None),
            f"Repository('me/secret', token='{self.SECRET}\\n').get('config.json')",
            f"Repository('me/secret', token='{self.SECRET}\\n{self.SECRET}').get('config.json')",
            f"Repository('me/secret', token='{self.SECRET}\\u00e9').get('config.json')",
            f"Repository('me/secret', token='{self.SECRET}')",
        )
        assert [error for error, _ in answers] == ["HubError", "HubError", "HubError", None]
        assert all(self.SECRET not in message for _, message in answers)
        assert "not a token of the Hub" in answers[1][1]

    def test_clean(self):
        assert clean_token(f" {self.SECRET}\r\n") == self.SECRET
        assert [clean_token(token) for token in (None, True, False, "", "\n")] == [None, True, False, None, None]
        with pytest.raises(HubError, match="not a token of the Hub"):
            clean_token("hf_a b")

    def test_redacted(self, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "other")
        text = f"Bearer {self.SECRET}, mine, other, hf_hub_download"
        assert redacted(text, "mine\n") == "Bearer hf_***, hf_***, hf_***, hf_hub_download"
