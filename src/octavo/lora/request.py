"""LoRARequest, under the name by which programs import it."""

from octavo.protocol.lora import LoRARequest

__all__ = ["LoRARequest"]
