"""Sizes of recorded steps: every step finds the smallest that holds it, and all that are found are recorded in turn."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from octavo.worker.graph_sizes import GraphSize, GraphSizes

LIMITS = st.tuples(st.integers(1, 1500), st.integers(1, 9216)).map(lambda limits: (min(limits), max(limits)))


@given(LIMITS, st.booleans(), st.data())
def test_a_step_finds_the_smallest_that_holds_it(limits: tuple[int, int], adapters: bool, data: st.DataObject) -> None:
    max_rows, max_tokens = limits
    sizes = GraphSizes(max_rows, max_tokens, adapters)
    num_rows = data.draw(st.integers(1, max_rows))
    num_tokens = data.draw(st.integers(num_rows, max_tokens))
    has_adapters = adapters and data.draw(st.booleans())
    found = sizes.find(num_tokens, num_rows, has_adapters)
    fitting = [
        size
        for size in sizes.order()
        if size.num_tokens >= num_tokens
        and size.num_rows >= num_rows
        and size.decodes == (num_tokens == num_rows)
        and size.adapters == has_adapters
    ]
    if found is None:
        # Of the next number of tokens none may have enough rows, but then they are many.
        assert not fitting or num_rows > 512
    else:
        assert found in fitting
        assert found == min(fitting)


@given(LIMITS, st.booleans())
def test_each_size_comes_once_and_none_is_larger_than_a_step(limits: tuple[int, int], adapters: bool) -> None:
    max_rows, max_tokens = limits
    order = GraphSizes(max_rows, max_tokens, adapters).order()
    assert len(set(order)) == len(order)
    assert all(size.num_rows <= max_rows and size.num_tokens <= max(max_tokens, max_rows) for size in order)
    assert {size.adapters for size in order} == {False, True} if adapters else {False}
    # The others share the memory of the first.
    assert order[0] == GraphSize(*[max(size.num_rows for size in order if size.decodes)] * 2)


def test_what_a_batch_needs_most_comes_first() -> None:
    order = GraphSizes(1024, 9216, False).order()
    place = {size: at for at, size in enumerate(order)}
    assert [size.num_rows for size in order[:11]] == [1024, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert [tuple(size[:2]) for size in order[11:16]] == [(64, 63), (128, 64), (256, 64), (512, 64), (1024, 64)]
    for tokens, rows in ((256, 192), (384, 383), (512, 511)):
        assert place[GraphSize(tokens, rows)] < place[GraphSize(12, 12)] < place[GraphSize(288, 288)]
    assert max(place[GraphSize(n, n)] for n in range(64, 256, 16)) < place[GraphSize(288, 288)]
    assert len(order) < 100
