"""Low-rank adapters in one batch against the product they are added to, on one Hopper GPU.

    PYTHONPATH=src python benchmarks/gpu/kernel_lora.py [--out FILE] [--seconds 90]

First the kernels are checked against the reference in float32, for the linear layers of Llama 3 8B. Then both are timed
apart for several ways to cut them up, by graph replay over copies of the adapters that outgrow L2: tokens sorted by
adapter, a tenth of them without one. Exits 1 if a result was wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from kernel_gemm import DEVICE, LLAMA, ROTATED_BYTES, attempt, problems, replay_us
from torch import Tensor

from octavo.kernels.reference import lora as reference
from octavo.kernels.triton import lora
from octavo.kernels.triton.lora import LoraPlan, add_lora

PARTS = {"qkv": (4096, 1024, 1024), "o": (4096,), "gate_up": (14336, 14336), "down": (4096,)}
TOKENS = (1, 16, 64, 256, 1024, 8192)
MAX_COPIES = 48
DTYPE = torch.bfloat16


class Stacks(NamedTuple):
    """Adapters as `add_lora` takes them."""

    a: Tensor
    b: Tensor
    ranks: Tensor
    parts: tuple[int, ...]


def stacks(name: str, num_slots: int, room: int, rank: int) -> Stacks:
    """Random adapters of one rank; each product A x, and B of it, has about the size of x."""
    parts, k = PARTS[name], LLAMA[name][1]
    a = torch.randn(num_slots, len(parts), room, k, device=DEVICE, dtype=DTYPE).mul_(k**-0.5)
    b = torch.randn(num_slots, sum(parts), room, device=DEVICE, dtype=DTYPE).mul_(rank**-0.5)
    a[:, :, rank:] = b[:, :, rank:] = 0
    return Stacks(a, b, torch.full((len(parts), num_slots), rank, dtype=torch.int32, device=DEVICE), parts)


def slots_of(num_tokens: int, num_slots: int, order: str = "sorted") -> Tensor:
    """order: of "sorted" and "shuffled", a tenth of the tokens without an adapter; "none", without any."""
    if order == "none":
        return torch.full((num_tokens,), -1, dtype=torch.int32, device=DEVICE)
    slots = torch.arange(num_tokens, device=DEVICE) * num_slots * 10 // (9 * num_tokens)
    slots = torch.where(slots < num_slots, slots, -1).to(torch.int32)
    return slots[torch.randperm(num_tokens, device=DEVICE)] if order == "shuffled" else slots


def check(label: str, made: Stacks, num_tokens: int, order: str) -> None:
    k, n = made.a.shape[3], made.b.shape[1]
    x, before = (torch.randn(num_tokens, width, device=DEVICE, dtype=DTYPE) for width in (k, n))
    slots = slots_of(num_tokens, made.a.shape[0], order)
    want = before.float()
    reference.add_lora(want, x.float(), made.a.float(), made.b.float(), made.ranks, made.parts, slots)
    first, second = before.clone(), before.clone()
    for y in (first, second):
        if attempt(label, lambda y=y: [add_lora(y, x, *made, slots)]) is None:
            return
    relative = ((first - want).norm() / want.norm()).item()
    if not relative < 4e-3:
        problems.append(f"WRONG: {label}: relative error {relative:.3g}")
    if not torch.equal(first, second):
        problems.append(f"WRONG: {label}: other bits the second time")
    if not torch.equal(first[slots < 0], before[slots < 0]):
        problems.append(f"WRONG: {label}: a token without an adapter has changed")


def check_all() -> None:
    count = 0
    for name in PARTS:
        for num_slots in (4, 8):
            for room, rank in ((16, 8), (16, 16), (64, 8), (64, 64)):
                made = stacks(name, num_slots, room, rank)
                made.ranks[-1, 1] = 0  # an adapter that leaves the last part alone
                for num_tokens in TOKENS:
                    for order in ("sorted", "shuffled"):
                        check(f"{name} S={num_slots} R={room} r={rank} T={num_tokens} {order}", made, num_tokens, order)
                        count += 1
    print(f"{count} results checked", flush=True)


def shrink_plans(base: LoraPlan, num_tokens: int, k: int) -> Iterator[LoraPlan]:
    """Ways to multiply by A."""
    shapes = [(16, 128, 4, 4), (16, 256, 4, 3), (16, 128, 2, 4)]
    shapes += [(16, 64, 4, 6)] if num_tokens < 1024 else []
    if num_tokens >= 1024:
        shapes = [(64, 64, 4, 4), (64, 64, 8, 4), (64, 128, 4, 3), (32, 128, 4, 3), (32, 64, 4, 5), (128, 64, 8, 4)]
    for block_m, block_k, warps, stages in shapes:
        for splits in (1, 2, 4, 8, 16, 32):
            programs = splits * -(-num_tokens // block_m)
            if splits * block_k <= k and (splits == base.splits or 64 <= programs * min(8, num_tokens) <= 2048):
                yield base._replace(
                    shrink_m=block_m, block_k=block_k, splits=splits, shrink_warps=warps, shrink_stages=stages
                )


def expand_plans(base: LoraPlan, num_tokens: int, full: bool) -> Iterator[LoraPlan]:
    """Ways to multiply by B. full: all of them."""
    shapes = [(16, 128, 32, 4), (16, 256, 32, 4), (16, 128, 64, 4), (16, 64, 32, 2)]
    splits = (4, 8, 16) if full else (8, 16)
    if num_tokens >= 1024:
        shapes = [(64, 128, 32, 8), (32, 128, 32, 4), (16, 256, 32, 4), (64, 64, 32, 4), (64, 256, 32, 8)]
        splits = (1, 4)
    for block_m, block_n, block_r, warps in shapes if full else shapes[:2]:
        for split in sorted({*splits, base.splits}):
            yield base._replace(splits=split, expand_m=block_m, block_n=block_n, expand_r=block_r, expand_warps=warps)


def short(plan: LoraPlan) -> tuple[str, str]:
    return (
        f"{plan.shrink_m}x{plan.block_k}/{plan.splits} {plan.shrink_warps}w{plan.shrink_stages}st",
        f"{plan.expand_m}x{plan.block_n}/{plan.splits} r{plan.expand_r} {plan.expand_warps}w",
    )


class Case(NamedTuple):
    """One layer, one number of tokens."""

    name: str
    copies: list[Stacks]
    num_tokens: int
    full: bool

    @property
    def base(self) -> LoraPlan:
        _, num_parts, room, k = self.copies[0].a.shape
        return LoraPlan.of(self.num_tokens, k, num_parts, room)

    def inputs(self, order: str = "sorted") -> tuple[Tensor, Tensor, Tensor]:
        """x, y, slots."""
        made = self.copies[0]
        x = torch.randn(self.num_tokens, made.a.shape[3], device=DEVICE, dtype=DTYPE)
        y = torch.zeros(self.num_tokens, made.b.shape[1], device=DEVICE, dtype=DTYPE)
        return x, y, slots_of(self.num_tokens, made.a.shape[0], order)

    def calls(self) -> Iterator[tuple[str, int, str, list[Callable[[], Any]]]]:
        """("shrink" or "expand", splits, plan in short, a call for each copy of the adapters)."""
        x, y, slots = self.inputs()
        base, k = self.base, x.shape[1]
        for plan in dict.fromkeys([base, *shrink_plans(base, self.num_tokens, k)]):
            runs = [partial(lora.shrink_lora, x, made.a, made.ranks, slots, plan=plan) for made in self.copies]
            yield "shrink", plan.splits, short(plan)[0], runs
        room = self.copies[0].a.shape[2]
        for plan in dict.fromkeys([base, *expand_plans(base, self.num_tokens, self.full)]):
            hidden = torch.zeros(plan.splits, self.num_tokens, len(self.copies[0].parts) * room, device=DEVICE)
            runs = [
                partial(lora.expand_lora, y, hidden, made.b, made.ranks, made.parts, slots, plan=plan)
                for made in self.copies
            ]
            yield "expand", plan.splits, short(plan)[1], runs

    def whole_us(self, order: str = "sorted") -> float | None:
        """Both kernels under the rule's plan."""
        x, y, slots = self.inputs(order)
        runs = [partial(add_lora, y, x, *made, slots) for made in self.copies]
        return attempt(f"{self.name} T={self.num_tokens} {order}", lambda: replay_us(runs))


