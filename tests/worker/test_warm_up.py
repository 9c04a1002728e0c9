"""What is compiled ahead is all that plain requests will launch: nothing is left to compile in a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_launches import launches

from octavo.attention.long_prefill import CudnnPrefill, LongPrefillShape, NoLongPrefill, Thresholds
from octavo.attention.triton import TritonAttention
from octavo.config import ModelFacts, SchedulerConfig
from octavo.distributed.executor import DeviceExecutor
from octavo.engine.engine import Engine
from octavo.kernels import triton
from octavo.loading.weights import dummy_weights
from octavo.models.registry import build_model
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.quantization.unquantized import PLAIN
from octavo.scheduler.scheduler import Scheduler
from octavo.worker.device_runner import DeviceLimits, DeviceRunner, DeviceSlots
from octavo.worker.sampler.device_sampler import DeviceSampler
from octavo.worker.warm_up import kernel_jobs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="reads what Triton's interpreter is told")
CPU = torch.device("cpu")
DTYPE = torch.bfloat16
HEADS, KV_HEADS, DIM, HIDDEN, INNER, VOCAB, BLOCK = 4, 2, 64, 48, 80, 112, 16


def dense(query: torch.Tensor, *_rest: Any) -> Any:
    """Laid out as cuDNN does: like the queries, tokens first. What it computes does not matter here."""
    _, heads, tokens, dim = query.shape
    part = torch.zeros(1, tokens, heads, dim, dtype=query.dtype).transpose(1, 2)
    return part, torch.zeros(1, heads, tokens)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize(("family", "max_model_len"), [("Qwen3ForCausalLM", 96), ("LlamaForCausalLM", 604)])
def test_a_step_finds_its_kernels_compiled(family: str, max_model_len: int) -> None:
    triton.load()
    config = {
        "architectures": [family],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "max_position_embeddings": max_model_len,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    model = build_model(config, DTYPE, CPU)
    model.load_weights(dummy_weights(model, 0, CPU))
    facts = ModelFacts(
        max_position_embeddings=max_model_len,
        vocab_size=VOCAB,
        num_layers=1,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        num_heads=HEADS,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        qk_norm=family.startswith("Qwen3"),
    )
    options = SimpleNamespace(kv_cache_dtype="auto", attention_backend="auto")
    engine_config: Any = SimpleNamespace(max_model_len=max_model_len, block_size=BLOCK, options=options, lora=None)
    with launches() as compiled:
        for job in kernel_jobs(engine_config, facts, PLAIN, DTYPE, CPU):
            if "skinny" not in str(job):  # on a CPU, no layer asks for it
                job()

    limits = DeviceLimits(max_num_seqs=4, max_num_batched_tokens=600, max_model_len=max_model_len, block_size=BLOCK)
    num_blocks = 5 * -(-max_model_len // BLOCK)
    shape = LongPrefillShape(HEADS, KV_HEADS, DIM, DTYPE, DTYPE, BLOCK, max_model_len, None, CPU)
    long = CudnnPrefill(shape, Thresholds(256, 256), 256, dense) if max_model_len > 500 else NoLongPrefill()
    cache = torch.zeros(1, num_blocks, 2, KV_HEADS, BLOCK, DIM, dtype=DTYPE)
    attention = TritonAttention(cache, HEADS, 4, limits.max_num_seqs, long)
    runner = DeviceRunner(
        model, attention, DeviceSampler(4, VOCAB, CPU), DeviceSlots(limits, CPU), limits, use_graphs=False
    )
    scheduling = SchedulerConfig(
        max_num_seqs=4, max_num_batched_tokens=600, max_model_len=max_model_len, block_size=BLOCK, num_blocks=num_blocks
    )
    engine = Engine(Scheduler(scheduling), DeviceExecutor(runner), 2)
    with launches() as launched:
        for index, length in enumerate((3, 40, max_model_len - 10, 17, 1)):
            sampling = SamplingParams(temperature=float(index % 2), seed=index)
            prompt = [(index + i) % VOCAB for i in range(length)]
            engine.add(
                Request(request_id=str(index), prompt_token_ids=prompt, sampling=sampling, max_tokens=2 + index % 2)
            )
        while engine.has_work:
            engine.step()
    kernels = {found[0] for found in launched}
    assert len(kernels) >= 8
    assert {"_gather_kv", "_merge_attention"} <= kernels or isinstance(long, NoLongPrefill)
    missing = launched - compiled
    names = {found[0] for found in missing}
    assert not missing, "\n".join(map(str, missing | {found for found in compiled if found[0] in names}))
