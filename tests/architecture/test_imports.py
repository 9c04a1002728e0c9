"""Imports go down only, nothing heavy is loaded by accident, and nothing is imported behind one's back."""

from __future__ import annotations

import subprocess
import sys

import pytest
from source_tree import Module, cycle, graph, modules

# Floor -> the floors, or modules, that it may import besides itself. Roots may import everything.
ROOTS = {
    "assembly",
    "cli",
    "device_assembly",
    "draft_assembly",
    "doctor",
    "entrypoints",
    "llm",
    "quantizing",
    "serving",
}
RULES = {
    "": set(),  # octavo itself names the roots' classes, for type checkers only
    "config": set(),
    "sampling_params": {"protocol"},
    "outputs": set(),
    "server": {"protocol", "text", "structured", "engine.client"},
    "engine": {"protocol", "scheduler", "structured"},
    "bench": {"protocol"},
    "client": set(),
    "text": {"protocol"},
    "structured": {"protocol"},
    "scheduler": {"protocol"},
    "protocol": set(),
    "worker": {
        "protocol",
        "models",
        "layers",
        "lora",
        "attention",
        "quantization",
        "loading",
        "distributed",
        "kernels",
    },
    "models": {"layers", "quantization"},
    "compress": {"layers", "loading", "models", "text"},
    "loading": {"models", "quantization", "distributed"},
    "lora": {"protocol", "loading.hub"},
    "layers": {"attention", "quantization", "kernels", "distributed"},
    "attention": {"kernels", "distributed"},
    "quantization": {"kernels", "distributed"},
    "distributed": {"protocol"},
    "kernels": set(),
}
BELOW_CONFIG = {"kernels", "config", "", "protocol"}
TORCHLESS = ("protocol", "scheduler", "text", "structured", "server", "client")
LAZY_FLOORS = ROOTS | {"loading"}
LAZY_MODULES = {"octavo.models.registry", "octavo.attention.long_prefill"}
TREE = modules()


def offences_against_floors(tree: list[Module]) -> list[str]:
    """Imports that do not go down: "octavo.a.b:12 imports octavo.c"."""
    names = {module.name for module in tree}
    found = []
    for module in tree:
        if module.floor in ROOTS:
            continue
        for imported in module.imports:
            target = imported.target if imported.target in names else imported.target.rpartition(".")[0]
            if not target.startswith("octavo") or (module.floor == "" and imported.when == "typing"):
                continue
            path = target.removeprefix("octavo").lstrip(".")
            allowed = RULES[module.floor] | {module.floor}
            if module.floor not in BELOW_CONFIG:
                allowed |= {"config", ""}
            if not any(path == name or (name and path.startswith(name + ".")) for name in allowed):
                found.append(f"{module.name}:{imported.line} imports {target}")
    return found


def hidden_imports(tree: list[Module]) -> list[str]:
    """Imports inside functions where only registries and composition roots may have them."""
    return [
        f"{module.name}:{imported.line} imports {imported.target} in a function"
        for module in tree
        if module.floor not in LAZY_FLOORS and module.name not in LAZY_MODULES
        for imported in module.imports
        if imported.when == "call"
    ]


def torch_imports(tree: list[Module]) -> list[str]:
    """Imports of torch on the floors that must do without."""
    return [
        f"{module.name}:{imported.line}"
        for module in tree
        if module.floor in TORCHLESS
        for imported in module.imports
        if imported.target.split(".")[0] in ("torch", "triton")
    ]


def test_every_floor_has_a_rule() -> None:
    assert {module.floor for module in TREE} <= set(RULES) | ROOTS


def test_imports_go_down() -> None:
    assert offences_against_floors(TREE) == []


def test_scheduler_and_worker_never_meet() -> None:
    assert "worker" not in RULES["scheduler"]
    assert "scheduler" not in RULES["worker"]


def test_no_import_cycle() -> None:
    assert cycle(graph(TREE)) is None


def test_no_imports_in_functions() -> None:
    assert hidden_imports(TREE) == []


def test_no_torch_above_the_worker() -> None:
    assert torch_imports(TREE) == []


def test_the_fences_catch_what_they_forbid() -> None:
    bad = [
        Module("octavo.scheduler.queue", "import torch\nfrom octavo.worker.slots import Slots\n"),
        Module("octavo.worker.slots", "from octavo import config\ndef f():\n    import octavo.scheduler.queue\n"),
        Module("octavo.config", ""),
        Module("octavo.kernels.cpu.gemm", "from octavo.config import home\n"),
        Module("octavo.server.app", "from octavo.engine.client import X\nimport octavo.engine.engine\n"),
        Module("octavo.engine.client", ""),
        Module("octavo.engine.engine", ""),
    ]
    assert offences_against_floors(bad) == [
        "octavo.scheduler.queue:2 imports octavo.worker.slots",
        "octavo.worker.slots:3 imports octavo.scheduler.queue",
        "octavo.kernels.cpu.gemm:1 imports octavo.config",
        "octavo.server.app:2 imports octavo.engine.engine",
    ]
    assert hidden_imports(bad) == ["octavo.worker.slots:3 imports octavo.scheduler.queue in a function"]
    assert torch_imports(bad) == ["octavo.scheduler.queue:1"]
    assert cycle(graph(bad)) is None
    bad.append(Module("octavo.a", "import octavo.b\n"))
    bad.append(Module("octavo.b", "from octavo import a\n"))
    assert cycle(graph(bad)) == ["octavo.a", "octavo.b", "octavo.a"]


@pytest.mark.parametrize("floor", [*TORCHLESS, "cli", "serving", "engine.client", "entrypoints.openai"])
def test_importing_a_floor_without_torch_does_not_load_it(floor: str) -> None:
    prefix = f"octavo.{floor}"
    names = [m.name for m in TREE if m.name == prefix or m.name.startswith(prefix + ".")]
    if not names:
        pytest.skip(f"there is no {prefix} yet")
    code = f"import sys\nfor name in {names!r}: __import__(name)\nprint('torch' in sys.modules)"
    assert _python("-c", code).stdout.strip() == "False"


def test_import_octavo_is_quick_and_light() -> None:
    code = "import sys, octavo; print(sorted({'torch', 'msgspec', 'numpy', 'tyro'} & set(sys.modules)))"
    runs = [_python("-X", "importtime", "-c", code) for _ in range(5)]
    assert {run.stdout.strip() for run in runs} == {"[]"}
    # Lines read "import time: self [us] | cumulative | imported package".
    lines = [next(line for line in run.stderr.splitlines() if line.endswith("| octavo")) for run in runs]
    assert min(int(line.split("|")[1]) for line in lines) < 200_000


def _python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=True)
