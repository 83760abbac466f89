"""
The store broken on purpose, one way after the other: which tests notice?

Run as `python -m tests.stores.mutations`; `test_mutations.py` does so, too.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent.parent
TESTS = [f"tests/stores/test_{name}.py" for name in ("contract", "properties", "redis_faults", "forgotten")]
COMMON, ADMIT, SETTLE, CHARGE, HEARTBEAT, SEED = (
    f"lua/{name}.lua" for name in ("common", "admit", "settle", "charge", "heartbeat", "seed")
)

MUTATIONS: dict[str, tuple[str, str, str]] = {
    "the oldest bucket does not count": (COMMON, "current - BUCKETS - 1 do", "current - BUCKETS do"),
    "a window is a fixed one": (
        COMMON,
        "local current = floor(now / size)",
        "local current = floor(now / rule[4]) * 60",
    ),
    "buckets that left stay in the sum": (COMMON, "w.used = w.used - (tonumber(left) or 0)", "w.used = w.used"),
    "a wait is a bucket too short": (COMMON, "return (buckets[i] + BUCKETS + 1)", "return (buckets[i] + BUCKETS)"),
    "a wait is a bucket too long": (COMMON, "return (buckets[i] + BUCKETS + 1)", "return (buckets[i] + BUCKETS + 2)"),
    "a refund goes to the current bucket": (
        COMMON,
        "local back = min(",
        "bucket = floor(now / ceil(rule[4] / BUCKETS)) local back = min(",
    ),
    "a refund may make a bucket negative": (
        COMMON,
        "local back = min(reserved - actual, tonumber(redis.call('HGET', key, bucket)) or 0)",
        "local back = reserved - actual",
    ),
    "a debt is forgiven": (COMMON, "window.add(w, w.current, actual - reserved)", "local forgiven = true"),
    "a debt is put where it was reserved": (
        COMMON,
        "window.add(w, w.current, actual - reserved)",
        "window.add(w, bucket or w.current, actual - reserved)",
    ),
    "a clock that steps back turns the window back": (COMMON, "elseif current < w.last then", "elseif false then"),
    "an old cost counts as of now": (COMMON, "if admitted < now then", "if false then"),
    "nobody tells what was lost": (COMMON, "if saw and now < ends and", "if false and now < ends and"),
    "what has ended is told as lost": (COMMON, "if saw and now < ends and", "if saw and ends > 0 and"),
    "only a window that is not there is lost": (COMMON, "(not got[1] or born > since)", "not got[1]"),
    "a window is lost to who made it": (COMMON, "born > since", "born >= since"),
    "what several saw adds up": (COMMON, "local more = used - (tonumber(got[1]) or 0)", "local more = used"),
    "what is told counts as of now": (
        COMMON,
        "max(floor(ends / size) - BUCKETS - 1, last - BUCKETS), more)",
        "floor(now / size), more)",
    ),
    "what came back before it was told counts twice": (
        COMMON,
        "if got[3] and tonumber(got[4]) <= since + CALL",
        "if false",
    ),
    "whatever came back was seen": (COMMON, "if got[3] and tonumber(got[4]) <= since + CALL", "if got[3]"),
    "what was told counts twice where it comes back": (COMMON, "told and admitted <= told + CALL", "false"),
    "whatever comes back was told": (COMMON, "told and admitted <= told + CALL", "told"),
    "a birth may be in the future": (COMMON, "if born > now then", "if false then"),
    "what was told pays for what was taken beyond": (
        SETTLE,
        "local expected = min(used, reserved[rule[2]])",
        "local expected = used",
    ),
    "each key tells what it has seen itself": ("redis/views.py", "self._views.setdefault(name, View())", "View()"),
    "what was seen is told for ever": ("redis/views.py", "if now_s < view.until_s else _NOTHING", ""),
    "a repeated answer is taken for news": ("redis/store.py", "if reply[0] < 2:", "if reply[0] != 2:"),
    "who is refused has seen nothing": ("redis/store.py", "if reply[0] < 2:", "if reply[0] == 0:"),
    "leases never lapse": (COMMON, "string.format('(%d', now)", "'-inf'"),
    "leases are not limited": (COMMON, "if l.used < limit then return 0 end", "if true then return 0 end"),
    "a quota ignores its limit": (COMMON, "if q.used + cost <= limit then return 0 end", "if true then return 0 end"),
    "a quota of another period is good enough": (COMMON, "q.begun >= start)", "true)"),
    "a month has thirty days": (COMMON, "return start, month(start + 31 * DAY)", "return start, start + 30 * DAY"),
    "years begin in January": (COMMON, "local z = days + 719468", "local z = days + 719528"),
    "a reservation of an earlier seeding counts": (
        COMMON,
        "if not epoch or redis.call('HGET', key, 'epoch') ~= epoch then return false end",
        "if not epoch then return false end",
    ),
    "rules with one counter count twice": (
        COMMON,
        "    if rule[6] == 0 then\n      places",
        "    if true then\n      places",
    ),
    "a repeated admit counts again": (ADMIT, "if known then", "if false then"),
    "the first rule alone decides": (
        ADMIT,
        "for i, rule in ipairs(rules) do\n  local wait",
        "for i, rule in ipairs({rules[1]}) do\n  local wait",
    ),
    "shadow rules refuse": (ADMIT, "if rule[5] == 1 then", "if false then"),
    "the shortest wait is told": (ADMIT, "wait > longest)", "wait < longest)"),
    "never is told as a long wait": (ADMIT, "(wait == NEVER or ", "("),
    "the refused pay": (
        ADMIT,
        "if denied then",
        "if denied then counters[rules[1][1]].take(seen[1], rules[1], costs[rules[1][2]], now, now, ARGV[4])",
    ),
    "a repeated settle counts again": (SETTLE, "if record and record[1] ~= 'open' then", "if false then"),
    "leases do not end": (SETTLE, "redis.call('ZREM', KEYS[i + 1], id)", "local kept = id"),
    "the deadline of what is settled stays": (SETTLE, "redis.call('ZREM', KEYS[1], id)", "local kept = id"),
    "what was lost does not count in windows": (SETTLE, "rule[6] == 0 and rule[1] == 'w'", "false"),
    "what was lost does not count in quotas": (SETTLE, "rule[6] == 0 and rule[1] == 'q'", "false"),
    "a charge is repeated": (CHARGE, "record[1], record[7] = 'done', {}", "local kept = record"),
    "a charge ignores what a seeding has": (CHARGE, " and tonumber(got[2]) < seq", ""),
    "a charge ignores its period": (CHARGE, "tonumber(got[1]) == late[at + 1] and ", ""),
    "a heartbeat renews no lease": (HEARTBEAT, "lease.renew(KEYS[i + 1], rule, id, now)", "local kept = id"),
    "a heartbeat revives what is settled": (HEARTBEAT, "if record[1] ~= 'open' then return 0 end", ""),
    "a heartbeat leaves the deadline": (HEARTBEAT, "redis.call('ZADD', KEYS[1], now + OVERDUE, id)", ""),
    "whoever seeds last is right": (SEED, "if begun and begun >= tonumber(ARGV[2]) then return 0 end", ""),
    "a seeding has no watermark": (SEED, "'watermark', ARGV[4]", "'watermark', 0"),
    "a refund needs no exact usage": (
        "redis/store.py",
        "actual if exact else actual.at_least(reservation.costs)",
        "actual",
    ),
    "a refund needs no exact usage, in memory": ("memory.py", "if not exact:", "if False:"),
    "lost replies are not asked for again": ("redis/calls.py", "return None if error.final else node", "return None"),
    "scripts that are gone are not sent again": ("redis/calls.py", 'command(word == "NOSCRIPT")', "command(False)"),
    "events that are gone tell nothing": ("redis/settlements.py", "or reply == len(dropping)", "or True"),
    "a backlog is dropped": ("redis/settlements.py", "self._backlog.append(settling)", "self._known.clear()"),
    "a broken server is always asked": (
        "redis/node.py",
        "if self.open:\n            raise",
        "if False:\n            raise",
    ),
    "nobody looks whether it is back": ("redis/node.py", "while done < PROBES:", "while True:"),
}


def is_noticed(mutation: str) -> str | None:
    """The first test that fails; None if all pass."""
    file, old, new = MUTATIONS[mutation]
    with TemporaryDirectory() as folder:
        for part in ("gateway", "tests"):
            shutil.copytree(ROOT / part, Path(folder) / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        path = Path(folder) / "gateway/stores" / file
        text = path.read_text()
        assert text.count(old) == 1, f"{mutation}: to be broken is not there once but {text.count(old)} times"
        path.write_text(text.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *TESTS]
        environment = {**os.environ, "PYTHONPATH": folder}
        try:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=90)
        except subprocess.TimeoutExpired:
            return "it does not end"
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if done.returncode == 0:
            return None
        return failed[0].partition(" - ")[0].rpartition("::")[2] if failed else done.stdout[-300:]


if __name__ == "__main__":
    for name in sys.argv[1:] or MUTATIONS:
        print(f"{name}: {is_noticed(name) or 'NOT NOTICED'}", flush=True)  # noqa: T201
