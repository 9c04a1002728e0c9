"""Scales of an FP8 KV cache in checkpoints: what their config says of them."""

from __future__ import annotations

from octavo.quantization.config_fields import Fields


def check_kv_cache_scheme(fields: Fields) -> None:
    """fields: with a kv_cache_scheme or none. Whether its scales are needed is up to the option kv_cache_dtype; here
    only that they are for a cache of FP8.

    Raises ValueError naming the field of kv_cache_scheme and its value.
    """
    if fields.any("kv_cache_scheme") in (None, "static"):  # a word of AutoFP8's for all of the following
        return
    scheme = fields.inner("kv_cache_scheme")
    scheme.choice("num_bits", (8,), 8)
    scheme.choice("type", ("float",), "float")
    scheme.choice("strategy", ("tensor",), "tensor")
    scheme.choice("symmetric", (True,), True)
    scheme.choice("dynamic", (False,), False)
    scheme.finish("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
