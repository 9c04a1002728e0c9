"""Raw sockets: slow, half-sent, oversized and malformed requests end with an answer, and cost nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import time

import pytest
from server_rig import FakeEngine, Script, running, until

from octavo.config import ServerOptions

BODY = b'{"model": "fake", "prompt": "x"}'


def request(body: bytes = BODY, path: str = "/v1/completions", method: str = "POST", **headers: str) -> bytes:
    """A request that asks for the connection to be closed. A header given as "" is left out."""
    given = {"host": "x", "connection": "close", "content-type": "application/json", "content-length": str(len(body))}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items() if value), "", ""]
    return "\r\n".join(lines).encode() + body


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error_of(answer: bytes) -> dict[str, object]:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


@pytest.fixture(autouse=True)
def _no_tracebacks(caplog: pytest.LogCaptureFixture):
    yield
    assert [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR] == []


async def test_slow_requests_are_answered_408_and_closed() -> None:
    async with running() as rig:
        for data in (
            b"",
            b"POST /v1/comp",
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n",
            request(b"{", content_length="1000"),
            request(b"", content_length="", transfer_encoding="chunked") + b"5\r\nab",
        ):
            start = time.monotonic()
            answer = await rig.raw(data)
            assert status(answer) == 408, (data, answer)
            assert error_of(answer)["code"] in ("request_timeout", None)
            assert 0.4 < time.monotonic() - start < 4
            await rig.healthy()


async def test_a_trickled_body_runs_into_the_total_limit() -> None:
    async with running() as rig:
        reader, writer = await rig.connect()
        writer.write(request(b"", content_length="1000", connection="keep-alive"))
        start = time.monotonic()
        answer = asyncio.create_task(reader.readuntil(b"}}"))
        while not answer.done() and time.monotonic() - start < 3:
            writer.write(b" ")
            await asyncio.sleep(0.1)
        assert status(await answer) == 408
        assert time.monotonic() - start < 2


async def test_a_trickled_body_after_the_answer_does_not_hold_the_socket() -> None:
    async with running() as rig:
        reader, writer = await rig.connect()
        writer.write(request(b"", content_length="1000", content_type="text/plain", connection="keep-alive"))
        assert status(await reader.readuntil(b"}}")) == 415
        start = time.monotonic()
        while not reader.at_eof() and time.monotonic() - start < 3:
            writer.write(b" ")
            await asyncio.sleep(0.05)
        assert reader.at_eof()
        writer.close()


async def test_a_connection_stays_open_between_requests() -> None:
    async with running() as rig:
        reader, writer = await rig.connect()
        for code, piece in ((404, b'{"model": "x", "prompt": "x"}'), (200, BODY), (200, BODY)):
            head, body = request(piece, connection="keep-alive").split(b"\r\n\r\n")
            writer.write(head + b"\r\n\r\n")
            await asyncio.sleep(0.05)
            writer.write(body)
            assert status(await reader.readuntil(b"}}")) == code
            await asyncio.sleep(0.7)  # longer than the time for a head
        writer.write(request(BODY, "/nowhere", connection="keep-alive")[:-5])  # answered before its body came
        assert status(await reader.readuntil(b"}}")) == 404
        writer.write(BODY[-5:])
        await asyncio.sleep(1.2)  # longer than a refused body may take
        writer.write(request(BODY))
        assert b"HTTP/1.1 200" in await reader.read()


async def test_heads_that_are_refused() -> None:
    async with running() as rig:
        many = {f"x-{i}": "1" for i in range(100)}
        for data, code in (
            (request(x="y" * 20_000), 431),
            (request(**many), 431),
            (request(**{f"x-{i}": "1" for i in range(20_000)}), 431),
            (b"nonsense\r\n\r\n", 400),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
            (request(content_length="abc"), 400),
            (request(content_length="-1"), 400),
            (request(content_length="1_0"), 400),
            (request(transfer_encoding="gzip"), 501),
            (request(b"zz\r\n\r\n", content_length="", transfer_encoding="chunked"), 400),
        ):
            answer = await rig.raw(data)
            assert status(answer) == code, (data[:80], answer)
            assert set(error_of(answer)) == {"message", "type", "param", "code"}
        await rig.healthy()


async def test_bodies_that_are_refused() -> None:
    async with running(options=ServerOptions(max_body_bytes=20_000)) as rig:
        big = b"x" * 150_000
        chunked = b"".join(b"1\r\nx\r\n" for _ in range(30_000)) + b"0\r\n\r\n"
        for data, code in (
            (request(big), 413),
            (request(b"", content_length="99999999999", expect="100-continue"), 413),
            (request(chunked, content_length="", transfer_encoding="chunked"), 413),
            (request(content_type=""), 415),
            (request(content_type="text/plain"), 415),
            (request(content_type="multipart/form-data"), 415),
            (request(content_encoding="gzip"), 415),
            (request(b"", content_length="", method="POST"), 400),
        ):
            answer = await rig.raw(data)
            assert status(answer) == code, (data[:120], answer[:200])
            assert b"100 Continue" not in answer
            await rig.healthy()
        fine = await rig.raw(request(content_type="application/json; charset=utf-8", expect="100-continue"))
        assert fine.startswith(b"HTTP/1.1 100 ")
        assert b"HTTP/1.1 200" in fine


async def test_an_endless_body_is_cut_off_with_flat_memory() -> None:
    async with running(options=ServerOptions(max_body_bytes=100_000)) as rig:
        _, writer = await rig.connect()
        writer.write(request(b"", content_length="", transfer_encoding="chunked"))
        piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        start = time.monotonic()
        try:
            while time.monotonic() - start < 5:
                writer.write(piece)
                await writer.drain()
        except ConnectionError:
            pass
        assert time.monotonic() - start < 2
        writer.close()
        await rig.healthy()


async def test_methods_and_paths() -> None:
    async with running() as rig:
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
            answer = await rig.http.request(method, "/v1/chat/completions")
            assert (answer.status_code, answer.headers["allow"]) == (405, "POST"), method
            assert answer.json()["error"]["code"] == "method_not_allowed"
        for path in ("/", "/v1", "/v1/completions/", "/tokenise", "/v1/%00", "/v1/../health", "/" + "a" * 8000):
            answer = await rig.raw(request(path=path))
            assert status(answer) == 404, path
            assert error_of(answer)["code"] == "not_found"
        assert status(await rig.raw(request(b"", path="http://x/health", method="GET"))) == 404
        await rig.healthy()


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with running(FakeEngine(lambda r: Script(bytes(r.prompt_token_ids)))) as rig:
        bodies = [b'{"model": "fake", "prompt": "%d"}' % i for i in range(50)]
        data = b"".join(request(body, connection="keep-alive") for body in bodies[:-1]) + request(bodies[-1])
        answer = await rig.raw(data)
        assert answer.count(b"HTTP/1.1 200") == 50
        places = [answer.index(b'"text":"%d"' % i) for i in range(50)]
        assert places == sorted(places)


async def test_keys() -> None:
    async with running(options=ServerOptions(api_key=("good", "better"))) as rig:
        paths = ["/v1/models", "/v1/models/fake", "/v1/completions", "/metrics", "/tokenize", "/", "/V1/models"]
        for value in (None, "Bearer", "Bearer bad", "Basic good", "good", "Bearer good, Bearer good", "Bearer gööd"):
            headers = {} if value is None else {"Authorization": value.encode("latin-1")}
            for path in paths:
                answer = await rig.http.get(path, headers=headers)
                assert answer.status_code == 401, (value, path)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key"
        assert status(await rig.raw(request(b"", host="a/?x", method="GET", path="/v1/models"))) == 401
        assert status(await rig.raw(request(b"", method="GET", path="//health"))) == 401
        for key in ("good", "better"):
            for scheme in ("Bearer", "bearer"):
                answer = await rig.http.get("/v1/models", headers={"Authorization": f"{scheme} {key}"})
                assert answer.status_code == 200
        for path in ("/health", "/ping", "/version"):
            assert (await rig.http.get(path)).status_code == 200
        assert (await rig.openai.models.list()).data


@pytest.mark.parametrize("stream", [b"true", b"false"])
@pytest.mark.parametrize("phase", ["queued", "running"])
async def test_disconnect_aborts_within_a_second(stream: bytes, phase: str) -> None:
    gate = asyncio.Event()
    if phase == "running":
        gate.set()
    async with running(FakeEngine(lambda _: Script(b"x" * 200, delay=0.02, gate=gate))) as rig:
        _, writer = await rig.connect()
        body = b'{"model": "fake", "prompt": "x", "n": 3, "max_tokens": 300, "stream": %s}' % stream
        writer.write(request(body, connection="keep-alive"))
        await until(lambda: len(rig.engine.running) == 3)
        await asyncio.sleep(0.05)
        writer.close()
        await until(lambda: len(rig.engine.aborted) == 3, 1.0)
        metrics = await rig.metrics()
        assert metrics['vllm:request_success_total{finished_reason="abort"}'] == 3
        assert metrics["octavo:requests_in_flight"] == 0


async def test_disconnect_while_the_body_is_sent_or_tokenized_leaves_nothing() -> None:
    async with running() as rig:
        for data in (request(b"{", content_length="100"), request()[:40]):
            _, writer = await rig.connect()
            writer.write(data)
            await writer.drain()
            writer.transport.abort()
        await rig.healthy()
        assert rig.engine.running == set()


async def test_a_client_that_does_not_read_is_dropped() -> None:
    async with running(FakeEngine(lambda _: Script(b"x" * 400, delay=0.005)), send_buffer=4096) as rig:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", rig.port))
            fields = b'"max_tokens": 400, "stream": true, "logprobs": true, "top_logprobs": 20'
            body = b'{"model": "fake", "messages": [{"role": "user", "content": "x"}], %s}' % fields
            sock.sendall(request(body, "/v1/chat/completions"))
            await until(lambda: len(rig.engine.aborted) == 1)


async def test_a_client_that_reads_slowly_gets_everything() -> None:
    """More than the buffers hold, read for longer than the write timeout, in pauses shorter than it."""
    text = bytes(range(0x41, 0x5B)) * 15
    async with running(FakeEngine(lambda _: Script(text)), send_buffer=4096) as rig:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", rig.port))
            sock.setblocking(False)
            fields = b'"max_tokens": 390, "stream": true, "logprobs": true, "top_logprobs": 20'
            body = b'{"model": "fake", "messages": [{"role": "user", "content": "x"}], %s}' % fields
            sock.sendall(request(body, "/v1/chat/completions"))
            await asyncio.sleep(0.1)
            assert rig.engine.running == set()  # the engine is not held up by its reader
            loop, answer, start = asyncio.get_running_loop(), b"", time.monotonic()
            while piece := await loop.sock_recv(sock, 32768):
                answer += piece
                await asyncio.sleep(0.02)
        assert time.monotonic() - start > 0.6
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert "".join(re.findall(r'"delta":{"content":"(.)"}', answer.decode())) == text.decode()


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_for_http_1_0_is_not_chunked(n: int) -> None:
    async with running() as rig:
        body = b'{"model": "fake", "prompt": "x", "n": %d, "stream": true}' % n
        answer = await rig.raw(request(body, connection="").replace(b"HTTP/1.1", b"HTTP/1.0"))
        head, _, events = answer.partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        *frames, done, rest = events.split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b"")
        texts = [json.loads(frame.removeprefix(b"data: "))["choices"][0] for frame in frames]
        for index in range(n):
            assert "".join(choice["text"] for choice in texts if choice["index"] == index) == "hello"


async def test_log_lines_cannot_be_forged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "octavo.access")
    async with running() as rig:
        await rig.raw(request(path="/a%0aINFO%1b[31m"))
    lines = [r.getMessage() for r in caplog.records if r.name == "octavo.access"]
    assert any(r"/a\nINFO\x1b[31m 404" in line for line in lines)
    assert not any("\n" in line for line in lines)