def copies_of(first: Stacks) -> list[Stacks]:
    count = min(MAX_COPIES, max(2, -(-ROTATED_BYTES // (first.a.nbytes + first.b.nbytes))))
    return [first, *(first._replace(a=first.a.clone(), b=first.b.clone()) for _ in range(count - 1))]


def cases(room: int, copied: bool) -> Iterator[Case]:
    for name in PARTS:
        first = stacks(name, 8, room, room)
        copies = copies_of(first) if copied else [first]
        for num_tokens in TOKENS if room == 16 else (16, 256, 8192):
            yield Case(name, copies, num_tokens, name == "qkv")


def compile_all() -> None:
    """Launch every variant once, on threads, so that compilers run side by side."""
    jobs: dict[Any, Callable[[], Any]] = {}
    for room in (16, 64):
        for name, parts in PARTS.items():
            jobs |= LoraPlan.launches(LLAMA[name][1], parts, room, DTYPE, DEVICE)
        for case in cases(room, copied=False):
            num_parts = len(case.copies[0].parts)
            for kind, _, plan, (run, *_) in case.calls():
                if kind == "shrink":  # splits are no constant of it
                    jobs.setdefault((kind, num_parts, num_parts * room, plan.split("/")[0], plan.split()[1]), run)
                else:
                    jobs.setdefault((kind, case.copies[0].parts, room, plan), run)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda item: attempt(str(item[0]), item[1]), jobs.items()))
    torch.cuda.synchronize()
    print(f"{len(jobs)} kernels compiled")


def measure(case: Case, weights: list[Tensor]) -> dict[str, Any]:
    """Times of all plans, and the pair of plans with the same splits that is the fastest."""
    times: dict[str, dict[int, dict[str, float]]] = {"shrink": {}, "expand": {}}
    for kind, splits, plan, runs in case.calls():
        us = attempt(f"{kind} {case.name} T={case.num_tokens} {plan}", lambda runs=runs: replay_us(runs))
        if us is not None:
            times[kind].setdefault(splits, {})[plan] = us
    pairs = []
    for splits in set(times["shrink"]) & set(times["expand"]):
        ways = [min(times[kind][splits].items(), key=lambda item: item[1]) for kind in ("shrink", "expand")]
        pairs.append((sum(us for _, us in ways), ways))
    x = torch.randn(case.num_tokens, weights[0].shape[1], device=DEVICE, dtype=DTYPE)
    entry: dict[str, Any] = {"product_us": replay_us([partial(F.linear, x, w) for w in weights])}
    entry["rule_us"], entry["rule"] = case.whole_us(), short(case.base)
    entry["best_us"], entry["best"] = min(pairs) if pairs else (None, None)
    return entry | {"all": times}


def table(room: int, deadline: float) -> dict[str, Any]:
    print(f"R={room}, 8 adapters: T  the product us + rule's us; best us = shrink + expand", flush=True)
    result: dict[str, Any] = {}
    weights: dict[str, list[Tensor]] = {}
    for case in cases(room, copied=True):
        label = f"{case.name} T={case.num_tokens}"
        if time.monotonic() > deadline:
            problems.append(f"skipped: R={room} {label}")
            continue
        n, k = LLAMA[case.name]
        if case.name not in weights:
            weights = {case.name: [torch.randn(n, k, device=DEVICE, dtype=DTYPE) for _ in range(4)]}
        result[label] = entry = measure(case, weights[case.name])
        said = "none"
        if entry["best"]:
            said = " + ".join(f"{us:.1f} ({plan})" for plan, us in entry["best"])
        rule, best = (entry[key] or float("nan") for key in ("rule_us", "best_us"))
        print(f"{label:14}: {entry['product_us']:.1f} + {rule:.1f}; {best:.1f} = {said}", flush=True)
    for num_tokens in TOKENS:
        found = [result.get(f"{name} T={num_tokens}") for name in PARTS]
        if all(found):
            sums = {key: sum(entry[key] or float("nan") for entry in found) for key in ("product_us", "rule_us")}
            share = 100 * sums["rule_us"] / sums["product_us"]
            print(f"a layer, T={num_tokens}: {sums['product_us']:.1f} + {sums['rule_us']:.1f} us ({share:.0f} %)")
    return result


def other_batches() -> dict[str, Any]:
    """The rule's plan where tokens are in no order, adapters are smaller than their room, or there are none."""
    result: dict[str, Any] = {}
    for label, room, rank, order in (
        ("sorted, rank 8 of 64", 64, 8, "sorted"),
        ("sorted, rank 8 of 512", 512, 8, "sorted"),
        ("shuffled, rank 16", 16, 16, "shuffled"),
        ("none, rank 16", 16, 16, "none"),
    ):
        copies = copies_of(stacks("qkv", 8, room, rank))
        times = {num_tokens: Case("qkv", copies, num_tokens, False).whole_us(order) for num_tokens in TOKENS}
        result[label] = times
        print(f"qkv, {label}: " + ", ".join(f"{t}: {us or float('nan'):.1f}" for t, us in times.items()), flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write the table as JSON")
    parser.add_argument("--seconds", type=float, default=90, help="measure no further shape after this time")
    arguments = parser.parse_args()
    began = time.monotonic()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    print(torch.cuda.get_device_name(), torch.__version__)
    compile_all()
    print(f"{time.monotonic() - began:.0f} s with compiling", flush=True)
    check_all()
    print(f"{time.monotonic() - began:.0f} s with checks", flush=True)
    result: dict[str, Any] = {"other": other_batches()}
    for room in (16, 64):
        result[f"R={room}"] = table(room, began + arguments.seconds)
    for line in problems[:20]:
        print(line)
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), **result, "said": problems}, file, indent=1, default=str)
    print(f"{time.monotonic() - began:.0f} s, {len(problems)} problems")
    return int(any(line.startswith("WRONG") for line in problems))


if __name__ == "__main__":
    sys.exit(main())
