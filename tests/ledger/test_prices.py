"""What did it cost?"""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import settings
from gateway.prices import pin
from gateway.settings import SettingsError

TOKENS = st.integers(0, 2**31 - 1)
USD = st.integers(0, 10**6 * 10**9).map(lambda nano: nano / 10**9)


def test_a_price_is_what_was_written_and_not_its_nearest_binary_fraction() -> None:
    prices = pin(settings.Prices(input=0.1, output=0.3, cached_input=0.000000007))

    assert prices is not None
    assert (prices.input, prices.output, prices.cached_input) == (100_000_000, 300_000_000, 7)


def test_cached_input_costs_as_much_as_other_input_where_it_has_no_price() -> None:
    prices = pin(settings.Prices(input=3, output=15))

    assert prices is not None
    assert prices.cost_nano(1000, 0, 0) == prices.cost_nano(1000, 1000, 0) == 3_000_000


def test_a_request_is_rounded_up_once() -> None:
    prices = pin(settings.Prices(input=0.0000001, output=0.0000001))

    assert prices is not None
    assert prices.cost_nano(1, 0, 1) == 1
    assert prices.cost_nano(0, 0, 0) == 0


def test_a_model_without_prices_has_no_cost_rather_than_none() -> None:
    assert pin(None) is None


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0, -0.000001])
@pytest.mark.parametrize("name", ["input", "output", "cached_input"])
def test_what_is_no_price_is_refused_by_name(name: str, wrong: float) -> None:
    with pytest.raises(SettingsError, match=f"prices.{name}: .* is no price"):
        pin(settings.Prices(**{"input": 1.0, "output": 1.0, name: wrong}))


def test_a_price_finer_than_can_be_billed_is_refused() -> None:
    with pytest.raises(SettingsError, match="too fine"):
        pin(settings.Prices(input=1e-10, output=1))


@given(TOKENS, TOKENS, TOKENS, st.integers(0, 10**15), st.integers(0, 10**15), st.integers(0, 10**15))
def test_the_cost_is_the_exact_sum_rounded_up_and_fits_a_database(
    prompt: int, cached: int, completion: int, given_in: int, given_out: int, given_cached: int
) -> None:
    cached = min(cached, prompt)
    prices = pin(settings.Prices(input=1, output=1))
    assert prices is not None
    prices = type(prices)(given_in, given_out, given_cached)

    cost = prices.cost_nano(prompt, cached, completion)

    exact = Fraction((prompt - cached) * given_in + cached * given_cached + completion * given_out, 10**6)
    assert exact <= cost < exact + 1
    assert cost < 2**63
