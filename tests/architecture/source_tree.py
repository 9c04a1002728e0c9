"""The source as the fences see it: parsed modules, what they import, and the floor each stands on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "octavo"
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One imported module of any package. `when`: "import", "typing" (under TYPE_CHECKING) or "call"."""

    target: str
    line: int
    when: str


@dataclass(frozen=True)
class Module:
    """One source file. `name` is dotted, without a trailing __init__."""

    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.name)

    @property
    def floor(self) -> str:
        """The top-level folder, or the file's own name where it lies in none; "" for octavo itself."""
        return self.name.removeprefix("octavo").lstrip(".").split(".")[0]

    @cached_property
    def imports(self) -> list[Import]:
        return list(_imports(self.tree, "import"))

    def functions(self) -> Iterator[Function]:
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))


def modules() -> list[Module]:
    """Every module under src/octavo."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found.append(Module(".".join(parts[:-1] if parts[-1] == "__init__" else parts), path.read_text()))
    return found


def _imports(node: ast.AST, when: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, when) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative import"
            yield from (Import(f"{child.module}.{alias.name}", child.lineno, when) for alias in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports(child, "typing")
        else:
            yield from _imports(child, "call" if isinstance(child, Function | ast.Lambda) else when)


def graph(tree: list[Module]) -> dict[str, set[str]]:
    """Module name -> the modules of `tree` that importing it imports by name."""
    names = {module.name for module in tree}
    edges: dict[str, set[str]] = {}
    for module in tree:
        targets = [imported.target for imported in module.imports if imported.when == "import"]
        resolved = {t if t in names else t.rpartition(".")[0] for t in targets}
        edges[module.name] = (resolved & names) - {module.name}
    return edges


def cycle(edges: dict[str, set[str]]) -> list[str] | None:
    """Some import cycle as a path that ends where it starts, or None."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for target in sorted(edges[name]):
            if found := visit(target, [*path, name]):
                return found
        done.add(name)
        return None

    return next((found for name in sorted(edges) if (found := visit(name, []))), None)
