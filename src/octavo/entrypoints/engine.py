"""The engine process: `python -m octavo.entrypoints.engine ADDRESS`, its options on standard input as JSON."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from dataclasses import fields

import msgspec

from octavo.config import EngineOptions
from octavo.engine.channel import EngineChannel
from octavo.engine.service import EngineService, refuse_all

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Twice over: the kernel kills this process when its parent ends, and so does the end of standard input.

    The first needs no thread of ours to run; the second also holds where the parent died before the call.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def read_line(fd: int) -> bytes:
    """One line from a descriptor, without buffering past it."""
    line = b""
    while (byte := os.read(fd, 1)) not in (b"\n", b""):
        line += byte
    return line


def main() -> int:
    values = msgspec.json.decode(read_line(0))
    logging.basicConfig(level=values.pop("log_level").upper(), format="%(asctime)s %(levelname)s %(message)s")
    options = EngineOptions(**{f.name: values[f.name] for f in fields(EngineOptions)})
    die_with_parent()
    channel = EngineChannel(sys.argv[1])
    try:
        from octavo.assembly import build_engine  # torch loads once the parent's death can be heard

        built = build_engine(options)
    except Exception as error:
        if not isinstance(error, (ValueError, OSError)):  # those name their cause, and the parent prints it
            logging.getLogger(__name__).exception("the engine could not start")
        refuse_all(channel, f"the engine could not start: {error}", timeout=2.0)
        channel.close()
        return 1
    EngineService(built.engine, channel, built.ready).run()
    channel.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
