"""Reasoning between an opening and a closing mark, before the answer."""

from __future__ import annotations

from octavo.structured.events import ContentText, ReasoningText
from octavo.structured.incremental import IncrementalParser, Markers, Script


class TaggedReasoning(IncrementalParser):
    """Reasoning is what stands between the marks at the beginning; space next to a mark belongs to neither side.
    Without a closing mark, all that follows the opening one is reasoning."""

    def __init__(self, openings: tuple[str, ...], closings: tuple[str, ...], is_open: bool) -> None:
        """openings: none where reasoning cannot begin any more. is_open: the prompt has opened it, or the model needs
        no mark for it."""
        super().__init__()
        self._openings = openings
        self._closings = Markers(*closings)
        self._is_open = is_open
        self._space: list[str] = []  # reasoning, if more of it follows

    def _parse(self) -> Script[None]:
        space = yield from self._spaces()
        opened = (yield from self._accept(*self._openings)) if self._openings else False
        if opened or self._is_open:
            yield from self._spaces()
            yield from self._until(self._closings, self._reasoning)
            yield from self._spaces()
        elif space:
            self._content(space)
        while (yield from self._peek()):
            self._content(self._read(len(self._text)))

    def _reasoning(self, text: str) -> None:
        self._source.clear()
        visible = text.rstrip()
        if visible:
            self._events.append(ReasoningText("".join(self._space) + visible))
            self._space.clear()
        if len(visible) < len(text):
            self._space.append(text[len(visible) :])

    def _content(self, text: str) -> None:
        self._source.clear()
        self._events.append(ContentText(text))
