"""What always holds? Both stores side by side against an ideal log; replicas that crash, over a Redis that forgets."""

import asyncio
from collections.abc import Container, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar, TypeVar

import pytest
import redis
import uvloop
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from gateway.settings import Store
from gateway.stores import Costs, Decision, Lease, LimitStore, Metric, Plan, Quota, Reservation, Rule, Window
from gateway.stores.memory import MemoryStore, period
from gateway.stores.redis import RedisStore
from tests.stores.conftest import Ledger
from tests.stores.servers import Clock, RedisServer, redis_server

MINUTE = 60_000
HOUR = 60 * MINUTE
DAY = 24 * HOUR
BEGIN = int(datetime(2028, 2, 29, 23, 58, 30, tzinfo=UTC).timestamp()) * 1000
"""Before the end of a day, of a month, and of a February that is longer than others."""

RPM = Window("key:a", "requests", 4, MINUTE)
TEAM_DAY = Quota("team:t", "tokens", 400, "day")
PLANS: tuple[tuple[Rule, ...], ...] = (
    (RPM, Window("key:a", "tokens", 100, MINUTE), Lease("key:a", 3), TEAM_DAY),
    (Window("key:b", "tokens", 60, MINUTE), Window("key:b", "requests", 1, MINUTE, shadow=True), TEAM_DAY),
    (RPM, Window("team:t", "requests", 7, HOUR), Quota("key:a", "nano_usd", 900, "month"), Lease("team:t", 4)),
)
SKIPS = st.sampled_from([1, 400, 999, 1_000, 7_300, 29_999, 30_000, 44_000, MINUTE, 61_000, HOUR, 6 * HOUR, DAY])
TOKENS = st.integers(0, 70)
MONEY = st.integers(0, 400)
Counter = tuple[str, str, int]
T = TypeVar("T")


@dataclass
class Request:
    """One request, as the model knows it."""

    request_id: str
    plan: int
    costs: Costs
    since_s: float
    admitted_ms: int = 0
    answer: Decision | None = None
    charged: Costs | None = None
    """What it was settled with; None while it is open."""
    settled_ms: int = 0
    seq: int | None = None


@dataclass
class Log:
    """An ideal sliding window: everything that was counted, with the moment it counts from."""

    entries: list[tuple[int, str, int]] = field(default_factory=list)

    def add(self, at: int, request_id: str, amount: int) -> None:
        self.entries.append((at, request_id, amount))

    def lower(self, request_id: str, amount: int) -> None:
        self.entries = [(at, who, amount if who == request_id else much) for at, who, much in self.entries]

    def within(self, now: int, span: int, apart_from: Container[str] = ()) -> int:
        return sum(amount for at, who, amount in self.entries if now - span < at <= now and who not in apart_from)


