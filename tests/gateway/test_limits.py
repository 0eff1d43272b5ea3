"""What one key may do, counted on a clock of the test's own; and how the endpoint says that it was too much."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.errors import LimitReached
from edge_llm.gateway.keys import ApiKey, KeysFile
from edge_llm.gateway.limits import Bucket, Limits
from tests.gateway.conftest import COMPLETIONS, Service, asking, serving
from tests.loopback import prompt_of, running_cluster, settings_of, until

KEY: Final = ApiKey("alice", "alice")


def refused(limits: Limits, key: ApiKey, now_s: float, *, tokens: int | None = None) -> LimitReached:
    with pytest.raises(LimitReached) as caught:
        if tokens is None:
            limits.arrive(key, "refused", now_s)
        else:
            limits.reserve(key, "a", tokens, now_s)
    return caught.value


def test_a_key_without_limits_may_do_anything() -> None:
    limits = Limits()
    for number in range(1000):
        limits.arrive(KEY, f"{number}", 0.0)
        limits.reserve(KEY, f"{number}", 10**6, 0.0)


def test_a_minutes_worth_of_requests_may_come_at_once_and_then_one_by_one() -> None:
    key, limits = replace(KEY, requests_per_minute=6), Limits()
    for number in range(6):
        limits.arrive(key, f"{number}", 100.0)
    error = refused(limits, key, 103.0)
    assert (error.status, error.code, error.retry_after_s) == (429, "rate_limit_exceeded", 7)
    limits.arrive(key, "later", 110.0)
    refused(limits, key, 110.0)


def test_tokens_are_reserved_and_what_was_not_used_comes_back() -> None:
    key, limits = replace(KEY, tokens_per_minute=600), Limits()
    limits.arrive(key, "a", 0.0)
    limits.reserve(key, "a", 500, 0.0)
    assert refused(limits, key, 0.0, tokens=200).retry_after_s == 10
    limits.leave(key, "a", 450)
    limits.arrive(key, "a", 0.0)
    limits.reserve(key, "a", 550, 0.0)
    refused(limits, key, 0.0, tokens=1)


def test_a_request_of_more_than_a_minutes_worth_waits_for_a_full_bucket_and_is_paid_off() -> None:
    key, limits = replace(KEY, tokens_per_minute=600), Limits()
    limits.arrive(key, "a", 0.0)
    limits.reserve(key, "a", 100, 0.0)
    assert refused(limits, key, 0.0, tokens=1200).retry_after_s == 10
    limits.reserve(key, "a", 1200, 10.0)
    assert refused(limits, key, 10.0, tokens=1).retry_after_s == 61
    limits.reserve(key, "a", 1, 71.0)


def test_answers_under_way_are_counted_until_they_end() -> None:
    key, limits = replace(KEY, max_streams=2), Limits()
    limits.arrive(key, "a", 0.0)
    limits.arrive(key, "b", 0.0)
    assert refused(limits, key, 0.0).code == "too_many_streams"
    limits.leave(key, "refused", 0)
    refused(limits, key, 0.0)
    limits.leave(key, "a", 0)
    limits.arrive(key, "c", 0.0)


def test_keys_have_accounts_of_their_own() -> None:
    key, limits = replace(KEY, requests_per_minute=1, max_streams=1), Limits()
    limits.arrive(key, "a", 0.0)
    limits.arrive(replace(key, id="bob"), "b", 0.0)
    assert refused(limits, key, 0.0).code == "too_many_streams"
    limits.leave(key, "a", 0)
    assert refused(limits, key, 0.0).code == "rate_limit_exceeded"


def test_a_change_of_the_keys_file_gives_nobody_a_new_minute() -> None:
    key, limits = replace(KEY, requests_per_minute=2, tokens_per_minute=600), Limits()
    limits.arrive(key, "a", 0.0)
    limits.reserve(key, "a", 500, 0.0)
    other_tenant = replace(key, tenant="family", expires_s=1e9)
    limits.arrive(other_tenant, "b", 0.0)
    assert refused(limits, other_tenant, 0.0).retry_after_s == 30
    assert refused(limits, other_tenant, 0.0, tokens=101).retry_after_s == 1
    limits.leave(key, "a", 500)  # it came before the change
    limits.reserve(other_tenant, "b", 600, 0.0)


def test_of_a_limit_that_changes_what_was_used_counts_on() -> None:
    key, limits = replace(KEY, requests_per_minute=4, max_streams=9), Limits()
    for number in range(3):
        limits.arrive(key, f"{number}", 0.0)
    more = replace(key, requests_per_minute=5)
    limits.arrive(more, "3", 0.0)
    limits.arrive(more, "4", 0.0)
    refused(limits, more, 0.0)
    fewer = replace(key, requests_per_minute=2)
    assert refused(limits, fewer, 0.0).retry_after_s == 120, "three beyond the limit flow in first, then one"
    limits.arrive(replace(key, requests_per_minute=None), "5", 0.0)


def test_a_limit_that_was_taken_away_and_comes_back_gives_nobody_a_new_minute() -> None:
    key, limits = replace(KEY, requests_per_minute=1, tokens_per_minute=600), Limits()
    limits.arrive(key, "a", 0.0)
    limits.reserve(key, "a", 600, 0.0)
    free = replace(key, requests_per_minute=None, tokens_per_minute=None)
    limits.arrive(free, "b", 0.0)
    limits.reserve(free, "b", 10**6, 0.0)
    assert refused(limits, key, 30.0).retry_after_s == 30
    limits.arrive(key, "c", 60.0)
    limits.reserve(key, "c", 600, 60.0)
    assert refused(limits, key, 60.0, tokens=1).retry_after_s == 1


def test_what_a_request_did_not_reserve_it_does_not_give_back() -> None:
    """It came before its key had a limit, and ends after."""
    key, limits = replace(KEY, tokens_per_minute=600), Limits()
    limits.arrive(KEY, "before", 0.0)
    limits.reserve(KEY, "before", 1000, 0.0)
    limits.arrive(key, "a", 0.0)
    limits.reserve(key, "a", 600, 0.0)
    limits.leave(KEY, "before", 1000)
    assert refused(limits, key, 0.0, tokens=1).retry_after_s == 1


@given(
    st.integers(1, 1000), st.lists(st.tuples(st.floats(0, 100), st.integers(1, 2000), st.integers(0, 500)), max_size=50)
)
def test_no_schedule_takes_more_than_flows_in(per_minute: int, steps: list[tuple[float, int, int]]) -> None:
    bucket, now_s, used = Bucket(per_minute, float(per_minute), 0.0), 0.0, 0
    largest = 0
    for pause_s, amount, unused in steps:
        now_s += pause_s
        if bucket.wait_s(amount, now_s) == 0:
            bucket.take(amount)
            bucket.give_back(min(unused, amount))
            used += amount - min(unused, amount)
            largest = max(largest, amount)
    assert used <= per_minute * (1 + now_s / 60) + largest + 1e-6


@given(st.integers(1, 10_000), st.integers(1, 50_000), st.floats(0, 1000))
def test_who_comes_back_when_told_is_let_in(per_minute: int, amount: int, now_s: float) -> None:
    bucket = Bucket(per_minute, float(per_minute), now_s)
    bucket.take(amount)
    wait_s = bucket.wait_s(amount, now_s)
    assert bucket.wait_s(amount, now_s + wait_s + 1e-6) < 1e-3


# -- over the endpoint


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    file = tmp_path / "keys.yaml"
    limits = {"two": {"requests_per_minute": 2}, "few": {"tokens_per_minute": 40}, "one": {"max_streams": 1}}
    entries = [{"id": k, "sha256": hashlib.sha256(k.encode()).hexdigest(), **more} for k, more in limits.items()]
    file.write_text(json.dumps(entries))
    file.chmod(0o600)
    async with running_cluster() as cluster, serving(cluster, KeysFile(file)) as made:
        await made.start("mixed", "m1", replace(settings_of("mixed"), decode_run_s=0.02))  # 400 tokens outlast any test
        yield made


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def key(name: str) -> dict[str, str]:
    return {"x-api-key": name}


@pytest.mark.anyio
async def test_a_limit_of_the_callers_own_is_a_429_with_the_time_to_come_back(service: Service) -> None:
    body = asking(prompt_of(4), max_tokens=2)
    for _ in range(2):
        assert (await service.post(COMPLETIONS, body, key("two"))).status == 200
    reply = await service.post(COMPLETIONS, body, key("two"))
    assert (reply.status, reply.error["code"], reply.error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
    assert 28 <= int(reply.headers["retry-after"]) <= 30
    assert (await service.post(COMPLETIONS, body, key("few"))).status == 200


@pytest.mark.anyio
async def test_tokens_of_prompt_and_answer_count_and_unused_ones_come_back(service: Service) -> None:
    used = asking(prompt_of(4), max_tokens=6)
    assert (await service.post(COMPLETIONS, used, key("few"))).status == 200
    refusal = await service.post(COMPLETIONS, asking(prompt_of(40), max_tokens=6), key("few"))
    assert (refusal.status, refusal.error["code"]) == (429, "rate_limit_exceeded")
    stop = (await service.post(COMPLETIONS, used, key("two"))).body["choices"][0]["text"][0]
    for _ in range(3):  # each reserves 18 of the 30 that are left, and uses 5
        reply = await service.post(COMPLETIONS, asking(prompt_of(4), max_tokens=14, stop=stop), key("few"))
        assert reply.status == 200, reply.body


@pytest.mark.anyio
async def test_prompts_of_one_request_run_so_many_at_once_as_the_key_may_and_never_more_than_it_has(
    service: Service,
) -> None:
    prompts = asking([prompt_of(4), prompt_of(5), prompt_of(6)], max_tokens=2)
    assert len((await service.post(COMPLETIONS, prompts, key("one"))).body["choices"]) == 3
    refused = await service.post(COMPLETIONS, prompts, key("two"))
    assert (refused.status, refused.error["param"]) == (400, "prompt")
    assert "2 a minute" in refused.error["message"]
    assert (await service.post(COMPLETIONS, asking(prompt_of(4), max_tokens=2), key("two"))).status == 200


@pytest.mark.anyio
async def test_a_second_answer_at_once_is_refused_until_the_first_has_ended(service: Service) -> None:
    body = asking(prompt_of(4), max_tokens=400)
    async with service.streaming(COMPLETIONS, body, key("one")) as streamed:
        await streamed.heard(lambda answer: bool(answer.chunks))
        reply = await service.post(COMPLETIONS, body, key("one"))
        assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (429, "too_many_streams", "1")
    await until(lambda: not service.gateway.dispatcher.requests)
    assert (await service.post(COMPLETIONS, asking(prompt_of(4)), key("one"))).status == 200
