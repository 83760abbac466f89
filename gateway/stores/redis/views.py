"""What has this process last seen of each window? Told to Redis with each admission, in case it has lost them."""

import struct
from collections.abc import Sequence

from gateway.stores import Plan, Window

_VIEW = struct.Struct("<ddd")
_NOTHING = _VIEW.pack(0, 0, 0)


class View:
    """What one window held, when, and when all of that will have left, by Redis's clock: as it is sent."""

    __slots__ = ("packed", "until_s")

    def __init__(self) -> None:
        self.packed = _NOTHING
        self.until_s = 0.0
        """When it is void by the clock of this process, which does not step."""


class Views:
    """Those of one plan's windows. Plans share the view of a window that they share."""

    __slots__ = ("_of",)

    def __init__(self, of: list[tuple[int, int, View]]) -> None:
        """*of* each: the place and the limit of its rule, and its view."""
        self._of = of

    def told(self, now_s: float) -> bytes:
        """As the script takes them."""
        return b"".join([view.packed if now_s < view.until_s else _NOTHING for _, _, view in self._of])

    def renew(self, asked_s: float, at_ms: int, remaining: Sequence[int], reset_ms: Sequence[int]) -> None:
        """What Redis has answered, of its figures for all rules of the plan."""
        for index, limit, view in self._of:
            reset = reset_ms[index]
            view.packed = _VIEW.pack(limit - remaining[index], at_ms, at_ms + reset)
            view.until_s = asked_s + reset / 1000


class Seen:
    """All views: as many as there are windows in the plans that were asked for."""

    def __init__(self) -> None:
        self._views: dict[tuple[str, str, str, int], View] = {}

    def of(self, plan: Plan) -> Views:
        found: dict[tuple[str, str, str, int], tuple[int, int, View]] = {}
        for index, rule in enumerate(plan.rules):
            if isinstance(rule, Window):
                name = (plan.slot, rule.scope, rule.metric, rule.window_ms)
                if name not in found:
                    found[name] = (index, rule.limit, self._views.setdefault(name, View()))
        return Views(list(found.values()))
