"""Configuration: what a user may say (EngineOptions, ServerOptions), and what it resolves to (EngineConfig).

The options are the one source of truth for names, types, defaults and help: the CLI's flags and
`LLM(...)`'s arguments are made from them. `resolve` runs once. The only file that reads os.environ.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Device = Literal["auto", "cpu", "cuda"]
AttentionBackendName = Literal["auto", "triton", "flashinfer", "torch"]
Quantization = Literal[
    "awq",
    "awq_marlin",
    "bitsandbytes",
    "compressed-tensors",
    "fp8",
    "fp8_per_block",
    "fp8_per_channel",
    "fp8_per_tensor",
    "gguf",
    "gptq",
    "gptq_marlin",
]
KVCacheDtype = Literal["auto", "fp8"]
LoadFormat = Literal["auto", "safetensors", "gguf", "bitsandbytes", "dummy"]
SchedulingPolicy = Literal["fcfs", "priority"]
ToolParserName = Literal[
    "deepseek_v3", "hermes", "llama3_json", "mistral", "openai", "pythonic", "qwen3_coder", "qwen3_xml"
]
OutputHead = Literal["tokens", "embeddings", "scores"]
# By the end of an architecture's name.
HEADS: dict[str, OutputHead] = {
    "ForCausalLM": "tokens",
    "Model": "embeddings",
    "ForSequenceClassification": "scores",
}
ReasoningParserName = Literal["deepseek_r1", "granite", "mistral", "openai_gptoss", "qwen3"]

DEFAULT_MODEL = "smollm2"
# Tokens of a long prompt that attention on a GPU serves best at once. A step has room for two, beside its decodes.
LONG_CHUNK = 4096
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What runs, and in how much memory. None means: derived from the model and the machine."""

    model: str = DEFAULT_MODEL
    """A folder, a .gguf file, a hub id, or "smollm2" (fetched on first use)."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, where it is not the model's own."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    hf_overrides: str | None = None
    """Fields that stand in for those of the model's config.json, as a JSON object; LLM takes a dict too."""
    load_format: LoadFormat = "auto"
    """Where weights come from; "dummy" makes random ones from the config alone, "bitsandbytes" is safetensors with
    quantization=bitsandbytes."""
    dtype: Dtype = "auto"
    """Type of weights, activations and KV cache. auto: bfloat16."""
    device: Device = "auto"
    """Where the model runs. auto: on the GPU, if there is one."""
    quantization: Quantization | None = None
    """Quantize the linear layers while they are loaded. fp8, fp8_per_channel: one scale an output channel and one a
    token; fp8_per_tensor: one scale a checkpoint's tensor; fp8_per_block: one a 128 x 128 block; bitsandbytes: NF4
    with a scale for 64 weights. Of a quantized checkpoint, any may say what its config says already; one that
    disagrees is refused."""
    dequantized_copy: bool | None = None
    """Keep packed integer weights in the model's dtype besides, on a GPU, for steps of many tokens: faster, for the
    memory of an unquantized model. None: where the copy takes no more than a tenth of the GPU."""
    kv_cache_dtype: KVCacheDtype = "auto"
    """Type of the KV cache. auto: as dtype; fp8: half the memory of bfloat16 (float8 e4m3, with the checkpoint's
    scales or 1), on a GPU."""
    attention_backend: AttentionBackendName = "auto"
    """How a GPU attends. auto: our kernels, and cuDNN for long prompts where it serves them; triton: our kernels
    alone; flashinfer: FlashInfer for long prompts; torch: plain operators, slow, for comparison."""
    enforce_eager: bool = False
    """Record no CUDA graphs: every step is launched kernel by kernel."""
    max_model_len: int | Literal["auto"] | None = None
    """Longest sequence, prompt and output together, in tokens. None: what the model was trained for; auto: that, or
    less where the KV cache is too small for it."""
    max_num_seqs: int | None = None
    """Most sequences that run at once. None: 64 on a CPU, 1024 on a GPU."""
    max_num_batched_tokens: int | None = None
    """Most tokens computed in one step. None: 512 on a CPU, 8192 + max_num_seqs on a GPU."""
    block_size: int | None = None
    """Tokens in a KV block. On a GPU, a multiple of 16. None: 16 on a CPU, 64 on a GPU."""
    kv_cache_memory: str | None = None
    """Memory for the KV cache, such as "2GiB" or a number of bytes; it decides alone where it is given. None: a
    fraction of what is free, by gpu_memory_utilization."""
    gpu_memory_utilization: float | None = None
    """Fraction (0, 1] of the device's memory that may be used; on a CPU, of the RAM that is free once
    the weights are loaded, for the KV cache. None: 0.9 on a GPU, 0.4 on a CPU."""
    enable_prefix_caching: bool = True
    """Share the KV blocks of equal prefixes between requests."""
    enable_chunked_prefill: bool = True
    """Let a prompt be computed over several steps, mixed with decoding."""
    scheduling_policy: SchedulingPolicy = "fcfs"
    """Order of the waiting queue: arrival, or priority (lower first) and then arrival."""
    async_scheduling: bool | None = None
    """Schedule step N+1 while step N runs. None: on where it measures faster."""
    tensor_parallel_size: int = 1
    """Devices that share one copy of the model. Only 1 for now."""
    enable_lora: bool = False
    """Serve LoRA adapters: a request may name one."""
    max_loras: int | None = None
    """Adapters that lie on the device, and so may be in one step, 1..64. None: 4, with enable_lora."""
    max_lora_rank: int | None = None
    """Largest rank of an adapter, 1..512; memory is set aside for it. None: 16, with enable_lora."""
    max_cpu_loras: int | None = None
    """Adapters that lie in the host's memory, at least max_loras. None: 8 x max_loras, with enable_lora."""
    lora_dtype: Dtype = "auto"
    """Type of adapters in memory: that of the model, which auto says too."""
    speculative_config: str | None = None
    """Guess tokens to come and verify several in one step, which changes no output: a JSON object with method (ngram,
    suffix, draft_model, eagle, eagle3), model, num_speculative_tokens and more; LLM takes a dict too."""
    speculative_model: str | None = None
    """The model of speculative_config, or [ngram]."""
    num_speculative_tokens: int | None = None
    """The num_speculative_tokens of speculative_config, 1..32."""
    generation_config: str = "auto"
    """Where sampling parameters come from that a request leaves open. auto: the model's generation_config.json; off
    (or vllm): nowhere; else a folder or file with a generation_config.json. What ends an output stays the model's."""
    seed: int = 0
    """Seed of requests that bring none, and of dummy weights."""
    skip_tokenizer_init: bool = False
    """Load no tokenizer: prompts are token ids, outputs have no text."""
    threads: int | None = None
    """CPU threads for the model. None: one a core."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where and how the HTTP server listens, and how much it takes on."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface."""
    port: int = 8000
    """TCP port, 1..65535; 0 picks a free one."""
    served_model_name: tuple[str, ...] = ()
    """Names the model answers to; the first is echoed. None given: --model as it was given."""
    api_key: tuple[str, ...] = ()
    """Keys of which a request must carry one as a bearer token. Else $OCTAVO_API_KEY; else open."""
    max_waiting_requests: int = 1024
    """Sequences that may wait beyond those that run; more are answered 429 with Retry-After."""
    max_body_bytes: int = 32 * 1024**2
    """Largest request body; a larger one is answered 413."""
    max_request_cost: int = 4 * 1024**2
    """Most that one request may ask for: its completions x their max_tokens x (1 + logprobs), and likewise its prompt
    tokens x (1 + prompt_logprobs); more is answered 400. 4M: 128 completions of 32K tokens, or one of 128K with 20
    logprobs and room to spare."""
    strict: bool = False
    """Refuse fields of a request's body, and parameters of its query, that are not known. Else they are ignored, and
    named in the answer's header X-Octavo-Ignored-Fields."""
    api_server_count: int = 1
    """API processes that share the port, 1..64, for more than one core's worth of HTTP; one engine serves them all.
    Each takes an equal part of the places in the queue."""
    drain_timeout: float = 60.0
    """Seconds that streams get to finish after SIGTERM."""
    chat_template: str | None = None
    """File of a Jinja chat template, in place of the model's own."""
    tool_call_parser: ToolParserName | None = None
    """Format of the model's tool calls. None: the one that the chat template writes."""
    enable_auto_tool_choice: bool | None = None
    """Let the model choose whether it calls a tool. true: and do not start where its calls cannot be read; false:
    refuse that choice; None: wherever they can be read."""
    exclude_tools_when_tool_choice_none: bool = False
    """Leave tools out of the prompt of a request whose tool_choice is none."""
    reasoning_parser: ReasoningParserName | None = None
    """Format of the model's reasoning, which answers then carry apart from their content. None: it stays in there."""
    lora_modules: tuple[str, ...] = ()
    """LoRA adapters that requests may name as their model: name=path, or a JSON object with name, path and
    base_model_name. A path is a folder, or a hub id. Needs --enable-lora."""
    allow_runtime_lora: bool = False
    """Serve /v1/load_lora_adapter and /v1/unload_lora_adapter. Needs --enable-lora, --lora-dir, and one API process."""
    lora_dir: str | None = None
    """Folder in which adapters that are loaded by request must lie. Needs --allow-runtime-lora."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe messages that are logged."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the configuration needs to know of a model."""

    max_position_embeddings: int
    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_heads: int = 1
    hidden_size: int = 1
    intermediate_size: int = 1
    qk_norm: bool = False
    sliding_window: int | None = None
    """The window of any layer that has one."""


