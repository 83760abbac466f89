"""How do tokens become text, one at a time and never half a character?"""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

UNFINISHED = "\ufffd"


class Detokenizer:
    """
    The text of one growing list of token ids; special tokens are left out.

    *before* are the last token ids of a text that is continued: some tokenizers begin a text without its first space.
    *tokenizer* is the Rust one, and must not be used by another thread: encoding changes its state.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._known = self._length = 0
        for token in before:
            self.feed(token)
        if before:
            self._known = len(tokenizer.decode(before, skip_special_tokens=True).rstrip(UNFINISHED))

    def feed(self, token: int) -> str:
        """The characters that *token* completes."""
        self._ids.append(token)
        text: str = self._stream.step(self._tokenizer, token) or ""
        start, self._length = self._length, self._length + len(text)
        return text[max(0, self._known - start) :]

    def flush(self) -> str:
        """The rest: bytes that became no character are U+FFFD, as in a decoding of the whole."""
        whole: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return whole[max(self._known, self._length) :]
