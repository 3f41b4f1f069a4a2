"""The same server on a Ray cluster: a front that receives HTTP, and replicas that each have the models.

Ray Serve places the replicas, counts their requests, and starts and stops them. Requests of one conversation go to
the replica that has computed its beginning: Ray calls that a multiplexed model. Here its id is the conversation's.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import threading
from collections.abc import AsyncIterator, Mapping
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from optimum_llava_ov.serving.app import Lifecycle, build_app
from optimum_llava_ov.serving.errors import ApiError, try_again
from optimum_llava_ov.serving.metrics import Metrics
from optimum_llava_ov.serving.middleware import REQUEST_ID, Bodies, Gate, RequestLog
from optimum_llava_ov.serving.run import load_models
from optimum_llava_ov.serving.settings import Settings
from optimum_llava_ov.system.cluster import connect, limit_threads


NAME = "llava-ov"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPLICA = "x-replica"  # header that names the replica of an answer
CONVERSATIONS = 1000  # that a replica is known for
_MARGIN = 5  # seconds after which the front ends a request that a replica should have ended
_SCOPE = ("type", "method", "path", "raw_path", "query_string", "headers", "http_version", "scheme")


class Replica:
    """Run the application of the server in an actor, without a socket."""

    def __init__(self, bundles: Mapping[str, str], settings: Settings, options: Mapping[str, Any]):
        self._models = load_models(bundles, settings, **options)
        self._lifecycle = Lifecycle(self._models)
        self._app = build_app(self._models, settings, self._lifecycle, behind_front=True)

    @serve.multiplexed(max_num_models_per_replica=CONVERSATIONS)
    async def remember(self, conversation: str) -> str:
        """Tell Ray that this replica knows a conversation."""
        return conversation

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """Answer a request with the messages of ASGI."""
        conversation = serve.get_multiplexed_model_id()
        if conversation:
            await self.remember(conversation)
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        bodies = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if bodies:
                return bodies.pop()
            await asyncio.Event().wait()  # until this task is cancelled
            raise AssertionError

        task = asyncio.ensure_future(self._app(scope, receive, messages.put))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message)[REPLICA] = serve.get_replica_context().replica_id.unique_id
                yield message
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def check_health(self) -> None:
        """Raise an error if the replica must be started again."""
        if self._lifecycle.status() == "failed":
            raise RuntimeError("A model could not be loaded again.")


class Front:
    """Pass requests on to replicas, as an ASGI application.

    Args:
        replicas: Handle of the deployment of [`Replica`].
        seconds: Maximum time until an answer begins.
    """

    def __init__(self, replicas: DeploymentHandle, seconds: float):
        self._replicas = replicas
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = (await receive()).get("body", b"")
        handle = self._replicas.options(stream=True, multiplexed_model_id=conversation_id(body))
        response = handle.answer.remote(_passed_on(scope), body)
        passing = asyncio.ensure_future(_pass_on(response, self._seconds, scope, receive, send))
        gone = asyncio.ensure_future(_wait_until_gone(receive))
        try:
            await asyncio.wait({passing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if passing.done():
                passing.result()
        finally:
            if not passing.done():
                response.cancel()
            passing.cancel()
            gone.cancel()
            await asyncio.gather(passing, gone, return_exceptions=True)


def _passed_on(scope: Scope) -> dict[str, Any]:
    """Return a request for a replica, whose log has the same id as that of the front."""
    headers = [(name, value) for name, value in scope["headers"] if name != REQUEST_ID.encode()]
    number = scope["state"]["log"]["request_id"].encode()
    return {
        **{name: scope[name] for name in _SCOPE if name in scope},
        "headers": [*headers, (REQUEST_ID.encode(), number)],
    }


async def _pass_on(response: Any, seconds: float, scope: Scope, receive: Receive, send: Send) -> None:
    started = complete = False
    try:
        message = await asyncio.wait_for(anext(response), seconds)
        started = True
        await send(message)
        # Not until the response ends: when the client has all, Ray cancels it, and that is no error of the answer
        while not complete:
            message = await anext(response)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)
    except asyncio.TimeoutError:
        response.cancel()
        error = ApiError(f"No replica answered within {seconds:g} seconds. Try again later.", 504, code="timeout")
        await error.response()(scope, receive, send)
    except BackPressureError:
        await try_again("Too many requests wait. Try again later.", status=429).response()(scope, receive, send)
    except (RayError, RayServeException):
        error = try_again("The replica that computed this answer has failed. Try again.")
        if started:  # an event of the stream, which then ends
            event = f"data: {json.dumps(error.body())}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            await error.response()(scope, receive, send)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def conversation_id(body: bytes) -> str:
    """Return the same text for all requests of one conversation: a hash of its beginning. "" if there is none."""
    try:
        messages = json.loads(body)["messages"]
        first = next(index for index, message in enumerate(messages) if message["role"] == "user")
        beginning = json.dumps(messages[: first + 1])
    except (ValueError, LookupError, TypeError, StopIteration, RecursionError):
        return ""
    return hashlib.sha256(beginning.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _without_request_id(app: ASGIApp) -> ASGIApp:
    """Leave it to Ray to name the request in the answer. Its process that receives HTTP does so with the same id."""

    async def named(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)[REQUEST_ID]
            await send(message)

        await app(scope, receive, send_without)

    return named


class FrontDeployment:
    """Receive HTTP in a deployment of Ray Serve.

    Args:
        replicas: Handle of the deployment of [`Replica`].
    """

    def __init__(self, replicas: DeploymentHandle, settings: Settings):
        self._replicas = replicas
        self._settings = settings

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application. Ray calls it in the actor."""
        app = Bodies(Front(self._replicas, self._settings.timeout + _MARGIN), self._settings)
        return _without_request_id(RequestLog(Gate(app, self._settings), Metrics({})))


