"""Models in this machine, run by transformers in a child process."""

from adapters.local.adapter import Adapter

__all__ = ["Adapter"]
