"""What does a public model name stand for?"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.adapter import Adapter
from gateway.auth import Principal
from gateway.errors import InvalidRequest, ModelNotFound
from gateway.prices import Prices, pin
from gateway.schema.endpoint import Endpoint
from gateway.settings import Settings


@dataclass(frozen=True, slots=True)
class Target:
    """One adapter, and the upstream's name for the model."""

    upstream: str
    model: str
    adapter: Adapter

    @property
    def label(self) -> str:
        return f"{self.upstream}/{self.model}"


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    targets: tuple[Target, ...]
    prices: Prices | None = None
    default_output_tokens: int = 512
    created: int = field(default_factory=lambda: int(time.time()))

    def targets_for(self, endpoint: Endpoint) -> list[Target]:
        """Those that serve *endpoint*, in the order to try them; raises InvalidRequest if none does."""
        able = [target for target in self.targets if hasattr(target.adapter, endpoint.verb)]
        if not able:
            raise InvalidRequest(
                f"The model `{self.name}` does not serve /v1/{endpoint.path}.",
                param="model",
                code="unsupported_endpoint",
            )
        return able


class Models:
    """The public names, each with its targets."""

    def __init__(self, settings: Settings, adapters: Mapping[str, Adapter]) -> None:
        self._models = {
            name: Model(
                name,
                tuple(
                    Target(target.upstream, target.model or name, adapters[target.upstream]) for target in model.targets
                ),
                pin(model.prices),
                model.default_output_tokens,
            )
            for name, model in settings.models.items()
        }

    def get(self, name: str, principal: Principal) -> Model:
        """Raises ModelNotFound, in the same words for what does not exist and what this key may not use."""
        model = self._models.get(name)
        if model is None or not principal.may_use(name):
            raise ModelNotFound(name)
        return model

    def of(self, principal: Principal) -> list[Model]:
        """The models this principal may use, by name."""
        return [model for name, model in sorted(self._models.items()) if principal.may_use(name)]
