"""Python programs that start in two seconds instead of seven.

Most of what `optimum-cli` does in its first seconds is to import torch, NNCF, OpenVINO and what these need. Here, one server process
imports these libraries, and forks itself for each program. A program is still a process of its own, with its own environment, arguments,
working directory and files, and it imports transformers, Optimum and this package itself. What reads the environment when it is
imported, such as `huggingface_hub`, is not imported by the server.

    client (this file, run by a test)  --arguments, environment, stdin, stdout, stderr-->  server  --fork-->  program

The client passes on SIGINT and SIGTERM, and ends as the program ends. If the client is killed, the program is killed.

Tests of imports, of memory, of terminals and of what is set when a process starts use `run(..., fresh=True)` or `subprocess`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys


LIBRARIES = (
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
    "scipy.stats",
    "sklearn.metrics",
    "tokenizers",
    "torch._dynamo",
    "torch.utils.data",
)
_server = None


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
    return [sys.executable, "-I", "-S", __file__, _address(), *arguments]


def _address() -> str:
    """Address of the server of this process, which ends with this process."""
    global _server
    if _server is None:
        import subprocess
        import tempfile

        folder = tempfile.mkdtemp(prefix="programs")
        address = os.path.join(folder, "socket")
        command = [sys.executable, __file__, "--serve", address]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, text=True
        )
        assert process.stdout.readline() == "ready\n"
        _server = address, process
    return _server[0]


def client(address: str, arguments: list[str]) -> None:
    """Ask the server for a program, and end as it ends."""
    request = json.dumps({"arguments": arguments, "env": dict(os.environ), "cwd": os.getcwd()}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(request)
        pid = int.from_bytes(connection.recv(8), "big")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: os.kill(pid, number))
        status = int.from_bytes(connection.recv(8), "big", signed=True)
    if status < 0:
        if status != -signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def serve(address: str) -> list[str]:
    """Serve until stdin is closed. Returns in the process of a program only, with the arguments of the program."""
    import gc
    import importlib
    import selectors

    for name in LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()

    selector = selectors.DefaultSelector()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    os.write(1, b"ready\n")
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                size, files, *_ = socket.recv_fds(connection, 8, 3)
                request = json.loads(connection.makefile("rb").read(int.from_bytes(size, "big")))
                pid = os.fork()
                if not pid:
                    for file in (selector, listener, connection):
                        file.close()
                    return _become(request, files)
                for file in files:
                    os.close(file)
                connection.sendall(pid.to_bytes(8, "big"))
                ended = os.pidfd_open(pid)
                selector.register(ended, selectors.EVENT_READ, (pid, ended, connection))
                selector.register(connection, selectors.EVENT_READ, (pid, None, connection))
            elif key.data is None:  # stdin is closed
                os.unlink(address)
                os.rmdir(os.path.dirname(address))
                os._exit(0)
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
                    connection.sendall(status.to_bytes(8, "big", signed=True))
                connection.close()


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


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        start(serve(sys.argv[2]))
    else:
        client(sys.argv[1], sys.argv[2:])
