"""Damaged files of a checkpoint and of a bundle."""

import json
import os
import shutil
from pathlib import Path
from random import Random

import torch
from conftest import EXACT, Golden
from hypothesis import strategies as st
from test_damage import copy_of, write

from fuzz.damage import changed_json, damaged
from fuzz.hypotheses import try_examples
from fuzz.rule import BrokenRuleError, attempt
from optimum_llava_ov import LlavaMptForConditionalGeneration, main_export
from optimum_llava_ov.bundle.settings import build_processor
from optimum_llava_ov.checkpoint.reader import OriginalCheckpoint
from optimum_llava_ov.export.finite import check_finite
from optimum_llava_ov.loading import session_factory
from optimum_llava_ov.samples.files import question_inputs


IMAGE = Golden("linear_fp16_sharded").image("img0_300x200")
EXPORT_SECONDS = 60


class Files:
    """Files that can be damaged, one at a time: links to whole ones.

    Args:
        folder: of the user's; the files are in it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def jsons(self) -> list[str]:
        return [name for name in self.names if name.endswith(".json")]

    def damage(self, name: str, content: bytes | str) -> "Files":
        self._link, self._name = os.readlink(self.folder / name), name
        write(name, content)(self.folder)
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error) -> None:
        (self.folder / self._name).unlink()
        (self.folder / self._name).symlink_to(self._link)

    def try_it(self, work, note, counts, name, content, what, **limits):
        note(f"{name}: {what}")
        with self.damage(name, content):
            outcome = attempt(work, self.folder, **limits)
        counts["refused" if isinstance(outcome, Exception) else "right"] += 1
        return outcome


class _Target:
    def __init__(self, *sets: Files):
        self.sets = sets

    def use(self, files: Files, name: str, number: int):
        raise NotImplementedError


class _Bytes(_Target):
    """Truncation and bit flips, one file after the other."""

    def run(self, number, seed, note, counts):
        choices = [(files, name) for files in self.sets for name in files.names]
        files, name = choices[number % len(choices)]
        draw = Random(f"{seed} {type(self).__name__} {number}")
        content = damaged((files.folder / name).read_bytes(), draw)
        files.try_it(lambda: self.use(files, name, number), note, counts, name, content, f"{len(content)} bytes")


class _Json(_Target):
    """Changed values of all JSON files, by Hypothesis."""

    examples = 40

    def run(self, number, seed, note, counts):
        choices = [(files, name) for files in self.sets for name in files.jsons()]
        values = [json.loads((files.folder / name).read_text()) for files, name in choices]
        indices = st.integers(0, len(choices) - 1)
        changes = indices.flatmap(lambda index: st.tuples(st.just(index), changed_json(values[index])))

        def example(change):
            (files, name), text = choices[change[0]], change[1]
            shown = text if len(text) < 6000 else f"{len(text)} characters"
            files.try_it(lambda: self.use(files, name, change[0]), note, counts, name, text, shown)

        try_examples(example, changes, self.examples, f"{seed} {type(self).__name__} {number}")


class _OfCheckpoints:
    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        super().__init__(*(Files(copy_of(name, folder)) for name in ("linear_fp16_sharded", "mlp2x_fp32_pad")))

    def use(self, files, name, number):
        return convert(files.folder / "checkpoint")


class CheckpointBytes(_OfCheckpoints, _Bytes):
    pass


class CheckpointJson(_OfCheckpoints, _Json):
    pass


class _OfBundles:
    def __init__(self, folder: Path, bundle: Path):
        folder.mkdir(parents=True)
        for file in bundle.iterdir():
            (folder / file.name).symlink_to(file.resolve())
        super().__init__(Files(folder))

    def use(self, files, name, number):
        engine = "genai" if "tokenizer." in name or number % 2 else "openvino"
        chat = session_factory(str(files.folder), ov_config=EXACT, engine=engine)(max_new_tokens=2, do_sample=False)
        return chat.send("What is this?", IMAGE).result()


class BundleBytes(_OfBundles, _Bytes):
    pass


class BundleJson(_OfBundles, _Json):
    examples = 15


class Export:
    """A damaged checkpoint, exported over a bundle: either the bundle is a new one, or it is as it was."""

    def __init__(self, folder: Path, bundle: Path):
        folder.mkdir(parents=True)
        self.files = Files(copy_of("linear_fp16_sharded", folder))
        self.output = folder / "bundle"
        shutil.copytree(bundle, self.output)
        (self.output / ".git").mkdir()
        (self.output / ".git" / "config").write_text("of the user")

    def run(self, number, seed, note, counts):
        draw = Random(f"{seed} export {number}")
        name = self.files.names[draw.randrange(len(self.files.names))]
        content = damaged((self.files.folder / name).read_bytes(), draw)
        before = contents(self.output)
        outcome = self.files.try_it(
            lambda: main_export(self.files.folder / "checkpoint", self.output),
            note, counts, name, content, f"{len(content)} bytes", seconds=EXPORT_SECONDS,
        )  # fmt: skip
        after = contents(self.output)
        if after[".git/config"] != b"of the user" or after.keys() != before.keys():
            raise BrokenRuleError(f"The files of the output are now {sorted(after)}.")
        if isinstance(outcome, Exception) and after != before:
            raise BrokenRuleError("The export was refused, and the bundle that was there has changed.")
        session_factory(str(self.output), engine="openvino")(max_new_tokens=2).send("What is this?", IMAGE).result()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def convert(checkpoint: Path) -> torch.Tensor:
    """What an export does before it traces, and then an answer in torch."""
    opened = OriginalCheckpoint.open(checkpoint)
    model = LlavaMptForConditionalGeneration.from_pretrained(checkpoint, dtype="float32")
    check_finite(model.state_dict())
    processor = build_processor(opened)
    inputs = question_inputs(processor, "What is this?", [IMAGE])
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=1).logits
    if logits.shape[:2] != (1, 1) or not torch.isfinite(logits).all():
        raise BrokenRuleError(
            f"The logits are {tuple(logits.shape)}, and {int((~torch.isfinite(logits)).sum())} of them are not finite."
        )
    return logits
