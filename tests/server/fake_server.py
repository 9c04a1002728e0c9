"""`octavo serve` over an engine without a model: `python fake_server.py MODEL PORT COUNT BEHAVIOUR`.

Of BEHAVIOUR, "lora_modules" is the server's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from octavo import serving
from octavo.config import EngineOptions, ServerOptions

if __name__ == "__main__":
    model, port, count, behaviour = sys.argv[1:]
    fake_engine = Path(__file__).parents[1] / "engine" / "fake_engine.py"
    serving._ENGINE_COMMAND = (sys.executable, str(fake_engine), behaviour)
    server = ServerOptions(
        port=int(port),
        api_server_count=int(count),
        served_model_name=("fake",),
        drain_timeout=10.0,
        lora_modules=tuple(json.loads(behaviour).get("lora_modules", ())),
    )
    sys.exit(serving.serve(EngineOptions(model=model, enable_lora=bool(server.lora_modules)), server))
