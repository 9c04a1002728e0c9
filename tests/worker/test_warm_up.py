"""What is compiled ahead is all that plain requests will launch: nothing is left to compile in a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from kernel_launches import launches

from octavo.attention.long_prefill import CudnnPrefill, LongPrefillShape, NoLongPrefill, Thresholds
from octavo.attention.triton import TritonAttention
from octavo.config import SchedulerConfig
from octavo.distributed.executor import DeviceExecutor
from octavo.engine.engine import Engine
from octavo.kernels import triton
from octavo.layers.linear import Linear
from octavo.loading.weights import dummy_weights
from octavo.models.registry import build_model, model_facts
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.quantization.registry import method_of
from octavo.quantization.scheme import LinearShape
from octavo.quantization.unquantized import PLAIN
from octavo.scheduler.scheduler import Scheduler
from octavo.worker.device_runner import DeviceLimits, DeviceRunner, DeviceSlots
from octavo.worker.sampler.device_sampler import DeviceSampler
from octavo.worker.warm_up import KernelShapes, kernel_jobs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="reads what Triton's interpreter is told")
CPU = torch.device("cpu")
DTYPE = torch.bfloat16
HEADS, KV_HEADS, DIM, HIDDEN, INNER, VOCAB, BLOCK = 4, 2, 64, 48, 80, 112, 16


def dense(query: torch.Tensor, *_rest: Any) -> Any:
    """Laid out as cuDNN does: like the queries, tokens first. What it computes does not matter here."""
    _, heads, tokens, dim = query.shape
    part = torch.zeros(1, tokens, heads, dim, dtype=query.dtype).transpose(1, 2)
    return part, torch.zeros(1, heads, tokens)


def config_of(family: str, max_model_len: int) -> dict[str, Any]:
    return {
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


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize(("family", "max_model_len"), [("Qwen3ForCausalLM", 96), ("LlamaForCausalLM", 604)])
def test_a_step_finds_its_kernels_compiled(family: str, max_model_len: int) -> None:
    triton.load()
    config = config_of(family, max_model_len)
    model = build_model(config, DTYPE, CPU)
    model.load_weights(dummy_weights(model, 0, CPU))
    model.embed_tokens._fused = triton.get()
    facts = model_facts(config)
    options = SimpleNamespace(kv_cache_dtype="auto", attention_backend="auto")
    engine_config: Any = SimpleNamespace(max_model_len=max_model_len, block_size=BLOCK, options=options, lora=None)
    with launches() as compiled:
        for job in kernel_jobs(KernelShapes(engine_config, facts, PLAIN, DTYPE, CPU)):
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
    assert "_embed_and_rotate_kernel" in kernels
    assert {"_gather_kv", "_merge_attention"} <= kernels or isinstance(long, NoLongPrefill)
    missing = launched - compiled
    names = {found[0] for found in missing}
    assert not missing, "\n".join(map(str, missing | {found for found in compiled if found[0] in names}))


def of_gptq(bits: int, **fields: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": 128, "sym": False, "desc_act": False} | fields


def of_gguf(*types: str, num_layers: int = 1) -> dict[str, Any]:
    """types: of the parts in turn."""
    parts = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    names = [f"model.layers.{index}.{part}" for index in range(num_layers) for part in parts]
    values = [gguf.GGMLQuantizationType[kind].value for kind in types]
    return {"quant_method": "gguf", "types": {name: values[at % len(values)] for at, name in enumerate(names)}}


PACKED: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    "gptq, 4 bits, desc_act": of_gptq(4, desc_act=True),
    "gptq, 8 bits": of_gptq(8),
    "gptq, 8 bits, symmetric": of_gptq(8, sym=True),
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    **{kind: of_gguf(kind) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")},
}


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_layer_finds_its_kernels_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every format, whatever the number of tokens: in these sizes K is split as often as the workspace allows."""
    triton.load()
    monkeypatch.setattr("octavo.quantization.grouped.keeps_codes", lambda _: True)
    monkeypatch.setattr("octavo.quantization.four_bit.keeps_codes", lambda _: True)
    monkeypatch.setattr("octavo.quantization.grouped.is_skinny", lambda x: len(x) <= 16)
    made = Linear(4096, {"gate_proj": 640, "up_proj": 640}, False, DTYPE, CPU)
    made.create_weights("model.layers.0.mlp.gate_up_proj", method_of(None, PACKED[name]))
    generator = torch.Generator().manual_seed(0)
    for slot in made.weight_slots("").values():
        slot.load(slot.spec.make_dummy(generator) if slot.spec.required or slot.spec.dummy else None)
    (layer,) = made.layers
    assert layer.held is not None
    with launches(run_kernels=False) as compiled:
        for job in layer.scheme.launches(LinearShape(1280, 4096, DTYPE, CPU, is_gated=True)).values():
            job()
    with launches(run_kernels=False) as launched:
        for num_tokens in (1, 8, 9, 16, 17, 33, 64, 65, 100, 129, 200, 257, 300, 512, 513):
            x = torch.zeros(num_tokens, 4096, dtype=DTYPE)
            made(x)
            assert (made.gated(x) is None) == (num_tokens > 16)
    assert {found[0] for found in launched} == {"_grouped_kernel", "_dequantize_kernel"}
    assert launched <= compiled, "\n".join(map(str, [*(launched - compiled), *compiled]))


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_every_layer_of_a_model_is_compiled_for(family: str) -> None:
    """Also where layers and parts of one matrix differ in format."""
    values = config_of(family, 96) | {"num_hidden_layers": 3, "hidden_size": 256, "intermediate_size": 512}
    values["quantization_config"] = of_gguf("Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q5_K", num_layers=3)
    model = build_model(values, DTYPE, CPU)
    method = method_of(None, values["quantization_config"])
    options = SimpleNamespace(kv_cache_dtype="auto", attention_backend="auto")
    engine_config: Any = SimpleNamespace(max_model_len=96, block_size=BLOCK, options=options)
    products = KernelShapes(engine_config, model_facts(values), method, DTYPE, CPU).products()
    layers = [
        (layer, name.endswith("gate_up_proj") and len(module.layers) == 1)
        for name, module in model.named_modules()
        if isinstance(module, Linear)
        for layer in module.layers
    ]
    assert set(products) == {
        (layer.scheme, LinearShape(layer.out_features, layer.in_features, DTYPE, CPU, is_gated))
        for layer, is_gated in layers
    }
    assert len({scheme for scheme, _ in products}) == 4
