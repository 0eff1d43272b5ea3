"""What every engine promises, on the real one and on the simulated one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from edge_llm.engine.engine import Engine, KVChunk, ServedPrompt, Step, Vocabulary
from edge_llm.errors import ContextTooLong, InvalidRequest, LocalProtocolError, Overloaded
from edge_llm.kv.codec import StateBlob
from edge_llm.request import Generation, SamplingParams, TokenEvent

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, min_p=0.02, repeat_penalty=1.1, seed=77)
CHUNK = 32


@pytest.fixture(scope="module")
def loaded(make_engine: Callable[[], tuple[Engine, Vocabulary]]) -> Iterator[tuple[Engine, Vocabulary]]:
    engine, vocabulary = make_engine()
    yield engine, vocabulary
    engine.close()


@pytest.fixture
def engine(loaded: tuple[Engine, Vocabulary]) -> Iterator[Engine]:
    """Idle before and after each test."""
    engine = loaded[0]
    yield engine
    for slot in range(engine.facts.slots):
        engine.end(slot)
    assert not engine.has_work


@pytest.fixture
def vocabulary(loaded: tuple[Engine, Vocabulary]) -> Vocabulary:
    return loaded[1]


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(3 + (17 * i + 31 * seed + i * i) % 250 for i in range(length))


def ask(ids: tuple[int, ...], max_tokens: int = 12, sampling: SamplingParams = GREEDY, **more: object) -> Generation:
    return Generation(f"r{hash(ids) % 9973}", 0, ids, max_tokens, sampling, **more)  # type: ignore[arg-type]


def run(engine: Engine, limit: int = 4000) -> list[Step]:
    steps: list[Step] = []
    while engine.has_work and len(steps) < limit:
        steps.append(engine.step())
    assert not engine.has_work
    return steps


def events(steps: list[Step]) -> dict[str, list[TokenEvent]]:
    found: dict[str, list[TokenEvent]] = {}
    for step in steps:
        assert not step.failures
        for event in step.events:
            found.setdefault(event.request_id, []).append(event)
    return found


def alone(engine: Engine, generation: Generation, slot: int = 0) -> list[int]:
    engine.begin(slot, generation)
    return [event.token_id for event in events(run(engine))[generation.request_id]]


def serve(engine: Engine, ids: tuple[int, ...], start: int = 0) -> list[KVChunk]:
    engine.serve(ServedPrompt("served", ids, start))
    return [chunk for step in run(engine) for chunk in step.chunks]


def snapshot(engine: Engine, chunks: list[KVChunk], total: int) -> StateBlob:
    assert engine.facts.layout is not None
    blob = StateBlob(engine.facts.layout, total, 0)
    for chunk in chunks:
        blob.place(chunk.p0, chunk.p1, chunk.payload, engine.facts.v_layout)
    return blob


# -- the theorem


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", [2, 3, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 2, 3 * CHUNK + 5])
def test_split_equals_whole(engine: Engine, length: int, sampling: SamplingParams) -> None:
    ids = prompt(length)
    whole = alone(engine, ask(ids, sampling=sampling))
    chunks = serve(engine, ids)
    last = engine.facts.slots - 1
    assert engine.begin(last, ask(ids, sampling=sampling), snapshot(engine, chunks, length - 1)) == length - 1
    (split,) = events(run(engine)).values()
    assert [event.token_id for event in split] == whole


@pytest.mark.parametrize("arrived", [1, CHUNK, 2 * CHUNK - 1])
def test_a_prompt_of_which_a_part_arrived_is_finished_here(engine: Engine, arrived: int) -> None:
    ids = prompt(3 * CHUNK)
    whole = alone(engine, ask(ids))
    blob = snapshot(engine, serve(engine, ids[: arrived + 1]), arrived)
    assert engine.begin(1, ask(ids), blob) == arrived
    steps = run(engine)
    assert [event.token_id for event in events(steps)[ask(ids).request_id]] == whole
    assert sum(step.prompt_tokens for step in steps) == len(ids) - 1 - arrived


def test_an_answer_among_others_equals_the_answer_alone(engine: Engine) -> None:
    asked = [ask(prompt(5 + 9 * n, seed=n), 90 + n, SAMPLED if n % 2 else GREEDY) for n in range(4)]
    expected = [alone(engine, generation) for generation in asked]
    for slot, generation in enumerate(asked):
        engine.begin(slot, generation)
    steps = run(engine)
    found = events(steps)
    assert [[event.token_id for event in found[generation.request_id]] for generation in asked] == expected
    assert max(step.decoded_rows for step in steps) == 4


@pytest.mark.parametrize("delivered", [1, 5, 11])
def test_a_resumed_answer_continues_like_the_undisturbed_one(engine: Engine, delivered: int) -> None:
    ids = prompt(40)
    whole = alone(engine, ask(ids, sampling=SAMPLED))
    engine.begin(2, ask(ids, sampling=SAMPLED, delivered_ids=tuple(whole[:delivered])))
    (resumed,) = events(run(engine)).values()
    assert [event.token_id for event in resumed] == whole[delivered:]
    assert [event.index for event in resumed] == list(range(delivered, len(whole)))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_next_turn_on_kept_kv_equals_a_cold_one(engine: Engine, sampling: SamplingParams) -> None:
    first = ask(prompt(2 * CHUNK + 3), sampling=sampling)
    engine.begin(0, first, keeps_kv=lambda: True)
    steps = run(engine)
    (kept,) = (kept for step in steps for kept in step.kept)
    answer = [event.token_id for event in events(steps)[first.request_id]]
    assert kept.ids == (*first.prompt_ids, *answer[:-1]), "the last token was drawn, never evaluated"
    second = ask((*first.prompt_ids, *answer, *prompt(9, seed=4)), sampling=sampling)
    cold = alone(engine, second)
    assert engine.begin(1, second, kept.state) == len(kept.ids)
    assert [event.token_id for event in events(run(engine))[second.request_id]] == cold


def test_kv_is_kept_only_when_asked_for_and_only_of_answers_that_end_well(engine: Engine) -> None:
    engine.begin(0, ask(prompt(10)))
    assert not [kept for step in run(engine) for kept in step.kept]
    engine.begin(0, ask(prompt(10)), keeps_kv=lambda: True)
    engine.step()
    engine.end(0)
    assert not [kept for step in run(engine) for kept in step.kept]


@pytest.mark.parametrize("known", [1, CHUNK, CHUNK + 7, 3 * CHUNK - 2])
def test_a_served_prompt_that_begins_with_a_snapshot_gives_the_chunks_of_a_cold_one(engine: Engine, known: int) -> None:
    ids = prompt(3 * CHUNK)
    cold = serve(engine, ids)
    layout = engine.facts.prompt_layout
    assert layout is not None
    blob = StateBlob(layout, known, 0)
    for chunk in serve(engine, ids[: known + 1]):
        blob.place(chunk.p0, chunk.p1, chunk.payload, engine.facts.v_layout)
    engine.serve(ServedPrompt("served", ids), blob)
    steps = run(engine)
    assert [chunk for step in steps for chunk in step.chunks] == cold
    assert sum(step.prompt_tokens for step in steps) == len(ids) - 1 - known


def test_a_served_prompt_that_is_known_whole_is_nothing_to_compute(engine: Engine) -> None:
    ids = prompt(CHUNK)
    layout = engine.facts.prompt_layout
    assert layout is not None
    blob = StateBlob(layout, len(ids) - 1, 0)
    for chunk in serve(engine, ids):
        blob.place(chunk.p0, chunk.p1, chunk.payload, engine.facts.v_layout)
    with pytest.raises(InvalidRequest):
        engine.serve(ServedPrompt("served", ids), blob)
    assert not engine.has_work


def test_a_running_sequence_moves_to_another_slot_without_a_trace(engine: Engine) -> None:
    ids = prompt(50)
    whole = alone(engine, ask(ids))
    engine.begin(0, ask(ids))
    seen: list[int] = []
    while len(seen) < 5:
        seen += [event.token_id for event in engine.step().events]
    taken = engine.export(0)
    assert taken.ids == (*ids, *seen[:-1])
    engine.end(0)
    engine.begin(3, ask(ids, delivered_ids=tuple(seen)), taken.state)
    (moved,) = events(run(engine)).values()
    assert seen + [event.token_id for event in moved] == whole


# -- serving prompts


def test_chunks_follow_each_other_and_end_at_borders(engine: Engine) -> None:
    chunks = serve(engine, prompt(3 * CHUNK + 5))
    total = 3 * CHUNK + 4
    assert [chunk.p0 for chunk in chunks] == [0, CHUNK, 2 * CHUNK, 3 * CHUNK]
    assert [chunk.p1 for chunk in chunks] == [CHUNK, 2 * CHUNK, 3 * CHUNK, total]
    assert [chunk.is_last for chunk in chunks] == [False, False, False, True]
    per_token = engine.facts.kv_bytes_per_token
    assert [len(chunk.payload) for chunk in chunks] == [(chunk.p1 - chunk.p0) * per_token for chunk in chunks]


def test_chunks_do_not_depend_on_earlier_prompts(engine: Engine) -> None:
    first = serve(engine, prompt(70))
    serve(engine, prompt(90, seed=5))
    assert serve(engine, prompt(70)) == first


def test_only_what_is_missing_is_shipped(engine: Engine) -> None:
    whole = serve(engine, prompt(100))
    rest = serve(engine, prompt(100), start=CHUNK)
    assert rest == whole[1:]


def test_a_second_prompt_is_refused_while_one_is_served(engine: Engine) -> None:
    engine.serve(ServedPrompt("a", prompt(70)))
    with pytest.raises(Overloaded):
        engine.serve(ServedPrompt("b", prompt(9)))
    engine.end_served("a")
    assert len(serve(engine, prompt(9))) == 1


def test_a_held_prompt_waits_while_streams_run(engine: Engine) -> None:
    engine.begin(0, ask(prompt(4), max_tokens=6))
    engine.serve(ServedPrompt("held", prompt(70)))
    engine.hold_served(True)
    steps = run(engine)
    assert len(events(steps)[ask(prompt(4)).request_id]) == 6
    assert not any(step.chunks for step in steps)
    engine.hold_served(False)
    assert engine.has_work
    assert run(engine)[-1].chunks[-1].is_last


def test_progress_reaches_the_total_with_the_last_chunk(engine: Engine) -> None:
    engine.serve(ServedPrompt("served", prompt(3 * CHUNK)))
    steps = run(engine)
    assert steps[-1].progress[-1].done == steps[-1].progress[-1].total == 3 * CHUNK - 1
    assert steps[-1].chunks[-1].is_last


# -- prompts beside streams


def test_a_prompt_does_not_stop_running_streams(engine: Engine) -> None:
    engine.begin(0, ask(prompt(4), max_tokens=200))
    engine.step()
    engine.begin(1, ask(prompt(300, seed=3), max_tokens=2))
    steps = [engine.step() for _ in range(12)]
    assert all(any(event.request_id == ask(prompt(4)).request_id for event in step.events) for step in steps)
    assert sum(step.prompt_tokens for step in steps) > 0


def test_a_local_and_a_served_prompt_take_turns(engine: Engine) -> None:
    engine.begin(0, ask(prompt(300), max_tokens=1))
    engine.serve(ServedPrompt("served", prompt(300)))
    names = {progress.request_id for _ in range(4) for progress in engine.step().progress}
    assert names == {"served", ask(prompt(300)).request_id}
    run(engine)


# -- ends


def test_an_answer_ends_at_max_tokens_and_frees_its_slot(engine: Engine) -> None:
    assert len(alone(engine, ask(prompt(9), max_tokens=7))) == 7
    assert len(alone(engine, ask(prompt(9), max_tokens=1))) == 1


def test_a_stop_token_ends_an_answer_without_text(engine: Engine) -> None:
    ids = prompt(20)
    whole = alone(engine, ask(ids))
    engine.begin(0, ask(ids, stop_ids=frozenset({whole[4]})))
    (found,) = events(run(engine)).values()
    end = whole.index(whole[4])
    assert [event.token_id for event in found] == whole[: end + 1]
    assert found[-1].finish_reason == "stop"


def test_a_stop_string_ends_the_text_before_it(engine: Engine, vocabulary: Vocabulary) -> None:
    ids = prompt(20)
    engine.begin(0, ask(ids, max_tokens=30))
    (whole,) = events(run(engine)).values()
    text = "".join(event.text for event in whole)
    stop = text[len(text) // 2 :][:2]
    engine.begin(0, ask(ids, max_tokens=30, stop=(stop,)))
    (found,) = events(run(engine)).values()
    assert "".join(event.text for event in found) == text[: text.index(stop)]
    assert found[-1].finish_reason == "stop"
    assert len(found) < len(whole)


def test_ending_a_sequence_frees_its_slot_in_every_state(engine: Engine) -> None:
    expected = alone(engine, ask(prompt(70)))
    for steps in range(6):
        engine.begin(0, ask(prompt(90, seed=9), max_tokens=50))
        for _ in range(steps):
            engine.step()
        engine.end(0)
        engine.end(0)
        assert not engine.has_work
        assert alone(engine, ask(prompt(70))) == expected


def test_an_interrupted_piece_is_done_again(engine: Engine) -> None:
    expected = alone(engine, ask(prompt(400)))
    engine.begin(0, ask(prompt(400)))
    stop = threading.Event()

    def disturb() -> None:
        while not stop.wait(0.0005):
            engine.interrupt()

    disturber = threading.Thread(target=disturb)
    disturber.start()
    steps = [engine.step() for _ in range(3)]
    stop.set()
    disturber.join()
    steps += run(engine)
    assert [event.token_id for event in events(steps)[ask(prompt(400)).request_id]] == expected


# -- refusals


def test_a_slot_in_use_or_unknown_is_refused(engine: Engine) -> None:
    engine.begin(0, ask(prompt(5)))
    for slot in (0, -1, engine.facts.slots):
        with pytest.raises(LocalProtocolError):
            engine.begin(slot, ask(prompt(6)))


def test_what_does_not_fit_the_context_is_refused_with_both_numbers(engine: Engine) -> None:
    with pytest.raises(ContextTooLong, match=r"520.*512"):
        engine.begin(0, ask(prompt(500), max_tokens=20))
    with pytest.raises(ContextTooLong):
        engine.serve(ServedPrompt("long", prompt(514)))


def test_tokens_outside_the_vocabulary_are_refused(engine: Engine) -> None:
    for ids in ((3, engine.facts.vocab_size), (3, -1)):
        with pytest.raises(InvalidRequest):
            engine.begin(0, ask(ids))
    assert not engine.has_work


def test_a_snapshot_longer_than_the_prompt_is_refused_and_leaves_the_slot_clean(engine: Engine) -> None:
    blob = snapshot(engine, serve(engine, prompt(60)), 59)
    with pytest.raises(InvalidRequest):
        engine.begin(0, ask(prompt(30)), blob)
    assert len(alone(engine, ask(prompt(30)))) == 12


# -- vocabulary


@pytest.mark.parametrize("text", ["plain", "naïve Ω 東京 🙂", "", "a\x00b", "line\nline\ttab"])
def test_pieces_of_a_text_join_to_the_text(vocabulary: Vocabulary, text: str) -> None:
    ids = vocabulary.tokenize(text, add_special=False, parse_special=False)
    assert b"".join(vocabulary.piece(token) for token in ids).decode().lstrip(" ") == text
    assert all(0 <= token < vocabulary.size for token in ids)


def test_a_chat_becomes_a_prompt_that_names_its_roles(vocabulary: Vocabulary) -> None:
    text = vocabulary.render_chat([{"role": "user", "content": "hello there"}])
    assert "user" in text
    assert "hello there" in text
    assert vocabulary.stop_ids


def test_a_fault_in_the_kv_changes_the_answer(engine: Engine) -> None:
    """The suite can fail: other exponents in the first chunk, and split no longer equals whole."""
    ids = prompt(3 * CHUNK)
    whole = alone(engine, ask(ids, max_tokens=40))
    chunks = serve(engine, ids)
    bad = bytearray(chunks[0].payload)
    for at in range(1, len(bad), 2):
        bad[at] ^= 64  # the exponent of f16 values
    chunks[0] = KVChunk("served", chunks[0].p0, chunks[0].p1, bytes(bad), chunks[0].is_last)
    engine.begin(0, ask(ids, max_tokens=40), snapshot(engine, chunks, len(ids) - 1))
    (split,) = events(run(engine)).values()
    assert [event.token_id for event in split] != whole
