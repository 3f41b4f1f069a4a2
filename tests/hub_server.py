"""A small Hub on loopback, speaking the real HTTP API to the real client.

    with HubServer(folder) as hub:
        run("optimum-cli", "llava-ov", "push", bundle, "me/model", env=hub.env())

Or by itself: `python tests/hub_server.py <folder>` prints its address and serves until it is killed.

Behaves as huggingface.co does where the client can tell: what is there, who may do what, revisions, pull requests, git-LFS with single and
multi-part uploads (hashes checked), redirects to where large files are, ranges. Has no Xet storage. [`HubServer.fail`] breaks answers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


# token: (who it belongs to, whether it may write)
TOKENS = {"hf_me": ("me", True), "hf_me_read": ("me", False), "hf_you": ("you", True)}
LFS_FROM = 100_000  # bytes; the Hub's own limit is 10 MB, which tiny models do not reach
PART = 20_000_000  # bytes of a part of a multi-part upload


@dataclass(frozen=True)
class Blob:
    """A file: its place on disk, and what the Hub says about it."""

    path: Path
    size: int
    oid: str  # sha256 of a large file, git's sha1 of another
    is_lfs: bool


@dataclass(frozen=True)
class Commit:
    oid: str
    message: str
    files: dict[str, Blob]


@dataclass
class Repo:
    name: str
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commit(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = (commit for branch in self.branches.values() for commit in branch)
        return next((commit for commit in commits if commit.oid == revision), None)


@dataclass
class Fault:
    """What goes wrong, `times` times, with a request whose `METHOD /path` matches `pattern`.

    Attributes:
        status: answer so instead.
        cut: close the connection after so many bytes of the body, of the request for an upload and of the answer for a download.
        dies: after a cut, hang up on whoever calls, until [`HubServer.live`].
        damage: change a byte on the way.
        shorten: leave out the last so many bytes, as if the file were no longer.
    """

    pattern: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    dies: bool = False
    damage: bool = False
    shorten: int = 0


class AnswerError(Exception):
    """An answer that ends a request early."""

    def __init__(self, status: int, code: str | None = None, message: str = "", **values):
        super().__init__(message)
        self.status, self.headers, self.values = status, {}, values
        if code:
            self.headers["X-Error-Code"] = code
        if message:
            self.headers["X-Error-Message"] = message


class HubServer:
    """
    Attributes:
        repos (`dict[str, Repo]`): by name.
        requests (`list[tuple[str, str, int, int]]`): method and path of all that was asked, status answered, bytes of the request's body.
    """

    def __init__(self, folder: Path, port: int = 0):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, int, int]] = []
        self.faults: list[Fault] = []
        self.is_dead = False
        self.lock = threading.RLock()
        self._http = _HttpServer(("127.0.0.1", port), _Handler)
        self._http.hub = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self._http.shutdown()
        self._http.server_close()

    def env(self, home: Path | None = None, token: str | None = "hf_me") -> dict[str, str]:
        """Variables that lead a client here, with an empty cache unless `home` has one."""
        home = Path(home or tempfile.mkdtemp(dir=self.folder))
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN": token or "",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def fail(self, pattern: str, **kwargs) -> None:
        self.faults.append(Fault(pattern, **kwargs))

    def live(self) -> None:
        """Back from the dead."""
        self.is_dead = False
        self.faults.clear()

    def add(self, name: str, files: Path | dict[str, bytes], private: bool = False, subfolder: str = "") -> Repo:
        """Put a repository there, with the files of a folder, as if somebody had pushed it."""
        repo = self.create(name, private)
        if isinstance(files, Path):
            files = {
                file.relative_to(files).as_posix(): file.read_bytes() for file in files.rglob("*") if file.is_file()
            }
        blobs = {f"{subfolder}/{path}".lstrip("/"): self.store([content], path) for path, content in files.items()}
        self.commit(repo, "main", "Upload", {**repo.commit("main").files, **blobs})
        return repo

    def create(self, name: str, private: bool = False) -> Repo:
        repo = self.repos.setdefault(name, Repo(name, private))
        if not repo.branches:
            self.commit(
                repo,
                "main",
                "initial commit",
                {".gitattributes": self.store([b"*.bin filter=lfs\n"], ".gitattributes")},
            )
        return repo

    def commit(self, repo: Repo, branch: str, message: str, files: dict[str, Blob]) -> Commit:
        history = repo.branches.setdefault(branch, [])
        count = sum(len(branch) for branch in repo.branches.values())
        commit = Commit(
            hashlib.sha1(f"{repo.name}{branch}{count}{message}".encode()).hexdigest(), message, dict(files)
        )
        history.append(commit)
        return commit

    def store(self, chunks: Iterable[bytes], path: str = "", as_lfs: bool = False) -> Blob:
        """Write a file's content, without holding it."""
        sha256, size = hashlib.sha256(), 0
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
            for chunk in chunks:
                file.write(chunk)
                sha256.update(chunk)
                size += len(chunk)
        is_lfs = as_lfs or is_large(path, size)
        content = b"" if is_lfs else Path(file.name).read_bytes()
        oid = sha256.hexdigest() if is_lfs else hashlib.sha1(b"blob %d\0" % size + content).hexdigest()
        return Blob(Path(shutil.move(file.name, self.folder / oid)), size, oid, is_lfs)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Content of a repository; without what the Hub itself puts there."""
        files = self.repos[name].commit(revision).files
        return {path: blob.path.read_bytes() for path, blob in files.items() if path != ".gitattributes"}

    def commits(self, name: str, branch: str = "main") -> list[str]:
        """Messages of what users committed."""
        return [commit.message for commit in self.repos[name].branches[branch] if commit.message != "initial commit"]

    def asked(self, pattern: str) -> list[tuple[str, str, int, int]]:
        return [request for request in self.requests if re.search(pattern, f"{request[0]} {request[1]}")]

    def uploaded(self) -> int:
        """Bytes of large files that clients have sent."""
        return sum(size for _, _, _, size in self.asked("^PUT /lfs/"))


def is_large(path: str, size: int) -> bool:
    return size > 0 and (path.endswith((".bin", ".safetensors", ".png")) or size > LFS_FROM)


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], (ConnectionError, BrokenPipeError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement
    server: _HttpServer

    def log_message(self, *args) -> None:
        pass

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.route, self.query = parts.path, parse_qs(parts.query)
        self.status, self.unread = 0, int(self.headers.get("Content-Length") or 0)
        self.received = 0
        self.fault = self._take_fault()
        try:
            if self.hub.is_dead:
                self._hang_up()
            if self.fault and self.fault.status:
                raise _with_headers(AnswerError(self.fault.status, message="It was told to"), self.fault.headers)
            for methods, pattern, handle in _ROUTES:
                match = re.fullmatch(pattern, self.route)
                if match and self.command in methods.split():
                    handle(
                        self,
                        **{name: unquote(value) for name, value in match.groupdict().items() if value is not None},
                    )
                    break
            else:
                raise AnswerError(404, message=f"No such page: {self.command} {self.route}")
        except AnswerError as answer:
            self.answer_json(answer.status, {"error": str(answer), **answer.values}, answer.headers)
        except ConnectionError:
            self.close_connection = True
        finally:
            self.hub.requests.append((self.command, self.route, self.status, self.received))

    def _take_fault(self) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times > 0 and re.search(fault.pattern, f"{self.command} {self.route}"):
                    fault.times -= 1
                    return fault
        return None

    # Bodies

    def body(self) -> Iterable[bytes]:
        """The request's body in pieces, broken as the fault says."""
        cut = self.fault.cut if self.fault else None
        while self.unread:
            chunk = self.rfile.read(min(self.unread, 1 << 16))
            if not chunk:
                raise ConnectionError("the client went away")
            self.unread -= len(chunk)
            self.received += len(chunk)
            if cut is not None and self.received >= cut:
                self._hang_up()
            if self.fault and self.fault.damage and not self.unread:
                chunk = chunk[:-1] + bytes([chunk[-1] ^ 1])
            yield chunk

    def _hang_up(self) -> None:
        self.hub.is_dead = self.hub.is_dead or bool(self.fault and self.fault.dies)
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionError("cut")

    def json(self) -> dict:
        return json.loads(b"".join(self.body()) or b"{}")

    def answer_json(self, status: int, values: object, headers: dict[str, str] | None = None) -> None:
        for _ in self.body():  # what was not read would be taken for the next request
            pass
        content = json.dumps(values).encode()
        self._head(
            status, {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        )
        if self.command != "HEAD":
            self.wfile.write(content)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    # Who asks, and for what

    def user(self) -> tuple[str | None, bool]:
        header = self.headers.get("Authorization", "")
        if not header:
            return None, False
        if header.removeprefix("Bearer ") not in TOKENS:
            raise AnswerError(401, message="Invalid credentials in Authorization header")
        return TOKENS[header.removeprefix("Bearer ")]

    def repo(self, name: str, write: bool = False) -> Repo:
        user, may_write = self.user()
        repo = self.hub.repos.get(name)
        owner = name.split("/")[0]
        if repo is None or (repo.private and owner != user):
            raise AnswerError(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not (may_write and owner == user):
            raise AnswerError(
                403, message="Authorization error: you need write access to this repository" if user else "Log in"
            )
        return repo

    def commit(self, name: str, revision: str) -> Commit:
        commit = self.repo(name).commit(revision)
        if commit is None:
            raise AnswerError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # What a client asks for

    def whoami(self) -> None:
        user, may_write = self.user()
        if user is None:
            raise AnswerError(401, message="Invalid credentials in Authorization header")
        role = "write" if may_write else "read"
        self.answer_json(200, {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def validate_yaml(self) -> None:
        self.answer_json(200, {"errors": [], "warnings": []})

    def create_repo(self) -> None:
        user, may_write = self.user()
        values = self.json()
        if user is None:
            raise AnswerError(401, message="Invalid credentials in Authorization header")
        owner = values.get("organization") or user
        name = f"{owner}/{values['name']}"
        if not may_write or owner != user:
            raise AnswerError(
                403, message=f'You don\'t have the rights to create a model under the namespace "{owner}"'
            )
        if name in self.hub.repos:
            raise AnswerError(409, message="You already created this model repo", url=f"{self.hub.url}/{name}")
        self.hub.create(name, values.get("visibility") == "private" or bool(values.get("private")))
        self.answer_json(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def create_branch(self, name: str, branch: str) -> None:
        repo = self.repo(name, write=True)
        if branch in repo.branches:
            raise AnswerError(409, message="Reference already exists")
        repo.branches[branch] = list(repo.branches["main"])
        self.answer_json(200, {})

    def model_info(self, name: str, revision: str = "main") -> None:
        commit, repo = self.commit(name, revision), self.repo(name)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self.answer_json(
            200,
            {
                "_id": name,
                "id": name,
                "modelId": name,
                "sha": commit.oid,
                "private": repo.private,
                "tags": [],
                "siblings": siblings,
            },
        )

    def tree(self, name: str, revision: str, path: str = "") -> None:
        commit = self.commit(name, revision)
        prefix = f"{path}/" if path else ""
        found = {name: blob for name, blob in commit.files.items() if name.startswith(prefix)}
        if path and not found:
            raise AnswerError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        if "recursive" not in self.query or self.query["recursive"][0] not in ("1", "true", "True"):
            found = {name: blob for name, blob in found.items() if "/" not in name[len(prefix) :]}
        self.answer_json(200, [_entry(name, blob) for name, blob in sorted(found.items())])

    def paths_info(self, name: str, revision: str) -> None:
        commit = self.commit(name, revision)
        body = b"".join(self.body()).decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        self.answer_json(200, [_entry(path, commit.files[path]) for path in paths if path in commit.files])

    def preupload(self, name: str, revision: str) -> None:
        repo = self.repo(name, write="create_pr" not in self.query)
        if self.user()[0] is None:
            raise AnswerError(401, message="Invalid credentials in Authorization header")
        there = (repo.commit(revision) or repo.commit("main")).files
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
                "shouldIgnore": False,
                "oid": there[file["path"]].oid if file["path"] in there else None,
            }
            for file in self.json()["files"]
        ]
        self.answer_json(200, {"files": files})

    def lfs_batch(self, name: str) -> None:
        self.repo(name)
        answer = []
        for wanted in self.json()["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            if (self.hub.folder / oid).is_file():
                answer.append({"oid": oid, "size": size})
                continue
            action = {"href": f"{self.hub.url}/lfs/{oid}", "header": {}}
            if size > PART:
                parts = range(1, -(-size // PART) + 1)
                header = {
                    "chunk_size": str(PART),
                    **{f"{part:05d}": f"{self.hub.url}/lfs/{oid}/{part}" for part in parts},
                }
                action = {"href": f"{self.hub.url}/lfs/{oid}/complete", "header": header}
            verify = {"href": f"{self.hub.url}/lfs/{oid}/verify"}
            answer.append({"oid": oid, "size": size, "actions": {"upload": action, "verify": verify}})
        self.answer_json(200, {"transfer": "basic", "objects": answer})

    def lfs_put(self, oid: str, part: str = "") -> None:
        with tempfile.NamedTemporaryFile(dir=self.hub.folder, prefix="upload-", delete=False) as file:
            for chunk in self.body():
                file.write(chunk)
        if part:
            Path(file.name).rename(self.hub.folder / f"{oid}.{part}")
        else:
            self._keep(oid, [Path(file.name)])
        self._head(200, {"Content-Length": "0", "ETag": f'"{oid[:8]}{part}"'})

    def lfs_complete(self, oid: str) -> None:
        parts = sorted(self.json()["parts"], key=lambda part: part["partNumber"])
        self._keep(oid, [self.hub.folder / f"{oid}.{part['partNumber']}" for part in parts])
        self.answer_json(200, {})

    def _keep(self, oid: str, parts: list[Path]) -> None:
        def chunks():
            for part in parts:
                with open(part, "rb") as file:
                    while chunk := file.read(1 << 20):
                        yield chunk
                part.unlink()

        blob = self.hub.store(chunks(), as_lfs=True)
        if blob.oid != oid:
            blob.path.unlink()
            raise AnswerError(400, message=f"The uploaded file has the SHA-256 {blob.oid}, not {oid} as announced")

    def lfs_verify(self, oid: str) -> None:
        if not (self.hub.folder / oid).is_file():
            raise AnswerError(404, message=f"LFS object {oid} was not uploaded")
        self.answer_json(200, {})

    def commit_files(self, name: str, revision: str) -> None:
        is_pull_request = "create_pr" in self.query
        repo = self.repo(name, write=not is_pull_request)
        if revision not in repo.branches:
            raise AnswerError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, message = dict(repo.commit(revision).files), ""
        for line in b"".join(self.body()).splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, repo.commit(revision).oid):
                    raise AnswerError(412, message="A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                files[value["path"]] = self.hub.store([base64.b64decode(value["content"])])
            elif item["key"] == "lfsFile":
                stored = self.hub.folder / value["oid"]
                if not stored.is_file():
                    raise AnswerError(
                        400, message=f"LFS pointer of {value['path']} points to a file that does not exist"
                    )
                files[value["path"]] = Blob(stored, stored.stat().st_size, value["oid"], True)
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        with self.hub.lock:
            branch = revision
            if is_pull_request:
                branch = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repo.branches)}"
                repo.branches[branch] = list(repo.branches[revision])
            commit = self.hub.commit(repo, branch, message, files)
        self.answer_json(
            200,
            {
                "commitUrl": f"{self.hub.url}/{name}/commit/{commit.oid}",
                "commitOid": commit.oid,
                "pullRequestUrl": f"{self.hub.url}/{name}/discussions/{branch.split('/')[-1]}"
                if is_pull_request
                else None,
            },
        )

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self.commit(name, revision)
        blob = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.oid}
        if blob is None:
            raise _with_headers(AnswerError(404, "EntryNotFound", "Entry not found"), headers)
        if not blob.is_lfs:
            self._send(blob, {**headers, "ETag": f'"{blob.oid}"'})
            return
        linked = {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(blob.size)}
        # Another host, as on huggingface.co: newer clients follow a redirect to the same one before they download
        elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
        self._head(302, {**headers, **linked, "Location": f"{elsewhere}/cdn/{blob.oid}", "Content-Length": "0"})

    def cdn(self, oid: str) -> None:
        path = self.hub.folder / oid
        self._send(Blob(path, path.stat().st_size, oid, True), {"ETag": f'"{oid}"'})

    def _send(self, blob: Blob, headers: dict[str, str]) -> None:
        fault = self.fault or Fault("")
        start, end, status = 0, blob.size - fault.shorten, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end, status = int(match[1]), int(match[2] or end - 1) + 1, 206
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{blob.size}"}
        self._head(status, {**headers, "Accept-Ranges": "bytes", "Content-Length": str(end - start)})
        if self.command == "HEAD":
            return
        sent = 0
        with open(blob.path, "rb") as file:
            file.seek(start)
            while sent < end - start:
                chunk = file.read(min(1 << 16, end - start - sent))
                if fault.damage and not sent:
                    chunk = bytes([chunk[0] ^ 1]) + chunk[1:]
                self.wfile.write(chunk)
                sent += len(chunk)
                if fault.cut is not None and sent >= fault.cut:
                    self._hang_up()


def _with_headers(answer: AnswerError, headers: dict[str, str]) -> AnswerError:
    answer.headers.update(headers)
    return answer


def _entry(path: str, blob: Blob) -> dict:
    lfs = {"lfs": {"oid": blob.oid, "size": blob.size, "pointerSize": 130}} if blob.is_lfs else {}
    return {"type": "file", "path": path, "size": blob.size, "oid": blob.oid, **lfs}


_NAME = r"(?P<name>[^/]+/[^/]+)"
_REV = r"(?P<revision>[^/]+)"
_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", rf"/api/models/{_NAME}/branch/(?P<branch>.+)", _Handler.create_branch),
    ("GET", rf"/api/models/{_NAME}", _Handler.model_info),
    ("GET", rf"/api/models/{_NAME}/revision/{_REV}", _Handler.model_info),
    (
        "GET",
        rf"/api/models/{_NAME}/tree/{_REV}(?:/(?P<path>.+))?",
        _Handler.tree,
    ),
    ("POST", rf"/api/models/{_NAME}/paths-info/{_REV}", _Handler.paths_info),
    ("POST", rf"/api/models/{_NAME}/preupload/{_REV}", _Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/{_REV}", _Handler.commit_files),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})(?:/(?P<part>\d+))?", _Handler.lfs_put),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", _Handler.lfs_complete),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", _Handler.lfs_verify),
    ("GET HEAD", rf"/{_NAME}/resolve/{_REV}/(?P<path>.+)", _Handler.resolve),
    ("GET HEAD", r"/cdn/(?P<oid>[0-9a-f]{64})", _Handler.cdn),
]


if __name__ == "__main__":
    with HubServer(Path(sys.argv[1])) as server:
        print(server.url, flush=True)
        threading.Event().wait()
