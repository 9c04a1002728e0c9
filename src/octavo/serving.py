"""`octavo serve`: the API processes, put together. A composition root."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from socket import socket

import msgspec
from tqdm import tqdm

import octavo
from octavo.config import EngineOptions, ServerOptions
from octavo.engine.client import EngineDeadError
from octavo.engine.process_client import ProcessEngineClient
from octavo.engine.socket_client import SocketEngineClient
from octavo.loading.generation_config import choose_generation_config
from octavo.loading.source import ModelSource, source_of
from octavo.protocol.sampling import generation_defaults
from octavo.server.adapter_probe import AdapterError, serve_modules
from octavo.server.adapters import AdapterModule, AdapterRegistry, read_modules
from octavo.server.batch import Batch, BatchFiles
from octavo.server.batch_files import count_lines, read_finished
from octavo.server.bind import bind, bind_shared
from octavo.server.context import ServerContext, ServerState
from octavo.server.front_ends import EngineNews, FrontEndGroup, FrontEnds, announce, follow
from octavo.server.openai.tools import ToolCalling
from octavo.server.serve import serve as serve_http
from octavo.text.chat_template import ChatTemplate, load_chat_template
from octavo.text.tokenizer import Tokenizer, load_tokenizer

_log = logging.getLogger(__name__)

_ENGINE_COMMAND = (sys.executable, "-m", "octavo.entrypoints.engine")
_FRONT_END_COMMAND = (sys.executable, "-m", "octavo.entrypoints.front_end")
# Of the garbage collector: a full collection looks at everything a thousand requests hold, which takes 100 ms, and
# stops every stream for as long. It comes after 400,000 new objects instead of 70,000, and leaves out what was there
# before the first request. Together 15-20 % less CPU a request in a burst (benchmarks/serving_cpu.py).
_COLLECTOR_THRESHOLDS = (2000, 10, 20)
_ENDING_SECONDS = 10.0  # for the other API processes, beyond their drain

_Text = tuple[Tokenizer | None, ChatTemplate | None]


class FrontEndOptions(msgspec.Struct, frozen=True):
    """What the first API process hands to each of the others."""

    engine: EngineOptions
    server: ServerOptions
    group: FrontEndGroup


def serve(options: EngineOptions, server: ServerOptions) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code.

    The port is taken first, so that one in use fails before anything is loaded. Raises OSError for it,
    ValueError for an option or a model that cannot be.
    """
    _configure_logging(server)
    modules = read_modules(options, server)
    if server.api_server_count == 1:
        listeners, guard = [bind(server.host, server.port)], None
    else:
        listeners, guard = bind_shared(server.host, server.port, server.api_server_count)
    with guard or contextlib.nullcontext():
        return asyncio.run(_serve(options, server, modules, listeners, _source(options)))


def join(options: FrontEndOptions, listener: socket, control: socket) -> int:
    """Serve on `listener` as one of several API processes, besides the first. Returns the exit code.

    control: the socket to the first process, which tells where the engine is.
    """
    _configure_logging(options.server)
    return asyncio.run(_join(options, listener, control))


def run_batch(options: EngineOptions, server: ServerOptions, input_file: Path, output_file: Path) -> int:
    """Run the requests of a file (OpenAI's batch format) and append their results to another. Returns the exit code:
    1 if any line of the output is a failure.

    What the output has already is not run again. Raises ValueError for an option or for a file that is something
    else, OSError, EngineDeadError.
    """
    _configure_logging(server)
    modules = read_modules(options, server)
    if input_file.resolve() == output_file.resolve():
        raise ValueError(f"output_file={output_file} is the input file too; allowed: another file")
    num_lines = count_lines(input_file)
    files = BatchFiles(input=input_file, output=output_file, finished=read_finished(output_file))
    return asyncio.run(_run_batch(options, server, modules, files, num_lines))


async def _run_batch(
    options: EngineOptions,
    server: ServerOptions,
    modules: Sequence[AdapterModule],
    files: BatchFiles,
    num_lines: int,
) -> int:
    wire = msgspec.json.encode({**asdict(options), "log_level": server.log_level})
    engine = ProcessEngineClient(_ENGINE_COMMAND, wire)
    try:
        source = _source(options)
        text = await asyncio.to_thread(_load_text, options, server, source)
        _say_how_tools_are_shown(server, text)
        await engine.wait_ready()
        context = await _context(options, server, source, text, engine, FrontEndGroup(), modules)
        state = ServerState(context)
        try:
            num_finished = min(len(files.finished), num_lines)
            with tqdm(total=num_lines, initial=num_finished, desc="Requests", disable=None, dynamic_ncols=True) as bar:
                num_failed = await Batch(state, engine.given_up).run(files, bar)
        finally:
            state.close()
    except AdapterError as error:
        _log.error("%s", error)
        return 1
    finally:
        await engine.close()
    if num_failed:
        _log.warning("%d lines of %s are failures", num_failed, files.output)
    return 1 if num_failed else 0


