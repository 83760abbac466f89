"""One OpenAI-compatible endpoint in front of every model a team runs."""

__version__ = "0.1.0"
