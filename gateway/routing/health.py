"""Who is healthy? Told by what became of requests: nobody is asked, and nothing is sent."""

from collections.abc import Callable
from typing import Literal

from gateway.errors import CredentialRefused, Overloaded, UpstreamError

Reason = Literal["failures", "credential"]
State = Literal["up", "trial", "ejected"]

FAILURES = 5
"""So many in a row, and a target is left alone."""
EJECTION_S = 10.0
LONGEST_EJECTION_S = 300.0
CREDENTIAL_TIMES = 6
"""A credential does not mend itself: the first ejection for it is as long as the sixth in a row for failures."""
JITTER = 0.2
LONGEST_BUSY_S = 30.0
FULL_S = 1.0
TRICKLE_S = 1.0
RAMP_S = 10.0
LEAST_RAMP = 0.1


class Health:
    """
    What is known of one target. Times are on one clock, in seconds; *random* gives numbers from 0 up to 1.

    It is up until `FAILURES` attempts in a row have failed by its fault, and then ejected: for `EJECTION_S`, each time
    in a row so much longer, up to `LONGEST_EJECTION_S`. Then it is on trial: one request at a time, until one is
    answered, or has it ejected again.
    """

    def __init__(self, random: Callable[[], float]) -> None:
        self.in_flight = 0
        self.ejected_at = 0.0
        self._random = random
        self._failures = 0  # in a row
        self._ejections = 0  # in a row
        self._ejected_until = 0.0
        self._ejection_s = 0.0
        self._on_trial = False
        self._back_since: float | None = None
        self._busy_until = 0.0
        self._full_until = 0.0
        self._trickled_at: float | None = None

    def state(self, now: float) -> State:
        return "up" if not self._on_trial else "ejected" if now < self._ejected_until else "trial"

    @property
    def failing(self) -> bool:
        """It would be ejected, but was the last one standing; or it is out by now."""
        return self._failures >= FAILURES or self._on_trial

    def is_out(self, now: float) -> bool:
        """Ejected; or on trial, and the request that tries it is under way."""
        return self._on_trial and (now < self._ejected_until or self.in_flight > 0)

    def busy_s(self, now: float) -> float:
        """For how long it has asked not to be asked; 0 if it has not."""
        return max(0.0, self._busy_until - now)

    def is_busy(self, now: float) -> bool:
        return now < self._busy_until

    def is_full(self, now: float) -> bool:
        """It has refused a request lately, without saying for how long it will: others go first."""
        return now < self._full_until

    def ramp(self, now: float) -> float:
        """How much of its weight it has: all, but soon after an ejection."""
        if self._back_since is None:
            return 1.0
        return min(1.0, max(LEAST_RAMP, (now - self._back_since) / RAMP_S))

    def trickle(self, now: float) -> bool:
        """Whether one of the few requests may go to it that find out whether it is back; it is then this one."""
        if self._trickled_at is not None and now - self._trickled_at < TRICKLE_S:
            return False
        self._trickled_at = now
        return True

    # What became of requests.

    def answered(self, now: float) -> None:
        """The first of an answer has come."""
        if self._on_trial:
            self._on_trial = False
            self._ejected_until = now
            self._failures = 0
            self._back_since = now

    def completed(self, now: float) -> None:
        self._failures = 0
        if self._back_since is not None and now - self._back_since >= max(self._ejection_s, RAMP_S):
            self._back_since = None
            self._ejections = 0

    def failed(self, error: UpstreamError, now: float, *, last_standing: bool) -> Reason | None:
        """An attempt has failed; why the target is ejected now, if it is. The last one standing never is."""
        if isinstance(error, Overloaded):
            self._busy_until = max(self._busy_until, now + min(error.busy_s, LONGEST_BUSY_S))
            self._full_until = now + FULL_S
        if not error.counts or now < self._ejected_until:
            return None  # what began before an ejection says nothing about the time after it
        self._failures += 1
        credential = isinstance(error, CredentialRefused)
        if last_standing or not (credential or self._on_trial or self._failures >= FAILURES):
            return None
        self._eject(now, CREDENTIAL_TIMES if credential else 1)
        return "credential" if credential else "failures"

    def _eject(self, now: float, least_times: int) -> None:
        self._ejections = max(self._ejections + 1, least_times)
        lasting = min(EJECTION_S * self._ejections, LONGEST_EJECTION_S)
        self._ejection_s = lasting * (1 - JITTER * self._random())
        self._ejected_until = now + self._ejection_s
        self.ejected_at = now
        self._on_trial = True
        self._failures = 0
        self._back_since = None

    @property
    def ejection_s(self) -> float:
        """How long the last ejection is, or was."""
        return self._ejection_s
