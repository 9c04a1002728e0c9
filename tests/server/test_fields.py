"""The table of fields and what it drives: it agrees with the structs, and the server does what it says."""

from __future__ import annotations

import asyncio
import string
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from request_bodies import ADAPTER_STRUCTS, BASE, ROUTES, STRUCTS
from server_rig import EOS, Rig, running

from octavo.config import OutputFacts, ServerOptions
from octavo.protocol.fields import FIELDS, REQUIRED, Field, fields_of
from octavo.protocol.ranges import INT64_MAX, Biases, Flag, Integer, Items, OneOf, Real, Shape, Text, TokenIds
from octavo.protocol.sampling import SamplingParams

# What a field needs beside it.
BESIDE: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True},
    "length_penalty": {"use_beam_search": True},
    "early_stopping": {"use_beam_search": True},
    "min_tokens": {"max_tokens": 400},
    "guided_decoding_backend": {},
}
OUTPUTS = OutputFacts(dimensions=(), hidden_size=48)
HIGHEST = {"the model's dimensions": 48, "the model's context": 400, "max_tokens": 400}
KINDS = [SamplingParams, *STRUCTS.values(), *ADAPTER_STRUCTS]
CHARACTERS = string.ascii_letters + " é字"
Case = tuple[str, Field]
RANGED: list[Case] = [
    (name, row) for name in STRUCTS for row in fields_of(name).values() if type(row.range) is not Shape
]
IDS = [f"{name}.{row.name}" for name, row in RANGED]


@pytest.mark.parametrize("struct", KINDS, ids=lambda struct: struct.__name__)
def test_table_and_structs_agree(struct: type[msgspec.Struct]) -> None:
    rows, name = fields_of(struct.__name__), struct.__name__
    fields = {field.name: field for field in msgspec.structs.fields(struct)}
    for missing in set(fields) - set(rows):
        pytest.fail(f"{name}.{missing} needs a row in protocol/fields.py: Field(({name!r},), {missing!r}, RANGE, …)")
    assert set(rows) == set(fields), f"rows of protocol/fields.py that {name} has no field for"
    for field in fields.values():
        row = rows[field.name]
        assert (row.default is REQUIRED) == field.required, field.name
        if not field.required and (struct is SamplingParams or field.default is not None):
            assert field.default == row.default, field.name
            assert type(field.default) is type(row.default), field.name
        _check_bounds(row, msgspec.json.schema_components([struct])[1][name]["properties"][field.name])


def _check_bounds(row: Field, schema: dict[str, Any]) -> None:
    """Where an annotation bounds a field too, it says what the row says."""
    keywords = row.range.keywords()
    for branch in schema.get("anyOf", [schema]) if type(row.range) is not Shape else ():
        for word in ("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"):
            own = keywords.get(branch.get("type", ""), {})
            assert branch.get(word, own.get(word)) == own.get(word) or (word, branch[word]) == ("minLength", 0), (
                row.name
            )
        if "enum" in branch and isinstance(row.range, OneOf):
            assert sorted(branch["enum"]) == sorted(row.range.values)


def test_rows_are_unambiguous_and_say_something() -> None:
    pairs = [(struct, row.name) for row in FIELDS for struct in row.structs]
    assert len(pairs) == len(set(pairs))
    assert {struct for struct, _ in pairs} == {struct.__name__ for struct in KINDS}
    for row in FIELDS:
        assert row.meaning.endswith(".")
        assert row.range.words


