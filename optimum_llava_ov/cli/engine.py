"""The base class of the commands that run a bundle on a device. Must be fast to import."""

from __future__ import annotations

import json
from argparse import ArgumentParser

from optimum_llava_ov.cli.base import Command
from optimum_llava_ov.system.devices import available_devices, check_device


class EngineCommand(Command):
    """Check the device, then run the command. `--device list` shows the devices instead.

    Subclasses implement `add_arguments`, which calls [`add_engine_arguments`], and `execute_on_device`.
    """

    def execute(self) -> None:
        if self.args.device == "list":
            print("\n".join(available_devices()))
        else:
            check_device(self.args.device)
            self.execute_on_device()

    def execute_on_device(self) -> None:
        """Execute the command with `self.args`. OpenVINO has the device."""
        raise NotImplementedError


def add_device_argument(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="CPU",
        help='OpenVINO device, such as CPU, GPU or AUTO. "list" shows the devices of this machine.',
    )


def add_engine_arguments(parser: ArgumentParser) -> None:
    add_device_argument(parser)
    parser.add_argument(
        "--engine",
        choices=("auto", "openvino", "genai"),
        default="auto",
        help="genai: OpenVINO GenAI. openvino: this package's own engine. auto (default): genai if it is installed "
        "and can read the model, otherwise openvino. Compressed models run in openvino on processors with AVX2 and "
        "without VNNI, because it is faster there.",
    )


def add_ov_config_argument(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--ov-config",
        metavar="JSON",
        help='Properties of OpenVINO as a JSON object, such as \'{"INFERENCE_PRECISION_HINT": "f32"}\'.',
    )


def read_ov_config(text: str | None) -> dict[str, str] | None:
    """Return the properties that `--ov-config` gives.

    Raises:
        `ValueError`: It is not a JSON object.
    """
    if text is None:
        return None
    try:
        properties = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--ov-config is not JSON: {error}.") from error
    if not isinstance(properties, dict):
        raise ValueError(f"--ov-config is {text}. Expected a JSON object.")  # noqa: TRY004  as all wrong options
    return {name: str(value) for name, value in properties.items()}
