"""Pacing: how long the host may do something else before the device would run dry."""

from __future__ import annotations

_MARGIN_SECONDS = 0.0003  # what waking up may take
_DRIFT = 0.1  # weight of the newest measurement of the host's time
_PREPARATION_SECONDS = 0.05  # what preparing takes, before any was measured


class Pacer:
    """Learns from decode steps what the device and the host take for one. Times are seconds of one clock.

    A step that is submitted as soon as there is room waits behind the one that runs, and whoever arrives meanwhile
    waits for both. Submitted just before the device needs it, it takes them along.
    """

    def __init__(self) -> None:
        self._decode: tuple[int, float] | None = None  # rows and device time of the last decode step
        self._submit = 0.0  # host time to schedule and launch a decode step
        self._began = 0.0  # when the step that runs began, as far as the host knows
        self._per_token: float | None = None  # the least device time that a token took in a step with prompts
        self._preparation = _PREPARATION_SECONDS

    def submitted(self, decodes: bool, seconds: float, now: float, *, alone: bool) -> None:
        """It took the host so long to schedule and launch a step. alone: nothing runs before it."""
        if decodes:
            self._submit += _DRIFT * (seconds - self._submit)
        if alone:
            self._began = now

    def finished(
        self,
        num_rows: int,
        num_tokens: int,
        decodes: bool,
        seconds: float | None,
        now: float,
        next_at: float | None = None,
    ) -> None:
        """A step's result is there. seconds: its device time, if known: a host that comes late for the result learns by
        it when the next one began. next_at: when that was submitted, if one was."""
        end = now if seconds is None else min(now, self._began + seconds)
        self._began = end if next_at is None else max(end, next_at)
        if seconds is None:
            return
        if decodes:
            self._decode = num_rows, seconds
        elif self._per_token is None or seconds < self._per_token * num_tokens:
            self._per_token = seconds / num_tokens

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

    def may_prepare(self, num_tokens: int, now: float) -> bool:
        """Whether the host may prepare something and then submit a step before the device runs dry, while steps with
        prompts, of so many tokens, are in flight.

        What is prepared is a step's launches, so that submitting one, launch by launch, takes about as long. It is not
        measured: while much is in flight the launches themselves wait for the device.
        """
        if self._per_token is None:
            return False
        return now + 2 * self._preparation < self._began + self._per_token * num_tokens

    def prepared(self, seconds: float) -> None:
        """Preparing something took the host so long."""
        self._preparation = seconds
