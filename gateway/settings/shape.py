"""What can be configured? Frozen structs, one for each section."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

Seconds = Annotated[float, Meta(gt=0, le=86_400)]
SecondsOr0 = Annotated[float, Meta(ge=0, le=86_400)]
Origin = Annotated[
    str, Meta(pattern=r"^https?://[a-z0-9._:\[\]-]+$", description="an origin such as https://app.example.com, no *")
]
KeyName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._@-]{1,64}$", description="1 to 64 of A-Z a-z 0-9 . _ @ -")]
SHA256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$", description="64 digits of 0-9 a-f, as `suiron key new` prints")]
AdapterName = Annotated[
    str, Meta(pattern=r"^([a-z]\w*|[A-Za-z_][\w.]*:\w+)$", description="a name such as openai, or package.module:Class")
]
DatabaseURL = Annotated[
    str,
    Meta(
        pattern=r"^(sqlite:///.+|postgresql://([^/@:]+@)?[^/@]*/.+)$",
        description="sqlite:////path/to/file, or postgresql://user@host/database (a password goes into `password`)",
    ),
]
StoreURL = Annotated[
    str,
    Meta(
        pattern=r"^rediss?(\+sentinel|\+cluster)?://.+$",
        description="redis://host:6379/0, rediss://…, redis+sentinel://host,host/master or redis+cluster://host,host",
    ),
]
MAX_USD = 9_000_000
MAX_COUNT = 2**53
"""What Redis' scripts can count to, exactly; money in billionths of a dollar."""

Steps = tuple[str | int, ...]
"""The way to a value: keys of mappings and indexes of lists, from the top."""


def shown(path: Steps) -> str:
    """Such as `models."org/name".targets[0]`."""
    named = [f"[{s}]" if isinstance(s, int) else f".{s}" if re.fullmatch(r"[\w-]+", s) else f'."{s}"' for s in path]
    return "".join(named).lstrip(".") or "the document"


class SettingsError(Exception):
    """
    The configuration cannot be used; the message gives file, line, path and what to write instead.

    *path* is where, for who knows the place but not the file: see `placed`.
    """

    def __init__(self, what: str, path: Steps = ()) -> None:
        super().__init__(f"{shown(path)}: {what}" if path else what)
        self.what = what
        self.path = path

    def within(self, *path: str | int) -> "SettingsError":
        """The same, of something that stands at *path*."""
        return SettingsError(self.what, (*path, *self.path))


