"""OpenAI, and every server that speaks its dialect, more or less: `options` say how much."""

from adapters.openai.adapter import Adapter

__all__ = ["Adapter"]
