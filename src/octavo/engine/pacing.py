"""Pacing: how long the next step may wait for requests to join it before the device would run dry."""

from __future__ import annotations

_MARGIN_SECONDS = 0.0003  # what waking up may take
_DRIFT = 0.1  # weight of the newest measurement of the host's time


class Pacer:
    """Learns from decode steps what the device and the host take for one. Times are seconds of one clock.

    A step that is submitted as soon as there is room waits behind the one that runs, and whoever arrives meanwhile
    waits for both. Submitted just before the device needs it, it takes them along.
    """

    def __init__(self) -> None:
        self._decode: tuple[int, float] | None = None  # rows and device time of the last decode step
        self._submit = 0.0  # host time to schedule and launch a decode step
        self._began = 0.0  # when the step that runs began, as far as the host knows

    def submitted(self, decodes: bool, seconds: float, now: float, *, alone: bool) -> None:
        """It took the host so long to schedule and launch a step. alone: nothing runs before it."""
        if decodes:
            self._submit += _DRIFT * (seconds - self._submit)
        if alone:
            self._began = now

    def finished(self, num_rows: int, decodes: bool, seconds: float | None, now: float) -> None:
        """A step's result is there; the next one in flight began at that moment. seconds: its device time, if known."""
        self._began = now
        if decodes and seconds is not None:
            self._decode = num_rows, seconds

    def spare(self, num_rows: int, now: float) -> float:
        """Seconds until the next step must be on its way, while one of so many rows runs. 0: it is late already.

        At least what decoding them takes: a row more makes no step shorter, and a step of fewer rows takes at least
        its share.
        """
        if self._decode is None:
            return 0.0
        rows, seconds = self._decode
        end = self._began + seconds * min(1.0, num_rows / rows)
        return max(0.0, end - 2 * self._submit - _MARGIN_SECONDS - now)
