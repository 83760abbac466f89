"""What of a plan's calls is always the same: the names of its keys, and how its commands begin."""

import base64
import hashlib

import msgspec

from gateway.stores import Lease, Plan, Quota, Rule, Window
from gateway.stores.redis.places import partition_of, tag
from gateway.stores.redis.scripts import Scripts, bulk
from gateway.stores.redis.views import Views

METRICS = {"tokens": 1, "nano_usd": 2, "requests": 3}


def key(partition: int, name: str) -> bytes:
    return f"{tag(partition)}{name}".encode()


class Prepared:
    """
    A plan as the scripts take it. `rules` is what they know of its rules, in msgpack; `rules_bulk` that as it is sent.

    After the keys of the rules comes that of the reservation, which begins with `reservation`. `lost_counts`: a settle
    that finds no reservation counts all the same. `views` are the store's, made when it is first asked.
    """

    __slots__ = (
        "_scripts",
        "admit",
        "keys",
        "lost_counts",
        "partition",
        "reservation",
        "reservation_length",
        "rules",
        "rules_bulk",
        "settle",
        "views",
    )

    def __init__(self, scripts: Scripts, partition: int, rules: bytes, names: list[str], lost_counts: bool) -> None:
        self._scripts = scripts
        self.partition = partition
        self.rules = rules
        self.rules_bulk = bulk(rules)
        self.keys = [key(partition, "rz"), *(key(partition, name) for name in names)]
        self.reservation = key(partition, "r:")
        self.reservation_length = len(self.reservation)
        self.lost_counts = lost_counts
        self.views: Views | None = None
        self.admit = self.admit_head()
        self.settle = self.settle_head()

    def admit_head(self, whole: bool = False) -> bytes:
        return self._scripts.admit.head(self.keys, 1, 5, whole)

    def settle_head(self, whole: bool = False) -> bytes:
        return self._scripts.settle.head([*self.keys, key(self.partition, "u")], 1, 6, whole)


def prepare(plan: Plan, scripts: Scripts) -> Prepared:
    """The plan as the scripts take it, made once."""
    if plan.prepared is None:
        names = [_name(rule) for rule in plan.rules]
        firsts = [names.index(name) for name in names]
        rules = [
            (*_figures(rule), int(rule.shadow), first + 1 if first < index else 0, name)
            for index, (rule, name, first) in enumerate(zip(plan.rules, names, firsts, strict=True))
        ]
        plan.prepared = Prepared(scripts, partition_of(plan.slot), msgspec.msgpack.encode(rules), names, True)
    prepared: Prepared = plan.prepared
    return prepared


def revive(partition: int, rules: bytes, scripts: Scripts) -> Plan:
    """The plan of somebody else's reservation, as far as settling needs it."""
    plan = Plan("", ())
    plan.prepared = Prepared(scripts, partition, rules, [rule[-1] for rule in msgspec.msgpack.decode(rules)], False)
    return plan


def _name(rule: Rule) -> str:
    """What its counter's key ends with. Names of people do not enter a key."""
    scope = base64.urlsafe_b64encode(hashlib.blake2b(rule.scope.encode(), digest_size=9).digest()).decode()
    if isinstance(rule, Window):
        return f"w:{scope}:{rule.metric[0]}:{rule.window_ms}"
    if isinstance(rule, Lease):
        return f"c:{scope}"
    return f"q:{scope}:{rule.metric[0]}:{rule.period}"


def _figures(rule: Rule) -> tuple[str, int, int, int | str]:
    """Kind, metric, limit and span, as the scripts know them."""
    if isinstance(rule, Window):
        return "w", METRICS[rule.metric], rule.limit, rule.window_ms
    if isinstance(rule, Lease):
        return "c", 0, rule.limit, rule.lease_ms
    assert isinstance(rule, Quota)
    return "q", METRICS[rule.metric], rule.limit, rule.period
