"""What can be configured? Frozen structs, read once from YAML; unknown keys are refused with file, line and path."""

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import msgspec
import yaml
from msgspec import Meta, Struct

Seconds = Annotated[float, Meta(gt=0)]


class SettingsError(Exception):
    """The configuration cannot be used; the message gives file, line, path and what to write instead."""


class Server(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the gateway listens. A stream's status is held back at most `hold_s`, for a real error to become one."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    max_body_bytes: Annotated[int, Meta(ge=1024)] = 20 * 1024 * 1024
    body_timeout_s: Seconds = 30.0
    hold_s: Seconds = 10.0
    keep_alive_s: Seconds = 15.0


class Key(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A static key: the SHA-256 of it in hex, as `suiron key new` prints. `models` null means all."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._@-]{1,64}$")]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    models: list[str] | None = None


class Auth(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    keys: list[Key] = []


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


class Timeouts(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long an upstream may take: to connect, to its first event, between events, and in all."""

    connect_s: Seconds = 2.0
    first_token_s: Seconds = 60.0
    idle_s: Seconds = 30.0
    total_s: Seconds = 600.0


class Upstream(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A server, or a model in this machine. `options` are the adapter's own."""

    adapter: str
    base_url: str = ""
    api_key: Secret | None = None
    timeouts: Timeouts = Timeouts()
    extra_fields: list[str] = []
    max_connections: Annotated[int, Meta(ge=1)] = 1000
    options: dict[str, Any] = {}


class Target(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An upstream and its name for the model; null means the public name."""

    upstream: str
    model: str | None = None


class Model(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A public name. Its targets are tried in this order, until one begins to answer."""

    targets: Annotated[list[Target], Meta(min_length=1)]
    context_tokens: Annotated[int, Meta(ge=1)] | None = None


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    server: Server = Server()
    auth: Auth = Auth()
    upstreams: dict[str, Upstream] = {}
    models: dict[str, Model] = {}


def load(path: Path) -> Settings:
    """Raises SettingsError for the first fault found."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"{path}: cannot be read: {exc}") from None
    return parse(text, str(path))


def parse(text: str, file: str) -> Settings:
    """Settings from YAML; *file* is its name for messages. Raises SettingsError."""
    try:
        root = yaml.compose(text, Loader=yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader)
        lines = dict(_lines(root, ())) if root is not None else {}
        document = yaml.safe_load(text) if root is not None else {}
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        where = f"{file}:{mark.line + 1}" if mark else file
        raise SettingsError(f"{where}: {exc.problem}") from None
    except yaml.YAMLError as exc:
        raise SettingsError(f"{file}: {exc}") from None
    except RecursionError:
        raise SettingsError(f"{file}: nested too deeply") from None
    try:
        settings = msgspec.convert(document or {}, Settings)
        check(settings)
    except msgspec.ValidationError as exc:
        raise _placed(str(exc), document, lines, file) from None
    return settings


def check(settings: Settings) -> None:
    """What the types cannot say: references and unique names. Raises msgspec.ValidationError with a path."""
    for name, model in settings.models.items():
        for index, target in enumerate(model.targets):
            if target.upstream not in settings.upstreams:
                hint = _near(target.upstream, settings.upstreams)
                raise msgspec.ValidationError(
                    f"there is no upstream '{target.upstream}'{hint} - at `$.models.{name}.targets[{index}].upstream`"
                )
    names = [key.name for key in settings.auth.keys]
    for index, key in enumerate(settings.auth.keys):
        if key.name in names[:index]:
            raise msgspec.ValidationError(f"a second key '{key.name}' - at `$.auth.keys[{index}].name`")
        for model_name in key.models or ():
            if model_name not in settings.models:
                hint = _near(model_name, settings.models)
                raise msgspec.ValidationError(
                    f"there is no model '{model_name}'{hint} - at `$.auth.keys[{index}].models`"
                )
    for name, upstream in settings.upstreams.items():
        if upstream.base_url and not re.match(r"^https?://[^/@\s]+", upstream.base_url):
            raise msgspec.ValidationError(
                f"'{upstream.base_url}' is not like http://host:port/v1 - at `$.upstreams.{name}.base_url`"
            )


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the configuration, for editors."""
    return msgspec.json.schema(Settings)


Path_ = tuple[str | int, ...]


def _lines(node: yaml.Node, path: Path_) -> Iterator[tuple[Path_, int]]:
    """Every path in the document and the line it begins on; raises yaml.MarkedYAMLError at a duplicate key."""
    yield path, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' occurs twice", problem_mark=key.start_mark)
            seen.add(key.value)
            yield from _lines(value, (*path, key.value))
            yield (*path, key.value), key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _lines(item, (*path, index))


_FAULT = re.compile(r"^(?P<what>.*?)(?: - at `(?P<key>key in )?\$(?P<path>.*)`)?$", re.DOTALL)


def _placed(fault: str, document: Any, lines: dict[Path_, int], file: str) -> SettingsError:
    """The fault with its line; msgspec writes `[...]` for a mapping's key, so the keys are tried until one fits."""
    match = _FAULT.match(fault)
    assert match is not None
    what, dotted = match["what"], match["path"] or ""
    path = _resolve(dotted, document, what)
    if unknown := re.match(r"Object contains unknown field `(.*)`", what):
        known = _fields_at(path)
        path = (*path, unknown[1])
        what = f"unknown key '{unknown[1]}'{_near(unknown[1], known) or '; known are: ' + ', '.join(sorted(known))}"
    elif missing := re.match(r"Object missing required field `(.*)`", what):
        what = f"'{missing[1]}' is missing"
    line = next((lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in lines), 1)
    shown = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
    said = what.replace("`", "").replace(" | null", "")
    return SettingsError(f"{file}:{line}: {shown or 'the document'}: {said[:1].lower()}{said[1:]}")


def _steps(dotted: str) -> list[str | int | None]:
    """None stands for "some key of this mapping"."""
    return [
        None if inner == "..." else int(inner) if inner else name
        for name, inner in re.findall(r"\.([^.\[\]]+)|\[(\.\.\.|\d+)\]", dotted)
    ]


def _resolve(dotted: str, document: Any, what: str) -> Path_:
    """The first path of that form at which msgspec finds the same fault again."""
    candidates: list[tuple[Path_, Any]] = [((), document)]
    for step in _steps(dotted):
        reached: list[tuple[Path_, Any]] = []
        for path, value in candidates:
            if step is None and isinstance(value, dict):
                reached += [((*path, key), member) for key, member in value.items()]
            elif isinstance(value, dict) and step in value:
                reached.append(((*path, step), value[step]))  # type: ignore[arg-type]
            elif isinstance(value, list) and isinstance(step, int) and step < len(value):
                reached.append(((*path, step), value[step]))
        candidates = reached or candidates
    for path, value in candidates:
        try:
            msgspec.convert(value, _type_at(path))
        except msgspec.ValidationError as exc:
            if str(exc).partition(" - at ")[0] == what:
                return path
    return candidates[0][0]


def _type_at(path: Path_) -> Any:
    kind: Any = Settings
    for step in path:
        kind = _member_type(kind, step)
    return kind


def _member_type(kind: Any, step: str | int) -> Any:
    info = msgspec.inspect.type_info(kind)
    for option in info.types if isinstance(info, msgspec.inspect.UnionType) else (info,):
        if isinstance(option, msgspec.inspect.StructType):
            hints = {field.encode_name: name for field in option.fields if (name := field.name)}
            if step in hints:
                return get_type_hints(option.cls, include_extras=True)[hints[str(step)]]
    arguments = getattr(kind, "__args__", ())
    if getattr(kind, "__metadata__", None) is not None:
        return _member_type(kind.__origin__, step)
    return arguments[-1] if arguments else Any


def _fields_at(path: Path_) -> list[str]:
    info = msgspec.inspect.type_info(_type_at(path))
    return [field.encode_name for field in info.fields] if isinstance(info, msgspec.inspect.StructType) else []


def _near(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
