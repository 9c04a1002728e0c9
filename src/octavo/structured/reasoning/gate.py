"""ReasoningGate: an output reasons freely, for so many tokens at most; after that it follows its grammar."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from octavo.structured.masks import admits, full_mask, mask_of, with_tokens, without
from octavo.structured.matcher import GrammarMatcher
from octavo.structured.reasoning.mark_tokens import MarkTokens

_UNBOUNDED = 2**31


class ReasoningGate:
    """A Constraint. It is in one of three states: what came so far is or may become an opening mark; the reasoning is
    open; it is over, or there is none, and the grammar has the rest.

    num_accepted: how many tokens of the output it has seen.
    """

    def __init__(
        self, marks: MarkTokens, is_open: bool, budget: int | None, matcher: GrammarMatcher | None, may_end: bool
    ) -> None:
        """budget: the most tokens of reasoning before its end is forced. matcher: fresh; None where what follows the
        reasoning is free. may_end: the output may end in the reasoning, though a grammar would follow."""
        self._marks = marks
        self._budget = budget
        self._matcher = matcher
        self._is_open = is_open
        self._is_undecided = not is_open
        self._may_end = may_end
        self.num_accepted = 0
        self._error: str | None = None
        # While undecided.
        self._head = b""  # all the text so far, less leading white space
        self._pending: list[int] = []  # the tokens that spell it
        self._num_matched = 0  # tokens that the matcher has taken too, in case they are its own
        self._is_committed = False  # the last token can only be one of an opening mark
        # While the reasoning is open.
        self._num_reasoning = 0
        self._stage = 0
        self._tail = b""  # bytes that may begin what the stage looks for
        self._recent: list[int] = []  # as many tokens as may begin the forced mark

    @property
    def mask(self) -> bytes | None:
        """See Constraint."""
        if self._is_undecided:
            return self._opening_mask()
        if not self._is_open:
            return None if self._matcher is None else self._matcher.mask
        if self._budget is not None and self._num_reasoning >= self._budget:
            return mask_of([self._forced()], len(self._marks.tokens))
        if self._matcher is None:
            return None
        barred = self._marks.overflowing(self._stage, self._tail)
        if not self._may_end:
            barred.update(self._matcher.ends(self.num_accepted))
        return without(full_mask(len(self._marks.tokens)), barred) if barred else None

    def masks(self, draft_ids: Sequence[int]) -> list[bytes | None]:
        """See Constraint. What it allows after a guess is known where nothing is barred yet, and where the grammar has
        the rest."""
        if not self._is_undecided and not self._is_open and self._matcher is not None:
            return self._matcher.masks(draft_ids)
        if self.num_free > 1:
            return [None] * min(self.num_free, 1 + len(draft_ids))
        return [self.mask]

    @property
    def num_free(self) -> int:
        """See Constraint."""
        if self._matcher is not None:
            return 0
        if self._budget is None or not (self._is_open or self._is_undecided):
            return _UNBOUNDED
        return max(0, self._budget - self._num_reasoning)

    @property
    def error(self) -> str | None:
        """See Constraint."""
        return self._error or (None if self._matcher is None else self._matcher.error)

    def accept(self, token_ids: Iterable[int]) -> None:
        """See Constraint."""
        for token_id in token_ids:
            if self._is_undecided:
                self._take_undecided(token_id)
            elif self._is_open:
                self._take_reasoning(token_id)
            elif self._matcher is not None:
                self._matcher.accept((token_id,))
            self.num_accepted += 1

    def _opening_mask(self) -> bytes | None:
        """What the grammar allows, and the next token of each opening mark that may have begun."""
        if self._matcher is None:
            return None
        size = len(self._pending)
        offered = [ids[size] for _, ids in self._marks.openings if ids[:size] == self._pending and len(ids) > size]
        if self._is_committed:
            return mask_of(offered, len(self._marks.tokens))
        return with_tokens(self._matcher.mask, offered)

    def _take_undecided(self, token_id: int) -> None:
        if self._matcher is not None and not self._is_committed:
            if admits(self._matcher.mask, token_id):
                self._matcher.accept((token_id,))
                self._num_matched += 1
            else:
                self._is_committed = True
        self._head = (self._head + self._marks.tokens[token_id]).lstrip()
        if self._head:
            self._pending.append(token_id)
        opening = next((text for text, _ in self._marks.openings if self._head.startswith(text)), None)
        if opening is not None:
            self._is_undecided, self._is_open = False, True
            if self._matcher is not None:
                self._matcher.rollback(self._num_matched)
            self._read(self._head[len(opening) :])
        elif not any(text.startswith(self._head) for text, _ in self._marks.openings):
            self._is_undecided = False
            if self._is_committed:
                self._error = f"the grammar cannot take token {token_id}, nor is it of a mark that opens reasoning"

    def _take_reasoning(self, token_id: int) -> None:
        self._num_reasoning += 1
        self._recent = [*self._recent, token_id][-len(self._marks.forced) :]
        self._read(self._marks.tokens[token_id])

    def _read(self, text: bytes) -> None:
        """Look for the end of the reasoning in more of its text."""
        text = self._tail + text
        while (found := self._marks.stages[self._stage].pattern.search(text)) is not None:
            text = text[found.end() :]
            self._stage += 1
            if self._stage == len(self._marks.stages):
                self._is_open = False
                if self._matcher is not None:
                    self._matcher.follow(self.num_accepted + 1)
                return
        num_kept = self._marks.stages[self._stage].num_kept
        self._tail = text[len(text) - min(num_kept, len(text)) :]

    def _forced(self) -> int:
        """The next token of the closing mark: from its beginning, unless the last tokens are that."""
        forced, recent = self._marks.forced, self._recent
        size = next(n for n in range(len(forced) - 1, -1, -1) if n == 0 or recent[-n:] == forced[:n])
        return forced[size]
