"""Engines over a tiny model with LoRA adapters, on the runner of a CPU, or on that of a GPU on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo.attention.backend import FusedAttentionBackend
from octavo.attention.cpu import CpuAttention
from octavo.attention.long_prefill import NoLongPrefill
from octavo.attention.torch_operators import TorchAttention
from octavo.attention.triton import TritonAttention
from octavo.config import LoRASizes, SchedulerConfig
from octavo.distributed.executor import DeviceExecutor, InProcessExecutor
from octavo.engine.adapters import AdapterDesk
from octavo.engine.engine import Engine
from octavo.kernels import triton
from octavo.loading.weights import dummy_weights
from octavo.models.base import CausalLM
from octavo.models.registry import build_head, build_model
from octavo.protocol.lora import LoRARequest
from octavo.protocol.outputs import TokenOutput
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.scheduler.scheduler import Scheduler
from octavo.worker.adapters import AdapterBank
from octavo.worker.device_runner import DeviceLimits, DeviceRunner, DeviceSlots
from octavo.worker.device_speculation import DeviceDrafter, DeviceSpeculation
from octavo.worker.drafters.draft_head import HeadDrafter
from octavo.worker.drafters.drafter import Drafter
from octavo.worker.drafters.lookup import LookupDrafter, LookupSettings
from octavo.worker.model_runner import ModelRunner
from octavo.worker.sampler.device_sampler import DeviceSampler
from octavo.worker.sampler.sampler import Sampler
from octavo.worker.slots import Slots
from octavo.worker.speculation import Speculation

CPU = torch.device("cpu")
VOCAB, HEAD_DIM = 61, 16
LIMITS = DeviceLimits(max_num_seqs=6, max_num_batched_tokens=32, max_model_len=64, block_size=16)
SIZES = LoRASizes(max_loras=3, max_lora_rank=64, max_cpu_loras=6)
NUM_DRAFTS = 3
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def random_weights() -> dict[str, Tensor]:
    """Far from uniform, so that a wrong neighbour would show."""
    made = dummy_weights(build_model(CONFIG, torch.float32, CPU), 0, CPU)
    return {name: tensor if "norm" in name else tensor * 10 for name, tensor in made}


def model_of(weights: dict[str, Tensor]) -> CausalLM:
    model = build_model(CONFIG, torch.float32, CPU)
    model.load_weights(weights.items())
    return model


def drafter_of(method: str, model: CausalLM, slots: Slots, num_blocks: int) -> Drafter:
    if method == "ngram":
        return LookupDrafter(LookupSettings(1, 4, NUM_DRAFTS), slots.token_ids)
    config = CONFIG | {"num_hidden_layers": 1, "eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
    head = build_head(method, config, model.config, (), torch.float32, CPU)
    head.load_weights(dummy_weights(head, 0, CPU))
    head.share(model)
    model.tap(head.tap_layers)
    return HeadDrafter(head, CpuAttention(1, num_blocks, LIMITS.block_size, 2, HEAD_DIM, torch.float32), slots)


class Rig:
    """An engine over the runner of a CPU, or over that of a GPU on the CPU."""

    def __init__(
        self, model: CausalLM, kind: str, sizes: LoRASizes | None, guesses: str | DeviceDrafter | None = None
    ) -> None:
        """guesses: the method that makes them on a CPU, or what makes them on a GPU's runner; None: there are none."""
        self.bank = None if sizes is None else AdapterBank(model, sizes, torch.float32, CPU)
        num_blocks, max_draft_rows = 32, 0 if guesses is None else 12
        rows, tokens, length, block, _ = LIMITS
        config = SchedulerConfig(
            max_num_seqs=rows,
            max_num_batched_tokens=tokens,
            max_model_len=length,
            block_size=block,
            num_blocks=num_blocks,
            max_loras=0 if sizes is None else sizes.max_loras,
            num_speculative_tokens=0 if guesses is None else NUM_DRAFTS,
            adaptive_speculation=False,
            max_step_rows=rows + max_draft_rows,
        )
        desk = None
        if self.bank is not None and sizes is not None:
            desk = AdapterDesk(self.bank.load, self.bank.drop, sizes.max_cpu_loras)
        executor: Any
        if kind == "cpu":
            assert guesses is None or isinstance(guesses, str)
            executor = self._cpu(model, guesses, num_blocks)
        else:
            assert not isinstance(guesses, str)
            executor = self._device(model, guesses, num_blocks, max_draft_rows)
        self.engine = Engine(Scheduler(config), executor, 1 if kind == "cpu" else 2, adapters=desk)

    def _cpu(self, model: CausalLM, method: str | None, num_blocks: int) -> InProcessExecutor:
        slots = Slots(LIMITS.max_num_seqs, LIMITS.max_model_len, LIMITS.block_size, CPU)
        attention = CpuAttention(2, num_blocks, LIMITS.block_size, 2, HEAD_DIM, torch.float32)
        sampler = Sampler(LIMITS.max_num_seqs, VOCAB, CPU)
        speculation = None if method is None else Speculation(drafter_of(method, model, slots, num_blocks), slots)
        num_tapped = {None: None, "eagle": 0, "eagle3": 3}.get(method)
        runner = ModelRunner(model, attention, sampler, slots, self.bank, speculation, num_tapped)
        return InProcessExecutor(runner, threaded=False)

    def _device(
        self, model: CausalLM, drafter: DeviceDrafter | None, num_blocks: int, max_draft_rows: int
    ) -> DeviceExecutor:
        triton.load()
        limits = LIMITS._replace(max_draft_rows=max_draft_rows)
        cache = torch.zeros(2, num_blocks, 2, 2, LIMITS.block_size, HEAD_DIM)
        sampler, slots = DeviceSampler(LIMITS.max_num_seqs, VOCAB, CPU), DeviceSlots(limits, CPU)
        num_rows, speculation = limits.max_num_seqs + max_draft_rows, None
        attention: FusedAttentionBackend = TorchAttention(cache, 4)
        if drafter is not None:
            speculation = DeviceSpeculation(drafter, NUM_DRAFTS, (LIMITS.max_num_seqs, num_rows), CPU)
            attention = TritonAttention(cache, 4, 4, num_rows, NoLongPrefill(), shares=True)
        runner = DeviceRunner(model, attention, sampler, slots, limits, False, self.bank, speculation)
        return DeviceExecutor(runner)

    def run(self, requests: list[Request]) -> dict[str, list[TokenOutput]]:
        found: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
        for request in requests:
            self.engine.add(request)
        while self.engine.has_work:
            for output in self.engine.step():
                assert output.error is None, output.error
                found[output.request_id].append(output)
            self.engine.audit()
        return found


def request_for(
    name: str, prompt: list[int], lora: LoRARequest | None, max_tokens: int = 4, prompt_logprobs: int | None = 1
) -> Request:
    sampling = SamplingParams(temperature=0, seed=0, max_tokens=max_tokens, logprobs=3, prompt_logprobs=prompt_logprobs)
    return Request(request_id=name, prompt_token_ids=prompt, sampling=sampling, max_tokens=max_tokens, lora=lora)


def logprobs(outputs: list[TokenOutput]) -> Tensor:
    """Of the prompt's tokens and then the output's."""
    rows = [row for output in outputs for row in (output.prompt_logprobs or [])]
    rows += [row for output in outputs for row in (output.logprobs or [])]
    return torch.tensor([row.logprobs[0] for row in rows])


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]
