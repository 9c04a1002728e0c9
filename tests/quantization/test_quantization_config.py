"""What a quantization_config of AWQ, GPTQ or compressed-tensors says of which layers, and what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from integer_encoders import awq, gptq, pack_quantized
from quantized_checkpoints import encoded, load, logits, plain_tensors, relative_error, write
from test_integer_formats import of_awq, of_gptq, of_pack_quantized
from torch import Tensor

from octavo.quantization.compressed_tensors import CompressedTensors
from octavo.quantization.grouped import GroupedScheme
from octavo.quantization.registry import method_of
from octavo.quantization.unquantized import UNQUANTIZED

LAYER = "model.layers.1.self_attn"
MLP = "model.layers.1.mlp"


def mixed(*choices: tuple[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As `encoded`: each projection by the encoder of the last choice whose name is part of its own; None for none."""
    state, plain = plain_tensors(), plain_tensors()
    for part, encode in choices:
        state_of, plain_of = (plain_tensors(),) * 2 if encode is None else encoded(encode)
        for name in [name for name in plain if name.endswith("_proj.weight") and part in name]:
            module = name.removesuffix("weight")
            kept = {other: tensor for other, tensor in state.items() if not other.startswith(module)}
            state = kept | {other: tensor for other, tensor in state_of.items() if other.startswith(module)}
            plain[name] = plain_of[name]
    return state, plain


def check(tmp_path: Path, tensors: tuple[dict[str, Tensor], dict[str, Tensor]], config: dict[str, Any]) -> None:
    got = logits(load(write(tmp_path / "packed", tensors[0], config)))
    assert relative_error(got, logits(load(write(tmp_path / "plain", tensors[1])))) < 1e-5


def test_rules_of_gptq_for_parts_of_one_matrix(tmp_path: Path) -> None:
    """One scheme, another and none, side by side; the first rule that matches counts."""
    four, eight = (partial(gptq, bits=bits, group_size=32, symmetric=True) for bits in (4, 8))
    rules = {r"-:.*\.v_proj": {}, r"+:.*1\.self_attn\.[kv]_proj": {"bits": 8}, r"-:.*1\.self_attn\.k_proj": {}}
    config = of_gptq(4, 32, True, dynamic=rules)
    check(tmp_path, mixed(("", four), ("v_proj", None), ("1.self_attn.k_proj", eight)), config)
    method = method_of(None, config)
    assert method.scheme_of("model.layers.0.self_attn.k_proj") == method.scheme_of(f"{MLP}.up_proj")
    assert method.scheme_of("lm_head") is UNQUANTIZED


def test_modules_of_gptq(tmp_path: Path) -> None:
    four = partial(gptq, bits=4, group_size=32, symmetric=True)
    modules = [["self_attn.k_proj", "self_attn.v_proj"], ["mlp.down_proj"]]
    check(
        tmp_path,
        mixed(("k_proj", four), ("v_proj", four), ("down_proj", four)),
        of_gptq(4, 32, True, modules_in_block_to_quantize=modules),
    )


def test_modules_that_awq_leaves_as_they_are(tmp_path: Path) -> None:
    tensors = mixed(("", partial(awq, group_size=32)), ("layers.0.self_attn", None), ("up_proj", None))
    check(tmp_path, tensors, of_awq(32, modules_to_not_convert=["layers.0.self_attn", "up_proj"]))


def test_a_quantized_head(tmp_path: Path) -> None:
    encode = partial(gptq, bits=4, group_size=32, symmetric=True)
    state, plain = encoded(encode)
    tensors, plain["lm_head.weight"] = encode(plain_tensors()["lm_head.weight"])
    del state["lm_head.weight"]
    state |= {f"lm_head.{end}": tensor for end, tensor in tensors.items()}
    check(tmp_path, (state, plain), of_gptq(4, 32, True, lm_head=True))


