"""Low-rank adapters: the kernels, and their reference in torch, against float64 computed token by token."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_launches import launches
from torch import Tensor

from octavo.kernels.reference import lora as reference
from octavo.kernels.triton.lora import LoraPlan, add_lora, add_lora_embedding, expand_lora, shrink_lora

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POISON = float("nan")


@dataclass(frozen=True)
class Adapters:
    """Stacks of A and B as a worker keeps them: views of one buffer of bytes a slot. What no product may read is NaN:
    the numbers from a part's true rank on."""

    a: Tensor
    b: Tensor
    ranks: Tensor
    parts: tuple[int, ...]


def adapters(
    k: int, parts: tuple[int, ...], room: int, ranks: list[list[int]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> Adapters:
    """room: R of the stacks; ranks: of each part, of each slot."""
    num_slots, generator = len(ranks[0]), torch.Generator().manual_seed(seed)
    num_a, num_b = len(parts) * room * k, sum(parts) * room
    slots = torch.randn(num_slots, num_a + num_b + 48, generator=generator).to(DEVICE, dtype)
    a = slots[:, 16 : 16 + num_a].unflatten(1, (len(parts), room, k)).mul_(k**-0.5)
    b = slots[:, 32 + num_a : 32 + num_a + num_b].unflatten(1, (sum(parts), room))
    for slot in range(num_slots):
        first = 0
        for part, size in enumerate(parts):
            a[slot, part, ranks[part][slot] :] = POISON
            b[slot, first : first + size, ranks[part][slot] :] = POISON
            first += size
    return Adapters(a, b, torch.tensor(ranks, dtype=torch.int32, device=DEVICE), parts)


def tokens(num_tokens: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def slots_of(*slots: int) -> Tensor:
    return torch.tensor(slots, dtype=torch.int32, device=DEVICE)


def expected(y: Tensor, hidden_of: Tensor, made: Adapters, token_slots: Tensor) -> Tensor:
    """float64. hidden_of: x, or float64 A rows' [T, R] if there is nothing to shrink."""
    result = y.double()
    for token, slot in enumerate(token_slots.tolist()):
        first = 0
        for part, size in enumerate(made.parts):
            rank = int(made.ranks[part, slot])
            if slot >= 0 and rank:
                hidden = hidden_of[token].double()
                if made.a.ndim == 4:
                    hidden = made.a[slot, part, :rank].double() @ hidden
                result[token, first : first + size] += (
                    made.b[slot, first : first + size, :rank].double() @ hidden[:rank]
                )
            first += size
    return result


def assert_close(got: Tensor, want: Tensor, before: Tensor) -> None:
    """As near as the dtype allows, given that the product of A is rounded to it."""
    assert got.dtype == before.dtype
    unit = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[got.dtype]
    scale = (want - before.double()).abs().max() + want.abs()
    error = (got.double() - want).abs()
    assert (error <= 2 * unit * scale).all(), f"off by up to {(error / (unit * scale)).nan_to_num().max().item()} units"


def check(x: Tensor, made: Adapters, token_slots: Tensor, plan: LoraPlan | None = None) -> None:
    before = tokens(len(x), sum(made.parts), x.dtype, seed=2)
    want = expected(before, x, made, token_slots)
    for compute in (add_lora, reference.add_lora):
        y = before.clone()
        if compute is add_lora:
            add_lora(y, x, made.a, made.b, made.ranks, made.parts, token_slots, plan=plan)
        else:
            compute(y, x, made.a, made.b, made.ranks, made.parts, token_slots)
        assert_close(y, want, before)
        assert torch.equal(y[token_slots < 0], before[token_slots < 0])


def test_the_halves_are_those_of_the_reference() -> None:
    made = adapters(64, (24, 8), 32, [[3, 20], [0, 32]])
    x, slots = tokens(5, 64), slots_of(1, 0, -1, 1, 0)
    for shrink, expand in ((shrink_lora, reference.expand_lora), (reference.shrink_lora, expand_lora)):
        before = tokens(5, 32, seed=2)
        y = before.clone()
        hidden = shrink(x, made.a, made.ranks, slots)
        # What no token needs was never written.
        hidden[:, slots < 0] = 0
        expand(y, hidden.nan_to_num(), made.b, made.ranks, made.parts, slots)
        assert_close(y, expected(before, x, made, slots), before)


PLANS = [
    LoraPlan(block_k=16, splits=3, block_n=16),
    LoraPlan(shrink_m=32, block_k=32, splits=1, expand_m=16, block_n=32),
    LoraPlan(shrink_m=16, block_k=64, splits=4, expand_m=64, block_n=64),  # more splits than steps
]


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, tuple[int, ...], int, list[list[int]], list[int], LoraPlan]:
    """K, rows of the parts, R, ranks, slots of the tokens, plan."""
    parts = tuple(draw(st.lists(st.integers(1, 5).map(lambda n: n * 8 - 3 * (n % 2)), min_size=1, max_size=3)))
    room, num_slots = draw(st.sampled_from([16, 32, 48, 96])), draw(st.integers(1, 4))
    rank = st.one_of(st.just(0), st.integers(1, room))
    ranks = [draw(st.lists(rank, min_size=num_slots, max_size=num_slots)) for _ in parts]
    slots = draw(st.lists(st.integers(-1, num_slots - 1), min_size=1, max_size=40))
    if draw(st.booleans()):
        slots.sort()
    return 8 * draw(st.integers(1, 12)), parts, room, ranks, slots, draw(st.sampled_from(PLANS))


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_any_shape_and_any_order_of_slots(
    case: tuple[int, tuple[int, ...], int, list[list[int]], list[int], LoraPlan],
) -> None:
    k, parts, room, ranks, slots, plan = case
    check(tokens(len(slots), k), adapters(k, parts, room, ranks), slots_of(*slots), plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    made = adapters(96, (24, 8), 16, [[16, 3, 0], [5, 0, 8]], dtype)
    check(tokens(7, 96, dtype), made, slots_of(0, 0, 1, 1, -1, 2, 0))


@pytest.mark.parametrize("num_tokens", [1, 17, 150, 700])
def test_the_rule_serves_any_number_of_tokens(num_tokens: int) -> None:
    made = adapters(256, (24, 16), 16, [[8, 16], [16, 1]])
    slots = torch.arange(num_tokens, device=DEVICE, dtype=torch.int32) * 3 // num_tokens - 1
    check(tokens(num_tokens, 256), made, slots.clamp(max=1))


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
def test_embedding(ids_dtype: torch.dtype) -> None:
    made = adapters(16, (40,), 32, [[32, 5, 0]])
    slots = slots_of(1, 0, -1, 2, 0, 0, 1)
    vocabulary = torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    vocabulary[1, :, 5:] = vocabulary[2] = POISON
    ids = torch.tensor([10, 3, 4, 0, 7, 3, 2], dtype=ids_dtype, device=DEVICE)
    before = tokens(7, 40)
    table = Adapters(vocabulary, made.b, made.ranks, made.parts)
    want = expected(before, vocabulary[slots.clamp(min=0).long(), ids.long()], table, slots)
    for compute in (add_lora_embedding, reference.add_lora_embedding):
        y = before.clone()
        compute(y, ids, vocabulary, made.b, made.ranks, slots)
        assert_close(y, want, before)


def test_an_adapter_of_nan_harms_no_other_token() -> None:
    made = adapters(32, (16,), 16, [[4, 16]])
    x = tokens(6, 32)
    made.a[0] = made.b[0] = POISON
    x[0] = POISON
    y = torch.zeros(6, 16, device=DEVICE)
    add_lora(y, x, made.a, made.b, made.ranks, made.parts, slots_of(0, 1, 0, 1, -1, 1))
    assert y.isnan().any(1).tolist() == [True, False, True, False, False, False]


def test_without_tokens_or_adapters_nothing_happens() -> None:
    made = adapters(32, (16,), 16, [[4]])
    for compute in (add_lora, reference.add_lora):
        for num_tokens in (0, 20):
            y = torch.full((num_tokens, 16), POISON, device=DEVICE)
            compute(y, y[:, :1].repeat(1, 32), made.a, made.b, made.ranks, (16,), slots_of(*[-1] * num_tokens))
            assert y.isnan().all()


def test_rows_may_lie_apart_and_bits_repeat() -> None:
    made = adapters(64, (24,), 16, [[16, 9]])
    x, y, slots = tokens(20, 128)[::2, :64], tokens(20, 48)[::2, :24], slots_of(*[1, 0] * 5)
    before = y.clone()
    add_lora(y, x, made.a, made.b, made.ranks, made.parts, slots, plan=PLANS[0])
    assert_close(y, expected(before, x, made, slots), before)
    again = before.clone()
    add_lora(again, x, made.a, made.b, made.ranks, made.parts, slots, plan=PLANS[0])
    assert torch.equal(again, y)


def test_the_reference_is_exact_in_float32() -> None:
    made = adapters(512, (64, 32), 64, [[64, 8], [0, 3]])
    x, slots = tokens(9, 512), slots_of(1, 1, 0, 0, -1, 0, 0, 1, 1)
    y = torch.zeros(9, 96, device=DEVICE)
    reference.add_lora(y, x, made.a, made.b, made.ranks, made.parts, slots)
    want = expected(torch.zeros_like(y), x, made, slots)
    assert (y.double() - want).norm() <= 1e-5 * want.norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="reads what Triton's interpreter is told")
@pytest.mark.parametrize(("k", "parts", "room"), [(2048, (40, 16), 32), (72, (24,), 16)])
def test_all_that_is_launched_has_been_compiled_ahead(k: int, parts: tuple[int, ...], room: int) -> None:
    with launches(run_kernels=False) as compiled:
        for launch in LoraPlan.launches(k, parts, room, torch.float16, DEVICE).values():
            launch()
        for launch in LoraPlan.embedding_launches(sum(parts), room, torch.float16, torch.int64, DEVICE).values():
            launch()
    made = adapters(k, parts, room, [[1, 0]] * len(parts), torch.float16)
    table = torch.zeros(2, 3, room, dtype=torch.float16, device=DEVICE)
    with launches(run_kernels=False) as launched:
        for num_tokens in (1, 16, 17, 300, 513, 2000, 5000, 9000):
            x, y = tokens(num_tokens, k, torch.float16), tokens(num_tokens, sum(parts), torch.float16)
            slots = torch.full((num_tokens,), -1, dtype=torch.int32, device=DEVICE)
            add_lora(y, x, made.a, made.b, made.ranks, parts, slots)
            ids = torch.zeros(num_tokens, dtype=torch.int64, device=DEVICE)
            add_lora_embedding(y, ids, table, made.b, made.ranks[:1], slots)
    assert len({found[0] for found in launched}) == 2
    assert launched <= compiled


def test_what_does_not_fit_is_refused() -> None:
    made = adapters(32, (16, 8), 16, [[4], [4]])
    y, x, slots = tokens(2, 24), tokens(2, 32), slots_of(0, 0)
    given = {"y": y, "x": x, "a": made.a, "b": made.b, "ranks": made.ranks, "parts": (16, 8), "token_slots": slots}
    wrong = [
        ("y", y[:, :16], r"expected \[2, 24\]"),
        ("y", y.double(), "y is torch.float64"),
        ("x", x[:, :24], "does not fit"),
        ("x", x.half(), "does not fit"),
        ("x", tokens(2, 36)[:, :32], "strides"),
        ("a", made.a[:, :1], "ranks: torch.int32"),
        ("b", made.b[:, :, :8], "a multiple of 16"),
        ("b", made.b.half(), "they must be the same"),
        ("ranks", made.ranks.long(), "ranks: torch.int64"),
        ("token_slots", slots[:1], r"expected contiguous int32 \[2\]"),
    ]
    for name, value, message in wrong:
        with pytest.raises(ValueError, match=message):
            add_lora(**{**given, name: value})  # type: ignore[arg-type]
    table = torch.zeros(1, 3, 16, device=DEVICE)
    with pytest.raises(ValueError, match="ids are"):
        add_lora_embedding(y, x[:, 0], table, made.b, made.ranks[:1], slots)
    with pytest.raises(ValueError, match="does not fit"):
        add_lora_embedding(y, slots, table.half(), made.b, made.ranks[:1], slots)
