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
    """What is not understood is passed over. Of several ages the lowest counts; one that is no number allows none."""
    if not header:
        return ANY
    said: set[bytes] = set()
    ages_s: list[int] = []
    for directive in header.lower().split(b","):
        name, _, value = (word.strip(b' \t"') for word in directive.partition(b"="))
        said.add(name)
        if name == b"max-age":
            ages_s.append(int(value[:10]) if value.isdigit() else 0)
    max_age_s = min(ages_s, default=None)
    return Control(
        no_store=b"no-store" in said,
        no_cache=b"no-cache" in said or max_age_s == 0,
        only_if_cached=b"only-if-cached" in said,
        max_age_s=max_age_s,
    )
