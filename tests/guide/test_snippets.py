"""What is found in a text, with fences and without, and what is made of it before it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from snippets import Snippet, snippets_of, with_port

PLAIN = """Heading

Some prose about import rules, and a table: a b c
from othr import LLM, SamplingParams

llm = LLM(model="org/Some-7B")
for output in llm.generate(["x"]):
    print(output)
Next Heading
    a diagram = [not code]
from openai import OpenAI

client = OpenAI(base_url="http://localhost:8000/v1")
from openai import OpenAI

client = OpenAI(base_url="http://localhost:8000/v2")
Checking
python -m vllm.entrypoints.openai.api_server \\
    --model org/Some-7B \\   # which
    --port 8000
Then prose
curl http://localhost:8000/v1/models | python -m json.tool
curl http://localhost:8000/x -d '{
    "model": "org/Some-7B"
}'
# A fragment
response = client.chat(model="org/Some-7B")
"""

MARKDOWN = """# Title

```python
# proxy.py
import json
value = json.loads("1")
```

Prose.

```
python is not run without a language
```

```python
print(value + 1)
```

```bash
docker run vllm/image
```
"""


def found(tmp_path: Path, text: str, name: str) -> list[Snippet]:
    path = tmp_path / name
    path.write_text(text)
    return snippets_of(path)


def test_plain_text(tmp_path: Path) -> None:
    offline, first, second, serve, curls, fragment = found(tmp_path, PLAIN, "guide.txt")
    assert [each.line for each in (offline, first, second, serve, curls, fragment)] == [4, 11, 14, 18, 22, 27]
    assert offline.source.endswith('LLM(model="smollm2")\nfor output in llm.generate(["x"]):\n    print(output)\n')
    assert first.source.count("OpenAI(") == second.source.count("OpenAI(") == 1
    assert serve.serves
    assert "octavo.entrypoints" in serve.source
    assert "smollm2 \\\n    --port 8000\n" in serve.source  # no comment after the backslash
    assert not curls.serves
    assert curls.source.count("curl") == 2
    assert '"model": "smollm2"\n}' in curls.source
    assert fragment.source.startswith(second.source)
    assert fragment.source.endswith('client.chat(model="smollm2")\n')
    assert {each.lacks for each in (offline, first, serve, curls)} == {None}


def test_markdown(tmp_path: Path) -> None:
    program, docker = found(tmp_path, MARKDOWN, "guide.md")
    assert program.source == '# proxy.py\nimport json\nvalue = json.loads("1")\n\nprint(value + 1)\n'
    assert (program.line, program.file) == (4, "proxy.py")
    assert (docker.kind, docker.lacks) == ("shell", "docker")


def test_a_name_that_nothing_defines_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"guide\.md:2: nothing above defines absent"):
        found(tmp_path, "```python\nprint(absent)\n```\n", "guide.md")


def test_only_the_servers_own_port_is_replaced() -> None:
    source = "curl http://localhost:8000/a localhost:80001 --port 8000 -n 8000"
    assert with_port(source, 9) == "curl http://localhost:9/a localhost:80001 --port 9 -n 8000"
