"""Who is calling, and who is refused?"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator

import httpx2
import pytest

from gateway.app import create_app
from gateway.auth import new_key
from gateway.settings import Auth, Key, Model, Secret, Server, Settings, SettingsError, Target, Upstream
from tests.house import HELLO, TOKEN, House, running

pytestmark = pytest.mark.anyio

Lines = list[tuple[str, str]]
ECHO = {"echo": Upstream(adapter="echo")}
SMART = {name: Model(targets=[Target(upstream="echo")]) for name in ("smart", "dear")}
POOR = "sk-test-poor"


def keyed(name: str, token: str, models: list[str] | None = None) -> Key:
    return Key(name=name, sha256=hashlib.sha256(token.encode()).hexdigest(), models=models)


@pytest.fixture(scope="module")
async def house() -> AsyncIterator[House]:
    keys = [keyed("alice", TOKEN), keyed("bob", POOR, ["smart"])]
    async with running(Settings(auth=Auth(keys=keys), upstreams=ECHO, models=SMART)) as house:
        yield house


@pytest.fixture(scope="module")
async def open_house() -> AsyncIterator[House]:
    async with running(Settings(upstreams=ECHO, models=SMART)) as house:
        yield house


async def call(house: House, lines: Lines, path: str = "/v1/models", body: bytes = b"") -> httpx2.Response:
    """An exchange with exactly these header lines, and Host where they have none."""
    async with asyncio.timeout(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
        sent = [*lines, ("connection", "close"), ("content-length", str(len(body)))]
        sent += [] if any(name == "host" for name, _ in lines) else [("host", f"127.0.0.1:{house.port}")]
        text = "".join(f"{name}: {value}\r\n" for name, value in sent)
        writer.write(f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\n{text}\r\n".encode("latin-1") + body)
        head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    status, *fields = head.decode("latin-1").split("\r\n")
    pairs = [(name, value.strip()) for name, _, value in (field.partition(":") for field in fields)]
    return httpx2.Response(int(status.split()[1]), headers=pairs, content=answer)


def bearer(token: str) -> Lines:
    return [("authorization", f"Bearer {token}")]


@pytest.mark.parametrize(
    "lines",
    [
        bearer(TOKEN),
        [("authorization", f"bearer {TOKEN}")],
        [("authorization", f"BEARER   {TOKEN}   ")],
        [*bearer(TOKEN), ("x-forwarded-for", "1.2.3.4"), ("host", "suiron.example"), ("origin", "https://a.example")],
    ],
    ids=["a key", "lower case", "upper case and spaces", "through a proxy"],
)
async def test_a_right_key_is_let_in(house: House, lines: Lines) -> None:
    assert (await call(house, lines)).status_code == 200


WRONG: dict[str, Lines] = {
    "another key": bearer("sk-test-9876543210"),
    "half the key": bearer(TOKEN[:-1]),
    "a longer key": bearer(TOKEN + "0"),
    "the hash of the key": bearer(hashlib.sha256(TOKEN.encode()).hexdigest()),
    "other letters": bearer(TOKEN.upper()),
    "8-bit characters": bearer("é" * 20),
    "basic": [("authorization", f"Basic {TOKEN}")],
    "no scheme": [("authorization", TOKEN)],
    "the scheme twice": [("authorization", f"Bearer Bearer {TOKEN}")],
    "two keys in one header": [("authorization", f"Bearer {TOKEN}, Bearer {TOKEN}")],
    "two headers": bearer(TOKEN) * 2,
    "a wrong header first": [*bearer("sk-wrong"), *bearer(TOKEN)],
    "a wrong header last": [*bearer(TOKEN), *bearer("sk-wrong")],
}


async def test_every_wrong_key_gets_the_same_answer(house: House) -> None:
    answers = {what: await call(house, lines) for what, lines in WRONG.items()}
    for what, answer in answers.items():
        assert answer.status_code == 401, what
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert not any(secret in answer.text for secret in (TOKEN[:8], "sk-wrong", "sk-test")), what
    assert len({answer.content for answer in answers.values()}) == 1
    varying = {"date", "x-request-id"}
    kinds = {tuple(sorted((n, v) for n, v in a.headers.items() if n not in varying)) for a in answers.values()}
    assert len(kinds) == 1
    assert next(iter(answers.values())).headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("lines", "path"),
    [
        ([], "/v1/models"),
        ([("authorization", "")], "/v1/models"),
        ([("authorization", "Bearer")], "/v1/models"),
        ([("authorization", "Bearer  ")], "/v1/models"),
        ([], f"/v1/models?api_key={TOKEN}&key={TOKEN}&access_token={TOKEN}"),
        ([("api-key", TOKEN), ("x-api-key", TOKEN), ("cookie", f"key={TOKEN}")], "/v1/models"),
        ([("host", "127.0.0.1")], "/v1/models"),
        ([], "/v1/models/smart"),
        ([], "/v1/models/nope"),
        ([], "//v1/models"),
    ],
)
async def test_without_a_key_in_its_header_nobody_is_let_in(house: House, lines: Lines, path: str) -> None:
    answer = await call(house, lines, path)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] is None
    assert TOKEN not in answer.text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
async def test_no_endpoint_is_without_its_lock(house: House, path: str) -> None:
    answer = await call(house, [("content-type", "application/json")], path, json.dumps(HELLO).encode())
    assert answer.status_code == 401


async def test_health_asks_for_no_key(house: House) -> None:
    assert (await call(house, [], "/health/live")).json() == {"status": "ok"}


async def test_a_key_sees_and_uses_only_its_models(house: House) -> None:
    json_type = ("content-type", "application/json")
    listed = (await call(house, bearer(POOR))).json()["data"]
    assert [model["id"] for model in listed] == ["smart"]
    assert (await call(house, bearer(POOR), "/v1/models/smart")).status_code == 200
    for model, status in (("smart", 200), ("dear", 404), ("nope", 404)):
        body = json.dumps({**HELLO, "model": model}).encode()
        answer = await call(house, [*bearer(POOR), json_type], "/v1/chat/completions", body)
        assert answer.status_code == status
    hidden, missing = [await call(house, bearer(POOR), f"/v1/models/{name}") for name in ("dear", "nope")]
    assert hidden.text == missing.text.replace("nope", "dear"), "what is hidden looks like what is not there"


# Without keys.


@pytest.mark.parametrize(
    "lines",
    [
        [],
        *[
            [("host", host)]
            for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.2:80", "[::1]", "[::1]:8000")
        ],
        *[[("origin", origin)] for origin in ("http://localhost:3000", "https://127.0.0.1", "http://[::1]:5173")],
        bearer("anything"),
    ],
)
async def test_without_keys_programs_on_this_machine_are_let_in(open_house: House, lines: Lines) -> None:
    assert (await call(open_house, lines)).status_code == 200


@pytest.mark.parametrize(
    "lines",
    [
        *[
            [("host", host)]
            for host in (
                "",
                "evil.example",
                "localhost.evil.example",
                "127.0.0.1.evil.example",
                "127.evil.example",
                "localhost@evil.example",
                "0.0.0.0",
                "10.0.0.1",
                "[::]",
                "2130706433",
            )
        ],
        [("host", "localhost"), ("host", "evil.example")],
        [("host", "evil.example"), ("host", "localhost")],
        *[
            [("origin", origin)]
            for origin in (
                "null",
                "",
                "https://evil.example",
                "http://localhost.evil.example",
                "http://localhost@evil.example",
                "file://",
                "chrome-extension://abc",
            )
        ],
        [("origin", "http://localhost"), ("origin", "https://evil.example")],
        [("x-forwarded-for", "127.0.0.1")],
        [("X-Forwarded-Host", "localhost")],
        [("x-forwarded-proto", "https")],
        [("forwarded", "for=127.0.0.1")],
        [("via", "1.1 proxy")],
        [("x-real-ip", "127.0.0.1")],
        [("x-forwarded-for", "127.0.0.1"), *bearer("anything")],
    ],
)
async def test_without_keys_nobody_else_is_let_in(open_house: House, lines: Lines) -> None:
    answer = await call(open_house, lines)
    assert answer.status_code == 401
    assert "suiron key new" in answer.json()["error"]["message"]
    assert (await call(open_house, lines, "/v1/models/nope")).status_code == 401


async def test_what_is_no_host_at_all_opens_nothing(open_house: House) -> None:
    for host in (
        "evil.example#localhost",
        "localhost/evil",
        "a/?x=localhost",
        "[::1",
        "löcalhost",
        "localhost, a.example",
    ):
        answer = await call(open_house, [("host", host)])
        assert answer.status_code in (400, 401), host
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("server", "upstream", "why"),
    [
        (Server(host="0.0.0.0"), Upstream(adapter="echo"), "listen on 0.0.0.0.*suiron key new.*listen on 127.0.0.1"),
        (Server(host="::"), Upstream(adapter="echo"), "listen on ::.*suiron key new"),
        (Server(host="suiron.example"), Upstream(adapter="echo"), "listen on suiron.example.*suiron key new"),
        (
            Server(),
            Upstream(adapter="echo", api_key=Secret(env="HOME")),
            "the upstream 'echo' holds a credential.*suiron key new",
        ),
    ],
)
def test_it_refuses_to_start_open_to_strangers_and_says_what_to_do(
    server: Server, upstream: Upstream, why: str
) -> None:
    settings = Settings(server=server, upstreams={"echo": upstream}, models=SMART)
    with pytest.raises(SettingsError, match=f"refusing to start without keys: .*{why}"):
        create_app(settings)
    with_key = Settings(
        server=server, upstreams={"echo": upstream}, models=SMART, auth=Auth(keys=[keyed("alice", TOKEN)])
    )
    create_app(with_key)


def test_new_keys_are_long_and_never_the_same() -> None:
    keys = {new_key() for _ in range(100)}
    assert len({key for key, _ in keys}) == 100
    assert all(len(key) > 50 and hashlib.sha256(key.encode()).hexdigest() == digest for key, digest in keys)
