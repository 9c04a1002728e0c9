"""Four bits by AWQ (Lin et al., 2023) or GPTQ (Frantar et al., 2022), made by llm-compressor; needs its extra.

What is written is compressed-tensors' "pack-quantized" layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

from octavo.compress.plain import HEAD

_SEQUENCE = 512  # tokens that are calibrated on at once
_MAX_SEQUENCES = 128


def write_calibrated(
    folder: Path, method: Literal["awq", "gptq"], group_size: int, calibration: Path, output: Path
) -> None:
    """folder: a plain model; calibration: UTF-8 text, of which the first 65,536 tokens are used; output: an empty
    folder, which gets the model and its config.json.

    Raises ValueError for a text that is not UTF-8 or shorter than one sequence of 512 tokens, and for AWQ on a machine
    without a GPU, where the library's does not run: it pins memory.
    """
    if method == "awq" and not torch.accelerator.is_available():
        raise ValueError("scheme='awq' needs a GPU here, as llm-compressor's does; allowed without: fp8, gptq, q4")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    try:
        ids = tokenizer(calibration.read_text(encoding="utf-8"))["input_ids"]
    except UnicodeDecodeError as error:
        raise ValueError(f"calibration={str(calibration)!r} is not UTF-8: {error}") from error
    starts = range(0, len(ids) - _SEQUENCE + 1, _SEQUENCE)[:_MAX_SEQUENCES]
    if not starts:
        raise ValueError(f"calibration={str(calibration)!r} has {len(ids)} tokens; allowed: >= {_SEQUENCE}")
    samples = Dataset.from_list(
        [{"input_ids": ids[at : at + _SEQUENCE], "attention_mask": [1] * _SEQUENCE} for at in starts]
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    arguments = QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=method == "gptq",
        strategy=QuantizationStrategy.GROUP,
        group_size=group_size,
        # AWQ looks for scales itself, and would ask an observer that searches as well at every step.
        observer="memoryless_mse" if method == "gptq" else "memoryless_minmax",
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=arguments)}
    if method == "gptq":
        recipe = [GPTQModifier(config_groups=groups, ignore=[HEAD])]
    else:
        recipe = [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=[HEAD])]
    oneshot(
        model=model,
        dataset=samples,
        recipe=recipe,
        max_seq_length=_SEQUENCE,
        num_calibration_samples=len(samples),
        pipeline="sequential",
    )
    model.save_pretrained(output, save_compressed=True)
