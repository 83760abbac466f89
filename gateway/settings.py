"""What can be configured? Frozen structs, read once from YAML; unknown keys are refused with file, line and path."""

import difflib
import ipaddress
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import msgspec
import yaml
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


class SettingsError(Exception):
    """
    The configuration cannot be used; the message gives file, line, path and what to write instead.

    *path* is where, for who knows the place but not the file: see `placed`.
    """

    def __init__(self, what: str, path: Steps = ()) -> None:
        super().__init__(f"{_shown(path)}: {what}" if path else what)
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


def load(path: Path) -> Settings:
    """Raises SettingsError for the first fault found."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise SettingsError(f"{path}: cannot be read: {exc.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: cannot be read: it is not UTF-8") from None
    return parse(text, str(path))


def placed(error: SettingsError, file: Path) -> str:
    """What an error says of a configuration from *file*, with its line there, if it is about one place."""
    if not error.path:
        return str(error)
    root = _Loader(file.read_text(encoding="utf-8")).get_single_node()
    return f"{file}:{_line_of(root, error.path)}: {error}"


def parse(text: str, file: str) -> Settings:
    """Settings from YAML; *file* is its name for messages. Raises SettingsError."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        document = {} if root is None else loader.construct_document(root) or {}
        fault = _fault(document, Settings, ())
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        raise SettingsError(f"{file}:{mark.line + 1 if mark else 1}: {exc.problem or exc.context}") from None
    except (yaml.YAMLError, ValueError) as exc:  # a character that no YAML has; a date that no calendar has
        raise SettingsError(f"{file}: {str(exc).splitlines()[0]}") from None
    except RecursionError:
        raise SettingsError(f"{file}: nested too deeply") from None
    if fault is None:
        settings = msgspec.convert(document, Settings)
        fault = next(_inconsistencies(settings), None)
        if fault is None:
            return settings
    path, what = fault
    raise SettingsError(f"{file}:{_line_of(root, path)}: {_shown(path)}: {what}")


Options = TypeVar("Options", bound=Struct)


def read_options(given: dict[str, Any], kind: type[Options]) -> Options:
    """An upstream's `options`, as its adapter knows them. Raises SettingsError."""
    if fault := _fault(given, kind, ("options",)):
        path, what = fault
        raise SettingsError(what, path)
    return msgspec.convert(given, kind)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the configuration, for editors."""
    return msgspec.json.schema(Settings)


class _Loader(yaml.SafeLoader):
    """
    Refuses duplicate keys, of which YAML's own loader takes the last, and `.nan`, which no bound keeps out.

    `off`, `no`, `on` and `yes` are words.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' occurs twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        number: float = self.construct_yaml_float(node)
        if math.isnan(number):
            raise yaml.MarkedYAMLError(problem=f"{node.value} is no number", problem_mark=node.start_mark)
        return number


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|false|True|False|TRUE|FALSE"), list("tfTF"))


Fault = tuple[Steps, str]
"""Where something is wrong, and what."""


def _inconsistencies(settings: Settings) -> Iterator[Fault]:
    """What the types cannot say: references, unique names, addresses."""
    for index, network in enumerate(settings.server.trusted_proxies):
        try:
            ipaddress.ip_network(network)
        except ValueError as exc:
            yield ("server", "trusted_proxies", index), f"no address and no network such as 10.0.0.0/8: {exc}"
    for name, upstream in settings.upstreams.items():
        if upstream.base_url and not is_base_url(upstream.base_url):
            yield (
                ("upstreams", name, "base_url"),
                "not like http://host:port/v1 (a credential goes into api_key, a query nowhere)",
            )
        elif too_much := re.search(r"/(chat/completions|completions|embeddings)/?$", upstream.base_url):
            yield ("upstreams", name, "base_url"), f"ends before {too_much[0]}, as http://host:port/v1 does"
        if upstream.api_key is not None and (upstream.api_key.env is None) == (upstream.api_key.file is None):
            yield ("upstreams", name, "api_key"), "a secret is either {env: NAME} or {file: PATH}"
    for name, model in settings.models.items():
        for index, target in enumerate(model.targets):
            if target.upstream not in settings.upstreams:
                hint = _near(target.upstream, settings.upstreams)
                path: Steps = ("models", name, "targets", index, "upstream")
                yield path, f"there is no upstream '{target.upstream}'{hint}"
    names = [key.name for key in settings.auth.keys]
    for index, key in enumerate(settings.auth.keys):
        if key.name in names[:index]:
            yield ("auth", "keys", index, "name"), f"a second key '{key.name}'"
    yield from _holder_faults(settings)


