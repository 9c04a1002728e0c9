"""The Python and shell snippets of a guide, made ready to run: out of Markdown, or out of plain text without fences.

`python tests/guide/snippets.py FILE` lists them, with what keeps each that cannot run here from it.
"""

from __future__ import annotations

import ast
import builtins
import re
import shlex
import symtable
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

Kind = Literal["python", "shell"]

_FENCE = re.compile(r"^```(\w*)\s*$")
_FILE = re.compile(r"^# ([\w-]+\.py)\b")
_FENCED_KINDS: dict[str, Kind] = {"python": "python", "bash": "shell", "sh": "shell"}
_PYTHON_START = re.compile(r"(from [\w.]+ import |import \w|(async )?def \w|class \w|\w+ = [\w.]+\()")
_SHELL_START = re.compile(r"([A-Z_]+=\S+ )*(curl|python3?|pip|uv|docker|source|litellm|octavo|vllm|export|cat|echo) ")
_LONGEST_PYTHON = 150  # lines
# What a snippet needs that a machine without a GPU, without docker and without other people's files lacks.
_NEEDS = {
    r"\bdocker\b": "docker",
    r"\bpip install\b|\buv venv\b": "a package index",
    r"\blitellm\b": "litellm",
    r"--tensor-parallel-size [2-9]": "several GPUs",
    r"--quantization (awq|gptq)|quantization=.bitsandbytes": "a quantized checkpoint",
    r"--quantization fp8": "a GPU (fp8)",
    r"run_bench_": "a benchmark command",
    r"-env/bin/activate": "a virtual environment with the package installed",
}


@dataclass(frozen=True)
class Snippet:
    """line: where it begins in its file, from 1. file: the name that a comment at its head gives it."""

    kind: Kind
    line: int
    source: str
    file: str | None = None

    @property
    def serves(self) -> bool:
        """It starts a server, and does not end by itself."""
        return self.kind == "shell" and re.search(r"octavo serve|openai\.api_server", self.source) is not None

    @property
    def lacks(self) -> str | None:
        """What it needs and is not to be had here; None for one that runs."""
        if re.search(r"^(from|import) fastapi", self.source, re.MULTILINE) and find_spec("fastapi") is None:
            return "FastAPI"
        return next((need for pattern, need in _NEEDS.items() if re.search(pattern, self.source)), None)


def snippets_of(path: Path) -> list[Snippet]:
    """Those of a file, with the names of another engine and its models replaced, in order.

    A Python snippet that uses names it does not define goes on with the nearest one above that does: in Markdown the
    two become one program, in plain text it gets a copy of that one in front. Raises ValueError where none defines one.
    """
    lines = path.read_text().splitlines()
    fenced = path.suffix == ".md"
    found: list[Snippet] = []
    for raw in _fenced(lines) if fenced else _unfenced(lines):
        snippet = replace(raw, source=_renamed(raw.source) + "\n")
        missing = _undefined(snippet.source) if snippet.kind == "python" else set()
        if missing:
            base = _defining(found, missing)
            if base is None:
                raise ValueError(f"{path}:{snippet.line}: nothing above defines {', '.join(sorted(missing))}")
            whole = f"{base.source}\n{snippet.source}"
            if fenced:
                found[found.index(base)] = replace(base, source=whole)
                continue
            snippet = replace(snippet, source=whole)
        found.append(snippet)
    return found


def _fenced(lines: list[str]) -> Iterator[Snippet]:
    begin, kind = 0, ""
    inside = False
    for number, line in enumerate(lines, 1):
        fence = _FENCE.match(line)
        if fence is None:
            continue
        if not inside:
            begin, kind = number, fence[1]
        elif kind in _FENCED_KINDS:
            yield Snippet(_FENCED_KINDS[kind], begin + 1, "\n".join(lines[begin : number - 1]), _file(lines[begin]))
        inside = not inside


