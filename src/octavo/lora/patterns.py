"""Regular expressions out of a stranger's file, matched within bounded time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

_SECONDS = 5.0
_MATCHES_HERE = 1_000_000  # how many matches are tried in this process, at well under a microsecond each
_PLAIN = re.compile(r"(?:[\w.^$-]|\\\.)*")  # nothing in it repeats, so a match takes time linear in the name
_BELOW_ANYTHING = r"(.*\.)?(%s)"
_CHILD = """
import json, re, sys
patterns, names = json.load(sys.stdin)
json.dump([[name for name in names if re.fullmatch(pattern, name)] for pattern in patterns], sys.stdout)
"""


def matched(what: str, patterns: Sequence[str], names: Sequence[str], *, as_ends: bool) -> list[frozenset[str]]:
    """The names that each pattern matches in full. as_ends: or that end in such a match, after a dot.

    A pattern can take time exponential in the length of a name, with every other thread waiting for it. So those
    that could are matched by a process of their own, which is given 5 seconds.
    Raises ValueError that starts with `what`, for a pattern that is no regular expression or that takes too long.
    """
    whole = [_BELOW_ANYTHING % pattern if as_ends else pattern for pattern in patterns]
    if len(whole) * len(names) <= _MATCHES_HERE and all(_PLAIN.fullmatch(pattern) for pattern in patterns):
        try:
            return [frozenset(filter(re.compile(pattern).fullmatch, names)) for pattern in whole]
        except re.error as error:
            raise ValueError(f"{what} is no regular expression: {error}") from None
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    request = json.dumps([whole, list(names)])
    try:
        run = subprocess.run(command, input=request, capture_output=True, text=True, check=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{what} takes longer than {_SECONDS:g} s to match against {len(names)} modules") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().rpartition("\n")[2] or f"exit status {error.returncode}"
        raise ValueError(f"{what} is no regular expression: {said}") from None
    return [frozenset(found) for found in json.loads(run.stdout)]
