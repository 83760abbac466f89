"""
An engine's dialect, played byte for byte on a real socket, with faults to order.

`speech` is what it says, `openai`, `vllm`, `tgi` and `transformers` are how it says it, `player` is the socket.
"""

from tests.replay.openai import OpenAI
from tests.replay.player import Faults, Player, playing
from tests.replay.speech import CONTEXT_TOKENS, Dialect
from tests.replay.tgi import TGI
from tests.replay.transformers import Transformers
from tests.replay.vllm import VLLM

__all__ = ["CONTEXT_TOKENS", "TGI", "VLLM", "Dialect", "Faults", "OpenAI", "Player", "Transformers", "playing"]