def _holder_faults(settings: Settings) -> Iterator[Fault]:
    """Models that are not there, limits that their kind cannot have, and users whose limits lie in two places."""
    every = list(settings.models)
    groups: dict[Steps, tuple[Limits, Sequence[str]]] = {("limits",): (settings.limits, every)}
    groups |= {("models", name, "limits"): (model.limits, [name]) for name, model in settings.models.items()}
    holders: dict[Steps, Key | Group] = {("auth", "keys", i): key for i, key in enumerate(settings.auth.keys)}
    holders |= {("auth", "teams", name): group for name, group in settings.auth.teams.items()}
    holders |= {("auth", "users", name): group for name, group in settings.auth.users.items()}
    for path, holder in holders.items():
        groups[*path, "limits"] = (holder.limits, every if holder.models is None else holder.models)
        for position, name in enumerate(holder.models or ()):
            if name not in settings.models:
                yield (*path, "models", position), f"there is no model '{name}'{_near(name, settings.models)}"
        for name, limits in holder.limits.models.items():
            groups[*path, "limits", "models", name] = (limits, [name])
            if name not in settings.models:
                yield (*path, "limits", "models", name), f"there is no model '{name}'{_near(name, settings.models)}"
    for path, (limits, models) in groups.items():
        for name in Limits.__struct_fields__:
            if (much := getattr(limits, name)) is not None and (fault := _limit_fault(name, much)):
                yield (*path, name), fault
            if much is not None and name.startswith("usd") and (unpriced := _unpriced(settings, models)):
                yield (*path, name), f"the model '{unpriced}' has no prices: give it some (0, if it costs nothing)"
    for user, group in settings.auth.users.items():
        teams = {key.team for key in settings.auth.keys if key.user == user}
        if group.limits != LimitsByModel() and len(teams) > 1:
            yield (
                ("auth", "users", user, "limits"),
                "all keys of a user with limits must be in one team, or in none",
            )


def _limit_fault(name: str, much: float | Limit) -> str | None:
    limit = much if isinstance(much, Limit) else Limit(limit=much)
    if name.startswith("usd"):
        if not limit.limit <= MAX_USD:
            return f"more than {MAX_USD} US dollars"
    elif not limit.limit <= MAX_COUNT or limit.limit != int(limit.limit):
        return f"not a whole number up to {MAX_COUNT}"
    if limit.window is not None and name not in ("requests_per_day", "tokens_per_day"):
        return "`window` is for requests and tokens per day"
    if limit.strict and name.startswith(("requests", "concurrent")):
        return "`strict` is for tokens and money: requests are never more than their limit"
    return None


def _unpriced(settings: Settings, models: Sequence[str]) -> str | None:
    """The first of *models* without prices: a limit of money cannot count it."""
    return next((name for name in models if name in settings.models and settings.models[name].prices is None), None)


