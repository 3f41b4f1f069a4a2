"""What docs/architecture.md says of the modules and of the tests, where no linter checks it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PACKAGE = "optimum_llava_ov"
# Commands must start fast, and a command that does not need one of these must work without it.
HEAVY = {
    "PIL",
    "datasets",
    "gradio",
    "httpx",
    "huggingface_hub",
    "matplotlib",
    "nncf",
    "openvino",
    "openvino_genai",
    "optimum",
    "prompt_toolkit",
    "rich",
    "pyarrow",
    "ray",
    "safetensors",
    "textual_image",
    "torch",
    "transformers",
}
# Modules of Python that not every system has
NOT_EVERYWHERE = {"readline", "resource"}
# Private names of other packages that tests read
OTHERS = {
    "_attn_implementation": "transformers keeps a configuration's choice there",
    "_OVLlavaForCausalLM": "the class that Optimum has for other models of this type",
    "_OVLlavaNextForCausalLM": "the same, for images in tiles",
    "_get_number_of_features": "what transformers' processor counts, which differs from the original",
    "_device": "Optimum keeps a model's device there",
    "_dynamo": "a part of torch that takes long to import",
    "_exit": "os._exit ends a process as a crash does",
    "_model_mapping": "transformers has no public name for what an auto class knows",
    "_offline_transformations": "where OpenVINO has the transformation to paged attention",
    "_support_new_processing": "Optimum's tests read it of every class",
}
FILES_ABOUT_OTHERS = {
    "test_host.py": "lists private names of other packages",
    "programs.py": "ends a forked process as Python does, for which there are no public names",
    "import_order.py": "imports the public names of other packages, which they keep in private tables",
}


def modules() -> dict[str, ast.Module]:
    """The modules of the package by name."""
    found = {}
    for file in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(file.read_text())
    return found


MODULES = modules()


def imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Names of modules, and whether they are imported inside a function. Not those that only a type checker imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield (name if name in MODULES else node.module), inside
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from imports(node, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def lazy_imports() -> Iterator[tuple[str, str]]:
    for name, tree in MODULES.items():
        yield from ((name, imported) for imported, inside in imports(tree) if inside)


@cache
def is_heavy(module: str) -> bool:
    """Whether the import of a module of ours imports one of [`HEAVY`]."""
    names = [imported for imported, inside in imports(MODULES[module]) if not inside]
    parents = [".".join(module.split(".")[:length]) for length in range(2, module.count(".") + 1)]
    return any(name.split(".")[0] in HEAVY or (name in MODULES and is_heavy(name)) for name in [*names, *parents])


def test_there_is_no_circle_even_inside_functions():
    graph = {
        name: {imported for imported, _ in imports(tree) if imported in MODULES and imported != PACKAGE}
        for name, tree in MODULES.items()
    }
    assert sum(map(len, graph.values())) > 200
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_commands_begin_without_heavy_modules():
    """A command shows its help at once."""
    program = (
        "import optimum_llava_ov.cli.commands, sys; print({'openvino', 'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_only_what_is_heavy_is_imported_inside_functions():
    others = {imported.split(".")[0] for _, imported in lazy_imports()} - {PACKAGE}
    assert others <= HEAVY | NOT_EVERYWHERE
    # `registration` is imported at each start of optimum-cli, and needs next to nothing until Optimum exports or loads.
    ours = [
        (name, imported)
        for name, imported in lazy_imports()
        if imported in MODULES and not name.startswith(f"{PACKAGE}.registration")
    ]
    assert len(ours) > 10
    assert [pair for pair in ours if not is_heavy(pair[1])] == []


PRIVATE = re.compile(
    r"(\w*)[\])]*\.(_[a-zA-Z]\w*)|setattr\([^,]*, \"(_[a-zA-Z]\w*)\"|from optimum_llava_ov\S* import .*\b(_[a-zA-Z]\w*)"
)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "tests").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT / "tests"))
)
def test_tests_ask_the_public_surface(file):
    if file.name in {*FILES_ABOUT_OTHERS, Path(__file__).name}:
        return
    private = [
        f"{number}: {line.strip()}"
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        for owner, *names in PRIVATE.findall(line)
        for name in filter(None, names)
        if owner != "self" and name not in OTHERS
    ]
    assert private == []