def inside(row: Field) -> st.SearchStrategy[Any]:
    """Values that the row allows, its edges often among them."""
    match row.range:
        case Flag():
            return st.booleans()
        case OneOf(values):
            return st.sampled_from(values)
        case Integer(low, high, hole, within):
            top = min(high, HIGHEST.get(within, high), 16 if row.cost == "completions" else high)
            bottom = max(low, 1) if row.name == "max_tokens" else low
            return st.one_of(st.sampled_from([bottom, top]), st.integers(bottom, top)).filter(lambda n: n != hole)
        case Real(low, high, open_low):
            numbers = st.floats(low, min(high, 1e9), exclude_min=open_low, allow_subnormal=False)
            return numbers if open_low else st.one_of(st.just(low), numbers)
        case Text(low, high, blank):
            return st.text(CHARACTERS, min_size=low, max_size=min(high, 40)).filter(lambda s: not blank or s.strip())
        case Items(Text(_, high, _), low, most):
            texts = st.text(string.ascii_letters, min_size=1, max_size=min(high, 20))
            return st.lists(texts, min_size=low, max_size=min(most, 8))
        case TokenIds(low, most):
            return st.lists(st.integers(0, EOS), min_size=low, max_size=min(most, 8))
        case Biases(each, _):
            return st.dictionaries(st.integers(0, EOS).map(str), st.floats(each.low, each.high), max_size=8)
    raise AssertionError(row.range)


def outside(row: Field) -> st.SearchStrategy[Any]:
    """Values of another type, and of the field's type just and far beyond its ends."""
    wrong: list[Any] = [{"a": 1}, [{}], [None]]
    match row.range:
        case Flag():
            wrong += [0, 1, "true", 0.5]
        case OneOf():
            wrong += ["other", "", 5]
        case Integer(low, high, hole):
            wrong += [low - 1, high + 1, 10**30, "1", 1.5, True, *([] if hole is None else [hole])]
        case Real(low, high, open_low):
            wrong += ["1", True, *([low] if open_low else []), low - 0.001]
            wrong += [] if high == float("inf") else [high + 0.001, 1e300]
        case Text(low, high):
            wrong += [5, True, "x" * (high + 1), *(["x" * (low - 1)] if low else [])]
        case Items(Text(_, high), _, most, _):
            wrong += [5, ["x" * (high + 1)], [""], [5], ["x"] * (most + 1)]
        case TokenIds(low, most):
            wrong += [5, "x", [-1], [EOS + 1], [2**31], ["a"], [True], [1.5]]
            wrong += [*([[]] if low else []), *([[1] * (most + 1)] if most != INT64_MAX else [])]
        case Biases(each, high):
            wrong += [5, {"x": 1}, {"-1": 1}, {"1": each.high + 1}, {"1": "1"}]
            wrong += [{str(n): 1 for n in range(high + 1)}]
    return st.sampled_from(wrong)


class Server:
    """The rig under an event loop that runs while a request is answered."""

    def __init__(self, runner: asyncio.Runner, rig: Rig) -> None:
        self._runner = runner
        self.rig = rig

    def post(self, struct: str, body: dict[str, Any], query: str = "") -> httpx.Response:
        content = msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"}
        answer = self._runner.run(self.rig.http.post(ROUTES[struct].path + query, content=content, headers=headers))
        assert answer.status_code < 500, (struct, body, answer.text)
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert error["message"], body
            anthropic = struct in ("MessagesBody", "CountBody")
            assert set(error) == {"message", "type", "param"} | (set() if anthropic else {"code"})
        return answer


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with asyncio.Runner() as runner:
        options = ServerOptions(max_waiting_requests=1024, max_request_cost=2**62)
        context = running(options=options, scheduling_policy="priority", outputs=OUTPUTS)
        rig = runner.run(_enter(context))
        yield Server(runner, rig)
        runner.run(context.__aexit__(None, None, None))


async def _enter(context: Any) -> Rig:
    rig: Rig = await context.__aenter__()
    return rig


