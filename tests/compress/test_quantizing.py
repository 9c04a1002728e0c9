"""`octavo quantize`: the folders that it writes, as Octavo loads them, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from octavo import quantizing
from octavo.cli import main
from octavo.compress.shards import ShardWriter
from octavo.loading.source import resolve_source
from octavo.loading.weights import load_model, safetensors_weights
from octavo.models.base import CausalLM
from octavo.text.tokenizer import load_tokenizer

CPU = torch.device("cpu")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LINEARS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}
SHAPES = {
    **{f"model.layers.0.{name}.weight": shape for name, shape in LINEARS.items()},
    "model.embed_tokens.weight": (32, 64),
    "lm_head.weight": (32, 64),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.0.post_attention_layernorm.weight": (64,),
    "model.norm.weight": (64,),
}


def write(folder: Path, state: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """A plain checkpoint with a file beside its weights."""
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}
    folder.mkdir(parents=True)
    save_file(made if state is None else state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


class Nothing:
    """Attention that adds nothing but its values."""

    def forward(self, _layer: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query + torch.cat([key + value] * (query.shape[1] // key.shape[1]), 1)


@torch.inference_mode()
def logits(folder: Path) -> Tensor:
    model: CausalLM = load_model(resolve_source(str(folder)), torch.float32, CPU, seed=0)
    ids = torch.arange(10)
    return model.compute_logits(model(ids, ids, Nothing()))


def dequantized(folder: Path) -> dict[str, Tensor]:
    """The checkpoint's tensors, the quantized ones by their layouts' definitions."""
    state = load_file(folder / "model.safetensors")
    plain = {}
    for name, tensor in state.items():
        base, _, end = name.rpartition(".")
        if end == "weight_packed":
            shifts = torch.arange(0, 32, 4)
            code = (tensor.long()[..., None] >> shifts & 15).flatten(1).float() - 8
            scale = state[f"{base}.weight_scale"].float()
            plain[f"{base}.weight"] = code * scale.repeat_interleave(code.shape[1] // scale.shape[1], 1)
        elif tensor.dtype == torch.float8_e4m3fn:
            plain[name] = tensor.float() * state[f"{base}.weight_scale"].float()
        elif end == "weight":
            plain[name] = tensor
    return plain


@pytest.mark.parametrize("scheme", ["fp8", "q4"])
def test_octavo_loads_what_it_writes(scheme: Any, tmp_path: Path) -> None:
    source, output = write(tmp_path / "plain"), tmp_path / "new" / "quantized"
    quantizing.quantize(str(source), scheme, output)
    assert (output / "tokenizer.json").read_text() == "{}"
    assert {path.name for path in output.parent.iterdir()} == {"quantized"}
    plain, original = dequantized(output), load_file(source / "model.safetensors")
    assert plain.keys() == original.keys()
    for name, tensor in plain.items():
        if ".layers.0." not in name or "norm" in name:
            assert torch.equal(tensor, original[name])
        else:
            assert 0 < (tensor - original[name].float()).square().mean() < 0.02
    expected = logits(write(tmp_path / "expected", plain))
    torch.testing.assert_close(logits(output), expected, rtol=1e-4, atol=1e-4)
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == (None if scheme == "fp8" else 32)


def test_a_gguf_file_becomes_a_folder(smollm2_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "fp8"
    assert main(["quantize", str(smollm2_path), "--scheme", "fp8", "-o", str(output)]) == 0
    given, made = load_tokenizer(smollm2_path), load_tokenizer(output)
    text = "Water boils\n\n at 100 °C. <|im_start|>user"
    ids = given.encode(text, add_special_tokens=True)
    assert made.encode(text, add_special_tokens=True) == ids
    other = AutoTokenizer.from_pretrained(output)
    assert other.encode(text) == ids
    assert "<|im_start|>" in other.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    source, plain = resolve_source(str(output)), resolve_source(str(smollm2_path))
    assert source.eos_token_ids == plain.eos_token_ids
    same = ("hidden_size", "vocab_size", "tie_word_embeddings", "rope_parameters", "rms_norm_eps")
    assert all(source.config[field] == plain.config[field] for field in same)
    assert len(load_file(output / "model.safetensors")) == 272 + 210


def test_shards_and_their_index(tmp_path: Path) -> None:
    state = {name: torch.full((4, 4), float(i)) for i, name in enumerate("abcde")}
    writer = ShardWriter(tmp_path, shard_bytes=2 * 64)
    for name, tensor in state.items():
        writer.add(name, tensor)
    writer.close()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    read = dict(safetensors_weights(tuple(files)))
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 64


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--scheme", "awq"], "--scheme='awq' needs a text to calibrate on: give --calibration FILE"),
        (["--scheme", "q4", "--calibration", "x"], "--calibration='x' is not used by scheme='q4'; allowed with: awq"),
        (["--scheme", "gptq", "--calibration", "nowhere"], "--calibration='nowhere' is no file"),
        (["--scheme", "fp8", "--group-size", "32"], "--group-size=32 is not supported; allowed: none with fp8"),
        (["--scheme", "q4", "--group-size", "128"], "q_proj.weight has 64 columns, which are not whole groups of 128"),
        (["--scheme", "q4", "-o", "."], "--output='.' exists; allowed: a new folder, or an empty one"),
    ],
)
def test_refused(
    flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "plain")
    assert main(["quantize", str(source), *(["-o", "out"] if "-o" not in flags else []), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    monkeypatch.delitem(sys.modules, "octavo.compress.calibrated", raising=False)
    text = tmp_path / "text"
    text.write_text("a b c")
    with pytest.raises(ValueError, match=r"scheme='gptq' needs llm-compressor: pip install 'octavo\[quantize\]'"):
        quantizing.quantize(str(write(tmp_path / "plain")), "gptq", tmp_path / "out", calibration=text)


def test_models_that_cannot_be_quantized(tmp_path: Path) -> None:
    written = write(tmp_path / "quantized", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match=r"quantized already \(quant_method='gptq'\)"):
        quantizing.quantize(str(written), "q4", tmp_path / "out")
    state = load_file(written / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"the checkpoint lacks model\.layers\.0\.mlp\.up_proj\.weight"):
        quantizing.quantize(str(write(tmp_path / "partial", state)), "q4", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"quantized", "partial"}
