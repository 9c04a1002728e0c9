"""`python -m octavo.entrypoints.openai.api_server --model MODEL [flags]`: another way to say `octavo serve`."""

import sys

from octavo.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
