"""Run `optimum-cli export openvino` for an original LLaVA checkpoint: turn the command's options into an export."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path

from optimum.commands.export.openvino import no_compression_parameter_provided, prepare_wc_config
from optimum.intel.openvino.configuration import OVConfig

from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.export.pipeline import main_export
from optimum_llava_ov.export.recipes import default_recipe
from optimum_llava_ov.export.report import summarize
from optimum_llava_ov.system.memory import return_what_is_freed


logger = logging.getLogger(__name__)


def run_export(args: Namespace, repository: Repository) -> None:
    """Run the command.

    Args:
        args: Arguments that Optimum's `parse_args_openvino` returns.
        repository: Where the checkpoint is.
    """
    _show_messages()
    return_what_is_freed()
    model_kwargs = dict(args.model_kwargs or {})
    if args.image_tokens is not None:
        model_kwargs["image_tokens"] = args.image_tokens
    main_export(
        repository,
        args.output,
        task=args.task,
        ov_config=ov_config_of(args),
        stateful=not args.disable_stateful,
        convert_tokenizer=not args.disable_convert_tokenizer,
        model_kwargs=model_kwargs,
        variant=args.variant,
    )
    print(summarize(Path(args.output)))


def _show_messages() -> None:
    """Show messages of the export (disk space, recipe) in the terminal."""
    package = logging.getLogger("optimum_llava_ov")
    package.setLevel(logging.INFO)
    if not package.hasHandlers():
        package.addHandler(logging.StreamHandler())


def ov_config_of(args: Namespace) -> OVConfig | None:
    """Return the configuration that the options about weights describe, or `None` without such options.

    Raises:
        `ValueError`: Options contradict each other, or this model does not support them.
    """
    if args.quant_mode is not None:
        raise ValueError(
            f"--quant-mode {args.quant_mode} quantizes activations, which is not supported for LLaVA. The size of "
            "its weights limits the speed of a decoder. Use --weight-format int8 or int4."
        )
    if args.smooth_quant_alpha is not None:
        raise ValueError(
            "--smooth-quant-alpha is an option of --quant-mode, which is not supported for LLaVA. Leave it out."
        )
    if args.weight_format in (None, "fp16", "fp32"):
        if not no_compression_parameter_provided(args) or args.quantization_statistics_path is not None:
            raise ValueError(
                "Options for compression need a compressed format. Add --weight-format int8, int4, nf4, mxfp4 or cb4."
            )
        return None if args.weight_format is None else OVConfig(dtype=args.weight_format)

    if args.weight_format in ("int4", "int8") and no_compression_parameter_provided(args):
        recipe = default_recipe(args.weight_format)
        logger.info("Using the recommended %s recipe: %s", args.weight_format, recipe)
        return OVConfig(quantization_config=recipe)

    config = prepare_wc_config(args, {"ratio": 1.0})
    if args.dataset is not None and Path(args.dataset).exists():
        config["dataset"] = [args.dataset]  # a list, because Optimum takes a string as the name of a data set
    try:
        return OVConfig(quantization_config=config)
    except ValueError as error:  # Optimum's message about a wrong value
        raise ValueError(f"--weight-format {args.weight_format}: {error}") from error
