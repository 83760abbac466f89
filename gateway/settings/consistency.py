"""What can the types not say? References, unique names, addresses, limits that their kind cannot have."""

import ipaddress
import re
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from gateway.settings.faults import Fault, near
from gateway.settings.shape import MAX_COUNT, MAX_USD, Group, Key, Limit, Limits, LimitsByModel, Settings, Steps


def inconsistencies(settings: Settings) -> Iterator[Fault]:
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
                hint = near(target.upstream, settings.upstreams)
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
                yield (*path, "models", position), f"there is no model '{name}'{near(name, settings.models)}"
        for name, limits in holder.limits.models.items():
            groups[*path, "limits", "models", name] = (limits, [name])
            if name not in settings.models:
                yield (*path, "limits", "models", name), f"there is no model '{name}'{near(name, settings.models)}"
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