def _unfenced(lines: list[str]) -> Iterator[Snippet]:
    at = 0
    while at < len(lines):
        length, kind = 0, "python"
        if _SHELL_START.match(lines[at]):
            length, kind = _shell_length(lines, at), "shell"
        elif _PYTHON_START.match(lines[at]):
            length = _python_length(lines, at)
        if length:
            yield Snippet(kind, at + 1, "\n".join(lines[at : at + length]), _file(lines[at - 1]) if at else None)
        at += length or 1


def _file(comment: str) -> str | None:
    named = _FILE.match(comment)
    return named[1] if named else None


def _python_length(lines: list[str], begin: int) -> int:
    """Lines from `begin` on that are one program: as many as parse, up to prose that does, or to another program."""
    longest = 0
    for end in range(begin + 1, min(len(lines), begin + _LONGEST_PYTHON) + 1):
        if not lines[end - 1].strip():
            continue
        try:
            body = ast.parse("\n".join(lines[begin:end])).body
        except SyntaxError:
            continue
        if _is_prose(body[-1]) or _starts_over(body):
            break
        longest = end - begin
    return longest


def _is_prose(statement: ast.stmt) -> bool:
    """A heading of one word is an expression too."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Name)


def _starts_over(body: list[ast.stmt]) -> bool:
    """The last statement imports what one before it has imported."""
    *before, last = (ast.unparse(s) if isinstance(s, ast.Import | ast.ImportFrom) else None for s in body)
    return last is not None and last in before


def _shell_length(lines: list[str], begin: int) -> int:
    """Lines from `begin` on that are whole commands, one right after the other."""
    end = begin
    while end < len(lines) and _SHELL_START.match(lines[end]):
        end += 1
        while end < len(lines) and _is_open("\n".join(lines[begin:end])):
            end += 1
    return end - begin


def _is_open(command: str) -> bool:
    """It goes on in the next line: after a backslash, or inside quotes."""
    command = _without_comments(command)
    if command.endswith("\\"):
        return True
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return True
    return False


def _without_comments(source: str) -> str:
    """A comment between a backslash and the end of its line, which no shell takes, is dropped."""
    return re.sub(r"\\[ \t]+#[^\n]*$", r"\\", source, flags=re.MULTILINE)


def _renamed(source: str) -> str:
    source = _without_comments(source)
    source = re.sub(r"\bvllm\b", "octavo", source).replace("/path/to/", "loras/")
    return re.sub(r"""((?:model|LLM)["']?\s*[:=(]?\s*["']?)[\w-]+/[\w.-]+""", r"\1smollm2", source)


def _undefined(source: str) -> set[str]:
    """Global names that a program reads and does not bind."""
    top = symtable.symtable(source, "snippet", "exec")
    bound = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    read: set[str] = set()
    tables = [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        read |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (table is top or s.is_global())}
    return read - bound - set(dir(builtins)) - {"__name__", "__file__"}


def _defining(above: list[Snippet], names: set[str]) -> Snippet | None:
    """The nearest program that a program with these names undefined can follow."""
    for snippet in reversed(above):
        if snippet.kind == "python" and names.isdisjoint(_undefined(snippet.source + "\n" + "\n".join(names))):
            return snippet
    return None


def with_port(source: str, port: int) -> str:
    """The same for a server on another port than 8000, which is where one listens that is not told."""
    if re.search(r"octavo serve|openai\.api_server", source) and "--port" not in source:
        source = source.rstrip() + " --port 8000\n"
    return re.sub(r"(localhost:|127\.0\.0\.1:|--port )8000\b", rf"\g<1>{port}", source)


if __name__ == "__main__":
    for each in snippets_of(Path(sys.argv[1])):
        first = each.source.lstrip().splitlines()[0]
        print(f"{each.line:5} {each.kind:7} {'needs ' + each.lacks if each.lacks else 'runs':55} {first[:80]}")
