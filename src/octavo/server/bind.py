"""The listening socket, made before anything slow happens, so that a taken port fails at once."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

_LISTEN = "0A"  # socket state in /proc/net/tcp


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to host:port, not yet listening: clients are refused until the server is ready.

    port 0 picks a free one. Raises OSError naming the address and, where it is known, the process
    that holds the port.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise OSError(f"cannot listen on {host!r}: {error.strerror}") from None
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}{_holder(port)}") from None
    sock.setblocking(False)
    return sock


def bind_shared(host: str, port: int, count: int) -> tuple[list[socket.socket], socket.socket]:
    """`count` sockets on one address, for as many processes, and a guard to keep until they listen.

    The kernel spreads connections over those that listen (SO_REUSEPORT), which one shared socket would not: whoever
    wakes first takes a whole burst. The guard keeps a second server that still starts from joining in; one that
    listens is found as by `bind`. Raises OSError like `bind`.
    """
    probe = bind(host, port)
    family, address = probe.family, probe.getsockname()
    probe.close()
    guard = socket.socket(socket.AF_UNIX)
    try:
        guard.bind(f"\0octavo-port-{address[0]}-{address[1]}")  # in Linux's abstract namespace: no file is left
    except OSError as error:
        guard.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: another server is starting on it") from None
    sockets = []
    for _ in range(count):
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        sock.setblocking(False)
        sockets.append(sock)
    return sockets, guard


def _holder(port: int) -> str:
    """Who listens on the port, in brackets, or nothing where that cannot be seen (not Linux, another user)."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*") if inodes else ():
        with contextlib.suppress(OSError):  # other users' processes, and ones that just ended
            if any(str(fd.readlink()) in inodes for fd in (process / "fd").iterdir()):
                return f" (held by process {process.name}, {(process / 'comm').read_text().strip()})"
    return ""
