from pathlib import Path

import pytest

from adapters.local.loading import Loaded, load
from adapters.local.options import read_options
from tests.models import make_model


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model with a context of 256 tokens."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def loaded(tiny: Path) -> Loaded:
    """The tiny model, in this process."""
    return load(tiny, read_options({"model": str(tiny), "threads": 1, "device": "cpu"}), lambda _: None)
