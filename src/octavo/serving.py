"""`octavo serve`: the API process, put together. A composition root."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from socket import socket

import msgspec

import octavo
from octavo.config import EngineOptions, ServerOptions
from octavo.engine.client import EngineDeadError
from octavo.engine.process_client import ProcessEngineClient
from octavo.loading.source import ModelSource, resolve_source
from octavo.protocol.sampling import generation_defaults
from octavo.server.bind import bind
from octavo.server.context import ServerContext
from octavo.server.serve import serve as serve_http
from octavo.text.chat_template import ChatTemplate, load_chat_template
from octavo.text.tokenizer import Tokenizer, load_tokenizer

_log = logging.getLogger(__name__)

_ENGINE_COMMAND = (sys.executable, "-m", "octavo.entrypoints.engine")


def serve(options: EngineOptions, server: ServerOptions) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code.

    The port is taken first, so that one in use fails before anything is loaded. Raises OSError for it,
    ValueError for an option or a model that cannot be.
    """
    logging.basicConfig(level=server.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    listener = bind(server.host, server.port)
    source = resolve_source(
        options.model, revision=options.revision, load_format=options.load_format, tokenizer=options.tokenizer
    )
    return asyncio.run(_serve(options, server, listener, source))


async def _serve(options: EngineOptions, server: ServerOptions, listener: socket, source: ModelSource) -> int:
    wire = msgspec.json.encode({**asdict(options), "log_level": server.log_level})
    engine = ProcessEngineClient(_ENGINE_COMMAND, wire)
    watch: asyncio.Task[None] | None = None
    try:
        tokenizer, template = await asyncio.to_thread(_load_text, options, server, source)
        await engine.wait_ready()
        watch = asyncio.create_task(_end_with(engine.given_up))
        context = ServerContext(
            engine=engine,
            tokenizer=tokenizer,
            chat_template=template,
            served_model_names=server.served_model_name or (options.model,),
            max_model_len=engine.ready.max_model_len,
            max_num_seqs=engine.ready.max_num_seqs,
            options=server,
            version=octavo.__version__,
            generation_defaults=generation_defaults(source.generation_config),
            scheduling_policy=options.scheduling_policy,
        )
        host, port = listener.getsockname()[:2]
        await serve_http(context, listener, lambda: _log.info("serving %s on http://%s:%d", source.name, host, port))
        return 1 if engine.given_up.is_set() else 0
    except EngineDeadError as error:
        _log.error("%s", error)
        return 1
    finally:
        if watch is not None:
            watch.cancel()
        await engine.close()


def _load_text(
    options: EngineOptions, server: ServerOptions, source: ModelSource
) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """The tokenizer, and the chat template: the server's own, else the model's, else none."""
    if options.skip_tokenizer_init:
        return None, None
    tokenizer = load_tokenizer(source.tokenizer_path)
    given = load_chat_template(Path(server.chat_template)) if server.chat_template else None
    if given is None and tokenizer.chat_template is None:
        return tokenizer, None
    return tokenizer, ChatTemplate.of(tokenizer, given)


async def _end_with(given_up: asyncio.Event) -> None:
    """A server whose engine stays down has nothing left to serve: it ends as on SIGTERM, with exit code 1."""
    await given_up.wait()
    signal.raise_signal(signal.SIGTERM)