class Machine(RuleBasedStateMachine):
    """What the two machines share: time, requests, and the loop that the stores run on."""

    server: ClassVar[RedisServer]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self.clock = Clock(BEGIN)
        self.ledger = Ledger()
        self.requests: list[Request] = []
        self.logs: dict[Counter, Log] = {}
        self.leases: dict[str, dict[str, int]] = {}
        self.client = redis.Redis(port=self.server.port, socket_timeout=10)
        self.client.flushall()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def replica(self) -> RedisStore:
        options = Store(url=self.server.url, timeout_s=10)
        clock = self.clock
        made = RedisStore(options, self.used, now_ms=clock, monotonic_s=clock.monotonic_s, stray_ms=0, settled_down_s=0)
        self.run(made.start())
        return made

    async def used(self, scope: str, metric: Metric, period_start_ms: int) -> tuple[int, int]:
        return await self.ledger(f"{scope} {metric}", metric, period_start_ms)

    def new(self, plan: int, tokens: int, nano_usd: int) -> Request:
        return Request(f"req_{len(self.requests)}", plan, Costs(tokens, nano_usd), self.clock.monotonic_s())

    def pick(self, index: int, which: list[Request]) -> Request:
        return which[index % len(which)]

    def open(self) -> list[Request]:
        return [request for request in self.requests if request.charged is None]

    def settled(self) -> list[Request]:
        return [request for request in self.requests if request.charged is not None]

    def remembered(self) -> list[Request]:
        """Those about which something may still be repeated: a store does not remember what is settled for ever."""
        return [r for r in self.requests if r.charged is None or self.clock.now_ms - r.settled_ms < 240_000]

    def counted(self, request: Request, rule: Window) -> Log:
        return self.logs.setdefault((rule.scope, rule.metric, rule.window_ms), Log())

    def count_admission(self, request: Request, costs: Costs) -> None:
        """What an admission adds to the ideal, which must then still be within every limit that is enforced."""
        now = self.clock.now_ms
        for counter in PLANS[request.plan]:
            if isinstance(counter, Window):
                log = self.counted(request, counter)
                log.add(request.admitted_ms, request.request_id, getattr(costs, counter.metric))
            elif isinstance(counter, Lease):
                self.leases.setdefault(counter.scope, {})[request.request_id] = now + counter.lease_ms

    def within_limits(self, request: Request) -> None:
        now = self.clock.now_ms
        for counter in PLANS[request.plan]:
            if isinstance(counter, Window) and not counter.shadow:
                assert self.counted(request, counter).within(now, counter.window_ms) <= counter.limit, counter
            elif isinstance(counter, Lease):
                assert self.alive(counter.scope) <= counter.limit

    def alive(self, scope: str) -> int:
        return sum(end > self.clock.now_ms for end in self.leases.get(scope, {}).values())

    def count_settlement(self, request: Request, actual: Costs, exact: bool) -> None:
        for counter in PLANS[request.plan]:
            if isinstance(counter, Window):
                log = self.counted(request, counter)
                reserved, used = getattr(request.costs, counter.metric), getattr(actual, counter.metric)
                if used > reserved:
                    log.add(self.clock.now_ms, "debt", used - reserved)
                elif exact:
                    log.lower(request.request_id, used)
            elif isinstance(counter, Lease):
                self.leases[counter.scope].pop(request.request_id, None)
        kept = request.costs if not exact else Costs(0, 0, 0)
        request.settled_ms = self.clock.now_ms
        request.charged = Costs(
            max(actual.tokens, kept.tokens), max(actual.nano_usd, kept.nano_usd), max(actual.requests, kept.requests)
        )

    def write(self, request: Request) -> int:
        """The row, once: what it was charged, in the period in which it was admitted. All quotas read the same rows."""
        assert request.charged is not None
        if request.seq is None:
            for counter in PLANS[request.plan]:
                if isinstance(counter, Quota):
                    amount = getattr(request.charged, counter.metric)
                    name = f"{counter.scope} {counter.metric}"
                    request.seq = self.ledger.add(name, request.admitted_ms, amount)
        assert request.seq is not None
        return request.seq

    def quotas_are_what_the_rows_say(self, store: LimitStore) -> None:
        for index, rules in enumerate(PLANS):
            probe = Reservation(Plan("t", rules), f"probe{index}", Costs(0, 0, 0), since_s=self.clock.monotonic_s())
            answer = self.run(store.admit(probe))
            for counter, left in zip(rules, answer.remaining, strict=True):
                if isinstance(counter, Quota):
                    start, _ = period(counter, self.clock.now_ms)
                    used, _ = self.run(self.used(counter.scope, counter.metric, start))
                    assert left == max(0, counter.limit - used), (counter, used)

    @invariant()
    def buckets_add_up(self) -> None:
        for name in self.client.scan_iter("{g1:*}:w:*"):
            window = {place: int(value) for place, value in self.client.hgetall(name).items()}
            buckets = [value for place, value in window.items() if place.isdigit()]
            assert min(buckets, default=0) >= 0
            assert window[b"used"] == sum(buckets)

    def keys(self) -> dict[Any, Any]:
        """Everything in Redis that is not about replicas or seedings."""
        names = [name for name in self.client.scan_iter(count=1000) if not name.endswith(b":m") and b":q:" not in name]
        with self.client.pipeline(transaction=False) as dumping:
            for name in names:
                dumping.dump(name)
            return dict(zip(names, dumping.execute(), strict=True))