QUICK = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize(("struct", "row"), RANGED, ids=IDS)
def test_values_in_range_are_accepted_and_others_refused_by_name(server: Server, struct: str, row: Field) -> None:
    base = {**BASE[struct], **BESIDE.get(row.name, {})}

    @QUICK
    @given(value=inside(row))
    def accepted(value: Any) -> None:
        needs_more = {"include_reasoning": value is False, "previous_response_id": True, "use_activation": value}
        needs_more["thinking_token_budget"] = value != -1
        if needs_more.get(row.name) or (struct == "TokenizeBody" and row.name in ("add_generation_prompt", "prompt")):
            return
        body = {**base, row.name: value}
        if row.name == "continue_final_message" and value:
            body["add_generation_prompt"] = False
        if row.name == "use_beam_search" or "use_beam_search" in base:
            body["temperature"] = 0
        answer = server.post(struct, body)
        assert answer.status_code == 200, (body, answer.text)

    @QUICK
    @given(value=outside(row))
    def refused(value: Any) -> None:
        answer = server.post(struct, {**base, row.name: value})
        assert answer.status_code == 400, (row.name, str(value)[:200], answer.text)
        param = answer.json()["error"]["param"]
        assert param.startswith(row.name), (row.name, str(value)[:200], answer.text)

    accepted()
    refused()


@pytest.mark.parametrize("struct", STRUCTS)
def test_bodies_of_any_fields_are_answered_or_refused_by_a_field(server: Server, struct: str) -> None:
    base = BASE[struct]
    rows = [row for name, row in RANGED if name == struct and row.name not in base]
    choices = st.fixed_dictionaries(
        {name: st.just(value) for name, value in base.items()},
        optional={row.name: st.one_of(inside(row), inside(row), outside(row)) for row in rows},
    )

    @settings(QUICK, max_examples=20)
    @given(body=choices)
    def answered(body: dict[str, Any]) -> None:
        answer = server.post(struct, body)
        if answer.status_code == 400:
            param = answer.json()["error"]["param"]
            assert any(param.startswith(name) for name in body), (body, answer.text)

    answered()


def _sent(server: Server, struct: str, body: dict[str, Any]) -> Any:
    """What reached the engine, without what is drawn anew."""
    del server.rig.engine.requests[:]
    answer = server.post(struct, body)
    assert answer.status_code == 200, (body, answer.text)
    return [(r.prompt_token_ids, r.max_tokens, r.priority, r.pooling, r.sampling) for r in server.rig.engine.requests]


DEFAULTS = [(name, row) for name in STRUCTS for row in fields_of(name).values() if row.default not in (None, REQUIRED)]


@pytest.mark.parametrize(("struct", "row"), DEFAULTS, ids=[f"{name}.{row.name}" for name, row in DEFAULTS])
def test_a_default_that_is_given_changes_nothing(server: Server, struct: str, row: Field) -> None:
    base = {**BASE[struct], **({"seed": 1} if "seed" in fields_of(struct) else {})}
    assert _sent(server, struct, {**base, row.name: row.default}) == _sent(server, struct, base)


@pytest.mark.parametrize("struct", STRUCTS)
def test_unknown_fields_are_named_in_a_header(server: Server, struct: str) -> None:
    unknown = {"foo": 1, "b\r\nX-Evil: 1": 2, "": 3}
    bodies = [BASE[struct], {**BASE[struct], "stream": True}][: 2 if ROUTES[struct].streams else 1]
    for body in bodies:
        answer = server.post(struct, {**body, **unknown})
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Octavo-Ignored-Fields"] == "foo, b??X-Evil??1, ?"
        assert "x-evil" not in answer.headers
        assert "X-Octavo-Ignored-Fields" not in server.post(struct, body).headers
    many = server.post(struct, {**BASE[struct], **{f"{n}{'x' * 100}": n for n in range(1000)}})
    assert many.headers["X-Octavo-Ignored-Fields"].endswith(", and 984 more")
    assert len(many.headers["X-Octavo-Ignored-Fields"]) < 1200


@pytest.mark.parametrize("struct", STRUCTS)
def test_parameters_of_the_query_that_nothing_reads_are_named_too(server: Server, struct: str) -> None:
    answer = server.post(struct, {**BASE[struct], "foo": 1}, "?api-version=2&x%0d%0a=")
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-Octavo-Ignored-Fields"] == "api-version, x??, foo"
