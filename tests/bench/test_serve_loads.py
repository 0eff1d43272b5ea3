"""What is sent when: arrivals, lengths, workloads, and prompts of so many tokens."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from edge_llm.bench.serve.arrivals import OPEN, mean_rate_per_s, times
from edge_llm.bench.serve.lengths import LEAST, Lengths, parse
from edge_llm.bench.serve.prompts import WORDS, Options, Style, body, combined
from edge_llm.bench.serve.schedule import Load, Source, endless, facts_of, scheduled
from edge_llm.bench.serve.workloads import NAMED, BadWorkload, Request, drawn, of_trace, parse_file, shuffled
from edge_llm.bench.traces import Row, Trace

TRACE = Trace("made_up", tuple(Row(number, number * 2.0, 100 + number, 20) for number in range(50)))
FOUR = Lengths("fixed", 4)


# -- arrivals


@pytest.mark.parametrize("process", OPEN)
def test_arrivals_come_at_the_rate_that_was_asked_for(process: Any) -> None:
    found = times(process, 4.0, seed=1, count=4000, seconds=None, burst=8)
    assert len(found) == 4000
    assert found == sorted(found)
    assert mean_rate_per_s(found) == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("process", OPEN)
def test_another_rate_is_the_same_process_faster(process: Any) -> None:
    slow, fast = (times(process, rate, seed=3, count=50, seconds=None, burst=4) for rate in (1.0, 5.0))
    assert fast == pytest.approx([at_s / 5 for at_s in slow])


def test_arrivals_end_with_their_number_or_their_time_whatever_is_first() -> None:
    assert times("constant", 2.0, 0, count=3, seconds=None) == [0.0, 0.5, 1.0]
    assert times("constant", 2.0, 0, count=3, seconds=0.9) == [0.0, 0.5]
    assert times("constant", 2.0, 0, count=None, seconds=1.0) == [0.0, 0.5]
    with pytest.raises(ValueError, match="bounds"):
        times("poisson", 1.0, 0, None, None)
    with pytest.raises(ValueError, match="rate"):
        times("poisson", 0.0, 0, 1, None)


def test_a_burst_comes_at_once_and_the_next_one_when_its_turn_is() -> None:
    assert times("burst", 2.0, 0, count=5, seconds=None, burst=2) == [0.0, 0.0, 1.0, 1.0, 2.0]


def test_poisson_gaps_vary_as_much_as_they_are_long() -> None:
    found = times("poisson", 1.0, seed=5, count=5000, seconds=None)
    gaps = [later - earlier for earlier, later in itertools.pairwise(found)]
    middle = sum(gaps) / len(gaps)
    assert sum((gap - middle) ** 2 for gap in gaps) / len(gaps) == pytest.approx(middle**2, rel=0.15)


def test_bursts_come_at_the_rate_that_was_asked_for_however_few_they_are() -> None:
    assert mean_rate_per_s(times("burst", 1.0, 0, count=16, seconds=None, burst=8)) == pytest.approx(1.0)
    assert mean_rate_per_s(times("burst", 1.0, 0, count=12, seconds=None, burst=8)) == pytest.approx(1.0)
    assert mean_rate_per_s([]) is None


def test_one_arrival_has_no_rate() -> None:
    assert mean_rate_per_s([1.0]) is None
    assert mean_rate_per_s([1.0, 1.0]) is None


# -- lengths


@pytest.mark.parametrize("text", ["128", "uniform:64-256", "normal:128,32", "lognormal:128,0.5"])
def test_lengths_are_written_as_they_are_read(text: str) -> None:
    assert str(parse(text)) == text


def test_lengths_are_drawn_as_they_are_written() -> None:
    rng = random.Random(7)
    uniform = [parse("uniform:64-256").draw(rng) for _ in range(2000)]
    assert (min(uniform), max(uniform)) == (64, 256)
    lognormal = sorted(parse("lognormal:100,0.5").draw(rng) for _ in range(2001))
    assert lognormal[1000] == pytest.approx(100, rel=0.06)
    assert lognormal[1681] == pytest.approx(100 * 2.718**0.5, rel=0.08), "84 % lie below a deviation more"
    assert {parse("normal:2,50").draw(rng) for _ in range(100)} >= {LEAST}
    assert parse("77").draw(rng) == 77


@pytest.mark.parametrize(
    "text", ["", "x", "0", "-5", "uniform:9-3", "uniform:9", "normal:5", "zipf:1,2", "nan", "1e99"]
)
def test_what_is_no_length_says_how_one_is_written(text: str) -> None:
    with pytest.raises(ValueError, match="lognormal:MEDIAN,SIGMA"):
        parse(text)


# -- workloads


@pytest.mark.parametrize("name", NAMED)
def test_named_workloads_fit_into_a_small_context_and_say_how_many_were_clipped(name: str) -> None:
    small, large = (drawn(name, *NAMED[name], n_ctx, seed=1) for n_ctx in (512, 65536))
    assert all(r.prompt_tokens + r.answer_tokens < 512 for r in small.requests)
    assert all(min(r.prompt_tokens, r.answer_tokens) >= LEAST for r in small.requests)
    assert large.facts["clipped"] == 0
    changed = sum(
        (a.prompt_tokens, a.answer_tokens) != (b.prompt_tokens, b.answer_tokens)
        for a, b in zip(small.requests, large.requests, strict=True)
    )
    assert small.facts["clipped"] == changed


def test_the_shapes_differ_as_their_names_say() -> None:
    means = {}
    for name, lengths in NAMED.items():
        requests = drawn(name, *lengths, 8192, 0).requests
        means[name] = sum(r.prompt_tokens for r in requests) / sum(r.answer_tokens for r in requests)
    assert means["summarization"] > 10 > means["chat"] > 1 > means["generation"]
    assert means["code"] > 10


def test_a_stream_of_requests_has_no_end_and_no_number_twice() -> None:
    workload = drawn("chat", FOUR, FOUR, 64, 0)
    taken = list(itertools.islice(workload.stream(5), 5000))
    assert [request.number for request in taken] == list(range(5, 5005))


def test_a_trace_keeps_its_rows_and_its_times() -> None:
    whole = of_trace(TRACE, 1.0, 4096, 0, None, None, None)
    assert [(r.at_s, r.prompt_tokens, r.answer_tokens) for r in whole.requests[:2]] == [(0.0, 100, 20), (2.0, 101, 20)]
    assert len(of_trace(TRACE, 1.0, 4096, 0, None, 10.0, None).requests) == 5
    assert len(of_trace(TRACE, 1.0, 4096, 0, 3, 10.0, None).requests) == 3
    half = of_trace(TRACE, 0.5, 4096, 0, None, None, None)
    assert half.requests[0].prompt_tokens == 50
    clipped = of_trace(TRACE, 1.0, 100, 0, None, None, None)
    assert all(r.prompt_tokens + r.answer_tokens < 100 for r in clipped.requests)
    assert clipped.facts["clipping"]["prompts_cut"] == 50


def test_a_trace_at_a_rate_keeps_its_span_and_says_when_it_has_too_few_rows() -> None:
    thin = of_trace(TRACE, 1.0, 4096, 0, None, 20.0, 1.0)
    assert len(thin.requests) == 20
    assert max(request.at_s or 0.0 for request in thin.requests) <= 20.0
    with pytest.raises(BadWorkload, match="has 50"):
        of_trace(TRACE, 1.0, 4096, 0, None, 100.0, 1.0)
    with pytest.raises(BadWorkload, match="0 requests"):
        of_trace(TRACE, 1.0, 4096, 0, None, 0.1, 1.0)


def test_rows_of_a_trace_under_other_arrivals_stay_whole_and_come_in_an_order_of_chance() -> None:
    whole = of_trace(TRACE, 1.0, 4096, 0, None, None, None)
    mixed = shuffled(whole, seed=1)
    assert sorted(r.prompt_tokens for r in mixed.requests) == [r.prompt_tokens for r in whole.requests]
    assert [r.prompt_tokens for r in mixed.requests] != [r.prompt_tokens for r in whole.requests]
    assert not mixed.is_timed


def test_a_file_gives_texts_ids_messages_or_lengths() -> None:
    lines = (
        '{"prompt": "say hi", "max_tokens": 9}',
        '{"prompt": [1, 2, 3]}',
        "",
        '{"messages": [{"role": "user", "content": "hi"}], "answer_tokens": 5}',
        '{"prompt_tokens": 900, "answer_tokens": 7}',
    )
    found = parse_file("\n".join(lines), "mine.jsonl", FOUR, 512, 0)
    assert [request.answer_tokens for request in found.requests] == [9, 4, 5, 7]
    text, ids, chat, sized = found.requests
    assert (text.text, ids.ids, chat.messages) == ("say hi", (1, 2, 3), ({"role": "user", "content": "hi"},))
    assert sized.prompt_tokens == 512 - 1 - 7
    assert found.facts["clipped"] == 1
    assert not found.is_timed


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no requests"),
        ("{", "line 1"),
        ('{"prompt": "a"}\n{"prompt": 3}', "line 2"),
        ('{"prompt": "a", "prompt_tokens": 3}', "prompt and prompt_tokens"),
        ("{}", "not none"),
        ('{"prompt_tokens": 0}', "1 or more"),
        ('{"prompt": "a", "at_s": 1}\n{"prompt": "b"}', "at_s"),
        ('{"prompt": "a", "at_s": 1}\n{"prompt": "b", "at_s": 0}', "in order"),
        ('{"messages": [{"role": "robot", "content": "hi"}]}', "line 1"),
    ],
)
def test_a_file_that_is_none_says_which_line(text: str, complaint: str) -> None:
    with pytest.raises(BadWorkload, match=complaint):
        parse_file(text, "mine.jsonl", FOUR, 512, 0)


# -- schedules


def source(name: str = "chat") -> Source:
    return Source(drawn(name, *NAMED[name], 4096, 0))


def test_all_that_are_compared_get_the_same_requests_and_each_pass_its_own() -> None:
    load = Load("poisson", 2.0, None, 20)
    once, again, other = (scheduled(source(), load, 7, number) for number in (0, 0, 1))
    assert once == again
    assert [one.at_s for one in once] != [one.at_s for one in other]
    assert {one.request.number for one in once} & {one.request.number for one in other} == set()


def test_a_closed_loop_takes_its_number_or_goes_on() -> None:
    assert len(list(endless(source(), Load("closed", None, 2, requests=5), 0))) == 5
    unbounded = endless(source(), Load("closed", None, 2, seconds=1.0), 0)
    assert len(list(itertools.islice(unbounded, 9999))) == 9999


def test_recorded_times_are_kept_stretched_or_missed() -> None:
    recorded = Source(of_trace(TRACE, 1.0, 4096, 0, None, None, None), TRACE, 1.0, 4096)
    assert [one.at_s for one in scheduled(recorded, Load("trace", requests=3), 0)] == [0.0, 2.0, 4.0]
    assert len(scheduled(recorded, Load("trace", rate_per_s=2.0, requests=10), 0)) == 10
    lines = "\n".join(f'{{"prompt_tokens": 5, "at_s": {at}}}' for at in (0, 1, 4))
    mine = Source(parse_file(lines, "mine", FOUR, 512, 0))
    assert [one.at_s for one in scheduled(mine, Load("trace"), 0)] == [0.0, 1.0, 4.0]
    assert [one.at_s for one in scheduled(mine, Load("trace", rate_per_s=1.0), 0)] == [0.0, 0.5, 2.0]
    with pytest.raises(BadWorkload, match="has none"):
        scheduled(source(), Load("trace"), 0)
    with pytest.raises(BadWorkload, match="rate is missing"):
        scheduled(source(), Load("poisson", requests=3), 0)
    with pytest.raises(BadWorkload, match="for longer"):
        scheduled(source(), Load("poisson", 0.001, seconds=0.1), 0)


def test_a_record_says_what_was_sent_and_not_what_it_was_drawn_from() -> None:
    traffic = Source(of_trace(TRACE, 1.0, 100, 0, None, None, None), TRACE, 1.0, 100)
    load = Load("poisson", 0.5, requests=8)
    sent = [one.request for number in (0, 1) for one in scheduled(traffic, load, 3, number)]
    found = facts_of(traffic, load, 3, 2)
    assert found == {
        "profile": "poisson",
        "rate_per_s": 0.5,
        "requests": 8,
        "sent": 16,
        "mean_prompt_tokens": sum(request.prompt_tokens for request in sent) / 16,
        "mean_answer_tokens": 20.0,
        "clipped": 16,
    }
    roomy = Source(of_trace(TRACE, 1.0, 4096, 0, None, None, None), TRACE, 1.0, 4096)
    assert facts_of(roomy, Load("trace", requests=8), 3, 1)["clipped"] == 0


def test_of_a_load_that_only_time_ends_nobody_knows_beforehand_what_is_sent() -> None:
    by_time = facts_of(source(), Load("closed", clients=2, seconds=9.0), 0, 1)
    assert by_time == {"profile": "closed", "clients": 2, "seconds": 9.0}
    assert "sent" not in facts_of(source(), Load("poisson", seconds=30.0), 0, 1), "a search has yet to find its rates"
    burst = facts_of(source(), Load("burst", 2.0, requests=4, burst=3), 0, 1)
    assert (burst["burst"], burst["sent"]) == (3, 4)


# -- prompts


def test_prompts_of_ids_are_exact_and_share_no_beginning() -> None:
    style, options = Style(vocab_size=32000), Options(model="m")
    one, other = (body(Request(number, 100, 8), style, options, "s") for number in (0, 1))
    assert len(one["prompt"]) == 100
    assert one["prompt"][:3] != other["prompt"][:3]
    assert one == body(Request(0, 100, 8), style, options, "s")
    assert one["prompt"] != body(Request(0, 100, 8), style, options, "another label")["prompt"]
    assert (one["model"], one["max_tokens"], one["ignore_eos"], one["stream"]) == ("m", 8, True, True)
    assert one["stream_options"] == {"include_usage": True}


def test_text_has_so_many_words_that_its_tokens_are_as_many_as_asked() -> None:
    style = Style(tokens_per_word=1.25, base_tokens=10)
    asked = body(Request(0, 135, 8), style, Options(endpoint="chat", is_stream=False, ignores_eos=False), "s")
    (message,) = asked["messages"]
    assert len(message["content"].split()) == 100
    assert {"stream", "ignore_eos", "model", "prompt"} & asked.keys() == set()
    tiny = body(Request(0, 1, 8), style, Options(), "s")
    assert tiny["prompt"] in WORDS


def test_prompts_of_ones_own_are_sent_as_they_are() -> None:
    style, chat = Style(32000), Options(endpoint="chat")
    assert body(Request(0, 0, 4, text="hi"), style, Options(), "s")["prompt"] == "hi"
    assert body(Request(0, 0, 4, ids=(5, 6)), style, Options(), "s")["prompt"] == [5, 6]
    assert body(Request(0, 0, 4, text="hi"), style, chat, "s")["messages"] == [{"role": "user", "content": "hi"}]
    messages = ({"role": "system", "content": "be brief"},)
    assert body(Request(0, 0, 4, messages=messages), style, chat, "s")["messages"] == list(messages)


def test_extra_fields_beat_ours_and_objects_are_merged() -> None:
    extra = {"temperature": 1.0, "edge_llm": {"mode": "split"}}
    found = body(Request(0, 5, 4), Style(100), Options(extra=combined(extra, {"edge_llm": {"slo": {}}})), "s")
    assert found["temperature"] == 1.0
    assert found["edge_llm"] == {"mode": "split", "slo": {}}
    assert extra == {"temperature": 1.0, "edge_llm": {"mode": "split"}}
