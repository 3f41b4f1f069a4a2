"""Load the models and run the server until it is stopped."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Mapping

import uvicorn

from optimum_llava_ov.batching.load import load_batch_engine
from optimum_llava_ov.serving.app import Lifecycle, build_app
from optimum_llava_ov.serving.middleware import JsonLines
from optimum_llava_ov.serving.models import ServedModel
from optimum_llava_ov.serving.settings import Settings


logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Run the application. After SIGTERM or Ctrl-C, complete the requests that it has, and end.

    A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle):
        super().__init__(config)
        self._lifecycle = lifecycle

    def handle_exit(self, sig: int, frame: object) -> None:
        self._lifecycle.stopping = True
        super().handle_exit(sig, frame)  # type: ignore[arg-type]


def load_models(
    bundles: Mapping[str, str],
    settings: Settings,
    device: str = "CPU",
    ov_config: dict[str, str] | None = None,
    cache_gb: int = 0,
) -> dict[str, ServedModel]:
    """Load bundles.

    Args:
        bundles: Folders or model ids by the names that requests use.
        cache_gb: Maximum size of the cache of each model, in GB. 0: it grows as needed.

    Raises:
        `ValueError`: The device does not exist, or a folder is not a bundle.
        `ImportError`: GenAI is not installed.
    """
    models = {}
    for name, bundle in bundles.items():
        engine = load_batch_engine(bundle, device, ov_config, max_sequences=settings.max_running, cache_gb=cache_gb)
        models[name] = ServedModel(name, engine, settings)
    return models


def run_server(
    models: Mapping[str, ServedModel],
    settings: Settings,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "CPU",
    page: bool = True,
) -> None:
    """Serve the models until SIGTERM or Ctrl-C.

    Args:
        page: Whether `/` is the page of `llava-ov demo`, with the first model.

    Raises:
        `OSError`: The port is in use.
    """
    lifecycle = Lifecycle(models)
    app = build_app(models, settings, lifecycle)
    if page:
        from optimum_llava_ov.serving.page import mount_page

        app = mount_page(app, next(iter(models.values())), settings, device)
    config = uvicorn.Config(app, host, port, log_config=None, access_log=False, server_header=False)
    _log_as_json()
    server = Server(config, lifecycle)
    listener = config.bind_socket()
    # asyncio sets this only for sockets that name TCP. Uvicorn's does not, and then a reply waits 40 ms for the client
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    logger.info("ready", extra={"fields": {"address": f"http://{host}:{port}", "models": list(models)}})
    try:
        server.run(sockets=[listener])
    finally:
        for model in models.values():
            model.close()


def _log_as_json() -> None:
    """Write the log of the server to standard error, one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("optimum_llava_ov", logging.INFO), ("uvicorn", logging.WARNING)):
        package = logging.getLogger(name)
        package.handlers = [handler]
        package.setLevel(level)
        package.propagate = False
