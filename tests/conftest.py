import os
import tempfile

import pytest
from hypothesis import settings

os.environ["XDG_STATE_HOME"] = f"{tempfile.gettempdir()}/suiron-tests-{os.getuid()}"  # no ledger among the user's files
settings.register_profile("shared", deadline=None)  # a busy machine is no fault
settings.load_profile("shared")


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The loop that the gateway runs on in production; one for the session, so that modules can share a gateway."""
    return "asyncio", {"use_uvloop": True}
