"""How many tokens does tiktoken count? Its only door: tables from the disk, and all work in a thread."""

import asyncio
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from gateway.call import Call, Estimate
from gateway.schema.endpoint import CHAT
from gateway.tokens.learned import MESSAGE_BYTES, SURPLUS_TOKENS
from gateway.tokens.prompts import texts_of

if TYPE_CHECKING:
    import tiktoken

MAX_COUNTED_BYTES = 256 * 1024
MOST_WAITING = 64
"""The longest text and the most requests that an encoding counts."""
TOKENS_A_MESSAGE = 3
TOKENS_AN_ANSWER = 3
"""What OpenAI's models add around a message, and before their answer."""

logger = logging.getLogger("suiron.tokens")


class Encodings:
    """tiktoken's tables, looked for on the disk only, and all that is done with them in a thread."""

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self._loaded: dict[str, tiktoken.Encoding] = {}
        self._thread = ThreadPoolExecutor(1, "suiron.tokens") if names else None
        self._loading: list[Future[None]] = []
        self._waiting = 0

    def load(self) -> None:
        if self._thread is not None:
            self._loading = [self._thread.submit(self._load, name) for name in sorted(self._names)]

    async def loaded(self) -> None:
        await asyncio.gather(*map(asyncio.wrap_future, self._loading))

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def count(self, name: str, call: Call, estimate: Estimate) -> Estimate:
        """*estimate* by the encoding's count; as it was while that is not loaded, or has too much to do."""
        encoding = self._loaded.get(name)
        if encoding is None or self._waiting >= MOST_WAITING:
            return estimate
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            counted = await loop.run_in_executor(self._thread, _count, encoding, list(texts_of(call)))
        finally:
            self._waiting -= 1
        if counted is None:
            return estimate
        if call.endpoint is not CHAT:
            return replace(estimate, tokens=max(1, counted), upper_bound=max(1, counted), exact=True)
        messages = len(call.request.value.messages)
        return replace(
            estimate,
            tokens=counted + messages * TOKENS_A_MESSAGE + TOKENS_AN_ANSWER,
            upper_bound=min(estimate.upper_bound, counted + messages * MESSAGE_BYTES + SURPLUS_TOKENS),
        )

    def _load(self, name: str) -> None:
        try:
            self._loaded[name] = _encoding(name)
        except Exception as exc:  # tiktoken and its plugins raise what they like
            logger.warning(
                "encoding %s cannot be loaded, so its tokens are estimated: %s (tables belong in TIKTOKEN_CACHE_DIR)",
                name,
                exc,
            )


def _encoding(name: str) -> "tiktoken.Encoding":
    try:
        import tiktoken.load
    except ImportError:
        raise RuntimeError("tiktoken is not installed: pip install 'suiron[tiktoken]'") from None
    tiktoken.load.read_file = _read_file  # its own would go to the network, the first time and after each bad file
    return tiktoken.get_encoding(name)


def _read_file(blobpath: str) -> bytes:
    if "://" in blobpath:
        raise FileNotFoundError(f"{blobpath} is not on this disk")
    return Path(blobpath).read_bytes()


def _count(encoding: "tiktoken.Encoding", texts: list[str]) -> int | None:
    """None where the encoding cannot. The text of a special token is text."""
    try:
        return sum(len(encoding.encode(text, disallowed_special=())) for text in texts)
    except BaseException:  # what its Rust panics with is no Exception
        logger.warning("the encoding %s cannot count a prompt", encoding.name)
        return None