async def _serve(
    options: EngineOptions,
    server: ServerOptions,
    modules: Sequence[AdapterModule],
    listeners: list[socket],
    source: ModelSource,
) -> int:
    wire = msgspec.json.encode({**asdict(options), "log_level": server.log_level})
    engine = ProcessEngineClient(_ENGINE_COMMAND, wire)
    watch: asyncio.Task[None] | None = None
    try:
        async with _others(options, server, listeners[1:]) as others:
            text = await asyncio.to_thread(_load_text, options, server, source)
            _say_how_tools_are_shown(server, text)
            await engine.wait_ready()
            engine.add_follower(others.tell)
            await others.wait_ready()
            if others.lost.is_set():
                return 1
            watch = asyncio.create_task(_end_with(engine.given_up, others.lost))
            group = FrontEndGroup(index=0, count=len(listeners), directory=others.directory)
            context = await _context(options, server, source, text, engine, group, modules)
            host, port = listeners[0].getsockname()[:2]

            def ready() -> None:
                _log.info("serving %s on http://%s:%d", source.name, host, port)

            _settle_heap()
            await serve_http(context, listeners[0], ready, others.signal)
            return 1 if engine.given_up.is_set() or others.lost.is_set() else 0
    except (EngineDeadError, AdapterError) as error:
        _log.error("%s", error)
        return 1
    finally:
        if watch is not None:
            watch.cancel()
        await engine.close()


@contextlib.asynccontextmanager
async def _others(options: EngineOptions, server: ServerOptions, listeners: list[socket]) -> AsyncIterator[FrontEnds]:
    """The API processes besides this one, for the time of the block; none where there are no listeners for them."""
    others = FrontEnds()
    for index, listener in enumerate(listeners, start=1):
        group = FrontEndGroup(index=index, count=len(listeners) + 1, directory=others.directory)
        others.spawn(_FRONT_END_COMMAND, msgspec.json.encode(FrontEndOptions(options, server, group)), listener)
    loop = asyncio.get_running_loop()
    try:
        yield others
    finally:
        # This process has no requests left; the others may, and a second signal is still for them.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, others.signal)
        await others.close(server.drain_timeout + _ENDING_SECONDS)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def _join(options: FrontEndOptions, listener: socket, control: socket) -> int:
    engine = SocketEngineClient()

    def hear(news: EngineNews) -> None:
        if news.address is not None:
            engine.connect(news.address)
        else:
            engine.lost(news.reason or "the engine process ended")

    following = asyncio.create_task(follow(control, hear))
    try:
        source = _source(options.engine)
        text = await asyncio.to_thread(_load_text, options.engine, options.server, source)
        await engine.wait_ready()
        modules = read_modules(options.engine, options.server)
        context = await _context(options.engine, options.server, source, text, engine, options.group, modules)
        _settle_heap()
        await serve_http(context, listener, lambda: announce(control))
        return 0
    except (EngineDeadError, AdapterError) as error:
        _log.error("%s", error)
        return 1
    finally:
        following.cancel()
        await engine.close()


async def _context(
    options: EngineOptions,
    server: ServerOptions,
    source: ModelSource,
    text: _Text,
    engine: SocketEngineClient,
    group: FrontEndGroup,
    modules: Sequence[AdapterModule],
) -> ServerContext:
    """What is served, once its adapters have been tried. Raises AdapterError for one that fails."""
    tokenizer, template = text
    model_names = server.served_model_name or (options.model,)
    adapters = AdapterRegistry(model_names)
    await serve_modules(modules, adapters, engine, source.outputs)
    return ServerContext(
        engine=engine,
        tokenizer=tokenizer,
        chat_template=template,
        served_model_names=model_names,
        max_model_len=engine.ready.max_model_len,
        max_num_seqs=engine.ready.max_num_seqs,
        options=server,
        version=octavo.__version__,
        generation_defaults=generation_defaults(source.generation_config),
        outputs=source.outputs,
        scheduling_policy=options.scheduling_policy,
        group=group,
        adapters=adapters,
    )


def _source(options: EngineOptions) -> ModelSource:
    """The model, with the generation_config that the options choose."""
    source = source_of(options)
    return replace(
        source, generation_config=choose_generation_config(options.generation_config, source.generation_config)
    )


def _load_text(options: EngineOptions, server: ServerOptions, source: ModelSource) -> _Text:
    """The tokenizer, and the chat template: the server's own, else the model's, else none."""
    if options.skip_tokenizer_init:
        return None, None
    tokenizer = load_tokenizer(source.tokenizer_path)
    given = load_chat_template(Path(server.chat_template)) if server.chat_template else None
    has_template = given is not None or tokenizer.chat_template is not None
    template = ChatTemplate.of(tokenizer, given) if has_template else None
    ToolCalling(server, template)  # raises what is wrong before the model is loaded
    return tokenizer, template


def _say_how_tools_are_shown(server: ServerOptions, text: _Text) -> None:
    if ToolCalling(server, text[1]).describes_tools:
        _log.info("the chat template shows no tools: requests with tools get them described in a system message")


def _settle_heap() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECTOR_THRESHOLDS)


def _configure_logging(server: ServerOptions) -> None:
    logging.basicConfig(level=server.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")


async def _end_with(*reasons: asyncio.Event) -> None:
    """A server whose engine stays down, or that lost an API process, ends as on SIGTERM, with exit code 1."""
    waits = [asyncio.create_task(reason.wait()) for reason in reasons]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        signal.raise_signal(signal.SIGTERM)
    finally:
        for wait in waits:
            wait.cancel()
