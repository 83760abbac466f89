"""What did it cost? In whole nano-dollars, rounded up once a request."""

import math
from decimal import Decimal

from msgspec import Struct

from gateway import settings
from gateway.settings import SettingsError

PER = 1_000_000
"""How many tokens a price is for."""
NANO = Decimal(10**9)


class Prices(Struct, frozen=True, gc=False):
    """Nano-USD for a million tokens."""

    input: int
    output: int
    cached_input: int

    def cost_nano(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> int:
        """Of *prompt_tokens*, *cached_tokens* are billed at their own price."""
        total = (
            (prompt_tokens - cached_tokens) * self.input
            + cached_tokens * self.cached_input
            + completion_tokens * self.output
        )
        return -(-total // PER)


def pin(prices: settings.Prices | None) -> Prices | None:
    """
    The configured prices as they go into each record; None where there are none.

    Raises SettingsError for what is no price: negative, not finite, or finer than a nano-dollar for a million tokens.
    """
    if prices is None:
        return None
    cached = prices.input if prices.cached_input is None else prices.cached_input
    return Prices(_nano("input", prices.input), _nano("output", prices.output), _nano("cached_input", cached))


def _nano(name: str, usd: float) -> int:
    if not math.isfinite(usd) or usd < 0:
        raise SettingsError(f"prices.{name}: {usd} is no price: write US dollars for a million tokens")
    nano = Decimal(str(usd)) * NANO  # str: what was written, not its nearest binary fraction
    if nano != nano.to_integral_value():
        raise SettingsError(f"prices.{name}: {usd} is too fine: no more than nine decimals")
    return int(nano)
