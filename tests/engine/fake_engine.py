"""An engine process without a model, for tests of everything around it: `python fake_engine.py [BEHAVIOUR] ADDRESS`.

What it does is in the options on standard input and in BEHAVIOUR, both JSON objects.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fake_worker import VOCAB_SIZE, FakeRunner

from octavo.config import SchedulerConfig
from octavo.distributed.executor import InProcessExecutor
from octavo.engine.adapters import AdapterDesk
from octavo.engine.channel import EngineChannel
from octavo.engine.engine import Engine
from octavo.engine.service import EngineService, refuse_all
from octavo.entrypoints.engine import die_with_parent, read_line
from octavo.protocol.lora import LoRARequest
from octavo.protocol.messages import Ready
from octavo.scheduler.scheduler import Scheduler


def load_adapter(lora: LoRARequest) -> bytes:
    if "corrupt" in lora.lora_path:
        raise ValueError(f"{lora.lora_path} is corrupt")
    return hashlib.sha256(lora.lora_path.encode()).digest()


def main() -> int:
    options = json.loads(read_line(0))
    if len(sys.argv) > 2:
        options |= json.loads(sys.argv[1])
    die_with_parent()
    channel = EngineChannel(sys.argv[-1])
    if options.get("refuse"):
        refuse_all(channel, options["refuse"], timeout=5.0)
        channel.close()
        return 1
    config = SchedulerConfig(
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_model_len=options.get("max_model_len") or 256,
        block_size=4,
        num_blocks=129,
        max_loras=2,
    )
    executor = InProcessExecutor(
        FakeRunner(poison=options.get("poison"), step_seconds=options.get("step_seconds", 0.0)), threaded=True
    )
    adapters = AdapterDesk(load_adapter, lambda _: None, 4)
    engine = Engine(Scheduler(config), executor, depth=options.get("depth", 2), adapters=adapters)
    sizes = (config.max_num_seqs, config.num_blocks, config.block_size, VOCAB_SIZE, config.max_loras)
    ready = Ready(config.max_model_len, *sizes)
    EngineService(engine, channel, ready).run()
    channel.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
