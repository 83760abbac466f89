"""What is an adapter, and what do those have in common that speak HTTP? The gateway's only door to the HTTP client."""

from gateway.adapter.over_http import ASKS_NOTHING, PROBE_S, HTTPAdapter, Outgoing, until_done
from gateway.adapter.patience import Vigil
from gateway.adapter.waist import Adapter, Dispatch, Features, ModelFacts, Repair, UpstreamFacts, load_adapter

__all__ = [
    "ASKS_NOTHING",
    "PROBE_S",
    "Adapter",
    "Dispatch",
    "Features",
    "HTTPAdapter",
    "ModelFacts",
    "Outgoing",
    "Repair",
    "UpstreamFacts",
    "Vigil",
    "load_adapter",
    "until_done",
]
