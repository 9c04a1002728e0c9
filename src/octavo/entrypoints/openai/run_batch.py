"""`python -m octavo.entrypoints.openai.run_batch FLAGS`, which is `octavo run-batch FLAGS`: scripts know this name."""

from __future__ import annotations

import sys

from octavo.cli import main

if __name__ == "__main__":
    sys.exit(main(["run-batch", *sys.argv[1:]]))
