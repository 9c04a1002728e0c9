"""The kernels of speculative decoding in plain torch; see octavo.kernels.triton.speculation for the contracts."""

from __future__ import annotations

from torch import Tensor


def follow_rows(
    row_slots: Tensor, offsets: Tensor, lengths: Tensor, starts: Tensor, positions: Tensor, items: Tensor
) -> None:
    """See the kernel."""
    for row, (slot, offset) in enumerate(zip(row_slots.tolist(), offsets.tolist())):
        if slot >= 0 and offset >= 0:
            starts[row] = lengths[slot] - 1 + offset
            positions[row] = starts[row] + 1
            mine = items[:, 0] + items[:, 3] - 1 == row  # as the last of those that share it
            items[mine, 2] = items[mine, 2].clamp(max=int(positions[row]))


def verify_rows(
    first_rows: Tensor,
    num_drafts: Tensor,
    row_slots: Tensor,
    positions: Tensor,
    cu_q: Tensor,
    input_ids: Tensor,
    drawn: Tensor,
    ready: Tensor,
    lengths: Tensor,
    counts: Tensor,
    most: int,
) -> None:
    """See the kernel."""
    for group, (row, planned) in enumerate(zip(first_rows.tolist(), num_drafts.tolist())):
        slot = int(row_slots[row])
        counts[group] = 0
        if planned < 0 or slot < 0:
            continue
        count = 1
        for at in range(row, row + min(planned, int(ready[slot]), most)):
            token, bad = drawn[at].tolist()
            if bad or token != int(input_ids[cu_q[at + 1]]):
                break
            count += 1
        counts[group] = count
        lengths[slot] = positions[row] + count


def place_drafts(
    group_slots: Tensor,
    drafts: Tensor,
    found: Tensor,
    asked: Tensor,
    lengths: Tensor,
    counts: Tensor,
    ready: Tensor,
    token_ids: Tensor,
    verdict: Tensor,
) -> None:
    """See the kernel."""
    for group, slot in enumerate(group_slots.tolist()):
        count = 0
        if slot >= 0:
            count = ready[slot] = min(int(found[group]), int(asked[group]))
            begin = int(lengths[slot])
            token_ids[slot, begin : begin + count] = drafts[group, :count]
            verdict[group, 2 : 2 + count] = drafts[group, :count]
        verdict[group, 0], verdict[group, 1] = counts[group], count
    found.zero_()


def keep_features(
    features: Tensor, row_slots: Tensor, starts: Tensor, cu_q: Tensor, recent: Tensor, longest: int
) -> None:
    """See the kernel."""
    kept, ends = recent.shape[1], cu_q.tolist()
    for row, (slot, start) in enumerate(zip(row_slots.tolist(), starts.tolist())):
        begin, end = ends[row], ends[row + 1]
        assert end - begin <= longest
        for token in range(max(begin, end - kept), end) if slot >= 0 else ():
            recent[slot, (start + token - begin) % kept] = features[token]
