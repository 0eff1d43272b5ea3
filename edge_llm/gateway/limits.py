"""What one API key may do: requests and tokens a minute, answers at once.

Pure: time is an argument. Owns the counting; refuses to know the cluster: whoever is refused here has reached a limit
of its own (429), however idle the cluster is.

Both rates are token buckets that hold one minute's worth: a key that was idle may use a minute's worth at once. Tokens
are reserved at admission (prompt + max_tokens, as OpenAI counts them), what an answer did not use is given back.
A request of more tokens than a minute's worth goes when the bucket is full and is paid off afterwards.

Invariant: what a key has used of a limit stays used, whatever becomes of its entry in the keys file, also when the
limit is taken away and comes back (in between nothing counts); new limits count from its next request on, and what came
before still ends in the same account. Nobody gets back more than it reserved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from edge_llm.errors import LimitReached
from edge_llm.gateway.keys import ApiKey


@dataclass(slots=True)
class Bucket:
    """`per_minute` flow in evenly; holds that many at most. May be negative: what was used beyond."""

    per_minute: int
    level: float
    at_s: float

    def wait_s(self, amount: int, now_s: float) -> float:
        """Seconds until `amount` may be taken (of more than the bucket holds: until it is full)."""
        self._flow(now_s)
        missing = min(amount, self.per_minute) - self.level
        return max(0.0, 60.0 * missing / self.per_minute)

    def take(self, amount: int) -> None:
        self.level -= amount

    def give_back(self, amount: int) -> None:
        self.level = min(float(self.per_minute), self.level + amount)

    def resize(self, per_minute: int, now_s: float) -> None:
        """From now on another limit; what was used counts on."""
        self._flow(now_s)
        used = self.per_minute - self.level
        self.per_minute, self.level = per_minute, per_minute - used

    def _flow(self, now_s: float) -> None:
        gained = (now_s - self.at_s) * self.per_minute / 60.0
        self.level, self.at_s = min(float(self.per_minute), self.level + max(0.0, gained)), max(now_s, self.at_s)


@dataclass(slots=True)
class _Account:
    """`streams`: answers under way, each with the tokens that it has reserved."""

    requests: Bucket | None = None
    tokens: Bucket | None = None
    streams: dict[str, int] = field(default_factory=dict)


class Limits:
    """Accounts of all keys, by id."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def arrive(self, key: ApiKey, request_id: str, now_s: float) -> None:
        """Count a request before anything is done for it. Raises LimitReached; then nothing was counted."""
        account = self._accounts.setdefault(key.id, _Account())
        account.requests = _adapted(account.requests, key.requests_per_minute, now_s)
        account.tokens = _adapted(account.tokens, key.tokens_per_minute, now_s)
        if key.max_streams is not None and len(account.streams) >= key.max_streams:
            raise LimitReached(
                f"key {key.id} has {key.max_streams} answers under way, as many as it may", code="too_many_streams"
            )
        if account.requests is not None and key.requests_per_minute is not None:
            _check(account.requests, 1, now_s, f"key {key.id} may send {key.requests_per_minute} requests a minute")
            account.requests.take(1)
        account.streams[request_id] = 0

    def reserve(self, key: ApiKey, request_id: str, tokens: int, now_s: float) -> None:
        """Reserve the tokens of a request that has arrived. Raises LimitReached."""
        account = self._accounts[key.id]
        bucket = account.tokens
        if bucket is not None and key.tokens_per_minute is not None:
            _check(bucket, tokens, now_s, f"key {key.id} may use {bucket.per_minute} tokens a minute")
            bucket.take(tokens)
            account.streams[request_id] += tokens

    def leave(self, key: ApiKey, request_id: str, unused_tokens: int) -> None:
        """A request that has arrived is over, with so many of its reserved tokens unused."""
        account = self._accounts[key.id]
        reserved = account.streams.pop(request_id, 0)
        if account.tokens is not None and unused_tokens > 0:
            account.tokens.give_back(min(unused_tokens, reserved))


def _adapted(bucket: Bucket | None, per_minute: int | None, now_s: float) -> Bucket | None:
    """The bucket of a key that has this limit now: a new one is full. Without a limit it is kept as it was."""
    if per_minute is None:
        return bucket
    if bucket is None:
        return Bucket(per_minute, float(per_minute), now_s)
    if bucket.per_minute != per_minute:
        bucket.resize(per_minute, now_s)
    return bucket


def _check(bucket: Bucket, amount: int, now_s: float, rule: str) -> None:
    wait_s = bucket.wait_s(amount, now_s)
    if wait_s > 0:
        raise LimitReached(f"{rule}: come back in {math.ceil(wait_s)} s", retry_after_s=math.ceil(wait_s))
