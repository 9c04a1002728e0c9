"""What a scheduler refuses up front: requests that could never run."""

from __future__ import annotations

from octavo.config import SchedulerConfig
from octavo.protocol.request import Request
from octavo.scheduler.kv_manager import KVManager


def check_request(request: Request, config: SchedulerConfig, kv: KVManager) -> None:
    """Raises ValueError, naming what does not fit, for a request that can never run."""
    num_prompt, num_output = len(request.prompt_token_ids), request.max_tokens
    if not num_prompt:
        raise ValueError("prompt_token_ids is empty; at least one token is needed")
    if num_output < 1:
        raise ValueError(f"max_tokens={num_output} is out of range; allowed: >= 1")
    if request.lora is not None and not config.max_loras:
        raise ValueError(f"lora_request={request.lora.lora_name!r} needs an engine with enable_lora")
    if request.pooling is not None and num_output != 1:
        raise ValueError(f"max_tokens={num_output} is out of range with pooling; allowed: 1")
    wants = f"the prompt has {num_prompt} tokens and max_tokens={num_output}"
    if num_prompt + num_output > config.max_model_len:
        raise ValueError(f"{wants}: together more than max_model_len={config.max_model_len}")
    # The last token is sampled, never computed.
    num_computed = num_prompt + num_output - 1
    num_blocks, available = kv.num_blocks_for(num_computed), config.num_blocks - 1
    if num_blocks > available:
        raise ValueError(
            f"{wants}: they need {num_blocks} KV blocks of {config.block_size} tokens, the cache has {available}"
        )
    if not config.enable_chunked_prefill and num_computed > config.max_num_batched_tokens:
        raise ValueError(
            f"{wants}: without chunked prefill they must fit in one step of "
            f"max_num_batched_tokens={config.max_num_batched_tokens}"
        )