class SideBySide(Machine):
    """One process in memory and one over Redis, told the same: they say the same, and no limit of the ideal breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = MemoryStore(self.used, self.clock, self.clock.monotonic_s)
        self.redis = self.replica()
        self.plans = [[Plan("t", rules) for rules in PLANS] for _ in range(2)]

    def both(self, request: Request) -> tuple[Reservation, Reservation]:
        made = [
            Reservation(plans[request.plan], request.request_id, request.costs, b"intent", 0, request.since_s)
            for plans in self.plans
        ]
        return made[0], made[1]

    def admit(self, request: Request) -> Decision:
        in_memory, in_redis = self.both(request)
        before = self.keys()
        answers = self.run(self.memory.admit(in_memory)), self.run(self.redis.admit(in_redis))
        assert answers[0] == answers[1]
        if answers[0].denied is not None:
            assert self.keys() == before
        assert all(0 <= left <= r.limit for left, r in zip(answers[0].remaining, PLANS[request.plan], strict=True))
        return answers[0]

    def settle(self, request: Request, actual: Costs, exact: bool) -> None:
        stores: list[LimitStore] = [self.memory, self.redis]
        for store, reservation in zip(stores, self.both(request), strict=True):
            store.settle(reservation, actual, exact=exact, event=b"row")
        self.run(self.redis.delivered())

    def try_to_admit(self, request: Request) -> Decision:
        answer = self.admit(request)
        if answer.denied is None:
            request.admitted_ms, request.answer = self.clock.now_ms, answer
            self.requests.append(request)
            self.count_admission(request, request.costs)
            self.within_limits(request)
        return answer

    @rule(plan=st.integers(0, 2), tokens=TOKENS, nano_usd=MONEY)
    def asks(self, plan: int, tokens: int, nano_usd: int) -> None:
        self.try_to_admit(self.new(plan, tokens, nano_usd))

    @rule(plan=st.integers(0, 2), tokens=st.integers(0, 120), nano_usd=MONEY)
    def asks_and_waits_as_told(self, plan: int, tokens: int, nano_usd: int) -> None:
        answer = self.try_to_admit(self.new(plan, tokens, nano_usd))
        if answer.denied is None:
            return
        costs = Costs(tokens, nano_usd)
        limits = [
            (r.limit, 1 if isinstance(r, Lease) else getattr(costs, r.metric)) for r in PLANS[plan] if not r.shadow
        ]
        assert (answer.wait_ms is None) == any(cost > limit for limit, cost in limits)
        if answer.wait_ms is not None:
            self.time_passes(answer.wait_ms)
            again = self.try_to_admit(self.new(plan, tokens, nano_usd))
            assert again.denied is None or isinstance(PLANS[plan][again.denied], Lease)

    @precondition(lambda self: self.remembered())
    @rule(index=st.integers(0))
    def asks_again(self, index: int) -> None:
        request = self.pick(index, self.remembered())
        assert self.admit(request) == request.answer

    @precondition(lambda self: self.open())
    @rule(
        index=st.integers(0),
        tokens=st.integers(0, 140),
        nano_usd=MONEY,
        requests=st.integers(0, 1),
        exact=st.booleans(),
    )
    def ends(self, index: int, tokens: int, nano_usd: int, requests: int, exact: bool) -> None:
        request, actual = self.pick(index, self.open()), Costs(tokens, nano_usd, requests)
        self.settle(request, actual, exact)
        self.count_settlement(request, actual, exact)

    @precondition(lambda self: self.settled())
    @rule(index=st.integers(0), tokens=TOKENS)
    def ends_again(self, index: int, tokens: int) -> None:
        request = self.pick(index, self.settled())
        if request in self.remembered():
            self.settle(request, Costs(tokens, tokens), exact=True)

    @rule(plan=st.integers(0, 2), tokens=TOKENS, nano_usd=MONEY, ago=SKIPS)
    def ends_though_nobody_has_admitted_it_here(self, plan: int, tokens: int, nano_usd: int, ago: int) -> None:
        request = self.new(plan, tokens, nano_usd)
        request.since_s -= ago / 1000
        request.admitted_ms = self.clock.now_ms - ago
        request.charged, request.settled_ms = request.costs, self.clock.now_ms
        self.requests.append(request)
        self.settle(request, request.costs, exact=True)
        self.count_admission(request, request.costs)
        for counter in PLANS[plan]:
            if isinstance(counter, Lease):
                self.leases[counter.scope].pop(request.request_id)
        request.answer = self.run(self.memory.admit(self.both(request)[0]))

    @precondition(lambda self: self.settled())
    @rule(index=st.integers(0))
    def is_recorded(self, index: int) -> None:
        request = self.pick(index, self.settled())
        rows = {request.request_id: self.write(request)}
        self.memory.recorded(rows)
        self.redis.recorded(rows)
        self.run(self.redis.delivered())

    def all_is_recorded(self) -> None:
        rows = {request.request_id: self.write(request) for request in self.settled()}
        self.memory.recorded(rows)
        self.redis.recorded(rows)
        self.run(self.redis.delivered())

    @precondition(lambda self: self.open())
    @rule(index=st.integers(0))
    def is_kept_up(self, index: int) -> None:
        request = self.pick(index, self.open())
        in_memory, in_redis = self.both(request)
        self.run(self.memory.heartbeat([in_memory]))
        self.run(self.redis.heartbeat([in_redis]))
        for counter in PLANS[request.plan]:
            if isinstance(counter, Lease):
                self.leases[counter.scope][request.request_id] = self.clock.now_ms + counter.lease_ms

    @rule(ms=SKIPS)
    def time_passes(self, ms: int) -> None:
        if ms > HOUR:
            self.all_is_recorded()  # what waits for its row does so for a day
        self.clock.forward(ms)

    @rule()
    def the_dead_are_settled(self) -> None:
        found = [{one.request_id: one for one in self.run(store.overdue())} for store in (self.memory, self.redis)]
        assert found[0].keys() == found[1].keys()
        for request in [request for request in self.open() if request.request_id in found[0]]:
            assert found[1][request.request_id].costs == request.costs
            self.memory.settle(found[0][request.request_id], Costs(5, 5), exact=False, event=b"row")
            self.redis.settle(found[1][request.request_id], Costs(5, 5), exact=False, event=b"row")
            self.run(self.redis.delivered())
            self.count_settlement(request, Costs(5, 5), exact=False)

    def teardown(self) -> None:
        for request in self.open():
            self.settle(request, request.costs, exact=True)
            self.count_settlement(request, request.costs, exact=True)
        self.all_is_recorded()
        self.quotas_are_what_the_rows_say(self.memory)
        self.quotas_are_what_the_rows_say(self.redis)
        self.run(self.redis.aclose())
        self.runner.close()
        self.client.close()


class Replicas(Machine):
    """
    Two replicas that crash and come back, over a Redis that forgets, told some things twice and others not at all.

    Between two losses no limit of the ideal breaks; over one, by no more than what none of the replicas that have asked
    since had seen before, and never twice. In the end, when the living have settled theirs and have found what the dead
    left, each admitted request has its row, and quotas are what rows say.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replicas = [self.replica(), self.replica()]
        self.plans = [[Plan("t", rules) for rules in PLANS] for _ in range(2)]
        self.owner: dict[str, int] = {}
        self.abandoned: set[str] = set()
        self.before_loss: dict[Counter, Log] = {}
        self.used_at_loss: dict[Counter, int] = {}
        self.saw: list[dict[Counter, tuple[int, int]]] = [{}, {}]
        """Of each replica: how much was used, and until when that counts, as it was last told."""
        self.to_tell: list[dict[Counter, tuple[int, int]]] = [{}, {}]
        """What it saw before the loss, until it asks."""
        self.told: dict[Counter, int] = {}
        self.lost_ms = 0
        self.journals: list[Request] = []

    def reservation(self, request: Request, replica: int) -> Reservation:
        plan = self.plans[replica][request.plan]
        return Reservation(plan, request.request_id, request.costs, b"intent", 0, request.since_s)

    def mine(self) -> list[Request]:
        """Open requests whose process lives."""
        return [request for request in self.open() if request.request_id not in self.abandoned]

    def within_limits(self, request: Request) -> None:
        now = self.clock.now_ms
        for counter in PLANS[request.plan]:
            if isinstance(counter, Window) and not counter.shadow:
                name = (counter.scope, counter.metric, counter.window_ms)
                before, log = self.before_loss.get(name, Log()), self.counted(request, counter)
                used = log.within(now, counter.window_ms)
                debts = sum(amount for at, who, amount in before.entries if who == "debt")
                assert used <= counter.limit
                assert used + before.within(now, counter.window_ms) <= 2 * counter.limit + debts
                again = {who for _, who, _ in before.entries if who != "debt"}
                across = before.within(now, counter.window_ms) + log.within(now, counter.window_ms, again)
                unseen = max(0, self.used_at_loss.get(name, 0) - self.told.get(name, 0))
                assert across <= counter.limit + unseen

    def count_settlement(self, request: Request, actual: Costs, exact: bool) -> None:
        super().count_settlement(request, actual, exact)
        for (_, metric, _), log in self.before_loss.items():
            if exact and getattr(actual, metric) <= getattr(request.costs, metric):
                log.lower(request.request_id, getattr(actual, metric))

    def count_views(self, request: Request, replica: int, answer: Decision) -> None:
        """What *replica* has told of the windows of its request, and what it has seen of them."""
        now = self.clock.now_ms
        for index, counter in enumerate(PLANS[request.plan]):
            if isinstance(counter, Window):
                name = (counter.scope, counter.metric, counter.window_ms)
                used, until = self.to_tell[replica].pop(name, (0, 0))
                if now < until:
                    self.told[name] = max(used, self.told.get(name, 0))
                self.saw[replica][name] = counter.limit - answer.remaining[index], now + answer.reset_ms[index]

    @rule(plan=st.integers(0, 2), tokens=TOKENS, nano_usd=MONEY, replica=st.integers(0, 1), lost=st.booleans())
    def asks(self, plan: int, tokens: int, nano_usd: int, replica: int, lost: bool) -> None:
        request = self.new(plan, tokens, nano_usd)
        answer = self.run(self.replicas[replica].admit(self.reservation(request, replica)))
        self.count_views(request, replica, answer)
        if lost:  # and asked again, of whichever replica
            again = self.run(self.replicas[1 - replica].admit(self.reservation(request, 1 - replica)))
            if answer.denied is None:
                assert again == answer
            else:  # which may have more to tell of what was lost
                assert again.denied is not None
                self.count_views(request, 1 - replica, again)
        if answer.denied is None:
            request.admitted_ms = self.clock.now_ms
            self.requests.append(request)
            self.owner[request.request_id] = replica
            self.count_admission(request, request.costs)
            self.within_limits(request)

    @rule(plan=st.integers(0, 2), tokens=TOKENS, first=st.integers(0, 1), times=st.integers(3, 8))
    def uses_up_what_is_left(self, plan: int, tokens: int, first: int, times: int) -> None:
        for number in range(times):
            self.asks(plan, tokens, 0, (first + number) % 2, lost=False)
            if self.mine():
                self.ends(len(self.mine()) - 1, tokens, 0, exact=True, row=True)

    @precondition(lambda self: self.mine())
    @rule(index=st.integers(0), tokens=st.integers(0, 140), nano_usd=MONEY, exact=st.booleans(), row=st.booleans())
    def ends(self, index: int, tokens: int, nano_usd: int, exact: bool, row: bool) -> None:
        request, actual = self.pick(index, self.mine()), Costs(tokens, nano_usd)
        replica = self.owner[request.request_id]
        self.count_settlement(request, actual, exact)
        self.replicas[replica].settle(
            self.reservation(request, replica), actual, exact=exact, event=request.request_id.encode()
        )
        self.run(self.replicas[replica].delivered())
        if row:
            self.is_recorded(len(self.settled()) - 1)

    @precondition(lambda self: self.settled())
    @rule(index=st.integers(0))
    def is_recorded(self, index: int) -> None:
        request = self.pick(index, self.settled())
        replica = self.replicas[self.owner[request.request_id]]
        replica.recorded({request.request_id: self.write(request)})
        self.run(replica.delivered())

    @rule()
    def the_living_are_kept_up(self) -> None:
        for request in self.mine():
            replica = self.owner[request.request_id]
            self.run(self.replicas[replica].heartbeat([self.reservation(request, replica)]))
            for counter in PLANS[request.plan]:
                if isinstance(counter, Lease):
                    self.leases[counter.scope][request.request_id] = self.clock.now_ms + counter.lease_ms

    @rule(ms=st.sampled_from([1, 1_000, 7_300, 29_999, MINUTE, 61_000]))
    def time_passes(self, ms: int) -> None:
        for _ in range(-(-ms // 10_000)):
            self.clock.forward(min(ms, 10_000))
            self.the_living_are_kept_up()

    @rule()
    def the_day_ends(self) -> None:
        self.clock.forward(DAY)
        self.the_living_are_kept_up()

    @rule()
    def redis_forgets_its_scripts(self) -> None:
        self.client.script_flush()

    @rule()
    def redis_forgets_everything(self) -> None:
        for request in self.journals:  # one fault at a time: what the dead had on record is written by now
            self.write(request)
        self.journals.clear()
        self.client.flushall()
        self.clock.forward(1)
        now = self.clock.now_ms
        if any(log.within(now, span) for (_, _, span), log in self.before_loss.items()):
            self.clock.forward(HOUR)  # one fault at a time: the windows that contain the last one are over
        self.lost_ms = now
        self.used_at_loss = {name: log.within(now, name[2]) for name, log in self.logs.items()}
        self.to_tell, self.saw, self.told = self.saw, [{}, {}], {}
        self.before_loss, self.logs, self.leases = self.logs, {}, {name: {} for name in self.leases}
        self.the_living_are_kept_up()
        for request in self.mine():
            self.count_admission(request, request.costs)

    @rule(replica=st.integers(0, 1))
    def a_replica_crashes(self, replica: int) -> None:
        """What it knew is gone; another takes its place."""
        for index, request in enumerate(self.settled()):
            if request.settled_ms <= self.lost_ms and self.owner[request.request_id] == replica:
                self.is_recorded(index)  # one fault at a time: it has made up for the loss before it crashes
            if request.seq is None and self.owner[request.request_id] == replica:
                self.journals.append(request)
        self.run(_let_go(self.replicas[replica]))
        self.saw[replica], self.to_tell[replica] = {}, {}
        self.abandoned |= {r.request_id for r in self.mine() if self.owner[r.request_id] == replica}
        self.replicas[replica] = self.replica()
        self.plans[replica] = [Plan("t", rules) for rules in PLANS]

    @rule(replica=st.integers(0, 1))
    def the_dead_are_looked_after(self, replica: int) -> None:
        store = self.replicas[replica]
        for found in self.run(store.overdue()):
            request = next(request for request in self.requests if request.request_id == found.request_id)
            if request.charged is None:
                self.count_settlement(request, Costs(5, 5), exact=False)
            store.settle(found, request.charged or Costs(), exact=False, event=request.request_id.encode())
            self.run(store.delivered())
            store.recorded({request.request_id: self.write(request)})
            self.run(store.delivered())
        for stray in self.run(store.strays()):
            request = next(request for request in self.requests if request.request_id == stray.event.decode())
            store.recorded({request.request_id: self.write(request)})
            self.run(store.delivered())

    def teardown(self) -> None:
        for request in self.mine():
            self.ends(self.mine().index(request), request.costs.tokens, request.costs.nano_usd, True, True)
        for index in range(len(self.settled())):
            self.is_recorded(index)
        self.clock.forward(MINUTE)
        for replica in (0, 1):
            self.the_dead_are_looked_after(replica)
        assert not self.run(self.replicas[0].strays())
        assert not self.run(self.replicas[1].overdue())
        self.quotas_are_what_the_rows_say(self.replicas[0])
        for store in self.replicas:
            self.run(store.aclose())
        self.runner.close()
        self.client.close()


async def _let_go(store: RedisStore) -> None:
    """Its process is gone: nothing is delivered, nobody says goodbye."""
    store._membership.cancel()
    store._settlements.close()
    for node in store._places.all():
        await node.aclose()


@pytest.fixture(scope="module")
def server() -> Any:
    with redis_server() as running:
        Machine.server = running
        yield running


QUICK = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
LONG = settings(QUICK, max_examples=400, stateful_step_count=60)


@pytest.mark.usefixtures("server")
def test_both_stores_say_the_same_and_keep_every_limit() -> None:
    run_state_machine_as_test(SideBySide, settings=QUICK)


@pytest.mark.slow
@pytest.mark.usefixtures("server")
def test_both_stores_say_the_same_and_keep_every_limit_for_long() -> None:
    run_state_machine_as_test(SideBySide, settings=LONG)


@pytest.mark.usefixtures("server")
def test_replicas_that_crash_and_a_redis_that_forgets_break_no_limit_and_no_quota() -> None:
    run_state_machine_as_test(Replicas, settings=QUICK)


@pytest.mark.slow
@pytest.mark.usefixtures("server")
def test_replicas_that_crash_and_a_redis_that_forgets_break_no_limit_and_no_quota_for_long() -> None:
    run_state_machine_as_test(Replicas, settings=LONG)