def build_deployment(
    bundles: Mapping[str, str],
    settings: Settings,
    options: Mapping[str, Any],
    replicas: tuple[int, int] = (1, 1),
    cpus: float = 1,
) -> serve.Application:
    """Build the application for `serve.run`. Running it again updates the replicas one after the other.

    Args:
        options: Other arguments of [`load_models`].
        replicas: Minimum and maximum number of replicas. Waiting requests decide how many there are.
        cpus: Number of processors of each replica.
    """
    scaling: dict[str, Any] = {"num_replicas": replicas[0]}
    if replicas[0] != replicas[1]:
        scaling = {
            "autoscaling_config": {
                "min_replicas": replicas[0],
                "max_replicas": replicas[1],
                "target_ongoing_requests": settings.max_running,
            }
        }
    limited = limit_threads(options.get("device", "CPU"), options.get("ov_config"), cpus)
    models = serve.deployment(
        name="models",
        ray_actor_options={"num_cpus": cpus},
        max_ongoing_requests=settings.max_running + settings.max_queue,
        max_queued_requests=settings.max_running + settings.max_queue,  # in the front, when all replicas are full
        graceful_shutdown_timeout_s=settings.timeout,
        **scaling,
    )(Replica).bind(bundles, settings, {**options, "ov_config": limited})

    front = serve.deployment(
        name="front",
        num_replicas=2,  # one of them receives requests while the other one is updated
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.timeout,  # it passes on the answers that replicas complete
    )
    return front(serve.ingress()(FrontDeployment)).bind(models, settings)


def run_on_ray(application: serve.Application, address: str, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Put the application on a cluster, in place of an earlier one.

    Args:
        address: Address of the cluster; "auto" for the one of this machine, which is started if there is none. Then
            the call ends with SIGTERM or Ctrl-C, after the requests are complete.
    """
    ended = threading.Event()
    is_ours = connect(address)
    if is_ours:
        # Before clients can reach the server. Ray's own handler would end it at once.
        for number in SIGNALS:
            signal.signal(number, lambda *_: ended.set())
    serve.start(http_options={"host": host, "port": port})
    serve.run(application, name=NAME, route_prefix="/")
    if is_ours:
        ended.wait()
        _end()


def _end() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # a second signal ends this process at once
    # Replicas complete their requests before they end. `serve.shutdown` alone ends the processes between them and the
    # clients.
    while True:
        try:
            serve.delete(NAME)
            break
        except TimeoutError:  # after a minute
            continue
    serve.shutdown()
    ray.shutdown()
