"""The module path by which existing scripts import SamplingParams and BeamSearchParams."""

from octavo.protocol.beam_search import BeamSearchParams
from octavo.protocol.sampling import SamplingParams

__all__ = ["BeamSearchParams", "SamplingParams"]
