"""What the checkpoint formats of grouped integers share: values packed into words, groups in another order, and random
tensors for models without a checkpoint."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.quantization.scheme import FLOATS, TensorSpec

_DUMMY_STD = 0.02  # of the weights that random codes and scales stand for


def memory_bits(bits: int) -> int:
    """Of a code in memory, for `bits` in a checkpoint."""
    return 4 if bits <= 4 else 8


def num_words(bits: int, size: int) -> int:
    """Words of a stream of `size` values."""
    return -(-size * bits // 32)


def unpack_bits(words: Tensor, bits: int, size: int) -> Tensor:
    """words: int32 [rows, W], each row a stream of bits in which value i begins at bit i * bits, across the ends of
    words where `bits` does not divide 32. Returns uint8 [rows, size]."""
    octets = words.flatten().view(torch.uint8).view(len(words), -1)
    if bits == 8:
        return octets[:, :size]
    eights = -(-size // 8)  # of values, in `bits` octets each
    octets = F.pad(octets, (0, max(0, eights * bits - octets.shape[1])))[:, : eights * bits]
    octets = octets.reshape(len(words), eights, bits)
    values = []
    for bit in range(0, 8 * bits, bits):
        first, shift = divmod(bit, 8)
        value = octets[..., first] >> shift
        if shift + bits > 8:
            value |= octets[..., first + 1] << 8 - shift
        values.append(value & (1 << bits) - 1)
    return torch.stack(values, -1).view(len(words), -1)[:, :size]


def unpack_padded(words: Tensor, bits: int, size: int) -> Tensor:
    """The same where no value crosses the end of a word: 32 // bits values a word, the high bits unused."""
    shifts = torch.arange(32 // bits, dtype=torch.int32, device=words.device) * bits
    values = words[..., None] >> shifts & (1 << bits) - 1
    return values.to(torch.uint8).view(len(words), -1)[:, :size]


def widened(code: Tensor, bits: int) -> Tensor:
    """uint8 codes of `bits`, of which 2**(bits - 1) means zero, as such of `memory_bits`."""
    return code + ((1 << memory_bits(bits) - 1) - (1 << bits - 1))


def refuse_zeros(name: str, zero: Tensor, bits: int) -> None:
    """zero: uint8, of a format that is symmetric. Raises ValueError, naming the tensor, unless it is in the middle of
    the range everywhere."""
    middle = 1 << bits - 1
    other = zero[zero != middle]
    if len(other):
        raise ValueError(f"{name} holds a zero of {int(other[0])}, and symmetric codes have {middle} everywhere")


def order_of(g_idx: Tensor, group_size: int) -> Tensor | None:
    """g_idx: int32 [K], the group of each column. Returns the columns sorted by group, int64 [K], None where they are.

    Raises ValueError where the groups are not of group_size columns each (the last may be short).
    """
    order = torch.argsort(g_idx, stable=True)
    expected = groups_in_order(len(g_idx), group_size, g_idx.device)
    wrong = torch.nonzero(g_idx[order] != expected)
    if len(wrong):
        column = int(order[wrong[0, 0]])
        raise ValueError(
            f"g_idx puts column {column} into group {int(g_idx[column])}, and so not {group_size} columns into each "
            f"of the groups 0 to {int(expected[-1])}"
        )
    return None if torch.equal(g_idx, expected) else order


def groups_in_order(in_features: int, group_size: int, device: torch.device) -> Tensor:
    """int32 [in_features]: the group of each column where neighbours share one."""
    return (torch.arange(in_features, device=device) // group_size).to(torch.int32)


def words_spec(*shape: int) -> TensorSpec:
    """Packed values."""

    def dummy(generator: torch.Generator) -> Tensor:
        limits = torch.iinfo(torch.int32)
        return torch.randint(
            limits.min, limits.max, shape, dtype=torch.int32, device=generator.device, generator=generator
        )

    return TensorSpec(shape=shape, dtypes=(torch.int32,), dummy=dummy)


def equal_words_spec(shape: tuple[int, ...], bits: int, value: int) -> TensorSpec:
    """Packed values, in a dummy all the same. shape: its last dimension is that of the stream."""
    stream = sum(value << bits * i for i in range(32))
    words = [(stream >> 32 * i & 0xFFFFFFFF ^ 1 << 31) - (1 << 31) for i in range(bits)]  # signed

    def dummy(generator: torch.Generator) -> Tensor:
        repeated = torch.tensor(words, dtype=torch.int32, device=generator.device).repeat(-(-shape[-1] // bits))
        return repeated[: shape[-1]].expand(shape).contiguous()

    return TensorSpec(shape=shape, dtypes=(torch.int32,), dummy=dummy)


def scale_spec(shape: tuple[int, ...], bits: int, symmetric: bool) -> TensorSpec:
    """Scales of packed values; in a dummy, one for all. symmetric: zeros are in the middle, not random."""
    spread = 2**bits / 12**0.5 * (1 if symmetric else 2**0.5)

    def dummy(generator: torch.Generator) -> Tensor:
        return torch.full(shape, _DUMMY_STD / spread, dtype=torch.float16, device=generator.device)

    return TensorSpec(shape=shape, dtypes=FLOATS, dummy=dummy)


def g_idx_spec(in_features: int, group_size: int, shuffled: bool, required: bool = True) -> TensorSpec:
    """The group of each column; int64 too, as some packers write it. In a dummy, the same for all parts of a size: in
    a checkpoint, those that are made of the same activations share it."""

    def dummy(generator: torch.Generator) -> Tensor:
        groups = groups_in_order(in_features, group_size, generator.device)
        order = torch.randperm(in_features, generator=torch.Generator().manual_seed(in_features))
        return groups[order.to(generator.device)] if shuffled else groups

    return TensorSpec(shape=(in_features,), dtypes=(torch.int32, torch.int64), required=required, dummy=dummy)


def known_spec(*values: int) -> TensorSpec:
    """int64 or int32, of values that are known before."""

    def dummy(generator: torch.Generator) -> Tensor:
        return torch.tensor(values, device=generator.device)

    return TensorSpec(shape=(len(values),), dtypes=(torch.int64, torch.int32), dummy=dummy)
