"""Models that embed or score, as sentence-transformers and transformers save them: the vectors that those compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from server_rig import byte_tokenizer
from tiny_models import SIZES, save_as, token_ids
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from octavo import LLM, SamplingParams
from octavo.assembly import build_engine
from octavo.config import engine_options
from octavo.loading.source import resolve_source
from octavo.protocol.pooling import SAMPLING, SCORE, floats
from octavo.protocol.request import Request

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "kv_cache_memory": "1MiB",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,  # a prompt of 40 tokens is computed in three steps
    "threads": 1,
}
QWEN3 = Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)


def add_modules(folder: Path, *modes: str, normalize: bool = True, **pooling: Any) -> None:
    """The files of sentence-transformers."""
    types = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(paths, types))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    names = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    values = {f"pooling_mode_{name}": name in modes for name in names}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(values | pooling))


@torch.inference_mode()
def reference(model: PreTrainedModel, pooling: str, normalize: bool, dimensions: int | None = None) -> torch.Tensor:
    hidden = model(token_ids(model.config.vocab_size)[None]).last_hidden_state[0]
    vector = (hidden[-1] if pooling == "last" else hidden.mean(0))[:dimensions]
    return vector / vector.norm() if normalize else vector


def embedding(folder: Path, hf_overrides: dict[str, Any] | None = None, **wish: Any) -> torch.Tensor:
    llm = LLM(str(folder), hf_overrides=hf_overrides, **OPTIONS)
    ids = token_ids(llm._vocab_size).tolist()
    [output] = llm.embed(ids, use_tqdm=False, **wish)
    llm.audit()
    return torch.tensor(output.outputs.embedding)


@pytest.mark.parametrize(
    "config",
    [QWEN3, LlamaConfig(**SIZES), MistralConfig(**SIZES, sliding_window=7), Qwen2Config(**SIZES)],
    ids=lambda config: config.model_type,
)
def test_a_model_without_a_head_embeds_as_transformers_does(config: PretrainedConfig, tmp_path: Path) -> None:
    model = save_as(AutoModel, config, tmp_path)
    for pooling in ("last", "mean"):
        found = embedding(tmp_path, pooling=pooling)
        torch.testing.assert_close(found, reference(model, pooling, True), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("mode", "pooling"), [("lasttoken", "last"), ("mean_tokens", "mean")])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_files_of_sentence_transformers_say_how(mode: str, pooling: str, normalize: bool, tmp_path: Path) -> None:
    """Also where the architecture is that of a causal model, as in Qwen3-Embedding: tensors without "model."."""
    model = save_as(AutoModel, QWEN3, tmp_path)
    add_modules(tmp_path, mode, normalize=normalize)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3ForCausalLM"]}))
    wanted = reference(model, pooling, normalize)
    torch.testing.assert_close(embedding(tmp_path), wanted, atol=1e-4, rtol=1e-4)
    assert (abs(float(wanted.norm()) - 1) < 1e-5) is normalize
    torch.testing.assert_close(embedding(tmp_path, normalize=True), reference(model, pooling, True), atol=1e-4, rtol=0)


def test_a_whole_causal_checkpoint_leaves_its_head_out(tmp_path: Path) -> None:
    model = save_as(AutoModelForCausalLM, LlamaConfig(**SIZES), tmp_path)
    plain = build_engine(engine_options({"model": str(tmp_path), **OPTIONS}))
    before = embedding(tmp_path)  # of a causal model: the last token's, of length 1
    add_modules(tmp_path, "lasttoken")
    torch.testing.assert_close(embedding(tmp_path), before, atol=1e-5, rtol=0)
    torch.testing.assert_close(before, reference(model.model, "last", True), atol=1e-4, rtol=0)
    smaller = build_engine(engine_options({"model": str(tmp_path), **OPTIONS}))
    head = model.lm_head.weight.nbytes
    assert plain.ledger.weight_bytes - smaller.ledger.weight_bytes >= head


def test_embeddings_are_cut_where_the_config_says_that_they_may_be(tmp_path: Path) -> None:
    model = save_as(AutoModel, QWEN3, tmp_path)
    overrides = {"is_matryoshka": True}
    found = embedding(tmp_path, overrides, dimensions=7)
    torch.testing.assert_close(found, reference(model, "last", True, 7), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"dimensions=49 is out of range; allowed: 1\.\.48"):
        embedding(tmp_path, overrides, dimensions=49)
    with pytest.raises(ValueError, match="dimensions=7 is out of range; allowed: 8, 16"):
        embedding(tmp_path, {"matryoshka_dimensions": [8, 16]}, dimensions=7)
    with pytest.raises(ValueError, match="dimensions=7 is not supported"):
        embedding(tmp_path, dimensions=7)


def score(folder: Path, **options: Any) -> float:
    built = build_engine(engine_options({"model": str(folder), **OPTIONS, **options}))
    ids = token_ids(built.ready.vocab_size).tolist()
    built.engine.add(Request(request_id="s", prompt_token_ids=ids, sampling=SAMPLING, max_tokens=1, pooling=SCORE))
    outputs = []
    while built.engine.has_work:
        outputs += built.engine.step()
    return floats(outputs[-1].embedding or b"")[0]


@pytest.mark.parametrize(
    "config",
    [Qwen3Config(**SIZES, head_dim=16, num_labels=1), LlamaConfig(**SIZES, num_labels=1)],
    ids=lambda config: config.model_type,
)
def test_a_classifier_of_one_label_scores_as_transformers_does(config: PretrainedConfig, tmp_path: Path) -> None:
    model = save_as(AutoModelForSequenceClassification, config, tmp_path)
    with torch.inference_mode():
        wanted = model(token_ids(model.config.vocab_size)[None]).logits[0, 0]
    assert score(tmp_path) == pytest.approx(float(wanted), abs=1e-3, rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_causal_model_scores_by_two_of_its_tokens(tied: bool, tmp_path: Path) -> None:
    """The sigmoid of the score is the probability of "y" among "n" and "y", as of Qwen3-Reranker's yes and no."""
    config = Qwen3Config(**SIZES | {"vocab_size": 257}, head_dim=16, tie_word_embeddings=tied)
    model = save_as(AutoModelForCausalLM, config, tmp_path)
    byte_tokenizer()._backend.save(str(tmp_path / "tokenizer.json"))
    overrides = {"architectures": ["Qwen3ForSequenceClassification"], "classifier_from_token": ["n", "y"]}
    with torch.inference_mode():
        logits = model(token_ids(257)[None]).logits[0, -1]
    wanted = logits[[ord("n"), ord("y")]].softmax(-1)[1]
    found = torch.tensor(score(tmp_path, hf_overrides=overrides)).sigmoid()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    one = overrides | {"classifier_from_token": ["y"]}
    assert score(tmp_path, hf_overrides=one) == pytest.approx(float(logits[ord("y")]), abs=1e-3, rel=1e-4)
    for tokens, message in ((["no", "y"], "has 'no', which is 2 tokens"), ([], "one or two"), ("y", "one or two")):
        with pytest.raises(ValueError, match=rf"classifier_from_token.*{message}"):
            score(tmp_path, hf_overrides=overrides | {"classifier_from_token": tokens})


