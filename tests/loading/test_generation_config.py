"""Where the defaults of sampling come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from octavo.loading.generation_config import choose_generation_config
from octavo.protocol.sampling import generation_defaults

OWN = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}


def test_the_models_own_none_or_that_of_a_folder_or_file(tmp_path: Path) -> None:
    other = {"temperature": 0.2, "max_new_tokens": 7}
    (tmp_path / "generation_config.json").write_text(json.dumps(other))
    assert choose_generation_config("auto", OWN) == OWN
    assert choose_generation_config("off", OWN) == choose_generation_config("vllm", OWN) == {}
    assert choose_generation_config(str(tmp_path), OWN) == other
    assert choose_generation_config(str(tmp_path / "generation_config.json"), OWN) == other
    assert generation_defaults(other) == {"temperature": 0.2, "max_tokens": 7}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no generation_config.json; allowed: auto"),
        ("{", "not valid JSON"),
        ("[]", "not hold a JSON object"),
    ],
)
def test_a_folder_without_a_good_one_is_refused_by_name(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=f"^generation_config={tmp_path}.*{message}"):
        choose_generation_config(str(tmp_path), OWN)


def test_values_that_no_request_could_have_are_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match=r"generation_config.json: temperature=7 is out of range; allowed: \[0, 2\]"):
        generation_defaults({"temperature": 7})
