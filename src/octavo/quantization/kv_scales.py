"""Scales of an FP8 KV cache in checkpoints: what their config says of them."""

from __future__ import annotations

from octavo.quantization.declared import Declared


def check_kv_cache_scheme(fields: Declared) -> None:
    """Whether scales are for a cache of FP8 is up to the option kv_cache_dtype; here only that they are such scales.

    Raises ValueError naming the field of kv_cache_scheme and its value.
    """
    if fields.get("kv_cache_scheme") == "static":  # AutoFP8's word for the same
        return
    scheme = fields.section("kv_cache_scheme")
    if scheme is None:
        return
    scheme.choice("num_bits", 8, (8,))
    scheme.choice("type", "float", ("float",))
    scheme.choice("strategy", "tensor", ("tensor",))
    scheme.choice("symmetric", True, (True,))
    scheme.choice("dynamic", False, (False,))
    scheme.finish("observer", "observer_kwargs", "block_structure", "group_size", "actorder", "scale_dtype", "zp_dtype")
