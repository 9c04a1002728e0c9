"""The sampling kernels against their oracles: draws, truncation, penalties, log-probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")


from octavo.kernels.reference import sampling as reference
from octavo.kernels.triton import sampling as kernels
from octavo.kernels.triton import sampling_rows, sampling_truncation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def record(temperature: float = 1.0, stream: int = 0, penalty_row: int = -1, **wish: float) -> np.ndarray:
    words = np.zeros(kernels.NUM_PARAMS, dtype=np.int32)
    floats = words.view(np.float32)
    floats[kernels.TEMPERATURE] = temperature
    floats[kernels.TOP_P] = wish.get("top_p", 1.0)
    floats[kernels.MIN_P] = wish.get("min_p", 0.0)
    floats[kernels.REPETITION] = wish.get("repetition", 1.0)
    floats[kernels.FREQUENCY] = wish.get("frequency", 0.0)
    floats[kernels.PRESENCE] = wish.get("presence", 0.0)
    words[kernels.TOP_K] = wish.get("top_k", 0)
    words[kernels.NUM_PROMPT_TOKENS] = wish.get("num_prompt_tokens", 0)
    words[kernels.PENALTY_ROW] = penalty_row
    words.view(np.uint32)[[kernels.STREAM_LOW, kernels.STREAM_HIGH]] = stream & 0xFFFFFFFF, stream >> 32
    return words


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def table(records: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(records)).to(DEVICE)


def grid_logits(num_rows: int, vocab_size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """On a grid of eighths: many are equal, and all are exact in every dtype."""
    values = torch.from_numpy(np.random.default_rng(seed).normal(0, 1.5, (num_rows, vocab_size)))
    return (values.mul(8).round() / 8).to(dtype).to(DEVICE)


def draw(
    logits: Tensor, row_slots: list[int], positions: list[int], params: Tensor, samples: list[int] | None = None, **more
) -> tuple[Tensor, Tensor]:
    """(out, token_ids_table), both poisoned before."""
    ids = torch.full((params.shape[0], 64), -7, dtype=torch.int32, device=DEVICE)
    out = torch.full((len(row_slots), 2), -7, dtype=torch.int32, device=DEVICE)
    drawing = ints([1] * len(row_slots) if samples is None else samples)
    kernels.draw_tokens(logits, ints(row_slots), ints(positions), params, drawing, ids, out, **more)
    return out.cpu(), ids.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [37, 1024, 2500])
def test_draw_tokens_draws_as_the_oracle(dtype, vocab_size):
    """A token is the oracle's, or its score is within float32's error of the oracle's best."""
    num_rows = 12
    logits = grid_logits(num_rows, vocab_size, 1, dtype)
    temperatures = [0.0, 0.01, 0.3, 1.0, 1.7, 2.0] * 2
    streams = [(2**64 - 1) * row // 11 for row in range(num_rows)]
    positions = [5 * row for row in range(num_rows)]
    params = table([record(t, s) for t, s in zip(temperatures, streams)])
    out, ids = draw(logits, list(range(num_rows)), positions, params)
    wanted, bad = reference.draw_tokens(logits.cpu(), temperatures, streams, positions)
    assert not bad.any()
    assert not out[:, 1].any()
    for row in range(num_rows):
        scores = reference.gumbel_scores(logits[row].cpu(), temperatures[row], streams[row], positions[row])
        token = out[row, 0].item()
        assert scores[wanted[row]] - scores[token] <= 1e-4 * temperatures[row]
        assert temperatures[row] > 0 or token == wanted[row]
        assert ids[row, positions[row]] == token
        assert (ids[row] != -7).sum() == 1


def test_most_draws_are_the_oracles_own():
    """The random words are the oracle's bit by bit: with others hardly a draw would agree."""
    logits = torch.zeros(1, 40, device=DEVICE).expand(40, -1)
    params = table([record(1.0, 0x123456789ABCDEF0)])
    positions = list(range(40))
    out, _ = draw(logits, [0] * 40, positions, params)
    wanted, _ = reference.draw_tokens(logits.cpu(), [1.0] * 40, [0x123456789ABCDEF0] * 40, positions)
    assert torch.equal(out[:, 0].long(), wanted)
    assert len(set(out[:, 0].tolist())) > 15


def noise(num: int, vocab_size: int, along: str) -> Tensor:
    """-log E of num rows whose positions, or streams, are neighbours; float64 [num, V]."""
    zeros = torch.zeros(vocab_size, dtype=torch.float64)
    pairs = [(77, n) if along == "positions" else (n << 32 | 5, 3) for n in range(num)]
    return torch.stack([reference.gumbel_scores(zeros, 1.0, *pair) for pair in pairs])


@pytest.mark.parametrize("along", ["positions", "streams"])
def test_draws_follow_the_softmax(along):
    """Chi-square over 37 tokens and 20,000 draws at each temperature and truncation; 99.9% bound by degrees."""
    logits = grid_logits(1, 37, 8)[0].cpu().double()
    scores = noise(20_000, 37, along)
    rng = np.random.default_rng(0)
    for temperature, top_k, top_p, min_p in [
        (0.5, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (2.0, 0, 1.0, 0.0), (1.0, 9, 1.0, 0.0), (0.8, 0, 0.8, 0.0),
        (1.5, 0, 1.0, 0.1), (1.0, 20, 0.9, 0.02),
    ]:  # fmt: skip
        kept = reference.truncation_cuts(logits, temperature, top_k, top_p, min_p)
        drawn = (logits + temperature * scores).masked_fill(~kept, -torch.inf).argmax(-1)
        weights = (logits / temperature).masked_fill(~kept, -torch.inf).softmax(-1)
        expected = weights[kept].numpy() * len(drawn)
        counts = torch.bincount(drawn, minlength=37)[kept].numpy()
        assert counts.sum() == len(drawn)
        common = expected >= 5
        found = ((counts - expected)[common] ** 2 / expected[common]).sum()
        bound = np.quantile(rng.chisquare(common.sum() - 1, 200_000), 0.9995)
        assert found < bound, (temperature, top_k, top_p, min_p)


def test_random_words_are_even_and_independent():
    """Of neighbouring tokens, positions and streams: each bit half the time, correlations within 5 sigma."""
    at = [(stream, position) for stream in range(40) for position in range(40)]
    words = torch.stack([reference.random_words(64, *pair) for pair in at]).view(40, 40, 64)
    bits = (words[..., None] >> torch.arange(32)) & 1
    assert (bits.double().mean((0, 1, 2)) - 0.5).abs().max() < 5 * 0.5 / words.numel() ** 0.5
    values = words.double() / 2**32 - 0.5
    for axis in range(3):
        length = values.shape[axis] - 1
        product = values.narrow(axis, 0, length) * values.narrow(axis, 1, length)
        assert abs(product.mean().item()) < 5 / 12 / product.numel() ** 0.5
    assert len(set(words.flatten().tolist())) > words.numel() * 0.999


def test_small_variates_keep_their_resolution():
    """Of 200,000 words the smallest variate is drawn from the whole range below 1e-5, not from steps of float32's."""
    words = torch.cat([reference.random_words(2000, 1, position) for position in range(100)])
    assert (words < 2**32 // 10_000).sum().item() == pytest.approx(20, abs=20)
    assert len(set(words.tolist())) > 199_900


@pytest.mark.parametrize("dtype", DTYPES)
def test_draw_tokens_takes_the_first_of_equal_logits(dtype):
    logits = torch.zeros(3, 2100, dtype=dtype, device=DEVICE)
    logits[0, [5, 1030, 2099]] = 1.0
    logits[1, [1025, 1027]] = 2.0
    out, _ = draw(logits, [0, 1, 2], [1, 1, 1], table([record(0.0)] * 3), programs=3)
    assert out.tolist() == [[5, 0], [1025, 0], [0, 0]]
    split, _ = draw(logits, [0, 1, 2], [1, 1, 1], table([record(0.0)] * 3), programs=1000)
    assert torch.equal(out, split)


def test_a_draw_is_the_same_in_any_batch_and_splitting():
    logits = grid_logits(6, 1500, 3, torch.bfloat16)
    params = table([record(1.0, 1000 + slot) for slot in range(8)])
    slots, positions = [3, -1, 0, 7, -1, 5], [4, 0, 9, 1, 0, 2]
    together, _ = draw(logits, slots, positions, params)
    assert together[1].tolist() == together[4].tolist() == [0, 0]
    for row in (0, 2, 3, 5):
        alone, ids = draw(logits[row : row + 1], [slots[row]], [positions[row]], params, programs=1)
        assert torch.equal(alone[0], together[row])
        assert ids[slots[row], positions[row]] == alone[0, 0]


def test_rows_that_do_not_sample_write_nothing():
    logits = grid_logits(3, 50, 4)
    out, ids = draw(logits, [0, 1, -1], [3, 3, 3], table([record()] * 2), samples=[0, 1, 1])
    assert out[0].tolist() == out[2].tolist() == [0, 0]
    assert (ids[0] == -7).all()
    assert (ids[1] != -7).sum() == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_rows_are_flagged_and_only_they(dtype, temperature):
    logits = torch.zeros(6, 1100, dtype=dtype, device=DEVICE)
    logits[0, 1050] = torch.nan
    logits[1, 3] = torch.inf
    logits[2] = -torch.inf
    logits[3] = -torch.inf
    logits[3, 1099] = -5.0
    logits[4] = torch.finfo(dtype).min
    out, _ = draw(logits, list(range(6)), [0] * 6, table([record(temperature, s) for s in range(6)]))
    assert out[:, 1].tolist() == [1, 1, 1, 0, 0, 0]
    assert out[:4, 0].tolist() == [0, 0, 0, 1099]


def test_draw_tokens_reads_rows_that_lie_apart():
    wide = grid_logits(4, 80, 5)
    params = table([record(1.0, slot) for slot in range(4)])
    apart, _ = draw(wide[:, :50], [0, 1, 2, 3], [1] * 4, params)
    together, _ = draw(wide[:, :50].contiguous(), [0, 1, 2, 3], [1] * 4, params)
    assert torch.equal(apart, together)


def kept_by(cuts: tuple[Tensor, Tensor], logits: Tensor) -> Tensor:
    """bool [n, V]: what the cuts keep of float32 logits [n, V]."""
    bits = (logits + 0.0).view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    cut = (cuts[0].cpu().long() & 0xFFFFFFFF)[:, None] - 2**31
    ids = torch.arange(logits.shape[1])
    return (keys > cut) | ((keys == cut) & (ids < cuts[1].cpu()[:, None]))


WISHES = [
    {"top_k": 2}, {"top_k": 7}, {"top_k": 200}, {"top_p": 0.9}, {"top_p": 0.3}, {"top_p": 1e-6}, {"top_p": 0.99999},
    {"min_p": 0.1}, {"min_p": 1.0}, {"top_k": 20, "top_p": 0.6}, {"top_k": 20, "min_p": 0.05},
    {"top_k": 40, "top_p": 0.7, "min_p": 0.02}, {"top_p": 0.7, "min_p": 0.02}, {"top_p": 0.8, "temperature": 0.3},
    {"top_p": 0.8, "temperature": 2.0}, {},
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("grid", torch.bfloat16),
        ("flat", torch.bfloat16),
        ("two", torch.float32),
        ("normal", torch.bfloat16),
        ("normal", torch.float32),
        ("normal", torch.float16),
    ],
)
def test_truncation_cuts_keep_what_sorting_keeps(monkeypatch, kind, dtype):
    monkeypatch.setattr(sampling_truncation, "_BLOCK", 512)
    vocab_size = 300
    wishes = WISHES if dtype == torch.bfloat16 else WISHES[::3]  # other dtypes take twice the passes
    logits = grid_logits(len(wishes), vocab_size, 6)
    if kind == "flat":
        logits = torch.full_like(logits, -2.5)
    elif kind == "two":
        logits = (logits > 1).float() * 3 - 1
    elif kind == "normal":
        logits = torch.from_numpy(np.random.default_rng(7).normal(0, 3, logits.shape)).float().to(DEVICE)
    logits = logits.to(dtype)
    params = table([record(**wish) for wish in wishes])
    order = list(range(len(wishes)))[::-1]
    cuts = sampling_truncation.truncation_cuts(logits, ints(order), ints(order), params)
    kept = kept_by(cuts, logits[order].float().cpu())
    for index, row in enumerate(order):
        wish = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | wishes[row]
        wanted = reference.truncation_cuts(logits[row].cpu(), **wish)
        assert torch.equal(kept[index], wanted), wishes[row]


def test_truncation_over_several_blocks(monkeypatch):
    monkeypatch.setattr(sampling_truncation, "_BLOCK", 128)
    logits = torch.zeros(3, 700, dtype=torch.bfloat16, device=DEVICE)
    logits[:, 650] = 1.0
    params = table([record(top_k=300), record(top_p=0.5), record(top_k=2)])
    cuts = sampling_truncation.truncation_cuts(logits, ints([0, 1, 2]), ints([0, 1, 2]), params)
    kept = kept_by(cuts, logits.float().cpu())
    for row, wish in enumerate([(300, 1.0), (0, 0.5), (2, 1.0)]):
        assert torch.equal(kept[row], reference.truncation_cuts(logits[row].cpu(), 1.0, *wish, 0.0))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_truncation_cuts_end_on_rows_of_any_values(monkeypatch):
    monkeypatch.setattr(sampling_truncation, "_BLOCK", 512)
    logits = torch.zeros(4, 60, device=DEVICE)
    logits[0] = torch.nan
    logits[1] = -torch.inf
    logits[2] = torch.inf
    logits[3, :] = torch.linspace(-1, 1, 60) * 3e38
    params = table([record(top_k=5, top_p=0.9, min_p=0.1)] * 4)
    cuts = sampling_truncation.truncation_cuts(logits, ints([0, 1, 2, 3]), ints([0, 1, 2, 3]), params)
    assert kept_by(cuts, logits.cpu())[3].nonzero().flatten().tolist() == [59]


def test_redraw_tokens_draws_the_oracles_token_and_keeps_bad_flags():
    num_rows, vocab_size = 6, 1200
    logits = grid_logits(num_rows + 2, vocab_size, 9)
    wishes = [{"top_k": 4}, {"top_p": 0.5}, {"min_p": 0.3}, {"top_p": 1.0}, {"top_k": 3}, {"top_k": 5}]
    params = table([record(1.5, 60 + slot, **wish) for slot, wish in enumerate(wishes)])
    source, target, slots = [7, 1, 0, 2, 3, 5], [1, 0, 3, 4, 2, 5], list(range(num_rows))
    positions = [slot + 3 for slot in slots]
    out = torch.zeros(num_rows, 2, dtype=torch.int32, device=DEVICE)
    out[5, 1] = 1
    ids = torch.zeros(num_rows, 20, dtype=torch.int32, device=DEVICE)
    cuts = sampling_truncation.truncation_cuts(logits, ints(source), ints(slots), params)
    kernels.redraw_tokens(
        logits, ints(source), ints(target), ints(slots), ints(positions), params, cuts,
        torch.zeros(0, vocab_size, dtype=torch.int32, device=DEVICE), ids, out,
    )  # fmt: skip
    defaults = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    rows = logits[source].cpu()
    kept = torch.stack([reference.truncation_cuts(row, 1.5, **(defaults | w)) for row, w in zip(rows, wishes)])
    wanted, _ = reference.redraw_tokens(rows, kept, [1.5] * num_rows, [60 + s for s in slots], positions)
    assert out[target[:5], 0].tolist() == wanted[:5].tolist()
    assert out[5].tolist() == [0, 1]
    assert ids[slots[:5], positions[:5]].tolist() == wanted[:5].tolist()


def test_redraw_without_truncation_is_the_plain_draw_and_counts():
    logits = grid_logits(2, 70, 10)
    params = table([record(1.0, 3, penalty_row=1), record(1.0, 4)])
    plain, _ = draw(logits, [0, 1], [2, 2], params)
    out = torch.zeros(2, 2, dtype=torch.int32, device=DEVICE)
    seen = torch.zeros(2, 70, dtype=torch.int32, device=DEVICE)
    ids = torch.zeros(2, 20, dtype=torch.int32, device=DEVICE)
    rows = ints([0, 1])
    kernels.redraw_tokens(logits, rows, rows, rows, ints([2, 2]), params, None, seen, ids, out)
    assert torch.equal(out.cpu(), plain)
    assert seen.sum() == 2
    assert seen[1, plain[0, 0]] == 2


def test_count_tokens_and_penalize_as_the_oracles():
    rng = np.random.default_rng(11)
    vocab_size, lengths, prompts = 90, [30, 7, 0], [10, 7, 0]
    ids = torch.from_numpy(rng.integers(0, 25, (3, 32)).astype(np.int32)).to(DEVICE)
    wish = {"repetition": 1.7, "frequency": 0.25, "presence": -0.5}
    records = [record(penalty_row=2 - s, num_prompt_tokens=prompts[s], **wish) for s in range(3)]
    params = table([*records, record()])
    seen = torch.zeros(3, vocab_size, dtype=torch.int32, device=DEVICE)
    sampling_rows.count_tokens(ints([0, 1, 2]), ints(lengths), 30, params, ids, seen)
    logits = grid_logits(5, vocab_size, 12, torch.bfloat16)
    target = torch.full((4, vocab_size), torch.nan, device=DEVICE)
    source = [4, 0, 1, 2]
    sampling_rows.penalize(logits, ints(source), ints([0, 1, 2, 3]), params, seen, target)
    for slot in range(3):
        wanted = reference.count_tokens(ids[slot, : lengths[slot]].tolist(), prompts[slot], vocab_size)
        assert torch.equal(seen[2 - slot].cpu(), wanted)
        penalized = reference.penalize(logits[source[slot]].cpu(), wanted, *wish.values())
        torch.testing.assert_close(target[slot].cpu(), penalized, rtol=1e-6, atol=1e-6)
    assert torch.equal(target[3], logits[2].float())


def test_bias_rows_as_the_oracle():
    biases = [{3: 1.5, 7: -100.0}, {}, dict.fromkeys(range(140), 0.5), {0: -float("inf")}]
    logits = grid_logits(4, 150, 13)
    wanted = reference.bias_rows(logits.cpu(), biases)
    offsets = np.cumsum([0, *map(len, biases)]).tolist()
    values = torch.tensor([v for bias in biases for v in bias.values()], device=DEVICE)
    sampling_rows.bias_rows(logits, ints(offsets), ints([t for bias in biases for t in bias]), values)
    assert torch.equal(logits.cpu(), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num", [0, 5])
def test_top_logprobs_as_the_oracle(num, dtype):
    logits = grid_logits(4, 200, 14, dtype)
    logits[1, :195] = -torch.inf
    logits[3] = 1.0
    tokens, rows = ints([5, 199, 17, 100]), [3, 1, 2]
    found = sampling_rows.top_logprobs(logits, ints(rows), tokens, num).cpu()
    ranks, ids, logprobs = reference.top_logprobs(logits[rows].cpu(), tokens[rows].long().cpu(), num)
    assert torch.equal(found[:, 0].long(), ranks)
    assert torch.equal(found[:, 1 : 2 + num].long(), ids)
    torch.testing.assert_close(found[:, 2 + num :].view(torch.float32).double(), logprobs, rtol=1e-5, atol=1e-5)
