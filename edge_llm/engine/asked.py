"""The life of a process that a bench starts to ask it things: one JSON line in, one out (bench/processes.py: Measurer).

Owns the loop and its words; what is loaded and answered is measure.py's, measure_node.py's and score.py's.

Protocol: after loading, {"event": "ready", ...facts}. Each request line is {"op": NAME, ...arguments}; each reply is
{"event": "result", ...} or {"event": "error", "message": ...}. End of input ends the process.
Invariant: between two requests nothing is computed, so that another process can be measured on the same core.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from edge_llm.errors import EdgeLLMError


class Asked(Protocol):
    """What has been loaded."""

    def ready(self) -> Mapping[str, Any]:
        """The first line."""
        ...

    def answer(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """The reply to one line. An EdgeLLMError is a reply, too."""
        ...

    def close(self) -> None: ...


def serve(load: Callable[[], Asked]) -> int:
    """Answer until the input ends; the process's exit code."""
    try:
        asked = load()
    except EdgeLLMError as error:
        _say({"event": "error", "message": error.message})
        return 1
    gc.freeze()  # as workers do (worker/serve.py)
    _say(asked.ready())
    for line in sys.stdin:
        try:
            _say(asked.answer(json.loads(line)))
        except EdgeLLMError as error:
            _say({"event": "error", "message": error.message})
    asked.close()
    return 0


def _say(message: Mapping[str, Any]) -> None:
    print(json.dumps(message), flush=True)
