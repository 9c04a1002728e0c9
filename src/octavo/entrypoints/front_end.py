"""An API process besides the first: `python -m octavo.entrypoints.front_end LISTENER_FD CONTROL_FD`.

Its options come on standard input, as FrontEndOptions in JSON. Not for users: `octavo serve --api-server-count N`
starts it.
"""

from __future__ import annotations

import sys
from socket import socket

import msgspec

from octavo.entrypoints.engine import die_with_parent, read_line
from octavo.serving import FrontEndOptions, join


def main() -> int:
    options = msgspec.json.decode(read_line(0), type=FrontEndOptions)
    die_with_parent()
    listener, control = (socket(fileno=int(fd)) for fd in sys.argv[1:3])
    listener.setblocking(False)
    control.setblocking(False)
    return join(options, listener, control)


if __name__ == "__main__":
    sys.exit(main())
