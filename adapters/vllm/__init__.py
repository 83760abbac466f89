"""vLLM, 0.2x to 0.33: OpenAI's shapes, and what differs in them from version to version."""

from adapters.vllm.adapter import Adapter

__all__ = ["Adapter"]
