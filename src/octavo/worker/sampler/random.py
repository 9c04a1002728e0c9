"""Random numbers by counter: a function of (seed, position) alone, so a replay draws the same.

SplitMix64 (Steele, Lea, Flood 2014): output n of the generator that starts at state s is mix(s + (n + 1) * GAMMA).
A request's generator starts at mix(seed), which puts the streams of neighbouring seeds far apart; the
token at position n of its sequence is drawn with output n. Plain ints: one hash a row costs a
microsecond, less than launching it anywhere else.
"""

from __future__ import annotations

_GAMMA = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def _mix(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def stream_of(seed: int) -> int:
    """The state, uint64, that a request with this seed (int64) draws from."""
    return _mix(seed & _MASK)


def uniform(stream: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits."""
    return (_mix((stream + (position + 1) * _GAMMA) & _MASK) >> 11) * 2.0**-53
