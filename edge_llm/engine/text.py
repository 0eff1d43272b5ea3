"""Bytes of tokens -> text that can be shown, with stop strings.

Pure. Owns two kinds of patience: bytes of an unfinished character wait for the rest, and text that may turn out to
be the beginning of a stop string waits until it cannot. Refuses to know tokens, vocabularies and requests.

Invariants: the concatenation of everything returned equals the text before the first stop string, however the
bytes were cut; nothing of a stop string is ever returned; work is linear in the text (times the stop's length).
"""

from __future__ import annotations

import codecs


class TextStream:
    """One answer's text. `push` pieces in order, `flush` at the end."""

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = stop
        self._held = ""
        self._is_stopped = False

    def push(self, piece: bytes) -> tuple[str, bool]:
        """Text that became certain with this piece, and whether a stop string is now complete."""
        if self._is_stopped:
            return "", True
        return self._release(self._decoder.decode(piece))

    def flush(self) -> str:
        """What was still held, when no more pieces come. An unfinished character is left out: it would be another."""
        rest, self._held = self._held, ""
        return rest

    def _release(self, text: str) -> tuple[str, bool]:
        if not self._stop:
            return text, False
        pending = self._held + text
        found = min((at for at in map(pending.find, self._stop) if at >= 0), default=-1)
        if found >= 0:
            self._is_stopped, self._held = True, ""
            return pending[:found], True
        keep = max(_overlap(pending, stop) for stop in self._stop)
        cut = len(pending) - keep
        self._held = pending[cut:]
        return pending[:cut], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
