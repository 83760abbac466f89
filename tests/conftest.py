import pytest
from hypothesis import settings

settings.register_profile("shared", deadline=None)  # a busy machine is no fault
settings.load_profile("shared")


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The loop that the gateway runs on in production; one for the session, so that modules can share a gateway."""
    return "asyncio", {"use_uvloop": True}