def test_what_a_model_is_not_made_for_is_refused(tmp_path: Path) -> None:
    save_as(AutoModel, QWEN3, tmp_path / "embeds")
    llm = LLM(str(tmp_path / "embeds"), **OPTIONS)
    with pytest.raises(ValueError, match="made for embeddings; this call needs one for tokens"):
        llm.generate([[1, 2]], SamplingParams(max_tokens=1))
    save_as(AutoModelForSequenceClassification, LlamaConfig(**SIZES, num_labels=1), tmp_path / "scores")
    scorer = LLM(str(tmp_path / "scores"), **OPTIONS)
    with pytest.raises(ValueError, match="made for scores; this call needs one for tokens"):
        scorer.embed([[1, 2]])
    save_as(AutoModelForSequenceClassification, LlamaConfig(**SIZES, num_labels=3), tmp_path / "labels")
    with pytest.raises(ValueError, match=r"num_labels=3 is not supported; allowed: 1 \(a score\)"):
        LLM(str(tmp_path / "labels"), **OPTIONS)


def folder_with(tmp_path: Path, **changes: Any) -> Path:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3Model"], "hidden_size": 48}))
    add_modules(tmp_path, "lasttoken")
    for name, value in changes.items():
        path = tmp_path / {"pooling": "1_Pooling/config", "prompts": "config_sentence_transformers"}.get(name, name)
        path.with_name(path.name + ".json").write_text(json.dumps(value))
    return tmp_path


def test_the_default_prompt_stands_before_every_text(tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "Find: ", "document": ""}, "default_prompt_name": "query"}
    assert resolve_source(str(folder_with(tmp_path, prompts=prompts))).outputs.prefix == "Find: "
    assert resolve_source(str(folder_with(tmp_path, prompts={"prompts": {"query": "x"}}))).outputs.prefix == ""
    newer = {"pooling_mode": "mean", "embedding_dimension": 48}
    assert resolve_source(str(folder_with(tmp_path, pooling=newer))).outputs.pooling == "mean"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pooling", {"pooling_mode_cls_token": True}, "pooling_mode cls_token is not supported; allowed: lasttoken, m"),
        ("pooling", {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}, "mean, lasttoken is not"),
        ("pooling", {}, "pooling_mode none is not supported"),
        ("pooling", {"pooling_mode": "mean", "include_prompt": False}, "include_prompt=False is not supported"),
        ("pooling", [], "does not hold a JSON object"),
        ("prompts", {"default_prompt_name": "x", "prompts": {}}, "default_prompt_name='x' is not among its prompts"),
        ("sentence_bert_config", {"do_lower_case": True}, "do_lower_case=true is not supported"),
        ("modules", {}, "does not hold a JSON array"),
        ("modules", [{"type": "a.Transformer", "path": ""}, {"type": "a.Dense"}], "modules Transformer, Dense are not"),
        ("modules", [{"type": "a.Transformer", "path": "0_T"}, {"type": "a.Pooling"}], "path='0_T' of Transformer"),
        ("modules", [{"type": "Transformer"}, {"type": "a.Pooling", "path": "../x"}], "lies outside the folder"),
        ("config", {"architectures": ["Qwen3Model"], "matryoshka_dimensions": [0]}, "matryoshka_dimensions="),
    ],
)
def test_a_folder_that_asks_for_more_is_refused(name: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_source(str(folder_with(tmp_path, **{name: value})))


@pytest.mark.parametrize("given", ["[]", "{", "1"])
def test_overrides_are_a_json_object(given: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hf_overrides=.* is not allowed; allowed: a JSON object"):
        resolve_source(str(folder_with(tmp_path)), hf_overrides=given)
