"""Packed codes to the numbers that a product takes, in registers: by setting the exponent around the bits (exact), or
by permuting the bytes of a table. GroupedWeight in octavo.quantization.grouped says how codes are packed."""

from __future__ import annotations

import triton
import triton.language as tl

# Four bytes to two pairs of numbers of their low bits, and two of their high bits. A magic byte in front of a code
# makes it a number of a known exponent. Where there is an operand, it is taken off. As in all instructions for several
# elements, each number must depend on its own byte alone: which elements stand together is for the layout to choose,
# and that of a product's operand has others beside each other than memory has.
_NUMBERS = """{
    .reg .b32 a, b, c, d;
    prmt.b32 a, $4, 0, 0x4140;
    prmt.b32 b, $4, 0, 0x4342;
    shr.b32 c, a, 4;
    shr.b32 d, b, 4;
    lop3.b32 $0, a, 0x000F000F, MAGIC, 0xEA;
    lop3.b32 $1, b, 0x000F000F, MAGIC, 0xEA;
    lop3.b32 $2, c, 0x000F000F, MAGIC, 0xEA;
    lop3.b32 $3, d, 0x000F000F, MAGIC, 0xEA;
    """
_LESS = """sub.rn.TYPE $0, $0, $5;
    sub.rn.TYPE $1, $1, $6;
    sub.rn.TYPE $2, $2, $5;
    sub.rn.TYPE $3, $3, $6;
    """
_REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r,r")
_LESS_REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r")
_BF16 = _NUMBERS.replace("MAGIC", "0x43004300")  # 128 + code
_BF16_NUMBERS = tl.constexpr(_BF16 + "}")
_BF16_LESS = tl.constexpr(_BF16 + _LESS.replace("TYPE", "bf16x2") + "}")
_FP16_LESS = tl.constexpr(_NUMBERS.replace("MAGIC", "0x64006400") + _LESS.replace("TYPE", "f16x2") + "}")  # 1024 + code
_BF16_ONES = tl.constexpr("mov.b32 $0, 0x3F803F80; mov.b32 $1, 0x3F803F80;")
_FP16_ONES = tl.constexpr("mov.b32 $0, 0x3C003C00; mov.b32 $1, 0x3C003C00;")