def test_a_head_that_shares_the_embedding_is_not_quantized(tmp_path: Path) -> None:
    config = of_pack_quantized(4, 32) | {"ignore": []}
    state, plain = encoded(partial(pack_quantized, bits=4, group_size=32))
    del state["lm_head.weight"], plain["lm_head.weight"]
    got = logits(load(write(tmp_path / "packed", state, config, tie_word_embeddings=True)))
    expected = logits(load(write(tmp_path / "plain", plain, tie_word_embeddings=True)))
    assert relative_error(got, expected) < 1e-5


def test_groups_of_compressed_tensors(tmp_path: Path) -> None:
    """Names before patterns, patterns before "Linear"; what is ignored is not quantized."""
    config = of_pack_quantized(4, 32)
    eight, three = (of_pack_quantized(bits, -1, False)["config_groups"]["group_0"] for bits in (8, 3))
    config["config_groups"] |= {
        "eight": eight | {"targets": ["re:.*mlp.*"]},
        "three": three | {"targets": [f"{MLP}.up_proj"]},
    }
    config["ignore"] += ["re:.*layers\\.0\\.self_attn\\.k_proj", f"{LAYER}.v_proj"]
    four = partial(pack_quantized, bits=4, group_size=32)
    wide, narrow = (partial(pack_quantized, bits=bits, symmetric=False) for bits in (8, 3))
    choices = [("", four), ("mlp", wide), ("1.mlp.up_proj", narrow), ("0.self_attn.k_proj", None)]
    check(tmp_path, mixed(*choices, ("1.self_attn.v_proj", None)), config)


def test_groups_of_a_mixed_config_name_their_format() -> None:
    config = of_pack_quantized(4, 32) | {"format": "mixed-precision"}
    with pytest.raises(ValueError, match=r"config_groups\.group_0\.format is missing; allowed: .*pack-quantized"):
        method_of(None, config)
    config["config_groups"]["group_0"]["format"] = "pack-quantized"
    config["config_groups"]["dense"] = config["config_groups"]["group_0"] | {"format": "dense", "targets": ["re:.*mlp"]}
    method = method_of(None, config)
    assert isinstance(method, CompressedTensors)
    assert isinstance(method.scheme_of(f"{LAYER}.q_proj"), GroupedScheme)
    assert method.scheme_of(f"{MLP}.up_proj") is UNQUANTIZED


@pytest.mark.parametrize(
    ("option", "declared"),
    [("awq", "awq"), ("awq_marlin", "awq"), ("awq", "awq_marlin"), (None, "awq_marlin"), ("awq_marlin", "awq_marlin")],
)
def test_names_of_other_engines(option: Any, declared: str) -> None:
    method = method_of(option, of_awq(32) | {"quant_method": declared})
    assert method == method_of(None, of_awq(32))


@pytest.mark.parametrize("option", ["gptq", "fp8", "compressed-tensors"])
def test_options_that_disagree(option: Any) -> None:
    with pytest.raises(ValueError, match=rf"quantization='{option}' and .*quant_method='awq' do not agree"):
        method_of(option, of_awq(32))
    with pytest.raises(ValueError, match="quantization='awq', and the checkpoint has no quantization_config"):
        method_of("awq", None)


