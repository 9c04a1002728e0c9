"""LoRARequest: which adapter a request wants (LoRA: Hu et al., 2021)."""

from __future__ import annotations

import msgspec


class LoRARequest(msgspec.Struct, frozen=True):
    """One adapter, by a name and a number of the caller's. Requests that name the same number share what was loaded.

    lora_name: for errors and metrics. lora_int_id: >= 1; no two adapters may have the same. lora_path: a folder as
    PEFT saves it (adapter_config.json and adapter_model.safetensors), or the id of a model on the hub.

    Raises ValueError naming the field that is out of range.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"lora_int_id={self.lora_int_id} is out of range; allowed: >= 1")
        if not self.lora_name:
            raise ValueError("lora_name='' is empty; allowed: any name")
        if not self.lora_path:
            raise ValueError(f"lora_path='' of adapter {self.lora_name!r} is empty; allowed: a folder, or a hub id")
