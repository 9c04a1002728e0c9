"""The rig's server in a process of its own: prints its port, and serves until SIGTERM."""

from __future__ import annotations

import asyncio
import tempfile

from server_rig import running

from octavo.config import ServerOptions


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        options = ServerOptions(max_waiting_requests=1024, allow_runtime_lora=True, lora_dir=folder)
        async with running(options=options) as rig:
            print(rig.port, flush=True)
            await rig.task


if __name__ == "__main__":
    asyncio.run(main())