def grouped_weights(**fields: Any) -> dict[str, Any]:
    config = of_pack_quantized(4, 32)
    config["config_groups"]["group_0"]["weights"] |= fields
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (of_awq(48), r"group_size=48 is not supported; allowed: 32, 64, 128, -1"),
        (of_awq(32, bits=8), r"bits=8 is not supported; allowed: 4"),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "group_size": 64}, r"group_size=64 .* allowed: 32"),
        (of_awq(32, version="gemv"), r"version='gemv' is not supported; allowed: gemm"),
        (of_awq(32, modules_to_not_convert="lm_head"), r"modules_to_not_convert='lm_head' .* a list of strings"),
        (of_awq(32, zero_point=True, sym=True), r"sym=True is not supported; allowed: False"),
        (of_awq(32, act_bits=8), r"act_bits=8 is not supported; allowed: "),
        (of_gptq(5, 32, True), r"bits=5 is not supported; allowed: 2, 3, 4, 8"),
        (of_gptq(4, 0, True), r"group_size=0 is not supported; allowed: -1, an integer >= 1"),
        ({"quant_method": "gptq", "bits": 4}, r"group_size is missing"),
        (of_gptq(4, 32, 1), r"sym=1 is not supported; allowed: true, false"),
        (of_gptq(4, 32, True, checkpoint_format="marlin"), r"checkpoint_format='marlin' .* gptq, gptq_v2"),
        (of_gptq(4, 32, True, checkpoint_format="gptq", format="gptq_v2"), r"\.format='gptq_v2' .* allowed: gptq"),
        (of_gptq(4, 32, True, pack_dtype="int16"), r"pack_dtype='int16' is not supported; allowed: int32"),
        (of_gptq(4, 32, True, dynamic={"+:(": {}}), r"dynamic\.\+:\(=\{\} is not supported; allowed: a regular expr"),
        (of_gptq(4, 32, True, dynamic={"+:x": {"bits": 5}}), r"dynamic\.\+:x\.bits=5 is not supported"),
        (of_gptq(4, 32, True, dynamic={"x": {"adapter": 1}}), r"dynamic\.x\.adapter=1 is not supported"),
        (of_gptq(4, 32, True, modules_in_block_to_quantize=[[1]]), r"modules_in_block_to_quantize=\[\[1\]\]"),
        (of_gptq(4, 32, True, adapter={"rank": 8}), r"adapter=\{'rank': 8\} is not supported"),
        (of_gptq(4, 32, True, block_name_to_quantize="transformer.h"), r"block_name_to_quantize='transformer.h'"),
        (of_pack_quantized(9, 32), r"config_groups\.group_0\.weights\.num_bits=9 is not supported; allowed: 2, 3"),
        (grouped_weights(type="float"), r"group_0\.weights\.type='float' is not supported; allowed: int"),
        (grouped_weights(dynamic=True), r"group_0\.weights\.dynamic=True is not supported; allowed: False"),
        (grouped_weights(strategy="block", group_size=None), r"block_structure is missing; allowed: two integers"),
        (
            grouped_weights(strategy="tensor", group_size=None),
            r"strategy='tensor' is not supported; allowed: group, ch",
        ),
        (grouped_weights(group_size=None), r"group_size is missing; allowed: an integer >= 1"),
        (grouped_weights(actorder="weights"), r"actorder='weights' is not supported; allowed: group, dynamic, weight"),
        (grouped_weights(bucket=3), r"weights\.bucket=3 is not supported; allowed: "),
        (of_pack_quantized(4, 32) | {"format": "marlin-24"}, r"format='marlin-24' is not supported; allowed: "),
        (of_pack_quantized(4, 32) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparsity_config=.*: null"),
        (of_pack_quantized(4, 32) | {"transform_config": {"a": 1}}, r"transform_config=\{'a': 1\} is not supported"),
        (of_pack_quantized(4, 32) | {"ignore": ["re:("]}, r"ignore=\['re:\('\] is not supported; allowed: names and"),
    ],
)
def test_what_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^config field quantization_config.*{message}"):
        method_of(None, config)


def test_activations_are_not_quantized() -> None:
    config = of_pack_quantized(4, 32)
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "strategy": "token", "dynamic": True}
    with pytest.raises(ValueError, match=r"group_0\.input_activations is not supported with format pack-quantized"):
        method_of(None, config)


def test_sizes_that_do_not_fill_words(tmp_path: Path) -> None:
    folder = write(tmp_path, {}, of_gptq(3, 32, True), intermediate_size=336)
    with pytest.raises(ValueError, match=r"mlp\.gate_proj: GPTQ of 3 bits packs whole words, and there are 336 rows"):
        load(folder, load_format="dummy")
    folder = write(tmp_path, {}, of_awq(32), intermediate_size=324)
    with pytest.raises(ValueError, match=r"mlp\.gate_proj: AWQ packs 8 rows a word, and there are 324"):
        load(folder, load_format="dummy")
