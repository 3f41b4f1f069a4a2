"""The command `optimum-cli llava-ov serve`. Must be fast to import."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from importlib.util import find_spec
from pathlib import Path

from optimum.commands.base import CommandInfo

from optimum_llava_ov.cli.engine import EngineCommand, add_device_argument, add_ov_config_argument, read_ov_config


API_KEY = "OPTIMUM_LLAVA_OV_API_KEY"
INSTALL = 'The server needs {}. Install it with: pip install "optimum-llava-ov[serve]"'


class ServeCommand(EngineCommand):
    COMMAND = CommandInfo(name="serve", help="Serve bundles over HTTP with the interface of OpenAI.")

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument(
            "bundle", nargs="?", help="Folder or model id of a bundle. Requests name it by the last part of this name."
        )
        parser.add_argument(
            "--model",
            action="append",
            default=[],
            metavar="NAME=BUNDLE",
            help="A bundle, and the name that requests use. Repeatable: one server can have several models.",
        )
        add_device_argument(parser)
        add_ov_config_argument(parser)
        parser.add_argument(
            "--host",
            default="127.0.0.1",
            help="Address to listen on; 0.0.0.0 for all networks (default: %(default)s).",
        )
        parser.add_argument("--port", type=int, default=8000, help="Port to listen on (default: %(default)s).")
        parser.add_argument(
            "--api-key-file",
            type=Path,
            help=f"File with one API key in each line. Default: the environment variable {API_KEY}, or no key.",
        )
        parser.add_argument(
            "--max-running",
            type=int,
            default=16,
            help="Number of answers that a model computes at the same time (default: %(default)s).",
        )
        parser.add_argument(
            "--max-queue",
            type=int,
            default=64,
            help="Number of requests that may wait for a model. The next one gets status 429 (default: %(default)s).",
        )
        parser.add_argument(
            "--max-tokens-per-request",
            type=int,
            default=1024,
            help="Maximum length of an answer in tokens (default: %(default)s).",
        )
        parser.add_argument(
            "--timeout",
            type=float,
            default=600,
            help="Maximum time of a request with its answer in seconds (default: %(default)s).",
        )
        parser.add_argument(
            "--cache-gb",
            type=int,
            default=0,
            help="Maximum size of a model's cache of keys and values in GB. Default: it grows as needed.",
        )
        parser.add_argument(
            "--image-cache-mb",
            type=float,
            default=256,
            help="Maximum size of a model's cache of prepared images in MB (default: %(default)s).",
        )
        parser.add_argument(
            "--allow-host",
            action="append",
            default=[],
            help="Host from which the server fetches images for clients. Repeatable. Default: none; the server does "
            "not fetch images.",
        )
        parser.add_argument(
            "--allow-name",
            action="append",
            default=[],
            help="Additional host name of the server, such as llava.example.org. Repeatable. localhost, IP addresses "
            "and --host are always allowed. With an API key, all names are.",
        )
        parser.add_argument(
            "--max-body-mb",
            type=float,
            default=32,
            help="Maximum size of a request in MB (default: %(default)s).",
        )
        parser.add_argument(
            "--max-image-mb",
            type=float,
            default=20,
            help="Maximum size of an image in MB (default: %(default)s).",
        )
        parser.add_argument(
            "--max-megapixels",
            type=float,
            default=50,
            help="Maximum size of an image in megapixels (default: %(default)s).",
        )
        parser.add_argument(
            "--ray",
            metavar="ADDRESS",
            help="Serve on the Ray cluster at this address; auto for the one of this machine, which is started if "
            "there is none. The page is not shown.",
        )
        parser.add_argument(
            "--replicas",
            default="1",
            metavar="N or MIN-MAX",
            help="Number of copies of the models on the cluster. Requests that wait decide between MIN and MAX "
            "(default: %(default)s).",
        )
        parser.add_argument(
            "--ray-cpus", type=float, default=1, help="Number of processors of each replica (default: %(default)s)."
        )
        parser.add_argument(
            "--no-page",
            action="store_true",
            help="Do not show the page of `llava-ov demo` at /. It is not shown without gradio or with an API key.",
        )

    def execute_on_device(self) -> None:
        for package in ("fastapi", "fastapi_offline", "uvicorn", "prometheus_client"):
            check_installed(package, INSTALL)
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        from optimum_llava_ov.images import ImageLimits
        from optimum_llava_ov.serving.run import load_models, run_server
        from optimum_llava_ov.serving.settings import Settings

        args = self.args
        settings = Settings(
            max_running=positive(args.max_running, "--max-running"),
            max_queue=args.max_queue,
            max_tokens=positive(args.max_tokens_per_request, "--max-tokens-per-request"),
            timeout=positive(args.timeout, "--timeout"),
            max_body_bytes=int(args.max_body_mb * 1e6),
            images=ImageLimits(int(args.max_image_mb * 1e6), int(args.max_megapixels * 1e6)),
            hosts=tuple(args.allow_host),
            image_cache_bytes=int(args.image_cache_mb * 1e6),
            keys=read_api_keys(args.api_key_file),
            names=(args.host, *args.allow_name),
        )
        bundles = bundles_by_name(args.bundle, args.model)
        ov_config = read_ov_config(args.ov_config)
        if args.ray is not None:
            replicas = read_range(args.replicas)
            check_installed("ray", 'A cluster needs {}. Install it with: pip install "optimum-llava-ov[ray]"')
            from optimum_llava_ov.serving.ray_app import build_deployment, run_on_ray

            options = {"device": args.device, "ov_config": ov_config, "cache_gb": args.cache_gb}
            application = build_deployment(bundles, settings, options, replicas, args.ray_cpus)
            run_on_ray(application, args.ray, args.host, args.port)
            return
        models = load_models(bundles, settings, args.device, ov_config, args.cache_gb)
        page = find_spec("gradio") is not None and not args.no_page and not settings.keys
        run_server(models, settings, args.host, args.port, args.device, page)


def bundles_by_name(bundle: str | None, models: list[str]) -> dict[str, str]:
    """Return bundles by the names that requests use.

    Args:
        bundle: A bundle that is named after its folder or its id.
        models: Others, as `name=bundle`.

    Raises:
        `ValueError`: There is no bundle, a name is used twice, or a model has no name.
    """
    bundles = {}
    if bundle is not None:
        bundles[Path(bundle).absolute().name if Path(bundle).exists() else bundle] = bundle
    for model in models:
        name, equals, folder = model.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--model is {model!r}. Expected NAME=BUNDLE, such as llava=./llava-ov.")
        if name in bundles:
            raise ValueError(f"Two models have the name {name!r}. Give each its own name.")
        bundles[name] = folder
    if not bundles:
        raise ValueError("No model was given. Give the folder or id of a bundle, or --model NAME=BUNDLE.")
    return bundles


def read_api_keys(file: Path | None) -> tuple[str, ...]:
    """Return the API keys of a file or of the environment. They are never on the command line, which others can see.

    Raises:
        `ValueError`: The file has no key.
    """
    text = os.environ.get(API_KEY) if file is None else file.read_text(encoding="utf-8")
    if text is None:
        return ()
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not keys:
        raise ValueError(f"{file or API_KEY} has no API key. Expected one key in each line.")
    return keys


def read_range(text: str) -> tuple[int, int]:
    """Return the minimum and maximum of `--replicas`.

    Raises:
        `ValueError`: It is neither a number nor two.
    """
    lowest, _, highest = text.partition("-")
    try:
        low, high = int(lowest), int(highest or lowest)
    except ValueError as error:
        raise ValueError(f"--replicas is {text}. Expected a number, or two such as 1-4.") from error
    if not 1 <= low <= high:
        raise ValueError(f"--replicas is {text}. Expected numbers above 0, the smaller one first.")
    return low, high


def positive(value: float, name: str):
    """Return a number that is above 0.

    Raises:
        `ValueError`: It is not.
    """
    if value <= 0:
        raise ValueError(f"{name} is {value}. Expected a number above 0.")
    return value


def check_installed(package: str, message: str) -> None:
    """Raise `ImportError` with a message that says what to install."""
    if find_spec(package) is None:
        raise ImportError(message.format(package))
