"""What is made of an upstream's refusals."""

from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import pytest

from gateway.errors import CredentialRefused, NotServed, Overloaded, UpstreamError, UpstreamFailed, UpstreamTimeout
from gateway.faults import MAX_WAIT_S, Fault, told_wait, upstream_error

NOW = datetime(2026, 11, 27, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": " 7 "}, 7.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "1000000000"}, 1e9),
        ({"retry-after": "9" * 400}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "٣"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "x", "retry-after": "9"}, 9.0),
        ({"retry-after": format_datetime(NOW.replace(second=20), usegmt=True)}, 20.0),
        ({"retry-after": "Fri, 27 Nov 2020 12:00:00 GMT"}, 0.0),
        ({"retry-after": "Fri, 99 Foo 2020 12:00:00 GMT"}, None),
    ],
)
def test_when_to_come_back_is_read_in_every_form_and_nonsense_is_none(headers: Any, seconds: float | None) -> None:
    assert told_wait(headers, NOW.timestamp()) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("status", "wait_s", "told", "busy_s"),
    [(429, None, "1", 0), (429, 7.2, "8", 7.2), (503, 1e9, str(MAX_WAIT_S), MAX_WAIT_S), (503, 0.25, "1", 0.25)],
)
def test_a_refusal_is_a_503_that_says_when_to_come_back(
    status: int, wait_s: float | None, told: str, busy_s: float
) -> None:
    error = upstream_error(status, Fault(), wait_s)
    assert isinstance(error, Overloaded)
    assert (error.status, error.headers["retry-after"], error.busy_s) == (503, told, busy_s)


@pytest.mark.parametrize(
    ("status", "message", "wait_s", "counts"),
    [
        (429, "", None, False),
        (503, "", 5.0, False),
        (503, "", None, True),
        (503, "upstream connect error", None, True),
        (503, "The engine is currently busy", None, False),
        (503, "The model is currently scaling. Please try again later.", None, False),
        (503, "Model is overloaded", None, False),
    ],
)
def test_being_full_says_nothing_against_a_server_but_a_bare_503_does(
    status: int, message: str, wait_s: float | None, counts: bool
) -> None:
    error = upstream_error(status, Fault(message=message), wait_s)
    assert isinstance(error, Overloaded)
    assert error.counts is counts


@pytest.mark.parametrize(
    ("status", "kind", "is_curable"),
    [
        (401, CredentialRefused, False),
        (403, CredentialRefused, False),
        (404, NotServed, False),
        (408, UpstreamTimeout, True),
        (302, UpstreamFailed, True),
        (500, UpstreamFailed, True),
        (504, UpstreamTimeout, True),
    ],
)
def test_what_is_not_the_clients_is_never_shown_as_such(status: int, kind: type[Any], is_curable: bool) -> None:
    error = upstream_error(status, Fault(message="http://10.0.0.7/ says no"))
    assert isinstance(error, UpstreamError)
    assert type(error) is kind
    assert (error.status >= 500, error.curable, error.counts) == (True, is_curable, True)
    assert "10.0.0.7" not in error.message
