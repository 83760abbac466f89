"""What does a browser see at `/`? Chromium looks, types and clicks; nothing it loads may come from elsewhere."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from gateway.settings import Auth, Key, Model, Settings, Target, Upstream
from tests.browser import Browser, browsing, why_no_browser
from tests.house import (
    KEY,
    ROLE,
    TOKEN,
    House,
    Script,
    UpstreamServer,
    chunk,
    event,
    hello_stream,
    json_reply,
    running,
    scripted,
    stream_reply,
    upstream,
)

pytestmark = pytest.mark.anyio

ENTER, ESCAPE, RIGHT = "\ue007", "\ue00c", "\ue014"
IMAGE = "<img src=x onerror=document.title='taken'>"
FILES = ("/", "/page.css", "/page.js", "/page.svg")
ANSWERED = "document.querySelector('.answer:not(.running) + .facts')"


@pytest.fixture(scope="module")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    missing = why_no_browser()
    if missing and os.environ.get("CI") == "true":
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    async with browsing(tmp_path_factory.mktemp("chromium")) as chromium:
        yield chromium


@asynccontextmanager
async def page_of(browser: Browser, house: House, refused: int = 0) -> AsyncIterator[None]:
    """The page, open; *refused* calls may fail, and nothing else may be wrong or come from elsewhere."""
    await browser.complaints()
    await browser.fetched()
    await browser.open(f"{house.url}/")
    await browser.until("document.querySelector('#access-note').textContent")
    yield
    complaints = await browser.complaints()
    assert [line for line in complaints if "responded with a status of 4" not in line] == []
    assert len(complaints) == refused
    assert {url for url in await browser.fetched() if not url.startswith(f"{house.url}/")} == set()


@asynccontextmanager
async def in_front_of(script: Script) -> AsyncIterator[tuple[House, UpstreamServer]]:
    """A gateway without keys whose model `smart` is an upstream that follows *script*."""
    async with upstream(script) as server:
        target = Target(upstream="up", model="model-1")
        async with running(
            Settings(upstreams={"up": server.settings()}, models={"smart": Model(targets=[target])})
        ) as h:
            yield h, server


def echoing(*names: str, keys: Sequence[Key] = ()) -> Settings:
    models = {name: Model(targets=[Target(upstream="echo")]) for name in names}
    return Settings(upstreams={"echo": Upstream(adapter="echo")}, models=models, auth=Auth(keys=list(keys)))


async def test_it_is_four_files_that_load_nothing_from_elsewhere_and_are_asked_for_only_once() -> None:
    async with scripted() as house:
        for path in FILES:
            answer = await house.http.get(house.url + path)
            again = await house.http.get(house.url + path, headers={"if-none-match": answer.headers["etag"]})
            refused = await house.http.post(house.url + path)

            assert answer.status_code == 200
            assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
            assert "https://" not in answer.text
            assert "unsafe" not in answer.headers["content-security-policy"]
            assert answer.headers["content-security-policy"].startswith("default-src 'none'; ")
            assert (again.status_code, again.content) == (304, b"")
            assert (refused.status_code, refused.headers["allow"]) == (405, "GET")
            assert refused.json()["error"]["message"] == "Not allowed to POST here. Allowed: GET."


async def test_it_lists_the_models_and_streams_an_answer_with_its_usage(browser: Browser) -> None:
    gate = asyncio.Event()
    begin, *rest = hello_stream()[1:]
    async with in_front_of(stream_reply(begin, gate, *rest)) as (house, server), page_of(browser, house):
        assert await browser.text("#model-list") == "smart"
        assert await browser.text("#access-note") == "None needed from this machine."

        await browser.type("#message", f"Hi{ENTER}")
        await browser.until("document.querySelector('.answer.running')?.textContent === 'Hel'")
        gate.set()
        await browser.until(ANSWERED)

        assert await browser.text(".question") == "Hi"
        assert await browser.text(".answer") == "Hello"
        assert (await browser.text(".facts")).startswith("3 tokens in, 2 out · first after ")

        await browser.type("#message", f"And?{ENTER}")
        await browser.until("document.querySelectorAll('.facts').length === 2")
        said = [message["content"] for message in server.requests[-1].json["messages"]]
        assert said == ["Hi", "Hello", "And?"]


@pytest.mark.parametrize("how", ["click", "escape"])
async def test_stop_ends_the_generation_upstream(browser: Browser, how: str) -> None:
    script = stream_reply(chunk(ROLE), chunk({"content": "Hel"}), asyncio.Event())
    async with in_front_of(script) as (house, server), page_of(browser, house):
        await browser.type("#message", f"Hi{ENTER}")
        await browser.until("document.querySelector('.answer')?.textContent === 'Hel'")
        await (browser.click("#stop") if how == "click" else browser.type("#message", ESCAPE))
        async with asyncio.timeout(5):
            await server.requests[-1].gone.wait()
        await browser.until(ANSWERED)

        assert await browser.text(".answer") == "Hel"
        assert await browser.text(".facts") == "stopped"


async def test_a_refusal_is_shown_and_the_question_given_back(browser: Browser) -> None:
    refusal = json_reply({"error": {"message": f"Too hot: {IMAGE}", "param": "temperature"}}, 400)
    async with in_front_of(refusal) as (house, _), page_of(browser, house, refused=1):
        await browser.type("#message", f"Hi{ENTER}")
        await browser.until("document.querySelector('[role=alert]')")

        assert await browser.text("[role=alert]") == f"Too hot: {IMAGE}"
        assert await browser.run("return document.querySelector('#message').value") == "Hi"
        assert await browser.run("return document.querySelectorAll('.answer, img').length") == 0


async def test_an_error_within_a_stream_is_shown_below_what_had_come(browser: Browser) -> None:
    script = stream_reply(chunk({"content": "Hel"}), event({"error": {"message": "out of memory", "code": 500}}))
    async with in_front_of(script) as (house, _), page_of(browser, house):
        await browser.type("#message", f"Hi{ENTER}")
        await browser.until("document.querySelector('[role=alert]')")

        assert await browser.text(".answer") == "Hel"
        assert await browser.text("[role=alert]")


async def test_a_wrong_key_is_refused_and_the_right_one_is_kept_in_this_tab_only(browser: Browser) -> None:
    async with running(echoing("parrot", keys=[KEY])) as house, page_of(browser, house, refused=2):
        assert await browser.text("#access-note") == "This gateway wants a key."
        await browser.type("#key", f"sk-wrong{ENTER}")
        await browser.until("document.querySelector('#access-note.bad')")
        assert await browser.text("#access-note") == "Incorrect API key provided."

        await browser.run("document.querySelector('#key').value = ''")
        await browser.type("#key", TOKEN)
        await browser.click("#access button")
        await browser.until("document.querySelector('#model-list input')")
        await browser.type("#message", f"Polly{ENTER}")
        await browser.until(ANSWERED)

        assert await browser.text(".answer") == "Polly"
        assert TOKEN not in await browser.run("return document.documentElement.outerHTML")
        kept = await browser.run(
            "return [sessionStorage.getItem('key'), localStorage.length, document.cookie, location.href]"
        )
        assert kept == [TOKEN, 0, "", f"{house.url}/"]


async def test_markup_in_names_questions_and_answers_stays_text(browser: Browser) -> None:
    async with running(echoing(IMAGE)) as house, page_of(browser, house):
        assert await browser.text("#model-list") == IMAGE
        assert IMAGE in await browser.text("#greeting")
        await browser.type("#message", f"{IMAGE}{ENTER}")
        await browser.until(ANSWERED)

        assert await browser.text(".question") == IMAGE
        assert await browser.text(".answer") == IMAGE
        assert await browser.run("return [document.images.length, document.title]") == [0, "Suiron"]


async def test_its_snippets_run_for_the_chosen_model(browser: Browser) -> None:
    async with running(echoing("a", "it's")) as house, page_of(browser, house):
        await browser.click("#model-list label:nth-child(2)")
        python = await browser.text("#snippet")
        await browser.type("#tab-python", RIGHT)
        node = await browser.text("#snippet")
        await browser.type("#tab-node", RIGHT)
        curl = await browser.text("#snippet")

        assert await _output_of(sys.executable, "-c", python) == "Hello!"
        assert await _output_of("sh", "-c", f"{curl.replace('curl ', 'curl -sS ', 1)}") == await _streamed(
            house, "it's"
        )
        for said in (f'baseURL: "{house.url}/v1"', 'model: "it\'s"', 'apiKey: "unused"'):
            assert said in node


async def test_copy_copies_the_snippet(browser: Browser) -> None:
    async with running(echoing("parrot")) as house, page_of(browser, house):
        await browser.devtools(
            "Browser.grantPermissions", origin=house.url, permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
        )
        await browser.click("#copy")
        await browser.until("document.querySelector('#copy').textContent === 'Copied'")

        copied = await browser.run("return navigator.clipboard.readText()")
        assert copied == await browser.text("#snippet")


async def test_it_fits_a_phone_and_follows_the_colour_scheme(browser: Browser) -> None:
    async with running(echoing("a-model/" + "with-a-long-name" * 4)) as house, page_of(browser, house):
        light = await browser.run("return getComputedStyle(document.body).backgroundColor")
        await browser.devtools(
            "Emulation.setDeviceMetricsOverride", width=360, height=780, deviceScaleFactor=1, mobile=True
        )
        await browser.devtools(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}]
        )
        try:
            await browser.type("#message", "x" * 200 + ENTER)
            await browser.until(ANSWERED)

            assert await browser.run("return document.documentElement.scrollWidth") == 360
            assert await browser.run("return getComputedStyle(document.body).backgroundColor") != light
        finally:
            await browser.devtools("Emulation.clearDeviceMetricsOverride")
            await browser.devtools("Emulation.setEmulatedMedia", features=[])


async def _output_of(*command: str) -> str:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    async with asyncio.timeout(20):
        output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return _without_ids(output.decode())


async def _streamed(house: House, model: str) -> str:
    asked = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "stream": True}
    return _without_ids((await house.post(asked)).text)


def _without_ids(stream: str) -> str:
    return "\n".join(line.partition('"choices"')[2] or line for line in stream.splitlines())
