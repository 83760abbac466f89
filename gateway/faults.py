"""What does an upstream's error mean to the client, whatever its shape?"""

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from math import ceil
from typing import Any

import msgspec
from msgspec import Struct

from gateway import errors

MAX_READ = 2000
"""Characters of a sentence that are looked at: an upstream's nonsense must not keep an expression busy."""


class Fault(Struct):
    """What an upstream's error body says, whatever its shape; empty where it says nothing."""

    message: str = ""
    param: str | None = None
    code: str | None = None
    status: int | None = None


_NAME = re.compile(r"[\w.\[\]-]{1,100}")
"""A member's path, or a word; what else an upstream writes there, such as an address, is nobody's business."""


def read_fault(body: bytes) -> Fault:
    """
    The error in *body*: OpenAI's `{"error": {…}}`, TGI's `{"error": text}`, old vLLM's and SGLang's flat
    `{"object": "error", "message"}`, FastAPI's `{"detail": text or [{"loc", "msg"}]}`.
    """
    try:
        document = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return Fault()
    if not isinstance(document, dict):
        return Fault()
    error = document.get("error") or document.get("detail") or document
    if isinstance(error, str):
        return Fault(message=error)
    if isinstance(error, list):
        return _invalid(error)
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return Fault()
    param, code = error.get("param"), error.get("code")
    number = code if isinstance(code, int) else error.get("http_status_code")
    return Fault(
        message=error["message"],
        param=param if isinstance(param, str) and _NAME.fullmatch(param) else None,
        code=code if isinstance(code, str) and _NAME.fullmatch(code) else None,
        status=number if isinstance(number, int) and 400 <= number < 600 else None,
    )


def _invalid(detail: list[Any]) -> Fault:
    """The first of FastAPI's complaints about a request body."""
    try:
        where = [str(step) for step in detail[0]["loc"] if step != "body"]
        return Fault(message=str(detail[0]["msg"]), param=".".join(where) or None)
    except (LookupError, TypeError):
        return Fault()


def upstream_error(status: int, fault: Fault, wait_s: float | None = None) -> errors.GatewayError:
    """
    What an upstream's status means to the client: its 4xx about the request is the client's, all else is not.

    *wait_s*: what its answer said of when to come back, as `told_wait` reads it.
    """
    if status in (400, 413, 422):
        return _complaint(fault)
    if status in (429, 503):
        return _refusal(status, fault, wait_s)
    if status in (408, 504):
        return errors.UpstreamTimeout("The upstream took too long to answer.")
    if status in (401, 403):
        return errors.CredentialRefused()
    if status == 404:
        return errors.NotServed()
    return errors.UpstreamFailed(f"The upstream failed with status {status}.")


MAX_WAIT_S = 30
_FULL = re.compile(r"overloaded|currently (busy|scaling)|queue|too many|capacity|rate limit", re.IGNORECASE)
"""What a server says that is full; one that says nothing of the kind with its 503 may as well be dead."""


def _refusal(status: int, fault: Fault, wait_s: float | None) -> errors.Overloaded:
    wait_s = min(max(wait_s or 0.0, 0.0), MAX_WAIT_S)
    return errors.Overloaded(
        "The upstream is overloaded. Try again later.",
        retry_after_s=max(1, ceil(wait_s)),
        busy_s=wait_s,
        counts=status == 503 and not wait_s and not _FULL.search(fault.message[:MAX_READ]),
    )


def told_wait(headers: Mapping[str, str], now: float) -> float | None:
    """
    In how many seconds an answer's headers say to come back: `retry-after-ms`, or `retry-after` in seconds or as a
    date; None if they do not, or say what nobody can understand. *now* is in seconds since 1970.
    """
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        told = headers.get(name, "").strip()[:64]
        if re.fullmatch(r"\d{1,15}(\.\d{0,9})?", told, re.ASCII):
            return float(told) * unit_s
        if told.endswith("GMT"):
            try:
                return max(0.0, parsedate_to_datetime(told).timestamp() - now)
            except (ValueError, OverflowError):
                return None
    return None


_OVERFLOW = re.compile(
    r"maximum context length|context.length.exceeded|exceed_context_size|context size|max_model_len|"
    r"maximum model length|must have less than \d+ tokens|`max_new_tokens` must be",
    re.IGNORECASE,
)
_OVERFLOWS = [
    (re.compile(pattern, re.DOTALL), param, says)
    for (param, says), patterns in {
        (None, "However, your input resulted in {given} tokens. Please reduce its length."): [
            r"context length is (?P<limit>\d+) tokens.*contains (?P<given>(?:at least )?\d+) input tokens",
            r"passed (?P<given>\d+) input tokens.*context length is only (?P<limit>\d+)",
            r"length (?P<given>\d+)\).*maximum model length of (?P<limit>\d+)",
            r"Input length \((?P<given>\d+)\).*context length \((?P<limit>\d+)\)",
        ],
        (None, "However, your input resulted in more than {given} tokens. Please reduce its length."): [
            r"context length is (?P<limit>\d+) tokens.*upper bound for (?P<given>\d+) input tokens",
        ],
        ("max_tokens", "However, you requested {given} completion tokens. Please reduce their number."): [
            r"max_tokens=(?P<given>\d+) cannot be greater than max_model_len=(?P<limit>\d+)",
            r"is too large: (?P<given>\d+).*context length is (?P<limit>\d+)",
        ],
    }.items()
    for pattern in patterns
]
"""What vLLM says, one version or another; and what OpenAI says then."""
_PYDANTIC = re.compile(r"'loc': '(?:body\.?)?(?P<param>[^']*)', 'msg': (?P<quote>['\"])(?P<says>.*?)(?P=quote)[,}]")
_NOISE = re.compile(
    r"\s*\(parameter=.*$"  # after most of vLLM's sentences
    r"|\[\d\d:\d\d:\d\d\]\s*\S+:\d+:\s*"  # where in its source a grammar failed
    r"|^\d+ validation errors?:\s*",
    re.DOTALL,
)
_NOT_OURS = frozenset({"input_tokens", "input_text"})
"""What vLLM names as parameters, and are none."""


def _complaint(fault: Fault) -> errors.InvalidRequest:
    message = fault.message[:MAX_READ]
    for pattern, param, says in _OVERFLOWS:
        if match := pattern.search(message):
            start = f"This model's maximum context length is {match['limit']} tokens. "
            return errors.ContextLengthExceeded(start + says.format(given=match["given"]), param=param)
    is_overflow = fault.code == "context_length_exceeded" or _OVERFLOW.search(message)
    param = (fault.param or "").removeprefix("body.") or None
    if match := _PYDANTIC.search(message):
        message, param = match["says"], match["param"] or None
    message = clean(_NOISE.sub("", message)) or "The upstream refused the request."
    if is_overflow:
        return errors.ContextLengthExceeded(message, param=None if param in _NOT_OURS else param)
    return errors.InvalidRequest(message, param=param, code=fault.code)


_ADDRESS = re.compile(
    r"\w+://\S+"
    r"|(?<!\w)/(?:[\w.-]+/)+[\w.-]*"
    r"|\b\d{1,3}(?:\.\d{1,3}){3}\b(?::\d+)?"
    r"|\b[A-Za-z][\w.-]*:\d{2,5}\b"
)
"""A URL, a path, an IPv4 address, or a host with its port."""


def clean(message: str, limit: int = 300) -> str:
    """An upstream's sentence without addresses, paths and control characters, cut to *limit* characters."""
    message = _ADDRESS.sub("…", message)
    return "".join(char for char in message if char.isprintable())[:limit]
