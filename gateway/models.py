"""What does a public model name stand for?"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway import settings
from gateway.adapter import Adapter
from gateway.auth import Principal
from gateway.errors import InvalidRequest, ModelNotFound
from gateway.prices import Prices, pin
from gateway.schema.endpoint import Endpoint


@dataclass(frozen=True, slots=True)
class Target:
    """One adapter, and the upstream's name for the model; tier, weight and room are as the configuration says."""

    upstream: str
    model: str
    adapter: Adapter
    tier: int = 0
    weight: float = 1.0
    max_in_flight: int | None = None
    label: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", f"{self.upstream}/{self.model}")  # asked for often; it is frozen

    def can(self, feature: str) -> bool:
        """Whether nothing is known to the contrary."""
        features = getattr(self.adapter, "features", None)
        return features is None or getattr(features(self.model), feature) is not False


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    targets: tuple[Target, ...]
    prices: Prices | None = None
    default_output_tokens: int = 512
    created: int = field(default_factory=lambda: int(time.time()))

    def targets_for(self, endpoint: Endpoint, asked: Any = None) -> list[Target]:
        """
        Those that serve *endpoint*, and can do what is *asked* as far as is known before they are.

        Raises InvalidRequest if there are none, for the first thing that none can do.
        """
        able = [target for target in self.targets if hasattr(target.adapter, endpoint.verb)]
        if not able:
            raise InvalidRequest(
                f"The model `{self.name}` does not serve /v1/{endpoint.path}.",
                param="model",
                code="unsupported_endpoint",
            )
        for feature, param in needs(asked):
            able = [target for target in able if target.can(feature)]
            if not able:
                name = param.rpartition(".")[2]
                raise InvalidRequest(
                    f"'{name}' is not supported by this model.", param=param, code="unsupported_parameter"
                )
        return able


MEDIA = {"image_url": "vision", "input_audio": "audio", "file": "files"}


def needs(asked: Any) -> Iterator[tuple[str, str]]:
    """The features that a request takes, each with the parameter that asks for it."""
    for position, message in enumerate(getattr(asked, "messages", ())):
        if isinstance(message.content, list):
            for place, part in enumerate(message.content):
                if part.type in MEDIA:
                    yield MEDIA[part.type], f"messages[{position}].content[{place}].{part.type}"
    if getattr(asked, "tools", None) and asked.tool_choice != "none":
        yield "tools", "tools"
    logprobs = getattr(asked, "logprobs", None)
    if logprobs is not None and logprobs is not False:
        yield "logprobs", "logprobs"
    format = getattr(asked, "response_format", None)
    if format is not None and format.type == "json_schema":
        yield "json_schema", "response_format"


class Models:
    """The public names, each with its targets."""

    def __init__(self, configured: settings.Settings, adapters: Mapping[str, Adapter]) -> None:
        self._models = {
            name: Model(
                name,
                tuple(_target(name, target, adapters) for target in model.targets),
                pin(model.prices),
                model.default_output_tokens,
            )
            for name, model in configured.models.items()
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


def _target(name: str, given: settings.Target, adapters: Mapping[str, Adapter]) -> Target:
    return Target(
        given.upstream,
        given.model or name,
        adapters[given.upstream],
        tier=given.tier,
        weight=given.weight,
        max_in_flight=given.max_in_flight,
    )
