"""Is what the mutations break still there? Whether they are noticed, `python -m tests.stores.mutations` tells."""

import pytest

from tests.stores.mutations import MUTATIONS, ROOT


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_is_to_be_broken_is_there_once(mutation: str) -> None:
    file, old, _ = MUTATIONS[mutation]
    assert (ROOT / "gateway/stores" / file).read_text().count(old) == 1
