"""What is known about one request on its way through the gateway?"""

import random
import time
from dataclasses import dataclass, field
from typing import Any

from gateway.auth import Principal
from gateway.models import Model
from gateway.schema.common import Usage
from gateway.schema.endpoint import Endpoint
from gateway.schema.payload import Payload


@dataclass(slots=True)
class Call:
    """The one mutable thing: each stage of the pipeline writes its own fields; adapters never see it."""

    endpoint: Endpoint
    principal: Principal
    request: Payload[Any]
    unknown: set[str]
    """Top-level members that OpenAI does not know."""
    id: str = field(default_factory=lambda: f"{random.getrandbits(128):032x}")  # names, and guards nothing
    created: int = field(default_factory=lambda: int(time.time()))
    started: float = field(default_factory=time.perf_counter)

    model: Model | None = None  # resolve
    headers: dict[str, str] = field(default_factory=dict)  # resolve: for the client
    target: str | None = None  # route: `upstream/model`
    attempts: int = 0  # route
    usage: Usage | None = None  # account

    @property
    def include_usage(self) -> bool:
        """Whether this client's stream ends with a usage chunk."""
        options = self.request.value.stream_options
        return options is not None and bool(options.include_usage)
