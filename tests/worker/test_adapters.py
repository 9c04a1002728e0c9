"""Rows with different adapters in one step compute what each merged model computes alone."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from random_adapters import merged, write_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.attention.cpu import CpuAttention
from octavo.attention.torch_operators import TorchAttention
from octavo.config import LoRASizes, SchedulerConfig
from octavo.distributed.executor import DeviceExecutor, InProcessExecutor
from octavo.engine.adapters import AdapterDesk
from octavo.engine.engine import Engine
from octavo.kernels import triton
from octavo.loading.weights import dummy_weights
from octavo.models.base import CausalLM
from octavo.models.registry import build_model
from octavo.protocol.lora import LoRARequest
from octavo.protocol.outputs import TokenOutput
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.scheduler.scheduler import Scheduler
from octavo.worker.adapters import AdapterBank
from octavo.worker.device_runner import DeviceLimits, DeviceRunner, DeviceSlots
from octavo.worker.model_runner import ModelRunner
from octavo.worker.sampler.device_sampler import DeviceSampler
from octavo.worker.sampler.sampler import Sampler
from octavo.worker.slots import Slots

CPU = torch.device("cpu")
VOCAB = 61
LIMITS = DeviceLimits(max_num_seqs=6, max_num_batched_tokens=32, max_model_len=64, block_size=16)
SIZES = LoRASizes(max_loras=3, max_lora_rank=64, max_cpu_loras=6)
NUM_ADAPTERS = 5
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def model_of(weights: dict[str, Tensor]) -> CausalLM:
    model = build_model(CONFIG, torch.float32, CPU)
    model.load_weights(weights.items())
    return model


class Rig:
    """An engine over the runner of a CPU, or over that of a GPU on the CPU."""

    def __init__(self, model: CausalLM, kind: str, sizes: LoRASizes | None) -> None:
        self.bank = None if sizes is None else AdapterBank(model, sizes, torch.float32, CPU)
        num_blocks, (rows, tokens, length, block, _) = 32, LIMITS
        executor: Any
        if kind == "cpu":
            attention = CpuAttention(2, num_blocks, block, 2, 8, torch.float32)
            slots = Slots(rows, length, block, CPU)
            runner = ModelRunner(model, attention, Sampler(rows, VOCAB, CPU), slots, self.bank)
            executor = InProcessExecutor(runner, threaded=False)
        else:
            triton.load()
            cache = torch.zeros(2, num_blocks, 2, 2, block, 8)
            sampler, slots = DeviceSampler(rows, VOCAB, CPU), DeviceSlots(LIMITS, CPU)
            executor = DeviceExecutor(
                DeviceRunner(model, TorchAttention(cache, 4), sampler, slots, LIMITS, False, self.bank)
            )
        config = SchedulerConfig(
            max_num_seqs=rows,
            max_num_batched_tokens=tokens,
            max_model_len=length,
            block_size=block,
            num_blocks=num_blocks,
            max_loras=0 if sizes is None else sizes.max_loras,
        )
        desk = None
        if self.bank is not None and sizes is not None:
            desk = AdapterDesk(self.bank.load, self.bank.drop, sizes.max_cpu_loras)
        self.engine = Engine(Scheduler(config), executor, 1 if kind == "cpu" else 2, adapters=desk)

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


def request_for(name: str, prompt: list[int], lora: LoRARequest | None, max_tokens: int = 4) -> Request:
    sampling = SamplingParams(temperature=0, seed=0, max_tokens=max_tokens, logprobs=3, prompt_logprobs=1)
    return Request(request_id=name, prompt_token_ids=prompt, sampling=sampling, max_tokens=max_tokens, lora=lora)


def logprobs(outputs: list[TokenOutput]) -> Tensor:
    """Of the prompt's tokens and then the output's."""
    rows = [row for output in outputs for row in (output.prompt_logprobs or [])]
    rows += [row for output in outputs for row in (output.logprobs or [])]
    return torch.tensor([row.logprobs[0] for row in rows])


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    made = dummy_weights(build_model(CONFIG, torch.float32, CPU), 0, CPU)
    return {name: tensor if "norm" in name else tensor * 10 for name, tensor in made}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Tensor]) -> list[Path]:
    root, rng = tmp_path_factory.mktemp("adapters"), random.Random(5)
    found = [root / f"a{number}" for number in range(NUM_ADAPTERS)]
    for folder in found:
        write_adapter(folder, weights, rng, SIZES.max_lora_rank)
    return found


@pytest.mark.parametrize("kind", ["cpu", "device"])
def test_random_mixes_against_merged_weights(
    kind: str, weights: dict[str, Tensor], folders: list[Path], examples: int
) -> None:
    """500 mixes: --examples 500."""
    models = [weights, *(merged(weights, folder) for folder in folders)]
    references = [Rig(model_of(own), "cpu", None) for own in models]
    rig = Rig(model_of(weights), kind, SIZES)
    loras = [None, *(LoRARequest(f.name, i + 1, str(f)) for i, f in enumerate(folders))]
    rng = random.Random(kind)
    wanted: dict[str, list[TokenOutput]] = {}
    worst, num_differing = 0.0, 0
    for mix in range(examples if kind == "cpu" else max(1, examples // 3)):  # the latter's sampler is interpreted
        which = [rng.randint(0, NUM_ADAPTERS) for _ in range(rng.randint(1, 7))]
        prompts = [[rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 17, 30]))] for _ in which]
        found = rig.run([request_for(f"{mix}-{i}", p, loras[w]) for i, (w, p) in enumerate(zip(which, prompts))])
        for i, (w, prompt) in enumerate(zip(which, prompts)):
            name = f"{mix}-{i}"
            wanted |= references[w].run([request_for(name, prompt, None)])
            assert tokens(found[name]) == tokens(wanted[name])
            worst = max(worst, float((logprobs(found[name]) - logprobs(wanted[name])).abs().max()))
            base = references[0].run([request_for(name, prompt, None)])[name] if w else found[name]
            num_differing += bool((logprobs(base) - logprobs(found[name])).abs().max() > 0.1)
    assert worst < 1e-3
    assert num_differing, "no adapter changes anything"


def test_whole_tables_of_an_adapter_stand_in_for_the_models(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """modules_to_save: the language head and the embedding, beside rows without an adapter and with another."""
    rng = random.Random(3)
    plain, saved = tmp_path / "plain", tmp_path / "saved"
    for folder in (plain, saved):
        write_adapter(folder, {n: w for n, w in weights.items() if "layers" in n}, rng, 8)
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["embed_tokens", "lm_head"]}))
    tables = {f"model.{n}" if "embed" in n else n: torch.randn(VOCAB, 32) for n in ("embed_tokens", "lm_head")}
    own = {f"base_model.model.{name}.weight": table for name, table in tables.items()}
    save_file(load_file(saved / "adapter_model.safetensors") | own, saved / "adapter_model.safetensors")
    replaced = merged(weights, saved) | {f"{name}.weight": table for name, table in tables.items()}
    for kind in ("cpu", "device"):
        rig = Rig(model_of(weights), kind, SIZES)
        loras = [LoRARequest("saved", 1, str(saved)), None, LoRARequest("plain", 2, str(plain))]
        prompt = [5, 9, 2, 7]
        found = rig.run([request_for(str(i), prompt, lora) for i, lora in enumerate(loras)])
        for i, own_weights in enumerate((replaced, weights, merged(weights, plain))):
            want = Rig(model_of(own_weights), "cpu", None).run([request_for("r", prompt, None)])["r"]
            assert tokens(found[str(i)]) == tokens(want)
            assert torch.allclose(logprobs(found[str(i)]), logprobs(want), atol=1e-4)


def test_tables_that_are_the_models_own_are_not_kept(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """As PEFT saves them beside what it trained of an embedding."""
    folder = tmp_path / "a"
    write_adapter(folder, {"model.embed_tokens.weight": weights["model.embed_tokens.weight"]}, random.Random(1), 8)
    path = "base_model.model.model.embed_tokens.base_layer.weight"
    own = load_file(folder / "adapter_model.safetensors") | {path: weights["model.embed_tokens.weight"].clone()}
    save_file(own, folder / "adapter_model.safetensors")
    rig = Rig(model_of(weights), "cpu", SIZES)
    lora = LoRARequest("a", 1, str(folder))
    found = rig.run([request_for("r", [5, 9, 2], lora)])["r"]
    assert rig.bank is not None
    assert not rig.bank.set_replaces([0])
    want = Rig(model_of(merged(weights, folder)), "cpu", None).run([request_for("r", [5, 9, 2], None)])["r"]
    assert torch.allclose(logprobs(found), logprobs(want), atol=1e-4)


def test_a_cached_prefix_is_of_the_adapter_that_computed_it(weights: dict[str, Tensor], folders: list[Path]) -> None:
    rig = Rig(model_of(weights), "cpu", SIZES)
    loras = [LoRARequest("a", 1, str(folders[0])), LoRARequest("same", 7, str(folders[0])), None]
    prompt = [i % VOCAB for i in range(40)]
    sampling = SamplingParams(temperature=0, seed=0, max_tokens=1)
    cached = []
    for name, lora in zip(itertools.count(), (*loras, *loras)):
        request = Request(request_id=str(name), prompt_token_ids=prompt, sampling=sampling, max_tokens=1, lora=lora)
        cached.append(rig.run([request])[str(name)][-1].num_cached_tokens)
    assert cached == [0, 32, 0, 32, 32, 32]  # the second has the same weights under another name


def test_an_adapter_that_is_dropped_before_its_step_fails_only_its_rows(
    weights: dict[str, Tensor], folders: list[Path]
) -> None:
    rig = Rig(model_of(weights), "device", SIZES)
    assert rig.bank is not None
    rig.bank.load(LoRARequest("a", 1, str(folders[0])))
    rig.bank.drop(1)
    rig.bank.bring_in([(0, 1)])
    assert rig.bank.broken == {0: "adapter 1 is no longer loaded"}
    rig.bank.load(LoRARequest("a", 1, str(folders[0])))
    rig.bank.bring_in([])
    assert not rig.bank.broken