@dataclass(frozen=True, kw_only=True)
class OutputFacts:
    """What a model's outputs are: tokens, embeddings alone, or scores alone; and how its embeddings are made.

    pooling, normalize: which of the last hidden states make an embedding, and whether it is scaled to length 1.
    prefix: text before every input that is embedded. dimensions: lengths to which embeddings may be cut: None for
    none, () for any.
    """

    head: OutputHead = "tokens"
    pooling: Literal["last", "mean"] = "last"
    normalize: bool = True
    prefix: str = ""
    dimensions: tuple[int, ...] | None = None
    hidden_size: int = 1

    def check_dimensions(self, given: int) -> None:
        """Raises ValueError for a length that embeddings cannot be cut to."""
        if self.dimensions is None:
            raise ValueError(
                f"dimensions={given} is not supported: the model's config says of none that it may be cut to "
                "(is_matryoshka, matryoshka_dimensions)"
            )
        allowed = ", ".join(map(str, self.dimensions)) or f"1..{self.hidden_size}"
        if given not in (self.dimensions or range(1, self.hidden_size + 1)):
            raise ValueError(f"dimensions={given} is out of range; allowed: {allowed}")


def output_head(architecture: str) -> OutputHead:
    """What a model of this class, as config.json names it, ends in."""
    return next((head for suffix, head in HEADS.items() if architecture.endswith(suffix)), "tokens")


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What the configuration needs to know of the machine."""

    kind: Literal["cpu", "cuda"]
    num_threads: int
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Everything the scheduler decides by. num_blocks counts the null block too."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    chunk_alignment: int = 1
    """Long chunks of prompts end at multiples of it, which attention may serve faster."""
    policy: SchedulingPolicy = "fcfs"
    max_loras: int = 0
    """Adapters that sequences of one step may have between them; 0: none may have one."""
    num_speculative_tokens: int = 0
    """Guesses that a row may verify at most; 0: no speculation."""
    max_step_rows: int = 2**31
    """Rows of a step, each guess counted as one more."""
    adaptive_speculation: bool = True
    """Guess fewer where that is faster."""
    drafts_are_free: bool = False
    """Whether guesses cost next to nothing to make."""
    levels_prompts: bool = False
    """Whether the prompts of patient requests are spread over the steps that decoding takes; without speculation."""


@dataclass(frozen=True, kw_only=True)
class LoRASizes:
    """How many adapters there may be on the device and on the host, and how large."""

    max_loras: int
    max_lora_rank: int
    max_cpu_loras: int


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The resolved configuration of one engine. Frozen: nothing changes it after `resolve`."""

    options: EngineOptions
    device: Literal["cpu", "cuda"]
    dtype: Literal["bfloat16", "float16", "float32"]
    max_model_len: int
    shrinks: bool
    """Whether max_model_len may be lowered to what the KV cache holds."""
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_cache_memory: int | None
    memory_fraction: float
    num_threads: int
    pipeline_depth: int
    kv_bytes_per_token: int
    quantization: Quantization | None = None
    lora: LoRASizes | None = None
    decisions: tuple[str, ...] = field(default=())

    @property
    def records_graphs(self) -> bool:
        """Whether steps are recorded as CUDA graphs."""
        eager = self.options.enforce_eager or self.options.attention_backend == "torch"
        return self.device == "cuda" and not eager

    @property
    def _levels_prompts(self) -> bool:
        """On a CPU each token makes a step longer; without graphs each step does."""
        options = self.options
        return self.records_graphs and options.enable_chunked_prefill and options.scheduling_policy == "fcfs"

    def scheduler(self, num_blocks: int, max_model_len: int) -> SchedulerConfig:
        """The scheduler's part, once the size of the KV pool is known, and with it the longest sequence."""
        cuda = self.device == "cuda"
        return SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=max_model_len,
            block_size=self.block_size,
            num_blocks=num_blocks,
            enable_prefix_caching=self.options.enable_prefix_caching,
            enable_chunked_prefill=self.options.enable_chunked_prefill,
            # Where a step has room for one such chunk only, it would be cut short for nothing.
            chunk_alignment=LONG_CHUNK if cuda and self.max_num_batched_tokens >= 2 * LONG_CHUNK else 1,
            policy=self.options.scheduling_policy,
            levels_prompts=self._levels_prompts,
            max_loras=0 if self.lora is None else self.lora.max_loras,
        )


