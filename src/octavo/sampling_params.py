"""The module path by which existing scripts import SamplingParams and what belongs to it."""

from octavo.protocol.beam_search import BeamSearchParams
from octavo.protocol.repetition import RepetitionDetectionParams
from octavo.protocol.sampling import SamplingParams
from octavo.protocol.structured import GuidedDecodingParams, StructuredOutputsParams

__all__ = [
    "BeamSearchParams",
    "GuidedDecodingParams",
    "RepetitionDetectionParams",
    "SamplingParams",
    "StructuredOutputsParams",
]
