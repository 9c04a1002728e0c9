"""The tensors of a GGUF file under their Hugging Face names, dequantized."""

from __future__ import annotations

import mmap
import re
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from octavo.loading.dequantize import dequantize, num_bytes
from octavo.loading.gguf_file import GgufFile

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(?P<block>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")
_ALIGNMENT = 8  # bytes, at least, by the specification
_SKIPPED = frozenset({"rope_freqs.weight"})  # it is part of the config


def gguf_weights(file: GgufFile, dtype: torch.dtype, num_threads: int = 2) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor [rows, columns] or [size] of `dtype`), in the file's order.

    A tensor whose name is unknown keeps it. Tensors are dequantized ahead of their use, `num_threads` at once.
    Raises ValueError naming the file and the tensor that is cut short or of a type that cannot be dequantized.
    """
    with file.path.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    # Tensors may share the mapping, which lives as long as they do.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        raw = torch.frombuffer(data, dtype=torch.uint8)
    heads = _heads_to_unpermute(file)
    names = [name for name in file.tensors if name not in _SKIPPED]
    with ThreadPoolExecutor(num_threads) as pool:
        ahead: deque[Future[Tensor]] = deque()
        started = 0
        for name in names:
            while started < len(names) and len(ahead) <= num_threads:
                ahead.append(pool.submit(_read, file, names[started], raw, heads, dtype))
                started += 1
            yield checkpoint_name(name), ahead.popleft().result()


def _read(file: GgufFile, name: str, raw: Tensor, heads: dict[str, int], dtype: torch.dtype) -> Tensor:
    tensor = file.tensors[name]
    try:
        size = num_bytes(tensor.shape, tensor.type)
        if tensor.offset + size > len(raw):
            raise ValueError(f"the file ends at byte {len(raw)}, inside it")
        if tensor.offset % _ALIGNMENT:
            raise ValueError(f"its offset {tensor.offset} is no multiple of {_ALIGNMENT}")
        values = dequantize(raw[tensor.offset : tensor.offset + size], tensor.shape, tensor.type, dtype)
        match = _NAME.fullmatch(name)
        num_heads = heads.get(match["part"]) if match else None
        return values if num_heads is None else _unpermute(values, num_heads)
    except ValueError as error:
        raise ValueError(f"{file.path}: tensor {name}: {error}") from error


def checkpoint_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown one comes back as it is."""
    match = _NAME.fullmatch(name)
    if match is None:
        return name
    block, part, kind = match["block"], match["part"], match["kind"]
    if block is None:
        return f"{_TOP[part]}.{kind}" if part in _TOP else name
    return f"model.layers.{block}.{_IN_BLOCK[part]}.{kind}" if part in _IN_BLOCK else name


def _heads_to_unpermute(file: GgufFile) -> dict[str, int]:
    """Heads of the projections whose rows llama.cpp's converter interleaves: those of its "llama" alone."""
    if file.metadata["general.architecture"] != "llama":
        return {}
    num_heads = file.metadata["llama.attention.head_count"]
    return {"attn_q": num_heads, "attn_k": file.metadata.get("llama.attention.head_count_kv", num_heads)}


def _unpermute(rows: Tensor, num_heads: int) -> Tensor:
    """Each head's rows 0, 2, 4, ... and then 1, 3, 5, ...: from rotation of neighbours to rotation of halves."""
    if len(rows) % (2 * num_heads):
        raise ValueError(f"its {len(rows)} rows are not {num_heads} heads of pairs")
    by_pair = rows.view(num_heads, -1, 2, *rows.shape[1:])
    return by_pair.transpose(1, 2).reshape(rows.shape)