def engine_options(values: Mapping[str, Any]) -> EngineOptions:
    """EngineOptions from keyword arguments. Raises TypeError naming an unknown one and its nearest match."""
    known = [f.name for f in fields(EngineOptions)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise TypeError(f"unknown option {name!r}{hint}")
    objects = ("hf_overrides", "speculative_config")
    spelled = {name: json.dumps(values[name]) for name in objects if isinstance(values.get(name), dict)}
    return EngineOptions(**{**values, **spelled})


def resolve(options: EngineOptions, model: ModelFacts, device: DeviceFacts) -> EngineConfig:
    """Turn wishes into numbers. Raises ValueError naming the option, its value and the allowed range."""
    _check(options)
    cpu = device.kind == "cpu"
    _check_device(options, cpu)
    decisions: list[str] = []
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16" if options.dtype == "auto" else options.dtype
    shrinks = options.max_model_len == "auto"
    max_model_len = options.max_model_len if isinstance(options.max_model_len, int) else model.max_position_embeddings
    if max_model_len > model.max_position_embeddings:
        raise ValueError(
            f"max_model_len={max_model_len} is out of range; allowed: 1..{model.max_position_embeddings} for this model"
        )
    max_num_seqs = options.max_num_seqs or (64 if cpu else 1024)
    batched = _max_num_batched_tokens(options, cpu, max_num_seqs, max_model_len, decisions)
    depth = 2 if (options.async_scheduling if options.async_scheduling is not None else not cpu) else 1
    for name, value in (("max_model_len", max_model_len), ("max_num_seqs", max_num_seqs)):
        if getattr(options, name) is None:
            decisions.append(f"{name}={value}")
    if options.max_num_batched_tokens is None:
        decisions.append(f"max_num_batched_tokens={batched}")
    kv_bytes = 1 if options.kv_cache_dtype == "fp8" else 4 if dtype == "float32" else 2
    return EngineConfig(
        options=options,
        device=device.kind,
        dtype=dtype,
        max_model_len=max_model_len,
        shrinks=shrinks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=batched,
        block_size=options.block_size or (16 if cpu else 64),
        kv_cache_memory=parse_size("kv_cache_memory", options.kv_cache_memory),
        memory_fraction=options.gpu_memory_utilization or (0.4 if cpu else 0.9),
        num_threads=options.threads or device.num_threads,
        pipeline_depth=depth,
        kv_bytes_per_token=2 * model.num_layers * model.num_kv_heads * model.head_dim * kv_bytes,
        quantization="bitsandbytes" if options.load_format == "bitsandbytes" else options.quantization,
        lora=_lora_sizes(options, dtype, decisions),
        decisions=tuple(decisions),
    )


def _max_num_batched_tokens(
    options: EngineOptions, cpu: bool, max_num_seqs: int, max_model_len: int, decisions: list[str]
) -> int:
    default = max(512, max_num_seqs) if cpu else 2 * LONG_CHUNK + max_num_seqs
    batched = options.max_num_batched_tokens or default
    if batched < max_num_seqs:
        raise ValueError(f"max_num_batched_tokens={batched} is out of range; allowed: >= max_num_seqs={max_num_seqs}")
    if not options.enable_chunked_prefill and batched < max_model_len:
        if options.max_num_batched_tokens is not None:
            raise ValueError(
                f"max_num_batched_tokens={batched} is out of range without chunked prefill; "
                f"allowed: >= max_model_len={max_model_len}"
            )
        batched = max_model_len
        decisions.append(f"max_num_batched_tokens is max_model_len={batched}: prompts are not chunked")
    return batched


def _lora_sizes(options: EngineOptions, dtype: str, decisions: list[str]) -> LoRASizes | None:
    if not options.enable_lora:
        for name in ("max_loras", "max_lora_rank", "max_cpu_loras", "lora_dtype"):
            if getattr(options, name) not in (None, "auto"):
                raise ValueError(f"{name}={getattr(options, name)} has no meaning without enable_lora")
        return None
    if options.lora_dtype not in ("auto", dtype):
        raise ValueError(f"lora_dtype={options.lora_dtype} is not supported; allowed: auto, {dtype} as the model")
    max_loras = options.max_loras or 4
    max_cpu_loras = options.max_cpu_loras or 8 * max_loras
    if max_cpu_loras < max_loras:
        raise ValueError(f"max_cpu_loras={max_cpu_loras} is out of range; allowed: >= max_loras={max_loras}")
    rank = options.max_lora_rank or 16
    decisions.append(f"LoRA: {max_loras} adapters on the device, {max_cpu_loras} on the host, ranks up to {rank}")
    return LoRASizes(max_loras=max_loras, max_lora_rank=rank, max_cpu_loras=max_cpu_loras)


def _check_device(options: EngineOptions, cpu: bool) -> None:
    """Refuse what the device does not serve."""
    if cpu:
        for name, served in (
            ("kv_cache_dtype", ("auto",)),
            ("attention_backend", ("auto", "torch")),
            ("dtype", ("auto", "bfloat16", "float32")),
            ("dequantized_copy", (None, False)),
        ):
            value = getattr(options, name)
            if value not in served:
                raise ValueError(f"{name}={value} needs a GPU; allowed on a CPU: {', '.join(map(str, served))}")
    elif options.block_size is not None and options.block_size % 16:
        raise ValueError(f"block_size={options.block_size} is refused; allowed on a GPU: multiples of 16 up to 256")


def _check(options: EngineOptions) -> None:
    for name, low, high in (
        ("max_model_len", 1, None),
        ("max_num_seqs", 1, 4096),
        ("max_num_batched_tokens", 1, None),
        ("block_size", 1, 256),
        ("tensor_parallel_size", 1, 1),
        ("max_loras", 1, 64),
        ("max_lora_rank", 1, 512),
        ("max_cpu_loras", 1, 10_000),
        ("threads", 1, 1024),
    ):
        value = getattr(options, name)
        if isinstance(value, str) and value != "auto":
            raise ValueError(f"{name}={value!r} is not a number; allowed: auto, or >= {low}")
        if isinstance(value, int) and (value < low or (high is not None and value > high)):
            allowed = f"{low}..{high}" if high is not None else f">= {low}"
            raise ValueError(f"{name}={value} is out of range; allowed: {allowed}")
    if options.load_format == "bitsandbytes" and options.quantization not in (None, "bitsandbytes"):
        raise ValueError(
            f"quantization={options.quantization} is refused with load_format=bitsandbytes, which implies its own"
        )
    fraction = options.gpu_memory_utilization
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"gpu_memory_utilization={fraction} is out of range; allowed: (0, 1]")


def parse_size(name: str, text: str | int | None) -> int | None:
    """Bytes from "2GiB", "512MB", "1e9"-free integers. Raises ValueError naming the option."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", str(text).lower())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size <= 0:
        raise ValueError(f"{name}={text!r} is not a size; allowed: a positive number of bytes, or such as 512MiB, 2GiB")
    return size


def home() -> Path:
    """Where fetched models live: $OCTAVO_HOME, else octavo/ in the XDG cache."""
    explicit = os.environ.get("OCTAVO_HOME")
    return Path(explicit) if explicit else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo"


def api_keys(options: ServerOptions) -> tuple[str, ...]:
    """The bearer keys in force: the option's, else those in $OCTAVO_API_KEY, comma-separated."""
    return options.api_key or tuple(k for k in os.environ.get("OCTAVO_API_KEY", "").split(",") if k)


def hub_token() -> str | None:
    """$HF_TOKEN, for gated models on the hub."""
    return os.environ.get("HF_TOKEN") or None
