#!/usr/bin/env python3
"""The workload `mixed` of gpu_workloads.py with LoRA adapters, on one GPU.

    PYTHONPATH=src python benchmarks/gpu/lora.py --model benchmarks/gpu/models/llama3-8b [--out FILE.jsonl]

Random adapters of rank 16 on every projection. Rows: the start; no request has an adapter; four adapters in turn; a
hundred, drawn by Zipf's law (the n-th with a chance of 1/n), of which --max-loras lie on the GPU at once and all in
the host's memory. The hundred are links to four files: each is read and copied as if it were its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from octavo import LLM, LoRARequest, SamplingParams

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_workloads import mixed

RANK = 16
NUM_FILES, NUM_ZIPF = 4, 100


def write_adapter(folder: Path, config: dict[str, Any], seed: int) -> None:
    """What PEFT would have saved."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * (hidden // config["num_attention_heads"])
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv)}
    shapes |= {"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner)}
    shapes |= {"mlp.down_proj": (inner, hidden)}
    # One layer's numbers serve all: drawing them takes longer than all else.
    drawn = {
        name: [torch.randn(size, generator=generator).bfloat16() * 0.01 for size in ((RANK, n_in), (n_out, RANK))]
        for name, (n_in, n_out) in shapes.items()
    }
    tensors = {
        f"base_model.model.model.layers.{layer}.{name}.lora_{end}.weight": tensor.clone()
        for layer in range(config["num_hidden_layers"])
        for name, pair in drawn.items()
        for end, tensor in zip("AB", pair)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    names = [name.partition(".")[2] for name in shapes]
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(fields))


def run(llm: LLM, seed: int, adapters: Sequence[LoRARequest | None]) -> dict[str, float]:
    """adapters: of the requests, in turn. One warm-up of 64 requests first, in which adapters are loaded."""
    prompts, outs = mixed(random.Random(seed))
    which = [adapters[i % len(adapters)] for i in range(len(outs))]
    params = [SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in outs]
    requests: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    seconds, loads = 0.0, 0
    for part in (slice(0, 64), slice(None)):
        loads = llm.stats().num_adapter_loads_total
        began = time.perf_counter()
        outputs = llm.generate(requests[part], params[part], use_tqdm=False, lora_request=which[part])
        seconds = time.perf_counter() - began
        assert [len(o.outputs[0].token_ids) for o in outputs] == outs[part]
        assert llm.reset_prefix_cache()
    llm.audit()
    loads = llm.stats().num_adapter_loads_total - loads
    return {"seconds": round(seconds, 3), "output_tok_s": round(sum(outs) / seconds, 1), "adapter_loads": loads}


def main() -> None:
    ap = argparse.ArgumentParser()
    ap.add_argument("--model", required=True)
    ap.add_argument("--max-loras", type=int, default=8)
    ap.add_argument("--kwargs", default="{}", help="JSON of further LLM() arguments")
    ap.add_argument("--out")
    args = ap.parse_args()
    config = json.loads((Path(args.model) / "config.json").read_text())
    label = {"model": Path(args.model).name, "kwargs": args.kwargs, "max_loras": args.max_loras}

    def report(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps({**label, **row}) + "\n")

    with tempfile.TemporaryDirectory() as root:
        began = time.perf_counter()
        sizes = {"max_loras": args.max_loras, "max_lora_rank": RANK, "max_cpu_loras": NUM_ZIPF + NUM_FILES}
        options = {"load_format": "dummy", "skip_tokenizer_init": True, "seed": 0, "enable_lora": True, **sizes}
        llm = LLM(args.model, **options, **json.loads(args.kwargs))
        report({"workload": "startup", "seconds": round(time.perf_counter() - began, 2)})
        folders = [Path(root) / f"file{index}" for index in range(NUM_FILES)]
        for index, folder in enumerate(folders):
            write_adapter(folder, config, index)
        loras = [LoRARequest(f"a{index}", index + 1, str(folder)) for index, folder in enumerate(folders)]
        report({"workload": "mixed, 0 adapters", **run(llm, 1000, [None])})
        report({"workload": "mixed, 4 adapters", **run(llm, 1000, loras)})
        many = []
        for index in range(NUM_ZIPF):
            folder = Path(root) / f"link{index}"
            os.symlink(folders[index % NUM_FILES], folder)
            many.append(LoRARequest(f"z{index}", 100 + index, str(folder)))
        rng = random.Random(7)
        drawn = rng.choices(many, [1 / (index + 1) for index in range(NUM_ZIPF)], k=1000)
        report({"workload": "mixed, 100 adapters", **run(llm, 1000, drawn)})


if __name__ == "__main__":
    main()
