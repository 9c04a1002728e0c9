"""Rows with different adapters in one step compute what each merged model computes alone."""

from __future__ import annotations

import itertools
import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from adapter_rig import SIZES, VOCAB, Rig, logprobs, model_of, random_weights, request_for, tokens
from random_adapters import merged, write_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.protocol.lora import LoRARequest
from octavo.protocol.outputs import TokenOutput
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams

NUM_ADAPTERS = 5


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights()


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
    """500 mixes: --examples 500. In every other one the last layer goes on for each row's last token alone."""
    models = [weights, *(merged(weights, folder) for folder in folders)]
    references = [Rig(model_of(own), "cpu", None) for own in models]
    rig = Rig(model_of(weights), kind, SIZES)
    loras = [None, *(LoRARequest(f.name, i + 1, str(f)) for i, f in enumerate(folders))]
    rng = random.Random(kind)
    wanted: dict[str, list[TokenOutput]] = {}
    worst, num_differing = 0.0, 0
    for mix in range(examples if kind == "cpu" else max(2, examples // 3)):  # the latter's sampler is interpreted
        asked = partial(request_for, prompt_logprobs=(1, None)[mix % 2])
        which = [rng.randint(0, NUM_ADAPTERS) for _ in range(rng.randint(1, 7))]
        prompts = [[rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 17, 30]))] for _ in which]
        found = rig.run([asked(f"{mix}-{i}", p, loras[w]) for i, (w, p) in enumerate(zip(which, prompts))])
        for i, (w, prompt) in enumerate(zip(which, prompts)):
            name = f"{mix}-{i}"
            wanted |= references[w].run([asked(name, prompt, None)])
            assert tokens(found[name]) == tokens(wanted[name])
            worst = max(worst, float((logprobs(found[name]) - logprobs(wanted[name])).abs().max()))
            base = references[0].run([asked(name, prompt, None)])[name] if w else found[name]
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
