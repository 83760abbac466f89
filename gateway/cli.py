"""What can I do from the shell?"""

import asyncio
import importlib.util
import json
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import msgspec

from gateway import __version__, server
from gateway.adapter import UpstreamFacts, load_adapter
from gateway.api.shutdown import Shutdown
from gateway.app import create_app, load_adapters
from gateway.auth import new_key, why_not_anonymous
from gateway.discovery import Discovery, Findings, describe
from gateway.errors import CannotLoad, CredentialRefused, GatewayError
from gateway.settings import (
    Key,
    Model,
    Settings,
    SettingsError,
    Target,
    Upstream,
    is_base_url,
    json_schema,
    load,
    placed,
)
from gateway.telemetry import Telemetry
from gateway.telemetry.log import Log, take_over

DEMO = "suiron-demo"
STDERR = 2

logger = logging.getLogger("suiron")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="suiron")
def main() -> None:
    """One OpenAI-compatible endpoint in front of every model a team runs."""


@main.command()
@click.option("--config", type=click.Path(path_type=Path), help="Configuration file (YAML).")
@click.option("--backend", metavar="URL", help="Put the gateway in front of this server; needs no file.")
@click.option(
    "--model", metavar="NAME", help="Serve this model from here: a folder or a hub id. With --backend: its name."
)
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on.  [default: 8000]")
def serve(config: Path | None, backend: str | None, model: str | None, host: str | None, port: int | None) -> None:
    """Start the gateway; without options, with the small demo model that comes with it."""
    faults: list[str] = []
    listener: socket.socket | None = None

    def ready(findings: Findings) -> None:
        faults.extend(finding.message for finding in findings.values() if isinstance(finding, CannotLoad))
        if findings and len(faults) == len(findings):
            signal.raise_signal(signal.SIGINT)  # there is nothing to serve
        else:
            faults.clear()
            assert listener is not None
            log.flush()
            _say_ready(_at(settings, listener), findings)

    try:
        settings = _settings(config, backend, model)
        given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
        settings = msgspec.structs.replace(settings, server=msgspec.structs.replace(settings.server, **given))
        listener = server.listen(settings.server)
        settings = _with_ledger(settings)
        log = Log(STDERR, "json" if settings.telemetry.log == "json" else "text")
        shutdown = Shutdown()
        app = create_app(
            settings,
            telemetry=Telemetry(settings, log=log),
            shutdown=shutdown,
            on_ready=ready,
        )
    except SettingsError as exc:
        if listener is not None:
            listener.close()
        raise click.ClickException(str(exc) if config is None else placed(exc, config)) from None
    take_over(log)
    started = server.run(app, listener, settings.server, shutdown)
    log.close()
    if faults:
        raise click.ClickException("; ".join(faults))
    if not started:
        sys.exit(1)


@main.command()
@click.option("--probe", is_flag=True, help="Ask every upstream what it is, too.")
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path, probe: bool) -> None:
    """Say what is wrong with a configuration FILE: where, and what to write instead."""
    try:
        settings = load(file)
        load_adapters(settings)
        if not settings.auth.keys and (forbidden := why_not_anonymous(settings)):
            raise SettingsError(f"{file}: it has no keys, but {forbidden}: add one under auth.keys (`suiron key new`)")
    except SettingsError as exc:
        raise click.ClickException(placed(exc, file)) from None
    click.echo(f"{file}: fine: {_count(settings.models, 'model')} on {_count(settings.upstreams, 'upstream')}")
    if probe and (faults := _probe_all(settings)):
        raise click.ClickException("; ".join(faults))


