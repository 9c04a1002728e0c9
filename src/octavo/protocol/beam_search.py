"""BeamSearchParams: what a caller wishes of a beam search. Immutable; it validates itself."""

from __future__ import annotations

import msgspec

from octavo.protocol import checks
from octavo.protocol.fields import fields_of
from octavo.protocol.sampling import SamplingParams

MAX_BEAM_WIDTH = 16
_ROWS = fields_of("SamplingParams")


class BeamSearchParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the most likely outputs are searched for.

    beam_width: outputs kept at each length and returned, 1..16.
    max_tokens: >= 1; ignore_eos: the end of sequence does not end an output.
    temperature: 0, for outputs are ranked by the model's own log-probabilities.
    length_penalty: outputs of n tokens are ranked by their log-probability / n ** length_penalty.
    early_stopping: when to end. True: once beam_width outputs have ended. False: also, once the best unended one
    would rank below them at its present length. "never": at the length that favours it most.
    include_stop_str_in_output: keep the end-of-sequence token.
    Raises ValueError naming the field, the value and the allowed range.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        checks.integer("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH)
        for name in ("max_tokens", "length_penalty", "early_stopping"):
            _ROWS[name].range.check(name, getattr(self, name))
        if self.temperature != 0:
            raise ValueError(f"temperature={self.temperature!r} is refused in a beam search; allowed: 0")


def beams_of(sampling: SamplingParams, max_tokens: int) -> BeamSearchParams:
    """The search that SamplingParams(use_beam_search=True) ask for, of best_of, else n, beams.

    Raises ValueError naming the field of `sampling` whose number of beams is too large.
    """
    name = "n" if sampling.best_of is None else "best_of"
    if sampling.num_completions > MAX_BEAM_WIDTH:
        raise ValueError(f"{name}={sampling.num_completions} is out of range; allowed: 1..{MAX_BEAM_WIDTH} beams")
    return BeamSearchParams(
        beam_width=sampling.num_completions,
        max_tokens=max_tokens,
        ignore_eos=sampling.ignore_eos,
        length_penalty=sampling.length_penalty,
        include_stop_str_in_output=sampling.include_stop_str_in_output,
        early_stopping=sampling.early_stopping,
    )
