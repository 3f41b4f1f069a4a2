"""Python programs that start in half a second instead of ten.

Most of what `optimum-cli` does in its first seconds is to import torch, NNCF, OpenVINO, transformers, Optimum and what these need. Here, one
server process imports the libraries that do not read the environment, and forks itself for each environment. Each of these servers
imports transformers and Optimum, which read the environment when they are imported, and forks itself for each program. A program is still
a process of its own, with its own environment, arguments, working directory and files, and it imports this package itself.

    client (this file, run by a test)  --arguments, environment, stdin, stdout, stderr-->  server  -->  server of the environment
                                                                                                            --fork-->  program

The client passes on SIGINT and SIGTERM, and ends as the program ends. If the client is killed, the program is killed. When a program ends, it
joins its threads, calls what was registered with `atexit`, and flushes its output. It does not destroy its objects one by one.

Tests that run in parallel share the server.

Tests of imports, of memory, of terminals and of what is set when a process starts or ends use `run(..., fresh=True)` or `subprocess`.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import sys


LIBRARIES = (
    "filelock",
    "httpx",
    "jinja2",
    "nncf",
    "numpy",
    "openvino",
    "openvino_genai",
    "openvino_tokenizers",
    "pandas",
    "PIL.Image",
    "requests",
    "rich.console",
    "scipy.stats",
    "sklearn.metrics",
    "tokenizers",
    "torch._dynamo",
    "torch.utils.data",
)
# These read the environment.
HOSTS = (
    "transformers.generation",
    "transformers.models.auto",
    "transformers.models.clip.image_processing_pil_clip",
    "transformers.models.llava.configuration_llava",
    "optimum.exporters.openvino",
    "optimum.intel.openvino",
)
# Variables that programs have of their own, and that no host reads when it is imported
OWN_VARIABLES = ("COLUMNS", "LINES", "OLDPWD", "PATH", "PWD", "SHLVL", "_")
MAX_ENVIRONMENTS = 6
_address = None


def quick(command: list[str], env: dict[str, str] | None = None) -> list[str]:
    """The same command through the server, if it is a Python program that the server can start. Starts the server if necessary."""
    program, *arguments = command
    if os.path.basename(program) == "optimum-cli":
        arguments = [program, *arguments]
    elif os.path.basename(program) not in ("python", os.path.basename(sys.executable)) or not (
        arguments[0] == "-c" or arguments[0].endswith(".py")
    ):
        return command
    if "PYTHONPATH" in {**os.environ, **(env or {})} or not hasattr(os, "pidfd_open"):
        return command
    return [sys.executable, "-I", "-S", __file__, address(), *arguments]


def address() -> str:
    """Address of the server. It ends with this process, or with the one that starts the processes of parallel tests."""
    import tempfile

    global _address
    if _address is None:
        owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
        folder = os.path.join(tempfile.gettempdir(), f"programs-{os.getuid()}-{owner}")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        _address = os.path.join(folder, "socket")
        _start_server(_address, owner)
    return _address


def _start_server(address: str, owner: int) -> None:
    import subprocess

    from filelock import FileLock

    with FileLock(f"{address}.lock"):
        if not _is_served(address):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address)
            command = [sys.executable, __file__, "--serve", address, str(owner)]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
            )
            assert process.stdout.readline() == b"ready\n"


def _is_served(address: str) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        return not connection.connect_ex(address)


def client(address: str, arguments: list[str]) -> None:
    """Ask the server for a program, and end as it ends."""
    request = json.dumps({"arguments": arguments, "env": dict(os.environ), "cwd": os.getcwd()}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        _send(connection, request, [0, 1, 2])
        pid = int.from_bytes(connection.recv(8), "big")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: os.kill(pid, number))
        status = int.from_bytes(connection.recv(8), "big", signed=True)
    if status < 0:
        if status != -signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def serve(address: str, owner: int) -> list[str]:
    """Serve until the owner ends. Returns in the process of a program only, with the arguments of the program."""
    import shutil

    _import(LIBRARIES)

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    ended = os.pidfd_open(owner)
    os.write(1, b"ready\n")
    environments: dict[str, socket.socket] = {}  # the one that was used last is last
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj == ended:
                    shutil.rmtree(os.path.dirname(address), ignore_errors=True)
                    os._exit(0)
                connection, _ = listener.accept()
                request, files = _receive(connection)
                if not request:  # the client is no more
                    for file in (connection.detach(), *files):
                        os.close(file)
                    continue
                env = json.loads(request)["env"]
                shared = json.dumps({name: env[name] for name in sorted(env) if not _is_own(name)})
                channel = environments.pop(shared, None)
                if channel is None:
                    channel, other = socket.socketpair()
                    if not os.fork():
                        for file in (selector, listener, channel, connection, *environments.values()):
                            file.close()
                        for file in (ended, *files):
                            os.close(file)
                        return _serve_environment(env, other)
                    other.close()
                environments[shared] = channel
                if len(environments) > MAX_ENVIRONMENTS:
                    environments.pop(next(iter(environments))).close()
                _send(channel, request, [connection.fileno(), *files])
                for file in (connection.detach(), *files):
                    os.close(file)
                with contextlib.suppress(ChildProcessError):
                    while os.waitpid(-1, os.WNOHANG)[0]:
                        pass


def _is_own(name: str) -> bool:
    return name in OWN_VARIABLES or name.startswith("PYTEST")


def _serve_environment(env: dict[str, str], channel: socket.socket) -> list[str]:
    """Fork programs of one environment, until the server closes the channel and no program is left."""
    os.environ.clear()
    os.environ.update(env)
    _import(HOSTS)

    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    while selector.get_map():
        for key, _ in selector.select():
            if key.fileobj is channel:
                request, files = _receive(channel)
                if not request:
                    selector.unregister(channel)
                    continue
                connection = socket.socket(fileno=files.pop(0))
                pid = os.fork()
                if not pid:
                    for file in (selector, channel, connection):
                        file.close()
                    return _become(json.loads(request), files)
                for file in files:
                    os.close(file)
                with contextlib.suppress(OSError):
                    connection.sendall(pid.to_bytes(8, "big"))
                ended = os.pidfd_open(pid)
                selector.register(ended, selectors.EVENT_READ, (pid, ended, connection))
                selector.register(connection, selectors.EVENT_READ, (pid, None, connection))
            else:
                pid, ended, connection = key.data
                selector.unregister(key.fileobj)
                if ended is None:  # the client is no more
                    os.kill(pid, signal.SIGKILL)
                    continue
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                os.close(ended)
                if connection in selector.get_map():
                    selector.unregister(connection)
                    with contextlib.suppress(OSError):
                        connection.sendall(status.to_bytes(8, "big", signed=True))
                connection.close()
    os._exit(0)


def _import(names: tuple[str, ...]) -> None:
    """Import what stays for good, so that no garbage collection needs to look at it."""
    import gc
    import importlib

    gc.disable()
    for name in names:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()


def _send(connection: socket.socket, content: bytes, files: list[int]) -> None:
    socket.send_fds(connection, [len(content).to_bytes(8, "big")], files)
    connection.sendall(content)


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """Content and files; no content if the other side ended before all was sent."""
    header, files, *_ = socket.recv_fds(connection, 8, 4)
    size, content = int.from_bytes(header, "big"), b""
    while len(content) < size:
        if not (part := connection.recv(size - len(content))):  # the next request may follow
            return b"", files
        content += part
    return content, files


def _become(request: dict, files: list[int]) -> list[str]:
    """Make this process one that was started by the client."""
    import numpy as np

    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    np.random.seed()
    return request["arguments"]


def start(arguments: list[str]) -> None:
    """What `python ARGUMENTS` does."""
    import runpy
    import types

    program = sys.modules["__main__"] = types.ModuleType("__main__")
    sys.orig_argv = [sys.executable, *arguments]
    if arguments[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
        exec(compile(arguments[1], "<string>", "exec"), program.__dict__)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(arguments[0])
        runpy.run_path(arguments[0], run_name="__main__")


def end(status: object) -> None:
    """End this process as Python does, except for the destruction of objects, which would copy all memory that was shared by the fork."""
    import atexit
    import threading

    if not isinstance(status, int | None):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for file in (sys.stdout, sys.stderr):
        file.flush()
    os._exit((status or 0) & 0xFF)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        try:
            start(serve(sys.argv[2], int(sys.argv[3])))
            status = None
        except SystemExit as error:
            status = error.code
        end(status)
    else:
        client(sys.argv[1], sys.argv[2:])
