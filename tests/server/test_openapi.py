"""The served document describes the routes that there are, and Schemathesis finds no answer that it does not.

`pytest tests/server/test_openapi.py --cases 5000 [--server http://127.0.0.1:8000]` makes more requests.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from server_rig import FakeEngine, make_context, running
from starlette.routing import Route

from octavo.config import ServerOptions
from octavo.server.api_page import page
from octavo.server.app import build_app
from octavo.server.openapi import ADAPTER_OPERATIONS, OPERATIONS, document

CHECKS = (
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    negative_data_rejection,
    unsupported_method,
)
PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def test_every_route_is_described_and_every_description_has_a_route() -> None:
    for runtime, operations in ((False, OPERATIONS), (True, OPERATIONS + ADAPTER_OPERATIONS)):
        options = ServerOptions(allow_runtime_lora=runtime)
        served = {
            (method.lower(), route.path.replace(":path}", "}"))
            for route in build_app(make_context(FakeEngine(), options=options)).routes
            if isinstance(route, Route)
            for method in (route.methods or set()) - {"HEAD"}
        }
        described = {(operation.method, operation.path) for operation in operations}
        assert served == described, "a route needs an Operation in server/openapi.py"


def test_the_page_names_every_route_by_its_method() -> None:
    for operation in OPERATIONS + ADAPTER_OPERATIONS:
        assert f"{operation.method.upper()} {operation.path}" in page()


def test_the_page_is_what_the_table_gives() -> None:
    assert PAGE.read_text() == page(), "run `make docs`"


def test_the_schemas_are_schemas() -> None:
    described = document("1", ("m",), True)
    for schema in described["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    body = described["components"]["schemas"]["ChatBody"]["properties"]
    assert body["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 2}
    assert body["temperature"]["default"] == 1.0
    assert body["max_tokens"]["deprecated"]
    assert "security" not in described["paths"]["/health"]["get"]
    assert "401" in described["paths"]["/openapi.json"]["get"]["responses"]


async def test_the_document_needs_a_key_where_there_is_one() -> None:
    async with running(options=ServerOptions(api_key=("secret",))) as rig:
        assert (await rig.http.get("/openapi.json")).status_code == 401
        answer = await rig.http.get("/openapi.json", headers={"x-api-key": "secret"})
        assert answer.json()["components"]["securitySchemes"].keys() == {"bearer", "key"}
        assert answer.json()["components"]["schemas"]["ChatBody"]["properties"]["model"]["enum"] == [
            "fake",
            "org/alias",
        ]


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    if given_url := request.config.getoption("--server"):
        yield given_url
        return
    command = [sys.executable, str(Path(__file__).with_name("rig_process.py"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=10)
        process.stdout.close()


def _check_shape(status: int, path: str, body: Any) -> None:
    error = body["error"]
    assert isinstance(error["message"], str)
    assert error["message"], (status, body)
    expected = {"message", "type", "param"} | (set() if path.startswith("/v1/messages") else {"code"})
    assert set(error) == expected, (status, path, body)


@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("default")
def test_schemathesis_finds_nothing(url: str, request: pytest.FixtureRequest) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", timeout=30)
    operations = [result.ok() for result in schema.get_all_operations()]
    with_body = [operation for operation in operations if operation.method == "post"]
    cases = max(1, request.config.getoption("--cases") // (2 * len(with_body)))
    counts: dict[int, int] = {}
    for operation in operations:
        modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        for mode in modes if operation in with_body else modes[:1]:

            @settings(
                max_examples=cases if operation in with_body else 1,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                response = case.call(timeout=120)
                counts[response.status_code] = counts.get(response.status_code, 0) + 1
                case.validate_response(response, checks=list(CHECKS))
                if response.status_code >= 400:
                    _check_shape(response.status_code, case.path, response.json())

            check()
    print(f"{sum(counts.values())} requests: {dict(sorted(counts.items()))}")
    assert not any(status >= 500 for status in counts)
    assert counts.get(200, 0) > len(operations) // 4
