"""Who is calling?"""

import hashlib
import ipaddress
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

from gateway.errors import AuthenticationFailed, PermissionDenied
from gateway.settings import Auth, Key, Settings

FORWARDING_HEADERS = re.compile(rb"forwarded|via|x-real-ip|x-(original-)?forwarded-.*|cf-connecting-ip")


@dataclass(frozen=True, slots=True)
class Principal:
    """
    Who a call is made for: a key, by its name, and whose it is. `models` None means every model.

    `tenant` is the boundary of cached answers, a hash of the key's team, else of the key, that upstreams may see;
    `slot` is where its counters lie together: all that can be shared with other keys is in one.
    """

    name: str
    tenant: str
    models: frozenset[str] | None = None
    user: str | None = None
    team: str | None = None

    @property
    def slot(self) -> str:
        if self.team is not None:
            return f"team:{self.team}"
        return f"key:{self.name}" if self.user is None else f"user:{self.user}"

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models


ANONYMOUS = Principal("anonymous", "anonymous")


class Keyring:
    """
    The keys that are known, by SHA-256.

    Without any, callers on this machine are let in anonymously, and nobody else: see `is_local_call`.
    """

    def __init__(self, auth: Auth, *, anonymous: bool) -> None:
        self._principals = {key.sha256: _principal(key, auth) for key in auth.keys}
        self._admins = {key.sha256: key.name for key in auth.admin_keys}
        self._anonymous = anonymous

    def authenticate(self, headers: Iterable[tuple[bytes, bytes]]) -> Principal:
        """The caller; raises AuthenticationFailed, always with the same words for a key that is not right."""
        return self.identify(joined(headers))

    def identify(self, fields: dict[bytes, bytes]) -> Principal:
        """The same, from headers that are joined already."""
        if self._anonymous:
            if is_local_call(fields):
                return ANONYMOUS
            raise AuthenticationFailed(
                "This gateway has no keys, so it only answers programs on its own machine: not pages of other sites, "
                "proxies or other host names. Add a key to its configuration (`suiron key new`)."
            )
        digest = _digest_of(fields)
        principal = self._principals.get(digest)
        if principal is None:
            if digest in self._admins:
                raise PermissionDenied("This key is for the admin API: it cannot call models.")
            raise _refused("Incorrect API key provided.", code="invalid_api_key")
        return principal

    def tenant_of(self, kind: str, name: str) -> str:
        """Of a `key` or a `team`; raises LookupError where no key has that name, or is in that team."""
        tenants = {principal.name if kind == "key" else principal.team: principal.tenant for principal in self._known()}
        return tenants[name]

    def _known(self) -> Iterable[Principal]:
        return [ANONYMOUS] if self._anonymous else self._principals.values()

    def authenticate_admin(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """The name of an admin's key; raises AuthenticationFailed, or PermissionDenied for a key that calls models."""
        digest = _digest_of(joined(headers))
        name = self._admins.get(digest)
        if name is None:
            if digest in self._principals:
                raise PermissionDenied("This key is for calling models: the admin API needs one of `auth.admin_keys`.")
            raise _refused("Incorrect API key provided.", code="invalid_api_key")
        return name


def _tenant(kind: str, name: str) -> str:
    """The name of a team is no name of a key: they would meet in one cache."""
    owner = f"tenant:{name}" if kind == "key" else f"tenant:team:{name}"
    return hashlib.sha256(owner.encode()).hexdigest()[:32]


def _digest_of(fields: dict[bytes, bytes]) -> str:
    """The SHA-256 of the key that was given; empty for what is none. Raises AuthenticationFailed without any."""
    scheme, _, token = fields.get(b"authorization", b"").partition(b" ")
    token = token.strip()
    if not token and scheme.lower() in (b"", b"bearer"):
        raise _refused(
            "You didn't provide an API key. Provide it in an Authorization header using Bearer auth "
            "(i.e. Authorization: Bearer YOUR_KEY).",
        )
    return hashlib.sha256(token).hexdigest() if scheme.lower() == b"bearer" else ""


def _principal(key: Key, auth: Auth) -> Principal:
    groups = [auth.users.get(key.user or ""), auth.teams.get(key.team or "")]
    allowed = [holder.models for holder in (key, *groups) if holder is not None and holder.models is not None]
    models = frozenset.intersection(*map(frozenset, allowed)) if allowed else None
    tenant = _tenant("key", key.name) if key.team is None else _tenant("team", key.team)
    return Principal(key.name, tenant, models, key.user, key.team)


def joined(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """A second header of the same name is joined to the first, so that neither counts."""
    fields: dict[bytes, bytes] = {}
    for name, value in headers:
        fields[name] = b"%b, %b" % (fields[name], value) if name in fields else value
    return fields


def _refused(message: str, code: str | None = None) -> AuthenticationFailed:
    return AuthenticationFailed(message, code=code, headers={"www-authenticate": "Bearer"})


def is_local_call(fields: dict[bytes, bytes]) -> bool:
    """Whether `Host` is this machine's, no other site's page made the call, and no proxy passed it on."""
    if any(FORWARDING_HEADERS.fullmatch(name) for name in fields):
        return False
    if not is_loopback(_hostname(b"//" + fields.get(b"host", b""))):
        return False
    origin = fields.get(b"origin")
    return origin is None or is_loopback(_hostname(origin))


def _hostname(url: bytes) -> str:
    try:
        parts = urlsplit(url.decode("ascii"))
        if parts.path or parts.query or parts.fragment or parts.username is not None:
            return ""
        return parts.hostname or ""
    except ValueError:
        return ""


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def client_address(peer: str, forwarded_for: Iterable[bytes], trusted: Sequence[Network]) -> str:
    """
    Who really asks: the last address in `X-Forwarded-For` that is no proxy of ours, or *peer* itself.

    What stands before that address, anybody may have written.
    """
    address = _bare_address(peer) or peer
    hops = [hop for line in forwarded_for for hop in line.decode("latin-1").split(",")]
    while hops and _is_in(address, trusted):
        hop = _bare_address(hops.pop())
        if hop is None:
            break
        address = hop
    return address


def _is_in(address: str, networks: Sequence[Network]) -> bool:
    return any(ipaddress.ip_address(address) in network for network in networks)


def _bare_address(hop: str) -> str | None:
    """Without a port; None for what is no address. One of IPv4 in IPv6's clothes is undressed."""
    found = re.fullmatch(r"\s*(?:\[([^\]]+)\]|([\d.]+))?(?::\d+)?\s*", hop)
    text = (found[1] or found[2] or "") if found else hop.strip()
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return str(getattr(address, "ipv4_mapped", None) or address)


@lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def why_not_anonymous(settings: Settings) -> str | None:
    """What forbids anonymous calls here, as the end of a sentence; None where they may be let in."""
    if not is_loopback(settings.server.host):
        return f"it would listen on {settings.server.host}, where others can reach it"
    credential = next((name for name, upstream in settings.upstreams.items() if upstream.api_key is not None), None)
    if credential is not None:
        return f"the upstream '{credential}' holds a credential that anybody here could spend"
    return None


def new_key() -> tuple[str, str]:
    """A new key of 256 random bits, and its SHA-256 for the configuration."""
    key = f"sk-suiron-{secrets.token_urlsafe(32)}"
    return key, hashlib.sha256(key.encode()).hexdigest()
