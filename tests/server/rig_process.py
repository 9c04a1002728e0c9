"""The rig's server in a process of its own: prints its port, and serves until SIGTERM."""

from __future__ import annotations

import asyncio

from server_rig import running

from octavo.config import ServerOptions


async def main() -> None:
    options = ServerOptions(max_waiting_requests=1024)
    async with running(options=options) as rig:
        print(rig.port, flush=True)
        await rig.task


if __name__ == "__main__":
    asyncio.run(main())
