"""What one API key may do: requests and tokens a minute, answers at once.

Pure: time is an argument. Owns the counting; refuses to know the cluster: whoever is refused here has reached a limit
of its own (429), however idle the cluster is.

Both rates are token buckets that hold one minute's worth: a key that was idle may use a minute's worth at once. Tokens
are reserved at admission (prompt + max_tokens, as OpenAI counts them), what an answer did not use is given back.
A request of more tokens than a minute's worth goes when the bucket is full and is paid off afterwards.
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

    def _flow(self, now_s: float) -> None:
        gained = (now_s - self.at_s) * self.per_minute / 60.0
        self.level, self.at_s = min(float(self.per_minute), self.level + max(0.0, gained)), max(now_s, self.at_s)


@dataclass(slots=True)
class _Account:
    requests: Bucket | None
    tokens: Bucket | None
    streams: set[str] = field(default_factory=set)


class Limits:
    """Accounts of all keys; one that changes its limits in the file begins a new minute."""

    def __init__(self) -> None:
        self._accounts: dict[str, tuple[ApiKey, _Account]] = {}

    def arrive(self, key: ApiKey, request_id: str, now_s: float) -> None:
        """Count a request before anything is done for it. Raises LimitReached; then nothing was counted."""
        account = self._account(key, now_s)
        if key.max_streams is not None and len(account.streams) >= key.max_streams:
            raise LimitReached(
                f"key {key.id} has {key.max_streams} answers under way, as many as it may", code="too_many_streams"
            )
        if account.requests is not None:
            _check(account.requests, 1, now_s, f"key {key.id} may send {key.requests_per_minute} requests a minute")
            account.requests.take(1)
        account.streams.add(request_id)

    def reserve(self, key: ApiKey, tokens: int, now_s: float) -> None:
        """Reserve the tokens of a request that has arrived. Raises LimitReached."""
        bucket = self._account(key, now_s).tokens
        if bucket is not None:
            _check(bucket, tokens, now_s, f"key {key.id} may use {key.tokens_per_minute} tokens a minute")
            bucket.take(tokens)

    def leave(self, key: ApiKey, request_id: str, unused_tokens: int, now_s: float) -> None:
        """The request is over, with so many of its reserved tokens unused."""
        account = self._account(key, now_s)
        account.streams.discard(request_id)
        if account.tokens is not None and unused_tokens > 0:
            account.tokens.give_back(unused_tokens)

    def _account(self, key: ApiKey, now_s: float) -> _Account:
        known, account = self._accounts.get(key.id, (None, None))
        if account is None or known != key:
            streams = account.streams if account else set()
            account = _Account(_full(key.requests_per_minute, now_s), _full(key.tokens_per_minute, now_s), streams)
            self._accounts[key.id] = (key, account)
        return account


def _full(per_minute: int | None, now_s: float) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute, float(per_minute), now_s)


def _check(bucket: Bucket, amount: int, now_s: float, rule: str) -> None:
    wait_s = bucket.wait_s(amount, now_s)
    if wait_s > 0:
        raise LimitReached(f"{rule}: come back in {math.ceil(wait_s)} s", retry_after_s=math.ceil(wait_s))
