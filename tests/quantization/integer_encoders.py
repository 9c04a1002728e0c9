"""Encoders of grouped integers, written from the formats' descriptions: a weight [N, K] -> its checkpoint tensors by
the end of their names, and the weight that they stand for. `benchmarks/quantization/against_packers.py` holds them
to the packers that checkpoints are made with, bit for bit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]  # that lie in a word's nibbles, from the low end


def stream(values: Tensor, bits: int) -> Tensor:
    """[R, C] below 2**bits -> int32 [R, ceil(C * bits / 32)]: each row's bits one after another, low bits first."""
    array = values.numpy().astype(np.uint8)
    single = (array[..., None] >> np.arange(bits) & 1).astype(np.uint8).reshape(len(array), -1)
    single = np.pad(single, ((0, 0), (0, -single.shape[1] % 32)))
    octets = np.packbits(single, axis=1, bitorder="little")
    return torch.from_numpy(np.ascontiguousarray(octets).view(np.int32).copy())


def padded(values: Tensor, bits: int) -> Tensor:
    """The same with 32 // bits values a word."""
    rows, per_word = len(values), 32 // bits
    filled = torch.nn.functional.pad(values.long(), (0, -values.shape[1] % per_word)).view(rows, -1, per_word)
    words = (filled << torch.arange(per_word) * bits).sum(-1).numpy()
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def codes_of(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, group_of: Tensor, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round to nearest. group_of: int64 [K], the group of each column. Returns code [N, K], scale [N, G] of `dtype`,
    zero [N, G], and W = (code - zero) * scale in float32."""
    groups, top = -(-weight.shape[1] // group_size), (1 << bits) - 1
    low, high = torch.zeros(len(weight), groups), torch.zeros(len(weight), groups)
    for group in range(groups):
        columns = weight[:, group_of == group]
        low[:, group], high[:, group] = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
    if symmetric:
        scale = (2 * torch.maximum(-low, high) / top).to(dtype)
        zero = torch.full_like(low, 1 << bits - 1)
    else:
        scale = ((high - low) / top).to(dtype)
        zero = (-low / scale.float()).round().clamp(0, top)
    wide, middle = scale.float()[:, group_of], zero[:, group_of]
    code = (weight / wide + middle).round().clamp(0, top)
    return code.to(torch.uint8), scale, zero.to(torch.uint8), (code - middle) * wide


def in_order(size: int, group_size: int) -> Tensor:
    return torch.arange(size) // group_size


def shuffled(size: int, group_size: int, seed: int = 0) -> Tensor:
    return in_order(size, group_size)[torch.randperm(size, generator=torch.Generator().manual_seed(seed))]


def awq(weight: Tensor, group_size: int, symmetric: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    size = weight.shape[1] if group_size == -1 else group_size
    code, scale, zero, stands_for = codes_of(weight, 4, size, symmetric, in_order(weight.shape[1], size))
    words = [
        stream(values.T.reshape(values.shape[1], -1, 8)[..., AWQ_COLUMNS].reshape(values.shape[1], -1), 4)
        for values in (code, zero)
    ]
    return {"qweight": words[0], "qzeros": words[1], "scales": scale.T}, stands_for


def gptq(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, version: int = 1, desc_act: bool = False, seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """seed: of the order of columns that desc_act finds."""
    size = weight.shape[1] if group_size == -1 else group_size
    group_of = shuffled(weight.shape[1], size, seed) if desc_act else in_order(weight.shape[1], size)
    code, scale, zero, stands_for = codes_of(weight, bits, size, symmetric, group_of)
    zeros = stream(zero.T, bits)
    if version == 1 and bits == 3:
        zeros = stream(zero.T - 1 & 7, bits)
    elif version == 1:
        zeros = zeros - sum(1 << shift for shift in range(0, 32, bits))
    return {
        "qweight": stream(code, bits).T,
        "qzeros": zeros,
        "scales": scale.T,
        "g_idx": group_of.int(),
    }, stands_for


def pack_quantized(
    weight: Tensor,
    bits: int,
    group_size: int = -1,
    symmetric: bool = True,
    desc_act: bool = False,
    dense: bool = True,
) -> tuple[dict[str, Tensor], Tensor]:
    size = weight.shape[1] if group_size == -1 else group_size
    group_of = shuffled(weight.shape[1], size) if desc_act else in_order(weight.shape[1], size)
    code, scale, zero, stands_for = codes_of(weight, bits, size, symmetric, group_of, torch.bfloat16)
    tensors = {
        "weight_packed": (stream if dense else padded)(code, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = stream(zero.T, bits).T
    if desc_act:
        tensors["weight_g_idx"] = group_of.int()
    return tensors, stands_for
