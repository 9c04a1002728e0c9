"""The module path by which existing scripts import SamplingParams."""

from octavo.protocol.sampling import SamplingParams

__all__ = ["SamplingParams"]
