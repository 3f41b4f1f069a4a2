"""Mount the page of `llava-ov demo` on the engine of a server."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from optimum_llava_ov.chat.session import ChatSession
from optimum_llava_ov.demo.page import Demo, Limits, Visitors, build_page, mount_demo
from optimum_llava_ov.serving.models import ServedModel
from optimum_llava_ov.serving.settings import Settings


METHODS = ["DELETE", "GET", "PATCH", "POST", "PUT"]


def mount_page(app: FastAPI, model: ServedModel, settings: Settings, device: str) -> FastAPI:
    """Show the page at `/`. Its visitors chat with the engine of the server, in the same batch."""
    limits = Limits(
        answers=settings.max_running,
        queue=settings.max_queue,
        max_bytes=settings.images.max_bytes,
        max_pixels=settings.images.max_pixels,
        max_new_tokens=settings.max_tokens,
        hosts=settings.hosts,
        names=settings.names,
    )

    def factory_of(_: str):
        return lambda: ChatSession(model.engine, image_limits=settings.images, when_full="drop_oldest")

    for path in ("/v1/{_:path}", "/health{_:path}", "/metrics"):
        app.add_route(path, _refuse, methods=METHODS, include_in_schema=False)
    visitors = Visitors(factory_of, limits.sessions, limits.idle_seconds)
    visitors.load(device)
    demo = Demo(visitors, limits)
    title = Path(model.name).name
    return mount_demo(app, build_page(demo, title, [device], max_new_tokens=min(512, settings.max_tokens)), demo)


async def _refuse(request: Request) -> Response:
    """Answer what the API does not have. The page would answer it otherwise, because it takes all other paths."""
    app = request.scope["app"]
    known = [route for route in app.routes if route.matches(request.scope)[0] is Match.PARTIAL]
    methods = sorted({method for route in known for method in route.methods})
    raise HTTPException(405, headers={"Allow": ", ".join(methods)}) if methods else HTTPException(404)
