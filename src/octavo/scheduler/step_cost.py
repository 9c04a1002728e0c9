"""StepCost: what a step with drafts takes, learned from measured steps."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from math import sqrt

# Token counts at which the curve has a corner: 1, 2, 3, 4, 6, 8, 12, 16, ..., 65536; between them it is straight.
_CORNERS = sorted({scale << shift for scale in (2, 3) for shift in range(16)} | {1})
_NUM_CORNERS = len(_CORNERS)
_PER_ROW, _ANY_DRAFT, _PASS_SHARE = range(_NUM_CORNERS, _NUM_CORNERS + 3)
_NUM_PARAMETERS = _NUM_CORNERS + 3

_DRIFT = 0.004**2  # variance that a parameter gains a step, relative to its scale squared: conditions change
_LEAST_NOISE, _FIRST_NOISE, _MOST_NOISE = 0.01**2, 0.05**2, 0.15**2  # variance of a measurement, relative
_LEAST_SHORTFALL = 0.15  # part of an estimate that a measurement must lack to disprove it
_LEAST_SHARE = 0.05  # of a measured step's seconds, in its corners
_TELLING = 0.3  # weight of a corner in a measurement from which on it counts as measured
_FILL_EVERY = 8  # observations after which unmeasured corners follow their neighbours
_LONGER_GAIN, _SHORTER_GAIN = 0.2, 0.5  # of one measurement in what steps without drafts take
_SHARE_SHIFT = 0.05  # standard deviation of a pass's share of a step, from one number of rows to others
_SLOPE, _SLOPE_DOUBT = 0.7, 0.4  # seconds of one token more, and their deviation, by what one of a prompt takes
_NUM_SLOPES = 8  # measurements of that which are kept
_TELLING_PROMPT = 512  # tokens of a step from which on it tells that
_PLAIN_LIFE = 256  # observations for which that is believed
_PLAIN_CLIP = 1.25  # times that which one measurement may take and be believed
_CLIP = 2.5  # standard deviations by which one measurement may differ and be believed: others are accidents


def is_alike(num_rows: int, before: int) -> bool:
    """Whether what was found for steps of so many rows before goes for num_rows too."""
    return abs(num_rows - before) * 16 <= num_rows


class StepCost:
    """Seconds of a step: curve(tokens) + rows * a + [it verifies drafts] * b + passes * c * plain(rows).

    The curve is nearly flat where weights are read once (few tokens, a GPU) and nearly straight through zero where
    arithmetic rules (many tokens, a CPU); a is what each row's context adds, b what verification adds as such, c the
    share of a step without drafts that a pass of the draft model takes: the two are of one kind, so it is much the same
    for any number of rows. The parameters follow the measurements as in a Kalman filter without covariances: what is
    known poorly, or has not been seen for long, takes most of the blame. Corners never measured lie on the line through
    their measured neighbours, and are poorly known; beyond these the curve rises by no more than a prompt's token
    takes. Accidents make steps long, none makes them short: so what is far above the estimate counts little, and what
    is far below shows that the estimate was an accident.

    What drafts are compared with, steps without any, is not left to the parameters where such steps were measured
    lately: others, which are many where drafts pay, would pull its estimate along with whatever they cannot explain.
    """

    def __init__(self) -> None:
        self._mean = [0.0] * _NUM_PARAMETERS  # seconds
        self._variance = [0.0] * _NUM_PARAMETERS
        self._scale = [0.0] * _NUM_PARAMETERS  # seconds: size against which drift is meant
        self._seen = [0] * _NUM_PARAMETERS  # number of the last observation that told of it
        self._measured = [False] * _NUM_CORNERS
        self._most_tokens = 0  # in a step measured so far
        self._slopes: deque[float] = deque(maxlen=_NUM_SLOPES)  # seconds of a token in steps with prompts
        self._rows_with_passes: set[int] = set()  # binary digits of numbers of rows that steps with passes had
        self._pass_rows = 0  # of the last step with passes
        self._noise = _FIRST_NOISE
        self._num_observed = 0
        self._plain_rows = self._plain_at = 0  # of the last step without drafts: its rows, and its number
        self._plain_seconds = 0.0  # of such steps

    @property
    def is_known(self) -> bool:
        """Whether a step has been observed: nothing can be estimated before."""
        return self._num_observed > 0

    @property
    def most_tokens(self) -> int:
        """The most tokens that an observed step had."""
        return self._most_tokens

    def observe(self, num_rows: int, num_tokens: int, num_passes: int, num_drafts: int, seconds: float) -> None:
        """A step of num_rows rows and num_tokens tokens, num_drafts of them drafts, took so many seconds, > 0."""
        if not self._num_observed:
            self._set_priors(num_rows, seconds)
        self._num_observed += 1
        self._most_tokens = max(self._most_tokens, num_tokens)
        if num_tokens == num_rows and not num_passes:
            known = self._plain_seconds if self.knows_plain(num_rows) else seconds
            gain = _SHORTER_GAIN if seconds < known else _LONGER_GAIN
            self._plain_seconds = known + gain * (min(seconds, _PLAIN_CLIP * known) - known)
            self._plain_rows, self._plain_at = num_rows, self._num_observed
        features = self._features(num_rows, num_tokens, num_passes, num_drafts)
        mean, variance, now = self._mean, self._variance, self._num_observed
        if num_passes:
            if not is_alike(num_rows, self._pass_rows):
                variance[_PASS_SHARE] += _SHARE_SHIFT**2
            self._pass_rows = num_rows
            self._rows_with_passes.add(num_rows.bit_length())
        estimate = sum(weight * mean[index] for index, weight in features)
        for index, _ in features:
            variance[index] += _DRIFT * self._scale[index] ** 2 * (now - self._seen[index])
            self._seen[index] = now
        noise = self._noise * estimate * estimate
        spread = sum(weight * weight * variance[index] for index, weight in features)
        shortfall = 1.0 - seconds / estimate
        if shortfall > _LEAST_SHORTFALL and (shortfall * estimate) ** 2 > _CLIP**2 * (spread + noise):
            for index, _ in features:
                variance[index] += (shortfall * mean[index]) ** 2
            spread = sum(weight * weight * variance[index] for index, weight in features)
        total = spread + noise
        error = min(seconds - estimate, _CLIP * sqrt(total))
        is_news = False
        for index, weight in features:
            gain = weight * variance[index] / total
            mean[index] = max(mean[index] + gain * error, 0.0)
            variance[index] *= 1.0 - gain * weight
            if index < _NUM_CORNERS:
                mean[index] = max(mean[index], _LEAST_SHARE * seconds)
                self._scale[index] = mean[index]
                if weight >= _TELLING and not self._measured[index]:
                    self._measured[index] = is_news = True
        # What the parameters' own uncertainty explains is not noise.
        surprise = max(error * error - spread, 0.0) / (estimate * estimate)
        self._noise = min(max(self._noise + 0.02 * (surprise - self._noise), _LEAST_NOISE), _MOST_NOISE)
        if is_news or not now % _FILL_EVERY:
            self._fill()

    def observe_prompts(self, num_tokens: int, seconds: float) -> None:
        """A step with prompts took so many seconds, > 0, without what a draft model did in it."""
        if num_tokens >= _TELLING_PROMPT:
            self._slopes.append(seconds / num_tokens)

    def estimate(self, num_rows: int, num_tokens: float, num_passes: int, num_drafts: float) -> tuple[float, float]:
        """Seconds that such a step will take, and the standard deviation of that estimate."""
        mean, variance = self._mean, self._variance
        right = min(bisect_right(_CORNERS, num_tokens), _NUM_CORNERS - 1)
        left = right - 1
        share = (num_tokens - _CORNERS[left]) / (_CORNERS[right] - _CORNERS[left])
        rest = 1.0 - share
        seconds = rest * mean[left] + share * mean[right] + num_rows * mean[_PER_ROW]
        spread = rest * rest * variance[left] + share * share * variance[right]
        if num_drafts:
            seconds += mean[_ANY_DRAFT]
            spread += variance[_ANY_DRAFT]
        if num_passes:
            shift = 0.0 if is_alike(num_rows, self._pass_rows) else _SHARE_SHIFT**2
            weight = num_passes * self.plain(num_rows)
            seconds += weight * mean[_PASS_SHARE]
            spread += weight * weight * (variance[_PASS_SHARE] + shift)
        return seconds, sqrt(spread)

    def plain(self, num_rows: int) -> float:
        """Seconds that a step of so many rows takes without drafts."""
        return self._plain_seconds if self.knows_plain(num_rows) else self.estimate(num_rows, num_rows, 0, 0)[0]

    def knows_passes(self, num_rows: int) -> bool:
        """Whether passes have been measured in steps of about so many rows."""
        return num_rows.bit_length() in self._rows_with_passes

    def knows_plain(self, num_rows: int) -> bool:
        """Whether steps of about so many rows were measured lately without drafts."""
        is_recent = self._num_observed - self._plain_at <= _PLAIN_LIFE
        return is_recent and is_alike(num_rows, self._plain_rows)

    def _set_priors(self, num_rows: int, seconds: float) -> None:
        for index, mean, deviation in (
            (_PER_ROW, 0.0, 0.1 * seconds / max(num_rows, 8)),
            (_ANY_DRAFT, 0.0, 0.03 * seconds),
            (_PASS_SHARE, 0.15, 0.15),
        ):
            self._mean[index] = mean
            self._variance[index] = deviation * deviation
            self._scale[index] = deviation
        for corner in range(_NUM_CORNERS):
            self._mean[corner], self._variance[corner], self._scale[corner] = seconds, seconds * seconds, seconds

    def _features(self, num_rows: int, num_tokens: int, num_passes: int, num_drafts: int) -> list[tuple[int, float]]:
        """(parameter, weight) of those that such a step's seconds are the weighted sum of."""
        right = min(bisect_right(_CORNERS, num_tokens), _NUM_CORNERS - 1)
        share = (num_tokens - _CORNERS[right - 1]) / (_CORNERS[right] - _CORNERS[right - 1])
        features = [(right - 1, 1.0 - share), (right, share), (_PER_ROW, float(num_rows))]
        if num_drafts:
            features.append((_ANY_DRAFT, 1.0))
        if num_passes:
            features.append((_PASS_SHARE, num_passes * self.plain(num_rows)))
        return [(index, weight) for index, weight in features if weight]

    def _fill(self) -> None:
        """Give corners never measured what their measured neighbours suggest."""
        mean, variance, measured = self._mean, self._variance, self._measured
        first = measured.index(True)
        for corner in range(first):
            mean[corner] = mean[first]
            variance[corner] = (0.5 * mean[first]) ** 2
        below = first
        while True:
            above = next((corner for corner in range(below + 1, _NUM_CORNERS) if measured[corner]), None)
            if above is None:
                break
            rise = (mean[above] - mean[below]) / (_CORNERS[above] - _CORNERS[below])
            for corner in range(below + 1, above):
                mean[corner] = mean[below] + rise * (_CORNERS[corner] - _CORNERS[below])
                variance[corner] = (0.05 * mean[below] + 0.2 * (mean[above] - mean[below])) ** 2
            below = above
        straight = mean[below] / _CORNERS[below]  # seconds a token, were the curve straight through zero
        lower = next((corner for corner in range(below - 1, -1, -1) if measured[corner]), None)
        rise = 0.3 * straight
        if lower is not None:
            rise = (mean[below] - mean[lower]) / (_CORNERS[below] - _CORNERS[lower])
            rise = min(max(rise, 0.0), straight)
        doubt = 0.5 * straight
        if self._slopes:
            slope = min(self._slopes)
            rise, doubt = min(rise, _SLOPE * slope), min(doubt, _SLOPE_DOUBT * slope)
        for corner in range(below + 1, _NUM_CORNERS):
            beyond = _CORNERS[corner] - _CORNERS[below]
            mean[corner] = mean[below] + rise * beyond
            variance[corner] = (doubt * beyond) ** 2