class CORS(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Pages of which other sites may call from a browser."""

    origins: list[Origin] = []


class Server(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    Where the gateway listens, and how patient it is with clients.

    A stream's status is held back at most `hold_s`, for a real error to become one. After SIGTERM it goes on accepting
    for `drain_delay_s`, null for 0 on a loopback address and else 5; then it lets requests end for `grace_s`.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    max_body_bytes: Annotated[int, Meta(ge=1024)] = 20 * 1024 * 1024
    body_timeout_s: Seconds = 30.0
    hold_s: Seconds = 10.0
    keep_alive_s: Seconds = 15.0
    header_timeout_s: Seconds = 10.0
    write_stall_s: Seconds = 60.0
    drain_delay_s: SecondsOr0 | None = None
    grace_s: SecondsOr0 = 120.0
    max_connections: Annotated[int, Meta(ge=1)] | None = None
    trusted_proxies: list[str] = []
    cors: CORS = CORS()


class Telemetry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may read /metrics, what a request leaves on stderr, and whether OpenTelemetry is told of it."""

    metrics: Literal["local", "open", "off"] = "local"
    log: Literal["text", "json", "off"] = "text"
    traces: bool = False


class Limit(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    How much, and how strictly. A number alone means `{limit: number}`.

    `shadow` counts and reports, and refuses nobody. `strict` never lets tokens or money exceed the limit: what may be
    generated is capped. `on_store_loss` says what holds while Redis is out of reach; null for the default of its kind.
    `window` is for limits per day: any 24 hours, or the calendar's day in UTC.
    """

    limit: Annotated[float, Meta(ge=0)]
    enforce: Literal["on", "shadow", "off"] = "on"
    strict: bool = False
    on_store_loss: Literal["local", "guard", "closed", "open"] | None = None
    window: Literal["sliding", "calendar"] | None = None


Much = Annotated[float, Meta(ge=0)] | Limit


class Limits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much may be asked for; null means what the wider default says, and no limit where that is null too."""

    requests_per_minute: Much | None = None
    requests_per_hour: Much | None = None
    requests_per_day: Much | None = None
    tokens_per_minute: Much | None = None
    tokens_per_hour: Much | None = None
    tokens_per_day: Much | None = None
    tokens_per_month: Much | None = None
    usd_per_day: Much | None = None
    usd_per_month: Much | None = None
    concurrent_requests: Much | None = None


class LimitsByModel(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits over all models, and in `models` further ones on single models."""

    models: dict[str, Limits] = {}


class Caching(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    Which answers are kept, and given again to the same question of the same tenant.

    `deterministic` are those to requests with temperature 0 or a seed. `hits_cost` is the share of the price a hit is
    billed at: all of it, that of cached input, or nothing.
    """

    mode: Literal["off", "deterministic", "all"] = "off"
    ttl_s: Annotated[float, Meta(gt=0, le=30 * 86_400)] = 3600.0
    max_entry_bytes: Annotated[int, Meta(ge=1024)] = 256 * 1024
    coalesce: bool = True
    replay: Literal["instant", "recorded"] = "instant"
    hits_cost: Literal["full", "cached", "free"] = "free"


class Key(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    A static key: the SHA-256 of it in hex, as `suiron key new` prints. `models` null means all.

    `user` is the person it belongs to, `team` who shares limits and cache with it.
    """

    name: KeyName
    sha256: SHA256
    user: KeyName | None = None
    team: KeyName | None = None
    models: list[str] | None = None
    limits: LimitsByModel = LimitsByModel()
    cache: Caching | None = None


class Group(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A team or a user: `limits` that all of its keys share. `models` null means all."""

    models: list[str] | None = None
    limits: LimitsByModel = LimitsByModel()


class AdminKey(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key for the admin API, which cannot call models."""

    name: KeyName
    sha256: SHA256


class Auth(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may call. Teams and users need to be named here only to be given limits."""

    keys: list[Key] = []
    teams: dict[str, Group] = {}
    users: dict[str, Group] = {}
    admin_keys: list[AdminKey] = []


class Secret(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a credential is kept: an environment variable or a file, so that none stands in the configuration."""

    env: str | None = None
    file: str | None = None

    def reveal(self) -> str:
        """Raises SettingsError when it is not there."""
        if (self.env is None) == (self.file is None):
            raise SettingsError("a secret is either {env: NAME} or {file: PATH}")
        if self.env is not None:
            value = os.environ.get(self.env, "")
            if not value:
                raise SettingsError(f"the environment variable {self.env} is not set")
            return value.strip()
        try:
            return Path(str(self.file)).read_text(encoding="utf-8").strip()
        except OSError as exc:
            raise SettingsError(f"the file {self.file} cannot be read: {exc.strerror}") from None


Credential = Annotated[Secret, Meta(description="{env: NAME} or {file: PATH}: no credential stands in this file")]


class Timeouts(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long an upstream may take: to connect, to its first event, between events, and in all."""

    connect_s: Seconds = 2.0
    first_token_s: Seconds = 60.0
    idle_s: Seconds = 30.0
    total_s: Seconds = 600.0


class Upstream(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A server, or a model in this machine. `options` are the adapter's own."""

    adapter: AdapterName
    base_url: str = ""
    api_key: Credential | None = None
    timeouts: Timeouts = Timeouts()
    extra_fields: list[str] = []
    max_connections: Annotated[int, Meta(ge=1)] = 1000
    options: dict[str, Any] = {}


class Target(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    An upstream and its name for the model; null means the public name.

    Lower tiers are tried first; within one, each target is first as often as its weight says. `max_in_flight` null
    means as many as come.
    """

    upstream: str
    model: str | None = None
    tier: Annotated[int, Meta(ge=0, le=99)] = 0
    weight: Annotated[float, Meta(gt=0, le=1_000_000)] = 1.0
    max_in_flight: Annotated[int, Meta(ge=1)] | None = None


class Prices(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """US dollars for a million tokens; cached input costs as much as other input where it has no price of its own."""

    input: Annotated[float, Meta(ge=0, le=1_000_000)]
    output: Annotated[float, Meta(ge=0, le=1_000_000)]
    cached_input: Annotated[float, Meta(ge=0, le=1_000_000)] | None = None


class Model(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    A public name, and the targets that answer for it.

    `default_output_tokens` is what a request without a limit is expected to generate until past answers tell.
    `encoding` names a table of tiktoken's to count with. `limits` hold for each key on this model.
    """

    targets: Annotated[list[Annotated[Target, Meta(description="{upstream: NAME}")]], Meta(min_length=1)]
    context_tokens: Annotated[int, Meta(ge=1)] | None = None
    default_output_tokens: Annotated[int, Meta(ge=1)] = 512
    encoding: str | None = None
    prices: Prices | None = None
    limits: Limits = Limits()
    cache: Caching = Caching()


class Store(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    Where replicas meet: `redis://`, `rediss://`, `redis+sentinel://host,host/master/db`, `redis+cluster://host,host`.

    null keeps everything in this process. `timeout_s` bounds each call.
    """

    url: StoreURL | None = None
    password: Credential | None = None
    timeout_s: Seconds = 0.25


class Answers(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    Where kept answers lie, of all models together: in Redis at `url`, null for where the store is, if that is Redis.

    No more than `max_bytes`. What is not there within `timeout_s` counts as not kept. `wait_s` is how long a request
    waits for the answer that another replica is generating.
    """

    url: StoreURL | None = None
    password: Credential | None = None
    max_bytes: Annotated[int, Meta(ge=1024 * 1024)] = 256 * 1024 * 1024
    timeout_s: Seconds = 0.05
    wait_s: SecondsOr0 = 10.0


class Database(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    Where the ledger is: `sqlite:///path` or `postgresql://…`; null for what `suiron serve` takes by default.

    `journal` is the directory of what is under way, which must survive a crash; null for beside the database.
    `journal_mib` is its room: 512 requests a MiB, under way or waiting for a database that is away.
    """

    url: DatabaseURL | None = None
    password: Credential | None = None
    journal: str | None = None
    journal_mib: Annotated[int, Meta(ge=1, le=4096)] = 64


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    server: Server = Server()
    telemetry: Telemetry = Telemetry()
    auth: Auth = Auth()
    upstreams: dict[str, Upstream] = {}
    models: dict[str, Annotated[Model, Meta(description="{targets: [{upstream: NAME}]}")]] = {}
    limits: Limits = Limits()
    store: Store = Store()
    cache: Answers = Answers()
    database: Database = Database()

    @property
    def has_limits(self) -> bool:
        """Whether anything is counted that several gateways would have to count together."""
        auth = self.auth
        of_holders: list[Key | Group] = [*auth.keys, *auth.teams.values(), *auth.users.values()]
        general = [self.limits, *(model.limits for model in self.models.values())]
        return any(holder.limits != LimitsByModel() for holder in of_holders) or any(
            limits != Limits() for limits in general
        )
