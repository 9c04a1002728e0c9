"""The shape of the code: sizes, forbidden calls, one reader of the environment, no option without a reader."""

from __future__ import annotations

import ast
import dataclasses
import tomllib
from collections.abc import Iterator

from source_tree import PACKAGE, ROOT, Module, modules

from octavo.config import EngineConfig, EngineOptions, SchedulerConfig, ServerOptions
from octavo.kernels.cpu.library import CpuKernels

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
FORBIDDEN_MODULES = {"pickle", "marshal", "cloudpickle", "shelve", "dill"}
# resolve() refuses all but one value of these, so there is nothing to read yet.
FIXED_OPTIONS = {"EngineOptions.tensor_parallel_size"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load"}
TREE = modules()


def too_long(tree: list[Module]) -> Iterator[str]:
    """Files and functions over their limits; the functions of kernels have none."""
    for module in tree:
        if len(module.text.splitlines()) > MAX_FILE_LINES:
            yield f"{module.name}: {len(module.text.splitlines())} lines"
        for function in module.functions() if module.floor != "kernels" else ():
            assert function.end_lineno is not None
            if (length := function.end_lineno - function.lineno + 1) > MAX_FUNCTION_LINES:
                yield f"{module.name}.{function.name}: {length} lines"
            args = function.args
            names = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg) if a]
            if (count := len([name for name in names if name not in ("self", "cls")])) > MAX_PARAMETERS:
                yield f"{module.name}.{function.name}: {count} parameters"


def environment_readers(tree: list[Module]) -> set[str]:
    """Modules that touch os.environ or os.getenv."""
    words = ("os.environ", "os.getenv", "os.putenv", "os.environb")
    touched = {m.name for m in tree for node in ast.walk(m.tree) if _name(node) in words}
    return touched | {m.name for m in tree for imported in m.imports if imported.target in words}


def unsafe(tree: list[Module]) -> list[str]:
    """Ways to run code that came as data."""
    imports = [
        f"{module.name}:{imported.line} {imported.target}"
        for module in tree
        for imported in module.imports
        if imported.target.split(".")[0] in FORBIDDEN_MODULES
    ]
    calls = [
        f"{module.name}:{node.lineno} {_name(node.func)}()"
        for module in tree
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and _name(node.func) in FORBIDDEN_CALLS
    ]
    return imports + calls


def attributes_read(tree: list[Module]) -> set[str]:
    """Every name that some code reads as an attribute."""
    return {
        node.attr
        for module in tree
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def public_functions(tree: list[Module]) -> set[str]:
    """Names of the module-level functions that do not start with an underscore."""
    top_level = [node for module in tree for node in module.tree.body if isinstance(node, ast.FunctionDef)]
    return {function.name for function in top_level if not function.name.startswith("_")}


def _name(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""


def test_files_and_functions_fit_on_a_screen_or_few() -> None:
    assert list(too_long(TREE)) == []


def test_only_config_reads_the_environment() -> None:
    assert environment_readers(TREE) <= {"octavo.config"}


def test_nothing_runs_data_as_code() -> None:
    assert unsafe(TREE) == []


def test_every_option_has_a_reader() -> None:
    read = attributes_read(TREE)
    kinds = (EngineOptions, ServerOptions, EngineConfig, SchedulerConfig)
    names = {f"{kind.__name__}.{f.name}" for kind in kinds for f in dataclasses.fields(kind)} - FIXED_OPTIONS
    assert sorted(name for name in names if name.split(".")[1] not in read) == []


def test_every_kernel_has_a_reference_and_a_test() -> None:
    kernels = public_functions([m for m in TREE if m.name.startswith("octavo.kernels.triton.")])
    kernels |= {name for name in vars(CpuKernels) if not name.startswith("_")}
    assert kernels
    references = public_functions([m for m in TREE if m.name.startswith("octavo.kernels.reference")])
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("*/**/test_*.py"))
    assert sorted(name for name in kernels if name not in references) == []
    assert sorted(name for name in kernels | references if name not in tests) == []


def test_the_fences_catch_what_they_forbid() -> None:
    names = ", ".join(f"a{i}" for i in range(9))
    bad = [
        Module("octavo.a", "x = 1\n" * 501),
        Module("octavo.b", f"class B:\n    def f(self, {names}):\n" + "        pass\n" * 60),
        Module("octavo.c", "import os\nfrom pickle import loads\nos.environ['A']\neval('1')\nmodel.eval()\n"),
        Module("octavo.d", "from os import getenv\nimport torch\ntorch.load('x')\n"),
    ]
    assert list(too_long(bad)) == ["octavo.a: 501 lines", "octavo.b.f: 61 lines", "octavo.b.f: 9 parameters"]
    assert environment_readers(bad) == {"octavo.c", "octavo.d"}
    assert unsafe(bad) == ["octavo.c:2 pickle.loads", "octavo.c:4 eval()", "octavo.d:3 torch.load()"]
    assert attributes_read(bad) == {"environ", "eval", "load"}


def test_the_architecture_page_names_every_folder() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    folders = [path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("**/*.py"))]
    assert sorted(name for name in folders if f"{name}/" not in page) == []


def test_the_readme_is_short_and_the_dependencies_few() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(project["dependencies"]) < 20
