"""Kernels that start while the one ahead still runs must not touch what it may write, or they race it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import octavo

_FOLDER = Path(octavo.__file__).parent / "kernels" / "triton"
_ACCESSES = {"load", "store", "atomic_add", "atomic_cas", "atomic_xchg", "make_tensor_descriptor"}
# What no kernel of a step writes, or its first ones do, many launches before those that read it.
_BEFORE = {"weight_ptr", "items", "items_ptr", "fields", "row_slots", "cu_q"}
_LAST_ACT = "_wait_for_previous(OVERLAP)"


def _kernels() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in sorted(_FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.FunctionDef)
                and "OVERLAP" in _parameters(node)
                and not node.name.startswith(("_after_", "_wait_"))
            ):
                yield f"{path.stem}.{node.name}", node


def _parameters(function: ast.FunctionDef) -> set[str]:
    return {argument.arg for argument in function.args.args}


_KERNELS = dict(_kernels())


def _early_accesses(kernel: ast.FunctionDef) -> list[str]:
    """Calls on memory before the wait. Raises ValueError where no statement of the body itself is the wait: one inside
    a branch would be skipped by some programs, as a return before it would be taken by some."""
    early: list[str] = []
    for statement in kernel.body:
        if isinstance(statement, ast.Expr) and ast.unparse(statement).startswith("_after_previous(OVERLAP"):
            return early
        for node in ast.walk(statement):
            if isinstance(node, ast.Return):
                early.append(ast.unparse(node))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _ACCESSES:
                names = {name.id for name in ast.walk(node.args[0]) if isinstance(name, ast.Name)}
                if node.func.attr != "load" or not names & _BEFORE:
                    early.append(ast.unparse(node))
    raise ValueError(f"{kernel.name} never waits")


def test_kernels_of_a_decode_step_overlap() -> None:
    expected = {"norm._rms_norm_kernel", "skinny_gemm._dot_kernel", "decode_attention._decode_kernel"}
    assert expected <= set(_KERNELS)


@pytest.mark.parametrize("name", _KERNELS)
def test_nothing_is_touched_before_the_wait(name: str) -> None:
    assert _early_accesses(_KERNELS[name]) == []


@pytest.mark.parametrize(
    "body",
    [
        "tl.store(out, 0)\n _after_previous(OVERLAP)",
        "tl.store(items, 0)\n _after_previous(OVERLAP)",
        "if x: return\n _after_previous(OVERLAP)",
    ],
)
def test_what_comes_too_early_is_found(body: str) -> None:
    (kernel,) = ast.parse(f"def kernel(out, x, OVERLAP):\n {body}").body
    assert isinstance(kernel, ast.FunctionDef)
    assert _early_accesses(kernel)


def test_a_kernel_without_a_wait_is_found() -> None:
    (kernel,) = ast.parse("def kernel(out, OVERLAP):\n if OVERLAP:\n  _after_previous(OVERLAP)").body
    assert isinstance(kernel, ast.FunctionDef)
    with pytest.raises(ValueError, match="never waits"):
        _early_accesses(kernel)


def _exits_without_wait(kernel: ast.FunctionDef) -> int:
    """Ways out of a kernel, its end among them, that the wait does not stand right before."""
    blocks = [[*kernel.body, ast.Return()]]
    for node in ast.walk(kernel):
        if isinstance(node, ast.If | ast.For | ast.While):
            blocks += [node.body, node.orelse]
    exits = [(block, at) for block in blocks for at, node in enumerate(block) if isinstance(node, ast.Return)]
    return sum(at == 0 or ast.unparse(block[at - 1]) != _LAST_ACT for block, at in exits)


@pytest.mark.parametrize("name", [name for name, kernel in _KERNELS.items() if "beside" in _parameters(kernel)])
def test_what_runs_beside_another_ends_after_it(name: str) -> None:
    assert _exits_without_wait(_KERNELS[name]) == 0


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (f"{_LAST_ACT}", 0),
        (f"if x:\n  return\n {_LAST_ACT}", 1),
        (f"if x:\n  {_LAST_ACT}\n  return\n {_LAST_ACT}", 0),
        (f"if x:\n  {_LAST_ACT}\n  return", 1),
    ],
)
def test_an_exit_without_a_wait_is_found(body: str, count: int) -> None:
    (kernel,) = ast.parse(f"def kernel(x, OVERLAP):\n {body}").body
    assert isinstance(kernel, ast.FunctionDef)
    assert _exits_without_wait(kernel) == count
