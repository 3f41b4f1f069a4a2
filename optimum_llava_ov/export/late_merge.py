"""Merge LoRA into a weight when NNCF reads it, so that the merged weights are never on the disk.

A merge before the export writes all weights once more, and reads them again: 13 GB each way at 7B. NNCF reads one
weight after the other, up to twice, and a product of low rank is computed faster than a disk reads it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import openvino
import torch
from openvino import opset13

from optimum_llava_ov.checkpoint.merge import LowRank
from optimum_llava_ov.errors import BundleError
from optimum_llava_ov.export.finite import check_finite
from optimum_llava_ov.export.spill import Spill


# Merged weights in memory, 90 MB each in the largest layers at 7B: before NNCF asks for them, and after
AHEAD, KEPT = 3, 2


class LateMerge:
    """Know the constants of a graph whose weights are to be merged, by their memory.

    Only fp16 weights can be merged so. OpenVINO then uses the memory of the checkpoint's file, which also tells which
    constant is which weight.

    Args:
        weights: tensors of the base by name.
        updates: LoRA of each tensor that is changed, in the order in which it is added.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], updates: Mapping[str, Sequence[LowRank]]):
        self._weights = {name: weights[name] for name in updates}
        self._updates = updates
        self._names = {_place(weight): name for name, weight in self._weights.items()}
        self._merged: set[str] = set()
        self._given: list[torch.Tensor] = []
        self._free: dict[int, list[torch.Tensor]] = {}  # memory by its size
        # While NNCF compresses a weight, those are merged that it will probably read next: the ones that followed this
        # one in the layer before
        self._steps: dict[str, tuple[str, int]] = {}
        self._previous: str | None = None
        self._ahead: dict[str, Future[torch.Tensor]] = {}
        self._num_threads = torch.get_num_threads()
        # Each thread merges a weight alone. Threads that share one would wait for each other while NNCF computes.
        self._pool = ThreadPoolExecutor(
            min(self._num_threads, AHEAD), "merge", initializer=torch.set_num_threads, initargs=(1,)
        )

    def is_possible(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Return whether all weights are fp16, and each is the memory of exactly one parameter of the model."""
        places = Counter(map(_place, parameters))
        return len(self._names) == len(self._weights) and all(
            weight.dtype == torch.float16 and places[_place(weight)] == 1 for weight in self._weights.values()
        )

    def tensor(self, constant: openvino.op.Constant) -> openvino.Tensor | None:
        """Return the merged weight of a constant; `None` if nothing is merged into it.

        It is valid until [`KEPT`] further calls.

        Raises:
            [`InvalidCheckpointError`]: the merged weight has NaN or infinity.
        """
        name = self._name(constant)
        if name is None:
            return None
        ahead = self._ahead.pop(name, None) or self._pool.submit(self._merge, name)
        self._learn(name)
        expected = self._following(name)
        for unexpected in self._ahead.keys() - set(expected):
            self._ahead.pop(unexpected).cancel()
        for following in expected:
            if following not in self._ahead:
                self._ahead[following] = self._pool.submit(self._merge, following)
        weight = ahead.result()
        self._merged.add(name)
        self._given.append(weight)
        if len(self._given) > KEPT:
            unused = self._given.pop(0)
            self._free.setdefault(unused.numel(), []).append(unused)
        return openvino.Tensor(weight.numpy(), shared_memory=True)

    def replace_rest(self, graph: openvino.Model, spill: Spill) -> None:
        """Replace the constants that were not compressed.

        Raises:
            [`BundleError`]: a weight was not found in the graph.
        """
        for constant in graph.get_ops():
            if _is_constant(constant) and (merged := self.tensor(constant)) is not None:
                name = constant.get_friendly_name()
                constant.set_friendly_name(f"{name}/base")
                new = spill.constant(opset13.constant(merged.data, name=name))  # a copy
                for user in constant.output(0).get_target_inputs():
                    user.replace_source_output(new.output(0))
        if missing := self._weights.keys() - self._merged:
            raise BundleError(
                f"OpenVINO {openvino.get_version()} has made a graph without the memory of the checkpoint's weights "
                f"({', '.join(sorted(missing)[:5])}), so the adapter cannot be merged. Nothing was exported. Please "
                "report this, and install another version of OpenVINO."
            )

    def close(self) -> None:
        """End the threads, and free the merged weights."""
        self._pool.shutdown(cancel_futures=True)
        self._ahead, self._given, self._free = {}, [], {}
        torch.set_num_threads(self._num_threads)  # what the threads set also holds for MKL elsewhere

    def _learn(self, name: str) -> None:
        """Learn which weight is read after the previous one."""
        if self._previous is not None:
            (previous_kind, previous_layer), (kind, layer) = _split(self._previous), _split(name)
            self._steps[previous_kind] = kind, layer - previous_layer
        self._previous = name

    def _following(self, name: str) -> list[str]:
        """Return the names of the weights that are probably read after this one, up to [`AHEAD`]."""
        kind, layer = _split(name)
        names: list[str] = []
        while len(names) < AHEAD and kind in self._steps:
            kind, step = self._steps[kind]
            layer += step
            if (following := kind.format(layer)) not in self._weights:
                break
            names.append(following)
        return names

    def _merge(self, name: str) -> torch.Tensor:
        weight = self._weights[name]
        *first, last = self._updates[name]
        for update in first:
            weight = update.apply(weight, torch.float16)
        try:
            memory = self._free[weight.numel()].pop()
        except LookupError:
            memory = torch.empty(weight.shape, dtype=torch.float16)
        weight = last.apply(weight, torch.float16, out=memory)
        if name not in self._merged:
            check_finite({name: weight})
        return weight

    def _name(self, constant: openvino.op.Constant) -> str | None:
        if constant.get_element_type() != openvino.Type.f16:
            return None
        return self._names.get((constant.data.ctypes.data, tuple(constant.shape)))


def _is_constant(op: openvino.Node) -> bool:
    return op.get_type_name() == "Constant"


def _split(name: str) -> tuple[str, int]:
    """Return the name of a weight with `{}` for the number of its layer, and this number."""
    match = re.search(r"(?<=\.)\d+(?=\.)", name)
    return (f"{name[: match.start()]}{{}}{name[match.end() :]}", int(match[0])) if match else (name, 0)


def _place(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)
