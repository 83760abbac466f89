"""
What can go wrong, and what is the client told?

* GatewayError
  x RequestError                 the caller can mend it
    + InvalidRequest             400  `code` and `param` say what is wrong
      - MalformedBody            400  no JSON, or none that is clear
      - ContextLengthExceeded    400
      - RequestTooLarge          400  beyond a limit by itself
    + AuthenticationFailed       401
    + PermissionDenied           403  a key of the wrong kind
    + ModelNotFound              404
    + UnknownURL                 404
    + MethodNotAllowed           405
    + RequestTimeout             408  it did not arrive in time
    + RateLimited                429  says when to come back
    + QuotaExceeded              429  coming back does not help
    + BodyTooLarge               413
    + HeadersTooLarge            431
    + NotCached                  504  it may not be generated, as the client says
  x UpstreamError                a backend failed: another target may do
    + UpstreamUnreachable        502  no connection
    + UpstreamFailed             502  a 5xx, nonsense, or an answer cut short
      - CredentialRefused        502  ours: the client's own is right
      - NotServed                502  it lacks the model or endpoint
      - CannotLoad               502  a local model that is not to be had
    + Overloaded                 503  full, or still loading; says when to come back
    + UpstreamTimeout            504
  x LimiterUnavailable           503  a limit that must hold cannot be checked
  x LedgerFull                   503  there is no room to record it
  x CacheUnavailable             503  kept answers cannot be forgotten now
  x ShuttingDown                 503  this process is about to end
  x InternalError                500  ours

The body is OpenAI's: `{"error": {"message", "type", "param", "code"}}`, all four keys always there.
"""

from collections.abc import Mapping
from typing import ClassVar

import msgspec


class GatewayError(Exception):
    """An error that a client is told about. *message* says what to do, and holds no secret."""

    status: ClassVar[int] = 500
    type: str = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.headers = dict(headers or {})

    def json(self) -> bytes:
        """The error object of the OpenAI API, encoded."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


class RequestError(GatewayError):
    status = 400
    type = "invalid_request_error"


class InvalidRequest(RequestError):
    """Raised with OpenAI's `code` for the kind of fault, and the `param` that has it."""


class MalformedBody(InvalidRequest):
    """Nothing in the body can be relied upon."""


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class RequestTooLarge(InvalidRequest):
    code = "request_too_large"


class AuthenticationFailed(RequestError):
    """Raised with the code `invalid_api_key` for a key that is not right, and without one where there is none."""

    status = 401


class PermissionDenied(RequestError):
    status = 403
    code = "permission_denied"


class ModelNotFound(RequestError):
    status = 404
    code = "model_not_found"

    def __init__(self, model: str) -> None:
        super().__init__(f"The model `{model[:200]}` does not exist or you do not have access to it.", param="model")


class UnknownURL(RequestError):
    status = 404


class MethodNotAllowed(RequestError):
    status = 405
    code = "method_not_supported"


class RequestTimeout(RequestError):
    status = 408
    code = "request_timeout"


class BodyTooLarge(RequestError):
    status = 413
    code = "request_too_large"


class HeadersTooLarge(RequestError):
    status = 431
    code = "headers_too_large"


class NotCached(RequestError):
    status = 504
    code = "not_cached"

    def __init__(self) -> None:
        super().__init__("No kept answer may be given to this request, and `only-if-cached` forbids to generate one.")


class RateLimited(RequestError):
    """*metric* is `requests` or `tokens`; a client that waits *wait_ms*, and is the only one, is admitted."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, metric: str, wait_ms: int) -> None:
        wait_s = max(1, -(-wait_ms // 1000))
        super().__init__(message, headers={"retry-after": str(wait_s), "retry-after-ms": str(wait_ms)})
        self.type = metric  # one error of two types, as OpenAI has it


class QuotaExceeded(RequestError):
    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"x-should-retry": "false"})


class UpstreamError(GatewayError):
    """`counts`: whether it speaks against the target's health; `curable`: whether a further try may go better."""

    status = 502
    code = "upstream_error"
    counts: bool = True
    curable: ClassVar[bool] = True


class UpstreamUnreachable(UpstreamError):
    code = "upstream_connect_error"


class UpstreamFailed(UpstreamError):
    pass


class CredentialRefused(UpstreamFailed):
    curable = False

    def __init__(self, says: str = "The upstream refused this gateway's credential. Ask its operator.") -> None:
        super().__init__(says)


class NotServed(UpstreamFailed):
    """The upstream has no such model or endpoint, although the configuration says so."""

    curable = False

    def __init__(
        self, says: str = "The upstream does not have this model or endpoint. Ask the gateway's operator."
    ) -> None:
        super().__init__(says)


class CannotLoad(UpstreamFailed):
    """A model of this machine that is not there, or cannot be loaded: waiting does not help."""

    curable = False


class Overloaded(UpstreamError):
    """`busy_s`: for how long the upstream has asked to be left alone; 0 if it has not. Being full is no illness."""

    status = 503
    code = "overloaded"
    counts = False

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        retry_after_s: int = 1,
        busy_s: float = 0.0,
        counts: bool = False,
    ) -> None:
        super().__init__(message, code=code, headers={"retry-after": str(retry_after_s)})
        self.busy_s = busy_s
        self.counts = counts


class UpstreamTimeout(UpstreamError):
    status = 504
    code = "upstream_timeout"


class LimiterUnavailable(GatewayError):
    status = 503
    code = "limiter_unavailable"

    def __init__(self) -> None:
        super().__init__(
            "A limit of this key cannot be checked at the moment. Try again later.", headers={"retry-after": "1"}
        )


class LedgerFull(GatewayError):
    status = 503
    code = "ledger_full"

    def __init__(self) -> None:
        super().__init__(
            "This gateway cannot record any more requests until its database is back. Try again later.",
            headers={"retry-after": "5"},
        )


class CacheUnavailable(GatewayError):
    status = 503
    code = "cache_unavailable"

    def __init__(self) -> None:
        super().__init__(
            "The store of kept answers is out of reach: try again, until it is.", headers={"retry-after": "1"}
        )


class ShuttingDown(GatewayError):
    status = 503
    code = "shutting_down"

    def __init__(self) -> None:
        super().__init__(
            "This gateway is shutting down. Trying again may reach another.",
            headers={"retry-after": "1", "connection": "close"},
        )


class InternalError(GatewayError):
    code = "internal_error"
