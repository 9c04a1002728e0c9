"""Memory that a model's weights take on a GPU in each quantized format, beside bfloat16.

    PYTHONPATH=src python benchmarks/gpu/weight_memory.py --model FOLDER [--out FILE.json]

FOLDER has a config.json; weights are random, and there is no KV cache and no graph. `projections` are the linear layers
but for the language head, which most formats leave as it is. Exits 1 if they take more bits a weight than the format's
codes and scales do, or if the allocator holds more than the model says.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from check_quantized import CHANNEL, GPTQ, INT4, NF4, TOKEN, compressed

from octavo.config import Quantization
from octavo.kernels import triton
from octavo.layers.linear import Linear
from octavo.loading.source import ModelSource, resolve_source
from octavo.loading.weights import load_model
from octavo.models.base import CausalLM

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GIB = 1 << 30
HEAD_IS_PLAIN = {"ignore": ["lm_head"]}
INT8 = {"num_bits": 8, "type": "int"}


class Format(NamedTuple):
    """most: bits a weight of the projections, scales included."""

    option: Quantization | None
    config: dict[str, Any] | None
    most: float


FORMATS = {
    "bfloat16": Format(None, None, 16),
    "fp8, while loaded": Format("fp8", None, 8.1),
    "fp8 blocks": Format(
        None, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, 8.1
    ),
    "awq, 4 bits, g128": Format(None, {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, 4.26),
    "gptq, 8 bits, g128": Format(None, GPTQ | {"bits": 8}, 8.26),
    "compressed-tensors, 4 bits, g128": Format(None, compressed("pack-quantized", INT4) | HEAD_IS_PLAIN, 4.26),
    "compressed-tensors, int8": Format(
        None, compressed("int-quantized", INT8 | CHANNEL, INT8 | TOKEN) | HEAD_IS_PLAIN, 8.1
    ),
    "bitsandbytes, nf4": Format(None, NF4, 4.51),
}


class Row(NamedTuple):
    """Bytes; bits a weight of the projections; seconds to build the model. peak: of the allocator, while loading."""

    projections: int
    bits: float
    model: int
    allocated: int
    peak: int
    seconds: float


def measure(source: ModelSource, form: Format) -> Row:
    """Build the model, and let go of it."""
    values = source.config | ({} if form.config is None else {"quantization_config": form.config})
    on_gpu = DEVICE.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    model = load_model(replace(source, config=values), torch.bfloat16, DEVICE, 0, form.option)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    gc.collect()
    allocated, peak = (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) if on_gpu else (0, 0)
    projections, num_weights = projection_bytes(model)
    return Row(projections, 8 * projections / num_weights, model.weight_bytes, allocated - before, peak, seconds)


def projection_bytes(model: CausalLM) -> tuple[int, int]:
    """Bytes and weights of the linear layers but for the head."""
    layers = [module for name, module in model.named_modules() if isinstance(module, Linear) and name != "lm_head"]
    num_bytes = sum(layer.num_bytes() + sum(p.nbytes for p in layer.parameters()) for layer in layers)
    return num_bytes, sum(layer.in_features * layer.out_features for layer in layers)


def problems(form: Format, row: Row) -> list[str]:
    found = []
    if DEVICE.type == "cuda":  # a CPU dequantizes
        if row.bits > form.most:
            found.append(f"{row.bits:.2f} bits a weight, expected at most {form.most:.2f}")
        if row.allocated > 1.02 * row.model:
            found.append(f"{row.allocated / GIB:.2f} GiB are allocated, the model says {row.model / GIB:.2f}")
    return found


def report(rows: dict[str, Row]) -> str:
    plain = next(iter(rows.values()))
    lines = [
        "| format | projections, GiB | bits a weight | of bfloat16 | model, GiB | of bfloat16 | allocated | peak | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        ratios = row.projections / plain.projections, row.model / plain.model
        lines.append(
            f"| {name} | {row.projections / GIB:.2f} | {row.bits:.2f} | {ratios[0]:.3f} | {row.model / GIB:.2f} | "
            f"{ratios[1]:.3f} | {row.allocated / GIB:.2f} | {row.peak / GIB:.2f} | {row.seconds:.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder with a config.json")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args()
    triton.load()
    source = resolve_source(arguments.model, load_format="dummy")
    rows: dict[str, Row] = {}
    failed = False
    for name, form in FORMATS.items():
        rows[name] = measure(source, form)
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        for problem in problems(form, rows[name]):
            print(f"FAIL {name}: {problem}", flush=True)
            failed = True
    print(report(rows))
    if arguments.out:
        found = {"model": Path(arguments.model).name, "device": str(DEVICE)}
        found |= {name: row._asdict() for name, row in rows.items()}
        arguments.out.write_text(json.dumps(found, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
