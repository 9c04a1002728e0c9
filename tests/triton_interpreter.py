"""Triton 3.6's interpreter, in which kernels run where there is no GPU, mended where it is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_NARROW = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
_FP8_MAX = 448.0


def mend() -> None:
    """Scalars, which it keeps as arrays of one number, may be loop bounds (NumPy >= 2.4 refuses them); products of
    bfloat16, which it keeps as uint16, are products of the numbers; conversions from float32 round to the nearest,
    and those to float8 saturate, as a GPU's do."""
    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot
    given: Callable[..., Any] = interpreter._convert_float

    def with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source.name != "fp32" or target.name not in _NARROW:
            return given(values, source, target, rounding)
        wide = torch.from_numpy(np.array(values).view(np.float32))
        dtype = _NARROW[target.name]
        if dtype == torch.bfloat16:
            return wide.to(dtype).view(torch.int16).numpy().view(np.uint16)
        return wide.clamp(-_FP8_MAX, _FP8_MAX).to(dtype).view(torch.uint8).numpy()

    interpreter._patch_lang_tensor = with_index
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    interpreter._convert_float = convert
