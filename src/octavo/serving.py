"""`octavo serve`: the API process, put together. A composition root."""

from __future__ import annotations

import asyncio
import logging
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
from octavo.server.app import ServerContext
from octavo.server.run import bind, run_server
from octavo.text.chat_template import load_chat_template
from octavo.text.tokenizer import load_tokenizer

_log = logging.getLogger(__name__)

_ENGINE_COMMAND = (sys.executable, "-m", "octavo.entrypoints.engine")


def serve(options: EngineOptions, server: ServerOptions) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code.

    The port is taken first, so that one in use fails before anything is loaded. Raises OSError for it,
    ValueError for an option or a model that cannot be.
    """
    logging.basicConfig(level=server.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    listener = bind(server.host, server.port)
    source = resolve_source(options.model, revision=options.revision, load_format=options.load_format)
    return asyncio.run(_serve(options, server, listener, source))


async def _serve(options: EngineOptions, server: ServerOptions, listener: socket, source: ModelSource) -> int:
    wire = msgspec.json.encode({**asdict(options), "log_level": server.log_level})
    engine = ProcessEngineClient(_ENGINE_COMMAND, wire)
    try:
        tokenizer = None
        if not options.skip_tokenizer_init:
            tokenizer = await asyncio.to_thread(load_tokenizer, Path(options.tokenizer or source.tokenizer_path))
        template = load_chat_template(server.chat_template) if server.chat_template else None
        await engine.wait_ready()
        context = ServerContext(
            engine=engine,
            tokenizer=tokenizer,
            chat_template=template,
            served_model_names=server.served_model_name or (options.model,),
            options=server,
            version=octavo.__version__,
            generation_defaults=generation_defaults(source.generation_config),
        )
        return await run_server(context, listener, engine.given_up)
    except EngineDeadError as error:
        _log.error("%s", error)
        return 1
    finally:
        await engine.close()
