"""What Triton's interpreter is told to launch, as Triton would compile it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction


def variant(function: InterpretedFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton compiles anew for: constants, types, and which integers and addresses are 1 or multiples of 16."""
    options = function.kwargs
    fixed, any_alignment = (options[name] or () for name in ("do_not_specialize", "do_not_specialize_on_alignment"))
    signature = inspect.signature(function.fn)
    launch = {name: value for name, value in kwargs.items() if name not in signature.parameters}
    bound = signature.bind(*args, **{name: value for name, value in kwargs.items() if name not in launch})
    found: list[Any] = [function.fn.__name__, *sorted(launch.items(), key=str)]
    for name, value in bound.arguments.items():
        aligned: Any = "-"
        if "constexpr" in str(signature.parameters[name].annotation):
            found.append((name, value))
            continue
        if isinstance(value, torch.Tensor):
            kind, address = str(value.dtype), value.data_ptr()
        elif isinstance(value, int) and not isinstance(value, bool):
            kind, address = "int", value
        else:
            found.append((name, type(value).__name__))
            continue
        if name not in fixed:
            aligned = "1" if kind == "int" and address == 1 else "-" if name in any_alignment else address % 16 == 0
        found.append((name, kind, aligned))
    return tuple(found)


@contextmanager
def launches(run_kernels: bool = True) -> Iterator[set[tuple[Any, ...]]]:
    """The variants of all kernels that are launched meanwhile. run_kernels: or noted alone."""
    seen: set[tuple[Any, ...]] = set()
    run = InterpretedFunction.run

    def noted(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        seen.add(variant(self, args, kwargs))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs) if run_kernels else None

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(InterpretedFunction, "run", noted)
        yield seen
