"""The HTTP application: routes, errors and streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from optimum_llava_ov.serving.errors import ApiError
from optimum_llava_ov.serving.forms import ChatForm, CompletionForm, Form
from optimum_llava_ov.serving.generation import Generation
from optimum_llava_ov.serving.metrics import Metrics
from optimum_llava_ov.serving.middleware import Bodies, Gate, RequestLog
from optimum_llava_ov.serving.models import Job, ServedModel
from optimum_llava_ov.serving.schemas import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
)
from optimum_llava_ov.serving.settings import Settings


Result = TypeVar("Result")
_STATUSES = (400, 401, 404, 408, 413, 421, 429, 500, 503, 504)
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in _STATUSES}
_READING_SECONDS = 30  # that a client has to read the rest of a stream whose time is over


class ClientGoneError(Exception):
    """Raised if the client went away before the answer."""


class Lifecycle:
    """Know whether the server takes requests.

    Attributes:
        stopping (`bool`): Whether the server completes its requests and takes no new ones.
    """

    def __init__(self, models: Mapping[str, ServedModel]):
        self.stopping = False
        self._models = models

    def status(self) -> str:
        if not all(model.engine.is_alive for model in self._models.values()):
            return "failed"
        return "stopping" if self.stopping else "ok"


def build_app(
    models: Mapping[str, ServedModel],
    settings: Settings,
    lifecycle: Lifecycle | None = None,
    behind_front: bool = False,
) -> FastAPI:
    """Build the application.

    Args:
        models: The models by name.
        lifecycle: Knows whether the server is stopping.
        behind_front: Whether another process has received the requests and checked keys, names and sizes.
    """
    metrics = Metrics(models)
    lifecycle = lifecycle or Lifecycle(models)

    # FastAPI's own /docs loads its scripts from a CDN. Without a validator, Swagger shows no badge of another server.
    app = FastAPIOffline(
        title="optimum-llava-ov",
        summary="LLaVA on OpenVINO",
        redoc_url=None,
        swagger_ui_parameters={"validatorUrl": None},
    )
    # The last one that is added is the first one that a request passes
    if not behind_front:
        app.add_middleware(Bodies, settings=settings)
        app.add_middleware(Gate, settings=settings)
    app.add_middleware(RequestLog, metrics=metrics)
    _add_error_handlers(app)

    def find(name: str) -> ServedModel:
        if name not in models:
            raise ApiError(
                f"The model {name!r} does not exist. This server has {', '.join(models)}.",
                status=404,
                code="model_not_found",
                param="model",
            )
        return models[name]

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        response_model_exclude_none=True,
        responses={**ERRORS, 200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    )
    async def chat_completions(request: Request, body: ChatRequest) -> Any:
        """Answer the last message of a conversation."""
        model = find(body.model)
        return await answer(request, body, model, body.n, lambda: model.chat_jobs(body), ChatForm)

    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses={**ERRORS, 200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    )
    async def completions(request: Request, body: CompletionRequest) -> Any:
        """Continue texts."""
        model = find(body.model)
        number = body.n * (1 if isinstance(body.prompt, str) else len(body.prompt))
        if not number:
            raise ApiError("The request has no prompt.", param="prompt")
        return await answer(request, body, model, number, lambda: model.completion_jobs(body), CompletionForm)

    async def answer(
        request: Request,
        body: Any,
        model: ServedModel,
        number: int,
        read: Callable[[], list[Job]],
        make_form: Callable[[Any, ServedModel, Generation], Form],
    ) -> Any:
        generation = Generation(model, number, metrics)
        log = request.scope["state"]["log"]
        log["model"] = model.name
        try:
            await _unless_gone(request, generation.start(read))
            form = make_form(body, model, generation)
            if body.stream:
                return EventStream(_events(form, generation), generation, settings, log)
            await _unless_gone(request, _collect(form, generation))
        except BaseException:
            _finish(generation, log)
            raise
        _finish(generation, log)
        return form.complete()

    @app.get("/v1/models")
    async def list_models() -> ModelList:
        """List the models of this server."""
        return ModelList(data=[_card(model) for model in models.values()])

    @app.get("/v1/models/{name:path}", responses={404: {"model": ErrorBody}})
    async def get_model(name: str) -> ModelCard:
        """Describe a model."""
        return _card(find(name))

    @app.get("/health/live", responses={503: {"model": Health}})
    async def live() -> Response:
        """Tell whether the server works. If not, it must be started again."""
        status = lifecycle.status()
        return _health(status, failed=status == "failed")

    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    @app.get("/health/ready", response_model=Health, responses={503: {"model": Health}})
    async def ready() -> Response:
        """Tell whether the server takes requests."""
        status = lifecycle.status()
        return _health(status, failed=status != "ok")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def read_metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


class EventStream(StreamingResponse):
    """Stream events of the server. The generation ends with the stream, whatever ends it."""

    def __init__(
        self, events: AsyncIterator[str], generation: Generation, settings: Settings, log: dict[str, Any]
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._generation = generation
        self._seconds = settings.timeout + _READING_SECONDS
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with anyio.move_on_after(self._seconds):  # a client that does not read
                await super().__call__(scope, receive, send)
        finally:
            _finish(self._generation, self._log)


async def _events(form: Form, generation: Generation) -> AsyncIterator[str]:
    for chunk in form.beginning():
        yield _event(chunk)
    try:
        async for piece in generation:
            yield _event(form.chunk(piece))
    except ApiError as error:
        yield _event(error.body())
        return
    for chunk in form.end():
        yield _event(chunk)
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _collect(form: Form, generation: Generation) -> None:
    async for piece in generation:
        form.collect(piece)


def _finish(generation: Generation, log: dict[str, Any]) -> None:
    generation.close()
    log["prompt_tokens"], log["answer_tokens"] = generation.prompt_tokens, generation.answer_tokens
    log["finish_reasons"] = generation.finish_reasons


async def _unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Do some work, and stop it if the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(ClientGoneError)
    async def client_gone(_: Request, __: ClientGoneError) -> Response:
        return ApiError("The client went away.", status=499).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = {404: f"There is no {request.url.path} here.", 405: f"{request.method} is not possible here."}
        response = ApiError(message.get(error.status_code, str(error.detail)), status=error.status_code).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def wrong_request(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        # Names of variants ("text", "image_url") and the word "body" are not part of what the client wrote
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        if first["type"] == "json_invalid":
            return ApiError("The body is not JSON.", code="invalid_json").response()
        if first["type"] == "extra_forbidden":
            message = f"The parameter {param} is not supported."
            return ApiError(message, code="unsupported_parameter", param=param).response()
        return ApiError(f"{param or 'body'}: {first['msg']}", param=param, code="invalid_value").response()


def _card(model: ServedModel) -> ModelCard:
    return ModelCard(id=model.name, created=model.created, max_model_len=model.context_window)


def _health(status: str, failed: bool) -> Response:
    return JSONResponse({"status": status}, 503 if failed else 200)
