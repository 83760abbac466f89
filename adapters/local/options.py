"""What can be configured about a model in this machine?"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from gateway import settings


class Options(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    `options` of an upstream with the adapter `local`.

    `model`: "demo" (shipped with Suiron), a folder, or a hub id. `threads` null: all cores but one. `max_waiting`:
    requests that may wait for the model before further ones get 503.
    """

    model: Annotated[str, Meta(min_length=1)] = "demo"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: Annotated[int, Meta(ge=1)] | None = None
    max_waiting: Annotated[int, Meta(ge=1)] = 128
    device: Annotated[str, Meta(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:1")] = "auto"

    @property
    def name(self) -> str:
        """What the model is called where people read it: never a path."""
        if self.model == "demo":
            return "suiron-demo"
        return Path(self.model).expanduser().resolve().name if self.is_path else self.model

    @property
    def is_path(self) -> bool:
        """Whether `model` can only be a folder; a relative one that exists wins over a hub id."""
        model = self.model
        return model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).is_dir()


def read_options(given: dict[str, Any]) -> Options:
    """Raises SettingsError."""
    options = settings.read_options(given, Options)
    return options if options.threads else msgspec.structs.replace(options, threads=max(1, (os.cpu_count() or 2) - 1))