_BASE_URL = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?(/[^\s?#]*)?", re.ASCII)


def is_base_url(url: str) -> bool:
    """Whether it is http or https, a host, perhaps a port and a path, and nothing else: no credential, no query."""
    try:
        return bool(_BASE_URL.fullmatch(url)) and urlsplit(url).port != 0
    except ValueError:  # not an address of IPv6, or a port that is too high
        return False


def _fault(value: Any, kind: Any, path: Steps) -> Fault | None:
    """The innermost part of *value* that is wrong by itself; None if the whole is a *kind*."""
    try:
        msgspec.convert(value, kind)
        return None
    except msgspec.ValidationError as exc:
        what = str(exc).partition(" - at `")[0]
    bare, description = _unwrapped(kind, value)
    for step, member, member_kind in _members(value, bare):
        if fault := _fault(member, member_kind, (*path, step)):
            return fault
    if unknown := re.match(r"Object contains unknown field `(.*)`", what):
        known = sorted(field.encode_name for field in msgspec.structs.fields(bare))
        hint = _near(unknown[1], known) or f"; known are: {', '.join(known)}"
        return (*path, unknown[1]), f"unknown key '{unknown[1]}'{hint}"
    if missing := re.match(r"Object missing required field `(.*)`", what):
        return path, f"'{missing[1]}' is missing"
    for key in value if isinstance(value, dict) else ():
        if not isinstance(key, str):
            return path, f"the key {key} is not text: put it in quotes"
    if description is not None and what.startswith("Expected"):
        return path, f"expected {description}"
    if get_origin(bare) is Literal:
        return path, f"expected one of {', '.join(get_args(bare))}"
    return path, _in_words(what)


def _in_words(what: str) -> str:
    """Such as "expected a number >= 0", for msgspec's "Expected `float` >= 0.0"."""
    said = re.sub(r"`(\w+)(?: \| (\w+))*`", lambda kinds: _kinds(kinds[0]), what)
    said = re.sub(r"\.0\b", "", said).replace(" of length >= 1", " with something in it")
    return f"{said[:1].lower()}{said[1:]}"


KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "nothing",
}


def _kinds(quoted: str) -> str:
    kinds = quoted.strip("`").removesuffix(" | null").split(" | ")
    return " or ".join(KINDS.get(kind, kind) for kind in kinds)


def _members(value: Any, kind: Any) -> list[tuple[str | int, Any, Any]]:
    """The members of *value* with their types, as far as *kind* says."""
    if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, Struct):
        kinds = get_type_hints(kind, include_extras=True)
        return [(name, member, kinds[name]) for name, member in value.items() if name in kinds]
    if isinstance(value, dict) and get_origin(kind) is dict:
        return [(name, member, get_args(kind)[1]) for name, member in value.items()]
    if isinstance(value, list) and get_origin(kind) is list:
        return [(index, item, get_args(kind)[0]) for index, item in enumerate(value)]
    return []


def _unwrapped(kind: Any, value: Any) -> tuple[Any, str | None]:
    """What *value* should be, of a type without `Annotated` and alternatives; and what that is in words."""
    description = None
    while get_origin(kind) not in (None, dict, list, Literal):
        described = [part.description for part in get_args(kind) if isinstance(part, Meta) and part.description]
        description = next(iter(described), description)
        kinds = [part for part in get_args(kind) if part is not NoneType and not isinstance(part, Meta)]
        kind = kinds[-1] if isinstance(value, dict) else kinds[0]  # a number, or an object that says more
    return kind, description


def _line_of(node: yaml.Node | None, path: Steps) -> int:
    """The line on which *path* stands, or what is nearest around it."""
    line = 1
    for step in path:
        if isinstance(node, yaml.MappingNode):
            key, node = next((pair for pair in node.value if pair[0].value == str(step)), (None, None))
        elif isinstance(node, yaml.SequenceNode):
            key = node = node.value[int(step)]
        else:
            break
        line = line if key is None else key.start_mark.line + 1
    return line


def _shown(path: Steps) -> str:
    """Such as `models."org/name".targets[0]`."""
    named = [f"[{s}]" if isinstance(s, int) else f".{s}" if re.fullmatch(r"[\w-]+", s) else f'."{s}"' for s in path]
    return "".join(named).lstrip(".") or "the document"


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
