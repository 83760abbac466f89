"""
What does each dialect send for a request, and what does a client get for what came back?

A folder `golden/<dialect>/<case>/` holds `request.json`, as a client sends it; `sent.json`, what goes upstream;
`received.json` or `received.sse`, what came back (`received-404.json` with another status than 200); `answered.jsonl`,
the parts that the client gets, or the error; `options.json` those of the upstream, if any. To record `sent` and
`answered` anew: GOLDEN=write.
"""

import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest

from adapters.openai.options import ENGINES, Options, switches
from adapters.tgi.adapter import REPAIRS as OF_TGI
from adapters.vllm.adapter import REPAIRS as OF_VLLM
from gateway.auth import ANONYMOUS
from gateway.cache import Cache
from gateway.cache.question import Fingerprints
from gateway.call import Call
from gateway.errors import GatewayError
from gateway.ledger import Ledger
from gateway.limits import Limiter
from gateway.models import Models
from gateway.pipeline import Pipeline
from gateway.routing import Router
from gateway.schema.endpoint import CHAT, COMPLETIONS, EMBEDDINGS
from gateway.schema.reading import read_request
from gateway.settings import Model, Settings, Target, Upstream
from gateway.stores.answers import MemoryAnswers
from gateway.stores.memory import MemoryStore
from gateway.telemetry.metrics import Metrics
from gateway.tokens import Tokens

pytestmark = pytest.mark.anyio

FOLDER = Path(__file__).parent / "golden"
CASES = sorted(path.parent for path in FOLDER.glob("*/*/request.json"))
REPAIRS = {"tgi": OF_TGI, "vllm": OF_VLLM}
ENDPOINTS = {"messages": CHAT, "prompt": COMPLETIONS, "input": EMBEDDINGS}
TYPES = {".json": "application/json", ".sse": "text/event-stream"}


class Recording(httpx2.AsyncBaseTransport):
    """An upstream that answers with a file, and keeps what it was sent."""

    def __init__(self, case: Path) -> None:
        (self._file,) = case.glob("received*")
        self._sent: list[Any] = []

    @property
    def sent(self) -> Any:
        """The request, or in some order all of several."""
        return self._sent[0] if len(self._sent) == 1 else sorted(self._sent, key=json.dumps) or None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.path.endswith("tokenize"):  # asked beside the exchange
            return httpx2.Response(404)
        self._sent.append({"path": request.url.path, "body": json.loads(await request.aread())})
        status = re.search(r"-(\d{3})$", self._file.stem)
        headers = {"content-type": TYPES[self._file.suffix]}
        return httpx2.Response(int(status[1]) if status else 200, headers=headers, content=self._file.read_bytes())


async def exchange(case: Path) -> tuple[Any, list[Any]]:
    """What was sent, and what was answered."""
    body = (case / "request.json").read_bytes()
    endpoint = next(endpoint for name, endpoint in ENDPOINTS.items() if name in json.loads(body))
    payload, unknown = read_request(endpoint, body)
    call = Call(endpoint, ANONYMOUS, payload, unknown, id="7", created=7)
    transport = Recording(case)
    given = case / "options.json"
    options = json.loads(given.read_bytes()) if given.exists() else {}
    upstream = Upstream(adapter=case.parent.name, base_url="http://upstream/v1", options=options)
    adapter = importlib.import_module(f"adapters.{upstream.adapter}").Adapter(upstream, transport=transport)
    model = Model(targets=[Target(upstream="upstream", model="model-1")])
    settings = Settings(upstreams={"upstream": upstream}, models={"smart": model})
    models, ledger, tokens = Models(settings, {"upstream": adapter}), Ledger(), Tokens(settings)
    limiter = Limiter(settings, MemoryStore(ledger.used), tokens, ledger.used)
    cache = Cache(settings, MemoryAnswers(1_000_000), Fingerprints(settings))
    pipeline = Pipeline(models, ledger, limiter, cache, Router(settings.upstreams, Metrics()), tokens)
    answered = []
    try:
        async for arrived in pipeline.answer(call):
            answered += [json.loads(part.wire) for part in arrived]
    except GatewayError as exc:
        answered.append({"status": exc.status, **json.loads(exc.json())})
    return transport.sent, answered


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}/{case.name}")
async def test_a_dialect_sends_and_answers_as_recorded(case: Path) -> None:
    sent, answered = await exchange(case)
    lines = [json.dumps(document, ensure_ascii=False) for document in answered]
    if os.environ.get("GOLDEN") == "write":
        (case / "sent.json").write_text(json.dumps(sent, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        (case / "answered.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert sent == json.loads((case / "sent.json").read_bytes())
    assert answered == [json.loads(line) for line in (case / "answered.jsonl").read_text("utf-8").splitlines()]


def test_there_are_cases_of_every_dialect_that_speaks_http() -> None:
    assert {case.parent.name for case in CASES} >= {"openai", "tgi", "vllm"}


@pytest.mark.parametrize("dialect", ["openai", "tgi", "vllm"])
def test_each_deviation_that_is_said_to_be_repaired_has_a_golden_that_proves_it(dialect: str) -> None:
    """In it the client gets something else than came back, or the server something else than was asked."""
    engines = [*ENGINES, None] if dialect == "openai" else [None]
    for engine in engines:
        repairs = switches(Options(engine=engine)).repairs if dialect == "openai" else REPAIRS[dialect]
        assert len({repair.says for repair in repairs}) == len(repairs)
        for repair in repairs:
            case = FOLDER / dialect / repair.golden
            assert case in CASES, repair
            asked, sent = (
                json.loads((case / "request.json").read_bytes()),
                json.loads((case / "sent.json").read_bytes()),
            )
            body = {} if sent is None or isinstance(sent, list) else sent["body"]
            (received,) = case.glob("received*")
            came = re.findall(r"\{.*\}", received.read_text("utf-8"))
            answered = (case / "answered.jsonl").read_text("utf-8").splitlines()
            is_changed = [_loose(text) for text in came] != [_loose(text) for text in answered]
            assert is_changed or body.keys() != asked.keys(), repair


def _loose(text: str) -> Any:
    """A document without what the gateway mints in all."""
    try:
        document = json.loads(text)
    except ValueError:
        return text
    return {name: value for name, value in document.items() if name not in ("id", "created", "model", "object")}
