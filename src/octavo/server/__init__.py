"""HTTP: the OpenAI-compatible server over an EngineClient."""

from octavo.server.app import build_app
from octavo.server.bind import bind
from octavo.server.context import ServerContext, ServerState
from octavo.server.limits import Timeouts
from octavo.server.serve import serve

__all__ = ["ServerContext", "ServerState", "Timeouts", "bind", "build_app", "serve"]