@triton.jit
def _bf16_bytes(raw):
    """raw: uint8. raw - 128 in bfloat16: the low seven bits as 128 + bits, less 128 or 256 by the eighth."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d;
        prmt.b32 a, $2, 0, 0x4140;
        prmt.b32 b, $2, 0, 0x4342;
        and.b32 c, a, 0x00800080;
        and.b32 d, b, 0x00800080;
        xor.b32 c, c, 0x43804380;
        xor.b32 d, d, 0x43804380;
        lop3.b32 a, a, 0x007F007F, 0x43004300, 0xEA;
        lop3.b32 b, b, 0x007F007F, 0x43004300, 0xEA;
        sub.rn.bf16x2 $0, a, c;
        sub.rn.bf16x2 $1, b, d;
        }""",
        "=r,=r,r",
        [raw],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _bytes(raw, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """raw: uint8. raw - 128 in DTYPE."""
    return _bf16_bytes(raw) if FAST and tl.bfloat16 == DTYPE else (raw.to(tl.int32) - 128).to(tl.float32).to(DTYPE)


# The numbers of a table of 16, by permutations of bytes. Operands: four bytes with two codes each; then the table as
# `_table_words` has it, every word four times, once for each byte. Bits 0 to 2 of a code choose among eight bytes, bit
# 3 between two such choices; low and high bytes are chosen apart and then put together.
_LOOKED_UP = tl.constexpr("""{
    .reg .b32 index, upper, next_index, next_upper, a, b, c, d;
    and.b32 index, $4, 0x77777777;
    shr.b32 upper, $4, 1;
    lop3.b32 upper, upper, 0x44444444, 0x32103210, 0xEA;
    shr.b32 next_index, index, 16;
    shr.b32 next_upper, upper, 16;
    prmt.b32 a, $5, $9, index;
    prmt.b32 b, $13, $17, index;
    prmt.b32 c, $21, $25, index;
    prmt.b32 d, $29, $33, index;
    prmt.b32 a, a, b, upper;
    prmt.b32 c, c, d, upper;
    prmt.b32 $0, a, c, 0x6240;
    prmt.b32 $2, a, c, 0x7351;
    prmt.b32 a, $5, $9, next_index;
    prmt.b32 b, $13, $17, next_index;
    prmt.b32 c, $21, $25, next_index;
    prmt.b32 d, $29, $33, next_index;
    prmt.b32 a, a, b, next_upper;
    prmt.b32 c, c, d, next_upper;
    prmt.b32 $1, a, c, 0x6240;
    prmt.b32 $3, a, c, 0x7351;
    }""")
_TABLE_REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r" + 33 * ",r")


@triton.jit
def _four_numbers(at, DTYPE: tl.constexpr):
    """at: of four float32. The low bytes of these numbers in DTYPE, of 16 bits, as a word [1, 1], and their high bytes.

    Tensors, not scalars: what is broadcast from those would keep the compiler from looking codes up in the layout in
    which a product takes its numbers, and they would go through shared memory.
    """
    low, high = tl.zeros((1, 1), tl.uint32), tl.zeros((1, 1), tl.uint32)
    for index in tl.static_range(4):
        bits = tl.load(at + index + tl.zeros((1, 1), tl.int32)).to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
        low |= (bits & 0xFF) << 8 * index
        high |= (bits >> 8) << 8 * index
    return low, high


@triton.jit
def _table_words(table_ptr, HAS_TABLE: tl.constexpr, DTYPE: tl.constexpr):
    """The low bytes of a table's 16 numbers in DTYPE, in four words, and the high bytes in four more."""
    if HAS_TABLE:
        low_0, high_0 = _four_numbers(table_ptr, DTYPE)
        low_1, high_1 = _four_numbers(table_ptr + 4, DTYPE)
        low_2, high_2 = _four_numbers(table_ptr + 8, DTYPE)
        low_3, high_3 = _four_numbers(table_ptr + 12, DTYPE)
        words = (low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3)
    else:
        words = ()
    return words


@triton.jit
def _ones(raw, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """1 for each of raw, uint8. FAST: in the layout of the numbers that are made of it, so that a product with the same
    tokens takes these from where they lie."""
    if FAST:
        if tl.bfloat16 == DTYPE:
            ones = tl.inline_asm_elementwise(_BF16_ONES, "=r,=r,r", [raw], dtype=tl.bfloat16, is_pure=True, pack=4)
        else:
            ones = tl.inline_asm_elementwise(_FP16_ONES, "=r,=r,r", [raw], dtype=tl.float16, is_pure=True, pack=4)
    else:
        ones = tl.full(raw.shape, 1.0, DTYPE)
    return ones


@triton.jit
def _low_and_high(
    raw, less, table_ptr, words, HAS_TABLE: tl.constexpr, PLUS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr
):
    """The numbers of a chunk's codes of 4 bits in DTYPE, exactly: those of the table, or the codes less `less`, int32
    [BLOCK_N], or with PLUS the codes plus 128. words: from _table_words, of the same table."""
    if HAS_TABLE and FAST:
        operands = (raw,) + words  # noqa: RUF005 (Triton has no unpacking)
        low, high = tl.inline_asm_elementwise(
            _LOOKED_UP, _TABLE_REGISTERS, operands, dtype=(tl.uint16, tl.uint16), is_pure=True, pack=4
        )
        low, high = low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True)
    elif HAS_TABLE:
        low, high = (raw & 15).to(tl.int32), (raw >> 4).to(tl.int32)
        low, high = tl.load(table_ptr + low).to(DTYPE), tl.load(table_ptr + high).to(DTYPE)
    elif FAST and PLUS:
        low, high = tl.inline_asm_elementwise(
            _BF16_NUMBERS, _REGISTERS, [raw], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif FAST:
        base = 128 if tl.bfloat16 == DTYPE else 1024  # what code 0 becomes
        base = tl.broadcast_to((less + base).to(tl.float32).to(DTYPE)[:, None], raw.shape)
        if tl.bfloat16 == DTYPE:
            low, high = tl.inline_asm_elementwise(
                _BF16_LESS, _LESS_REGISTERS, [raw, base], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
        else:
            low, high = tl.inline_asm_elementwise(
                _FP16_LESS, _LESS_REGISTERS, [raw, base], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
    else:
        less = -128 if PLUS else less[:, None]
        low, high = (raw & 15).to(tl.int32) - less, (raw >> 4).to(tl.int32) - less
        low, high = low.to(tl.float32).to(DTYPE), high.to(tl.float32).to(DTYPE)
    return low, high


@triton.jit
def _scaled(w, scale, FAST: tl.constexpr):
    """w [BLOCK_N, H] times scale, float32 [BLOCK_N], rounded to w's dtype; FAST rounds the scale before as well."""
    if not FAST:
        return (w.to(tl.float32) * scale[:, None]).to(w.dtype)
    factor = tl.broadcast_to(scale.to(w.dtype)[:, None], w.shape)
    if tl.bfloat16 == w.dtype:
        return tl.inline_asm_elementwise(
            "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [w, factor], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return w * factor


@triton.jit
def _scaled_first(w, scale, minimum, HAS_MINIMUM: tl.constexpr, FAST: tl.constexpr):
    """The weight itself, of a group's numbers w [BLOCK_N, H], rounded to w's dtype; the rest as for _scaled."""
    w = _scaled(w, scale, FAST)
    if HAS_MINIMUM:
        w = (w.to(tl.float32) + minimum[:, None]).to(w.dtype)
    return w