def _count(things: Sized, name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _probe_all(settings: Settings) -> list[str]:
    """Prints what each upstream is, and what of its deviations is repaired; what there is to mend."""
    findings = asyncio.run(_findings(settings))
    faults = []
    for name, finding in findings.items():
        if isinstance(finding, GatewayError):
            faults.append(f"upstream {name}: {finding.message}")
            continue
        click.echo(f"{name}: {describe(finding)}")
        if hint := _hint(settings.upstreams[name], finding):
            click.echo(f"  {hint}")
        for repair in finding.repairs:
            click.echo(f"  repaired: {repair.says}")
    return faults + list(_not_listed(settings, findings))


async def _findings(settings: Settings) -> Findings:
    adapters = load_adapters(settings)
    try:
        return await Discovery(adapters, lambda name, facts: None).first()
    finally:
        await asyncio.gather(*(adapter.aclose() for adapter in adapters.values()))


def _not_listed(settings: Settings, findings: Findings) -> Iterator[str]:
    """Targets that their upstreams do not list, where these list anything."""
    for public, model in settings.models.items():
        for index, target in enumerate(model.targets):
            finding, name = findings[target.upstream], target.model or public
            if isinstance(finding, UpstreamFacts) and finding.kind in LISTING:
                listed = [facts.id for facts in finding.models]
                if listed and name not in listed:
                    has = ", ".join(listed[:10])
                    yield f"models.{public}.targets[{index}]: {target.upstream} does not list '{name}', but {has}"


@main.command()
def schema() -> None:
    """Print the JSON Schema of the configuration, for editors."""
    click.echo(json.dumps(json_schema(), indent=2))


@main.group()
def key() -> None:
    """Keys for the gateway's users."""


@key.command("new")
@click.option("--name", default="app", help="What to call it in the configuration.  [default: app]")
def key_new(name: str) -> None:
    """Print a new key, and the lines to paste into the configuration."""
    secret, digest = new_key()
    try:
        msgspec.convert({"name": name, "sha256": digest}, Key)
    except msgspec.ValidationError:
        raise click.ClickException("--name: 1 to 64 of A-Z a-z 0-9 . _ @ -") from None
    click.echo(f"# The key, for the app that uses it; it is shown only now:\n#   {secret}\n# For the configuration:")
    click.echo(f"auth:\n  keys:\n    - name: {name}\n      sha256: {digest}")


def _settings(config: Path | None, backend: str | None, model: str | None) -> Settings:
    if config is not None and (backend or model):
        raise SettingsError("--config stands alone: write the backend or the model into the file")
    if config is not None:
        return load(config)
    if backend is not None:
        return _in_front_of(backend, model)
    if model is not None:
        name = model if not Path(model).exists() else Path(model).resolve().name
        return _one_upstream(name, Upstream(adapter="local", options={"model": model}))
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        click.echo(
            "torch and transformers are not installed, so the demo model cannot run: `echo` repeats what you say.\n"
            "For models in this machine: pip install 'suiron[local]'.",
            err=True,
        )
        return _one_upstream("echo", Upstream(adapter="echo"))
    return _one_upstream(DEMO, Upstream(adapter="local", options={"model": "demo"}))


def _one_upstream(name: str, upstream: Upstream) -> Settings:
    target = Target(upstream=upstream.adapter)
    return Settings(upstreams={upstream.adapter: upstream}, models={name: Model(targets=[target])})


def _in_front_of(url: str, model: str | None) -> Settings:
    """Settings for one server, with the models that it says it has. Raises SettingsError."""
    address = url if "://" in url else f"http://{url}"
    if not is_base_url(address):
        raise SettingsError(f"--backend {url}: not like http://host:port")
    parts = urlsplit(address)
    base_url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"
    upstream, found = asyncio.run(recognise(base_url))
    if isinstance(found, UpstreamFacts):
        names = [facts.id for facts in found.models]
        click.echo(f"{url}: {describe(found)}", err=True)
        if model is not None and model not in names:
            click.echo(f"{url}: it does not list {model}; asking for it all the same", err=True)
    elif isinstance(found, CredentialRefused):
        raise SettingsError(f"--backend {url}: {found.message} For that it takes a file: see config/gateway.yaml")
    elif model is None:
        raise SettingsError(
            f"--backend {url}: {found.message} Start it or mend the address; if it lists no models, add --model NAME"
        )
    else:
        click.echo(f"{url}: {found.message}", err=True)
        names = []
    names = [model] if model is not None else names
    if not names:
        raise SettingsError(f"--backend {url}: it has no models; load one there, or name it with --model")
    models = {name: Model(targets=[Target(upstream="backend")]) for name in names}
    return Settings(upstreams={"backend": upstream}, models=models)


DIALECTS: dict[str, dict[str, Any]] = {
    "vLLM": {"adapter": "vllm"},
    "TGI": {"adapter": "tgi"},
    "SGLang": {"adapter": "openai", "options": {"engine": "sglang"}},
    "llama.cpp": {"adapter": "openai", "options": {"engine": "llamacpp"}},
    "Ollama": {"adapter": "openai", "options": {"engine": "ollama"}},
    "OpenAI": {"adapter": "openai", "options": {"engine": "openai"}},
}
"""What the kinds of server that do not quite speak OpenAI's dialect are spoken to in."""


def _hint(upstream: Upstream, facts: UpstreamFacts) -> str:
    """How to speak to a server in its own dialect; empty where the configuration says one, or there is none."""
    if upstream.adapter != "openai" or upstream.options.get("engine") or facts.kind == "OpenAI":
        return ""
    dialect = DIALECTS.get(facts.kind)
    if dialect is None:
        return ""
    engine = dialect.get("options", {}).get("engine")
    better = f"options: {{engine: {engine}}}" if engine else f"adapter: {dialect['adapter']}"
    return f"better with `{better}`: more of its deviations are repaired"


LISTING = frozenset({"vLLM", "SGLang", "Ollama", "OpenAI", "Suiron"})
"""The kinds that refuse a model which they do not list; others take any name for the one they have."""


async def recognise(base_url: str) -> tuple[Upstream, UpstreamFacts | GatewayError]:
    """What the server at *base_url* is, and how to speak to it; of the oldest TGI, only its own address tells."""
    upstream = Upstream(adapter="openai", base_url=base_url)
    found = await _probe(upstream)
    dialect = DIALECTS.get(found.kind) if isinstance(found, UpstreamFacts) else DIALECTS["TGI"]
    if dialect is not None:
        closer = Upstream(base_url=base_url, **dialect)
        seen = await _probe(closer)
        if isinstance(seen, UpstreamFacts):
            return closer, seen
    return upstream, found


async def _probe(upstream: Upstream) -> UpstreamFacts | GatewayError:
    adapter = load_adapter(upstream)
    try:
        return await adapter.probe()
    except GatewayError as exc:
        return exc
    finally:
        await adapter.aclose()


def _with_ledger(settings: Settings) -> Settings:
    """*settings* with a place for the ledger, where they name none and the port is one to come back to."""
    port, database = settings.server.port, settings.database
    if port == 0 or (database.url is not None and database.journal is not None):
        return settings
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "suiron"
    if database.url is None:
        database = msgspec.structs.replace(database, url=f"sqlite:///{state / str(port)}.db")
    elif database.url.startswith("postgresql"):
        database = msgspec.structs.replace(database, journal=str(state / f"{port}.journal"))
    return msgspec.structs.replace(settings, database=database)


def _at(settings: Settings, listener: socket.socket) -> Settings:
    """*settings* with the port that was found free, where they ask for any."""
    port = listener.getsockname()[1]
    return msgspec.structs.replace(settings, server=msgspec.structs.replace(settings.server, port=port))


def _say_ready(settings: Settings, findings: Findings) -> None:
    if settings.telemetry.log == "json":
        logger.info("ready on port %d with the models %s", settings.server.port, ", ".join(settings.models))
        for name, finding in findings.items():
            if isinstance(finding, UpstreamFacts):
                logger.info("upstream %s: %s", name, describe(finding))
        if unpriced := _unpriced(settings):
            logger.warning("without prices in the configuration, the cost of these models is unknown: %s", unpriced)
    else:
        click.echo(_welcome(settings, findings))


def _upstreams(settings: Settings, findings: Findings) -> str:
    """What was found behind each, below the rest; what could not be reached is in the log."""
    lines = []
    for name, facts in findings.items():
        if isinstance(facts, UpstreamFacts):
            hint = _hint(settings.upstreams[name], facts)
            lines += [f"  {name}: {describe(facts)}\n", f"    {hint}\n" if hint else ""]
    return "".join(lines and ["\nUpstreams:\n", *lines])


def _unpriced(settings: Settings) -> str:
    return ", ".join(name for name, model in settings.models.items() if model.prices is None)


def _welcome(settings: Settings, findings: Findings) -> str:
    """One block to paste from; what could not be reached is said above it."""
    host = settings.server.host
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    base_url = f"http://{shown}:{settings.server.port}/v1"
    names = list(settings.models)
    keyed = bool(settings.auth.keys)
    keys = (
        f"send one of the keys {', '.join(key.name for key in settings.auth.keys)} as `Authorization: Bearer KEY`"
        if keyed
        else "none needed from this machine, and nobody else is let in (make one: suiron key new)"
    )
    model = names[0] if names else "MODEL"
    ledger = "none: name a database in the configuration"
    if settings.database.url is not None:
        ledger = re.sub(r"://[^/]*@", "://", settings.database.url).removeprefix("sqlite:///")
    unpriced = _unpriced(settings)
    prices = f"unknown, so their cost is not billed, for: {unpriced}" if unpriced else "known for every model"
    return f"""
Suiron {__version__} is ready.

  Base URL  {base_url}
  Models    {", ".join(names) or "none: add some under `models` in the configuration"}
  Keys      {keys}
  Ledger    {ledger}
  Prices    {prices}
  Health    {base_url.removesuffix("/v1")}/health/ready
{_upstreams(settings, findings)}
Try it (pip install openai):

from openai import OpenAI
client = OpenAI(base_url="{base_url}", api_key="{"YOUR KEY" if keyed else "unused"}")
reply = client.chat.completions.create(model="{model}", messages=[{{"role": "user", "content": "Hello!"}}])
print(reply.choices[0].message.content)

Serve a real model:  suiron serve --model ORG/NAME-or-folder
or put a server here: suiron serve --backend http://host:port
"""
