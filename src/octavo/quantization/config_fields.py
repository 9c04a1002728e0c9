"""A checkpoint's quantization_config, read field by field: every field is used, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Of AWQ and GPTQ: with what, from what and for which kernels a checkpoint was made.
HOW_MADE = (
    *("meta", "provider", "quantizer", "packing_format", "autoround_version", "backend", "exllama_config", "do_fuse"),
    *("use_exllama", "use_cuda_fp16", "disable_exllama", "fuse_max_seq_len", "modules_to_fuse", "max_input_length"),
    *("model_seqlen", "model_name_or_path", "model_file_base_name", "tokenizer", "dataset", "batch_size", "seqlen"),
    *("nsamples", "iters", "lr", "minmax_lr", "amp", "low_gpu_mem_usage", "gradient_accumulate_steps", "pad_token_id"),
    *("enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input", "supported_types", "scale_dtype"),
    *("to_quant_block_names", "quant_block_list", "cache_block_outputs", "module_name_preceding_first_block"),
    *("damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "act_group_aware", "mse", "hyb_act"),
    *("offload_to_disk", "offload_to_disk_path", "pack_impl", "uri"),
)


class Fields:
    """One JSON object of it. Every method raises ValueError naming the field, its value and what is allowed; a field
    of null counts as absent."""

    def __init__(self, values: Mapping[str, Any], path: str = "quantization_config") -> None:
        """path: of the object in config.json, for messages."""
        self._values = {name: value for name, value in values.items() if value is not None}
        self._path = path
        self._read: set[str] = set()

    def path(self, name: str) -> str:
        return f"{self._path}.{name}"

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def names(self) -> list[str]:
        return list(self._values)

    def any(self, name: str, default: Any = None) -> Any:
        """The value as it is; None where there is none."""
        self._read.add(name)
        return self._values.get(name, default)

    def choice(self, name: str, allowed: Sequence[Any], default: Any = None) -> Any:
        """One of `allowed`; without a default the field must be there."""
        value = self.any(name, default)
        if not any(value == one and type(value) is type(one) for one in allowed):
            raise self.refused(name, ", ".join(map(str, allowed)))
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.any(name, default)
        if not isinstance(value, bool):
            raise self.refused(name, "true, false")
        return value

    def integer(self, name: str) -> int:
        value = self.any(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refused(name, "an integer")
        return value

    def strings(self, name: str) -> tuple[str, ...]:
        """A list of strings, empty where there is none."""
        value = self.any(name, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.refused(name, "a list of strings")
        return tuple(value)

    def inner(self, name: str) -> Fields:
        """The object in a field, which must be there."""
        value = self.any(name)
        if not isinstance(value, Mapping):
            raise self.refused(name, "an object")
        return Fields(value, self.path(name))

    def finish(self, *bookkeeping: str) -> None:
        """All that is used was read. bookkeeping: fields that say how the checkpoint was made, not what it is.

        Raises ValueError naming the first field that is left.
        """
        for name in self._values:
            if name not in self._read and name not in bookkeeping:
                allowed = ", ".join(sorted(self._read | set(bookkeeping)))
                raise ValueError(
                    f"config field {self.path(name)}={self._values[name]!r} is not supported; allowed: {allowed}"
                )

    def refused(self, name: str, allowed: str) -> ValueError:
        if name not in self._values:
            return ValueError(f"config field {self.path(name)} is missing; allowed: {allowed}")
        return ValueError(f"config field {self.path(name)}={self._values[name]!r} is not supported; allowed: {allowed}")
