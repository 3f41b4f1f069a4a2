"""The command `optimum-cli llava-ov caption`. Must be fast to import."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from optimum.commands.base import CommandInfo

from optimum_llava_ov.captions.sources import Source
from optimum_llava_ov.cli.engine import EngineCommand, add_device_argument, add_ov_config_argument, read_ov_config
from optimum_llava_ov.cli.serve import check_installed, positive


class CaptionCommand(EngineCommand):
    COMMAND = CommandInfo(name="caption", help="Caption a data set of images into Parquet or JSONL.")

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument(
            "images",
            help="A folder, a pattern such as 'images/*.jpg', a .txt list of paths, a .jsonl, .csv or .parquet table, "
            ".tar archives of webdataset, or the id of a data set on the Hub.",
        )
        parser.add_argument("--model", required=True, help="Folder or model id of a bundle.")
        parser.add_argument(
            "--output",
            type=Path,
            required=True,
            help="Folder for the captions. Its name ends with .parquet or .jsonl, the format. The same command "
            "continues a job that was stopped.",
        )
        parser.add_argument(
            "--prompt",
            default="Describe the image in detail.",
            help="Question about each image (default: %(default)s).",
        )
        parser.add_argument("--image-column", help="Column of the images. Default: the first usual name.")
        parser.add_argument(
            "--prompt-column", help="Column of prompts; in archives, the suffix of the files with prompts."
        )
        parser.add_argument("--key-column", help="Column of names for the output. Default: key, id, or the path.")
        parser.add_argument("--split", default="train", help="Split of a data set on the Hub (default: %(default)s).")
        parser.add_argument(
            "--max-new-tokens",
            type=int,
            default=256,
            help="Maximum length of a caption in tokens (default: %(default)s).",
        )
        parser.add_argument(
            "--temperature",
            type=float,
            default=0.0,
            help="Sampling temperature; 0 for greedy decoding (default: %(default)s). The key of an image is its "
            "seed.",
        )
        parser.add_argument("--top-p", type=float, default=1.0, help="Top-p for sampling (default: %(default)s).")
        parser.add_argument("--json-schema", type=Path, help="File with a JSON schema that each caption must match.")
        parser.add_argument(
            "--running", type=int, default=16, help="Number of images in the batch (default: %(default)s)."
        )
        parser.add_argument(
            "--workers", type=int, default=1, help="Number of processes that decode images (default: %(default)s)."
        )
        parser.add_argument(
            "--rows-per-part",
            type=int,
            default=1000,
            help="Number of images in each file of the output (default: %(default)s).",
        )
        parser.add_argument(
            "--num-shards", type=int, default=1, help="Split the job by hand into this number of shards."
        )
        parser.add_argument("--shard", type=int, default=0, help="Caption only this shard, from 0.")
        parser.add_argument(
            "--ray",
            metavar="ADDRESS",
            help="Caption on the Ray cluster at this address; auto for the one of this machine, which is started if "
            "there is none.",
        )
        parser.add_argument(
            "--ray-models", type=int, default=1, help="Maximum number of models on the cluster (default: %(default)s)."
        )
        parser.add_argument(
            "--ray-cpus", type=float, default=1, help="Number of processors of each model (default: %(default)s)."
        )
        add_device_argument(parser)
        add_ov_config_argument(parser)

    def execute_on_device(self) -> None:
        args = self.args
        if args.output.suffix == ".parquet" or ".parquet" in args.images:
            check_installed("pyarrow", 'Parquet needs {}. Install it with: pip install "optimum-llava-ov[data]"')
        from optimum_llava_ov.captions.captioner import Captioner
        from optimum_llava_ov.captions.job import Job, run_job

        captioner = Captioner(
            args.model,
            prompt=args.prompt,
            max_new_tokens=positive(args.max_new_tokens, "--max-new-tokens"),
            temperature=args.temperature,
            top_p=args.top_p,
            schema=read_schema(args.json_schema),
            running=positive(args.running, "--running"),
            device=args.device,
            ov_config=read_ov_config(args.ov_config),
        )
        job = Job(
            Source(args.images, args.image_column, args.prompt_column, args.key_column, args.split),
            args.output,
            captioner,
            rows_per_part=args.rows_per_part,
            num_shards=args.num_shards,
            shard=args.shard,
            workers=args.workers,
        )
        if args.ray is not None:
            check_installed("ray", 'A cluster needs {}. Install it with: pip install "optimum-llava-ov[ray]"')
            from optimum_llava_ov.captions.ray_job import run_ray_job

            print(run_ray_job(job, args.ray, args.ray_models, args.ray_cpus), file=sys.stderr)
            return
        print(run_job(job), file=sys.stderr)
        captioner.close()


def read_schema(file: Path | None) -> dict[str, Any] | None:
    """Return the JSON schema of a file.

    Raises:
        `ValueError`: It is not a JSON object.
    """
    if file is None:
        return None
    try:
        schema = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
    if not isinstance(schema, dict):
        raise ValueError(f"{file} is not a JSON object.")  # noqa: TRY004  as all wrong options
    return schema
