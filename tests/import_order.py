"""Import the hosts' public names in fresh processes, after and before this package. Prints what does not work, and what was tried.

    python tests/import_order.py [--all]

transformers alone has some 3,400 names. They are defined in some 1,400 modules, and importing a module is what can fail, so there is
one process for each module, which imports all its names. The processes are forked from one that has imported what the hosts
themselves import of others, such as torch, and of the hosts only the packages that hold names, which import next to nothing.

- After this package: each module. What we register with the modules that were imported then must be there. And no more modules of
  transformers than without this package must be there, for those are the ones that may be half imported.
- Before this package: no module of the host is half imported then. All that can differ is which of the modules that we wait for are
  there. So one module is tried for each such set that was seen.

A module that cannot be imported without this package either, because of a package that is missing here, does not count.

Without `--all`, which takes half an hour: of transformers, the modules outside of `transformers.models`, and in it those of `MODELS`;
of Optimum and optimum-intel, their packages.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import multiprocessing
import sys
import traceback
from typing import NamedTuple


LAZY_PACKAGES = ("transformers", "optimum.intel")
MODELS = ("auto", "llava", "mpt")
PREPARED = (
    "huggingface_hub",
    "nncf",
    "openvino_tokenizers",
    "pandas",
    "PIL.Image",
    "requests",
    "scipy.stats",
    "sklearn.metrics",
    "tokenizers",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.data",
)
WAITED_FOR = {
    "transformers.models.auto.configuration_auto": lambda auto: auto.CONFIG_MAPPING["llava_mpt"],
    "transformers.models.auto.modeling_auto": lambda auto: auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[_config_class()],
    "transformers.models.auto.processing_auto": lambda auto: auto.PROCESSOR_MAPPING[_config_class()],
    "optimum.exporters.openvino": lambda exporter: exporter.main_export.__wrapped__,
    "optimum.intel.openvino.modeling_visual_language": lambda modeling: modeling._OVLlavaForCausalLM.__subclasses__()[
        0
    ],
}


def main(everything: bool) -> int:
    for name in PREPARED:
        importlib.import_module(name)
    # Else the garbage collection of each process looks through all of it, and copies it
    gc.freeze()
    gc.disable()
    modules = _modules(everything)

    first = _try_all("ours first", modules)
    failures = {f"ours first, then {module}": found.error for module, found in first.items() if found.error}
    controls = _try_all(
        "without ours", {name: modules[name] for name in modules if first[name].error or name in WAITED_FOR}
    )
    for module, found in controls.items():
        if found.error:
            failures.pop(f"ours first, then {module}")
        elif module.startswith("transformers.") and (more := first[module].imported - found.imported):
            failures[f"registering after {module}"] = f"imports {', '.join(sorted(more))}, which may be half imported"

    kinds = {found.there: module for module, found in first.items() if not found.error}
    last = _try_all("ours last", {module: modules[module] for module in kinds.values()})
    failures |= {f"{module}, then ours": found.error for module, found in last.items() if found.error}
    print(json.dumps({"failures": failures, "ours first": list(first), "ours last": list(last)}, indent=1))
    return 1 if failures else 0


def _modules(everything: bool) -> dict[str, list[tuple[str, str]]]:
    """Modules of the hosts, each with the public names, and their package, that importing leads to it."""
    modules: dict[str, list[tuple[str, str]]] = {}
    for package in LAZY_PACKAGES:
        for name, module in importlib.import_module(package)._class_to_module.items():
            parts = module.split(".")
            if everything or parts[0] != "models" or parts[1] in MODELS:
                modules.setdefault(f"{package}.{module}", []).append((package, name))
    for distribution in ("optimum", "optimum-intel"):
        for file in importlib.metadata.files(distribution):
            parts = file.with_suffix("").parts
            if file.suffix == ".py" and parts[0] == "optimum" and (everything or parts[-1] == "__init__"):
                modules.setdefault(".".join(parts).removesuffix(".__init__"), [])
    return modules


class Found(NamedTuple):
    """
    Attributes:
        error: what went wrong, if anything.
        there: the modules that we wait for that were imported.
        imported: the modules of transformers that were imported.
    """

    error: str | None
    there: frozenset[str] = frozenset()
    imported: frozenset[str] = frozenset()


def _try_all(order: str, modules: dict[str, list[tuple[str, str]]]) -> dict[str, Found]:
    with multiprocessing.get_context("fork").Pool(maxtasksperchild=1) as pool:
        found = pool.starmap(_try, [(order, module, names) for module, names in modules.items()], chunksize=1)
    return dict(zip(modules, found))


def _try(order: str, module: str, names: list[tuple[str, str]]) -> Found:
    try:
        if order == "ours first":
            importlib.import_module("optimum_llava_ov")
        for package, name in names:
            getattr(importlib.import_module(package), name)
        if not names:
            importlib.import_module(module)
        imported = frozenset(name for name in sys.modules if name.startswith("transformers."))
        if order == "ours last":
            importlib.import_module("optimum_llava_ov")
        there = frozenset(name for name in WAITED_FOR if name in sys.modules)
        if order != "without ours":
            for name in there:
                WAITED_FOR[name](sys.modules[name])
    except Exception:
        return Found(traceback.format_exc(limit=-4))
    return Found(None, there, imported)


def _config_class() -> type:
    return sys.modules["optimum_llava_ov"].LlavaMptConfig


if __name__ == "__main__":
    sys.exit(main("--all" in sys.argv[1:]))
