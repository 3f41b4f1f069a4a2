"""`optimum-cli export openvino` for a LLaVA-MPT checkpoint: from the command's options to an export."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path

from optimum.commands.export.openvino import no_compression_parameter_provided, prepare_wc_config
from optimum.intel.openvino.configuration import OVConfig

from optimum_llava_ov.bundle.layout import ONE_BILLION
from optimum_llava_ov.checkpoint.config import read_config
from optimum_llava_ov.checkpoint.repository import Repository
from optimum_llava_ov.export.pipeline import main_export
from optimum_llava_ov.export.recipes import default_recipe
from optimum_llava_ov.export.report import summarize
from optimum_llava_ov.system.memory import restart_with_huge_pages, return_what_is_freed


logger = logging.getLogger(__name__)


def run_export(args: Namespace) -> None:
    """Run the command.

    Args:
        args: as Optimum's `parse_args_openvino` gives them.
    """
    hub_options = {
        name: getattr(args, name) for name in ("revision", "subfolder", "token") if getattr(args, name, None)
    }
    if args.weight_format not in ("fp16", "fp32") and _is_large(
        Repository(args.model, cache_dir=args.cache_dir, **hub_options)
    ):
        restart_with_huge_pages()
    _show_messages()
    return_what_is_freed()
    main_export(
        args.model,
        args.output,
        task=args.task,
        ov_config=ov_config_of(args),
        stateful=not args.disable_stateful,
        convert_tokenizer=not args.disable_convert_tokenizer,
        model_kwargs=args.model_kwargs,
        cache_dir=args.cache_dir,
        variant=args.variant,
        **hub_options,
    )
    print(summarize(Path(args.output)))


def _is_large(repository: Repository) -> bool:
    """Whether compressing takes minutes. Known before any weights are downloaded."""
    config = read_config(repository.require("config.json", "it says what the model is"))
    return 12 * config.n_layers * config.d_model**2 >= ONE_BILLION


def _show_messages() -> None:
    """What the export has to say (how much disk it needs, which recipe) belongs on the terminal of who waits for it."""
    package = logging.getLogger("optimum_llava_ov")
    package.setLevel(logging.INFO)
    if not package.hasHandlers():
        package.addHandler(logging.StreamHandler())


def ov_config_of(args: Namespace) -> OVConfig | None:
    """What the options about weights ask for; `None` if there are none.

    Raises:
        `ValueError`: options that contradict each other, or that make no sense for this model; says which.
    """
    if args.quant_mode is not None:
        raise ValueError(
            f"--quant-mode {args.quant_mode} quantizes activations, which is not supported for LLaVA-MPT: a decoder's speed is set by the "
            "size of its weights. Use --weight-format int8 or int4."
        )
    if args.smooth_quant_alpha is not None:
        raise ValueError("--smooth-quant-alpha belongs to --quant-mode, which is not supported for LLaVA-MPT.")
    if args.weight_format in (None, "fp16", "fp32"):
        if not no_compression_parameter_provided(args) or args.quantization_statistics_path is not None:
            raise ValueError(
                "There are options for compression, but no compressed format. Add --weight-format int8, int4, nf4, mxfp4 or cb4."
            )
        return None if args.weight_format is None else OVConfig(dtype=args.weight_format)

    if args.weight_format in ("int4", "int8") and no_compression_parameter_provided(args):
        recipe = default_recipe(args.weight_format)
        logger.info("Using the recommended %s recipe: %s", args.weight_format, recipe)
        return OVConfig(quantization_config=recipe)

    config = prepare_wc_config(args, {"ratio": 1.0})
    if args.dataset is not None and Path(args.dataset).exists():
        config["dataset"] = [args.dataset]  # a list, for Optimum takes a string for the name of a data set it knows
    try:
        return OVConfig(quantization_config=config)
    except ValueError as error:  # Optimum's sentences about values are for the user
        raise ValueError(f"--weight-format {args.weight_format}: {error}") from error
