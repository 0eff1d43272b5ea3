"""A load generator that shares no code with the benches: the standard library, a thread a client. To check them with.

python tests/bench/independent_client.py URL CLIENTS REQUESTS PROMPT_TOKENS ANSWER_TOKENS VOCABULARY [SEED]
"""

from __future__ import annotations

import http.client
import json
import random
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Seen:
    """One answer: when it was asked for, when its pieces came, how many tokens the server counts."""

    sent_s: float
    times_s: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        return (self.times_s[-1] - self.times_s[0]) / (self.tokens - 1)


def ask(url: str, body: dict[str, Any]) -> Seen:
    peer = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
    seen = Seen(time.perf_counter())
    peer.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    reply = peer.getresponse()
    while (line := reply.readline().strip()) != b"data: [DONE]":
        if line.startswith(b"data:"):
            event = json.loads(line[5:])
            if any(choice.get("text") for choice in event.get("choices", [])):
                seen.times_s.append(time.perf_counter())
            seen.tokens = (event.get("usage") or {}).get("completion_tokens", seen.tokens)
    peer.close()
    return seen


def main(url: str, clients: int, count: int, prompt: int, answer: int, vocabulary: int, seed: int = 0) -> None:
    numbers, lock, done = iter(range(count)), threading.Lock(), list[Seen]()

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            rng = random.Random(f"{seed}/{number}")
            ids = [rng.randrange(vocabulary // 20, vocabulary) for _ in range(prompt)]
            body = {"prompt": ids, "max_tokens": answer, "temperature": 0, "ignore_eos": True, "stream": True}
            done.append(ask(url, body | {"stream_options": {"include_usage": True}}))

    began_s = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took_s = max(seen.times_s[-1] for seen in done) - began_s
    found = {
        "requests": len(done),
        "ttft_ms": 1e3 * statistics.median(seen.ttft_s for seen in done),
        "tpot_ms": 1e3 * statistics.median(seen.tpot_s for seen in done),
        "e2el_ms": 1e3 * statistics.median(seen.times_s[-1] - seen.sent_s for seen in done),
        "output_throughput": sum(seen.tokens for seen in done) / took_s,
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
