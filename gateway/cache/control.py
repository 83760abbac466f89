"""What does a client say about cached answers, in its `cache-control`?"""

from msgspec import Struct


class Control(Struct, frozen=True, gc=False):
    """
    As RFC 9111 has it for requests, as far as it fits.

    `no_store`: neither give a kept answer nor keep this one. `no_cache`: keep it, but generate it. `max_age_s`: give
    none that is older. `only_if_cached`: generate nothing.
    """

    no_store: bool = False
    no_cache: bool = False
    only_if_cached: bool = False
    max_age_s: int | None = None


ANY = Control()


def read_control(header: bytes) -> Control:
    """What is not understood is passed over; an age that is no number allows none."""
    if not header:
        return ANY
    said: dict[bytes, bytes] = {}
    for directive in header.lower().split(b","):
        name, _, value = directive.strip().partition(b"=")
        said[name] = value.strip(b' "')
    age = said.get(b"max-age")
    max_age_s = None if age is None else int(age[:10]) if age.isdigit() else 0
    return Control(
        no_store=b"no-store" in said,
        no_cache=b"no-cache" in said or max_age_s == 0,
        only_if_cached=b"only-if-cached" in said,
        max_age_s=max_age_s,
    )
