"""Hugging Face's Text Generation Inference, versions 1 to 3: archived, so that what it says stays as it is."""

from adapters.tgi.adapter import Adapter

__all__ = ["Adapter"]
