"""Which board does what, what it gets, and what is said when it does not fit."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_llm.catalogue.memory import ModelSizes
from edge_llm.config import WorkerRole
from edge_llm.errors import ConfigError
from edge_llm.plan.alternatives import Wanted
from edge_llm.plan.boards import MIB, STEP_BYTES, Board, Settings, sum_of
from edge_llm.plan.fit import Fitted, fitted
from edge_llm.plan.roles import placements

GIB = 1 << 30
# About Qwen3 1.7B in Q4_0: nearly all of it is repacked on a Pi, 112 KiB of KV a token.
SIZES = ModelSizes(1000 * MIB, 800 * MIB, 112 << 10, 151_936, 16, 2048, 6144)
SETTINGS = Settings(
    slots=4,
    spare_slots=2,
    spare_prompts=True,
    n_ctx=2048,
    chunk_tokens=128,
    k_type="f16",
    v_type="f16",
    prefix_cache_bytes=256 * MIB,
)
GATEWAY = 512 * MIB
# With these a board of 4 GiB has room for a prefill worker, and for no decode worker.
SMALL = replace(SETTINGS, spare_slots=0, prefix_cache_bytes=64 * MIB)


def sizes(machine: str, k_type: str, v_type: str) -> ModelSizes:
    """Nothing is repacked but on ARM; q8_0 halves K."""
    kv = SIZES.kv_bytes_per_token if k_type == "f16" else SIZES.kv_bytes_per_token * 3 // 4
    return replace(SIZES, kv_bytes_per_token=kv, repacked_bytes=SIZES.repacked_bytes if machine == "aarch64" else 0)


def pi(name: str, gib: float = 8, role: WorkerRole | None = None, **more: object) -> Board:
    return replace(Board(name, int(gib * GIB), role=role), **more)  # type: ignore[arg-type]


def fit(
    boards: list[Board],
    settings: Settings = SETTINGS,
    *,
    splits: bool = True,
    earlier: dict[str, WorkerRole] | None = None,
) -> Fitted:
    return fitted(boards, settings, sizes, splits=splits, gateway_bytes=GATEWAY, earlier=earlier)


def roles(
    boards: list[Board], *, splits: bool = True, earlier: dict[str, WorkerRole] | None = None
) -> dict[str, str | None]:
    return {board.name: board.role for board in next(iter(placements(boards, splits=splits, earlier=earlier)))}


# -- roles


def test_one_board_does_both() -> None:
    assert roles([pi("a")]) == {"a": "mixed"}


@pytest.mark.parametrize(("boards", "readers"), [(2, 1), (3, 1), (4, 1), (6, 2), (8, 2), (12, 3)])
def test_about_one_board_in_four_reads_prompts(boards: int, readers: int) -> None:
    assert list(roles([pi(f"b{n:02}") for n in range(boards)]).values()).count("prefill") == readers


def test_the_boards_with_most_memory_decode_and_the_control_plane_reads() -> None:
    assert roles([pi("a", 8), pi("b", 4), pi("c", 8)]) == {"a": "decode", "b": "prefill", "c": "decode"}
    assert roles([pi("a", 4), pi("b", 8, is_server=True), pi("c", 4)])["b"] == "prefill"


def test_a_board_that_is_too_small_to_decode_reads_although_another_would_by_rule() -> None:
    """The control plane's board would read; then the small one would decode, for which it has no room."""
    boards = [pi("a", 8, is_server=True), pi("b", 8), pi("c", 4)]
    assert roles(boards)["a"] == "prefill"
    found = fit(boards, SMALL)
    assert {board.name: group.role for group in found.groups for board in group.boards} == {
        "a": "decode",
        "b": "decode",
        "c": "prefill",
    }


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([2.0, 3.0, 4.0, 5.0, 6.0, 8.0]),
            st.sampled_from(["arm64", "amd64"]),
            st.booleans(),
        ),
        min_size=2,
        max_size=5,
    )
)
def test_roles_that_fit_are_found_where_there_are_any(described: list[tuple[float, str, bool]]) -> None:
    boards = [pi(f"b{n}", gib, arch=arch, is_server=is_server) for n, (gib, arch, is_server) in enumerate(described)]

    def fits(boards: list[Board]) -> bool:
        return Wanted(boards, SMALL, sizes, True, GATEWAY, {}).fits()

    roles: tuple[WorkerRole, ...] = ("prefill", "decode")
    given = (
        [replace(board, role=role) for board, role in zip(boards, way, strict=True)]
        for way in product(roles, repeat=len(boards))
    )
    assert fits(boards) == any(map(fits, given))


def test_of_many_boards_the_small_ones_read() -> None:
    found = fit([*(pi(f"small{n:02}", 4) for n in range(30)), *(pi(f"large{n:02}", 8) for n in range(30))], SMALL)
    (readers, decoders) = found.groups
    assert {board.name[:5] for board in decoders.boards} == {"large"}
    assert len(readers.boards) >= 30


def test_roles_that_were_given_stay_and_count() -> None:
    assert roles([pi("a", role="prefill"), pi("b"), pi("c"), pi("d")]) == {
        "a": "prefill",
        "b": "decode",
        "c": "decode",
        "d": "decode",
    }
    assert roles([pi("a", role="mixed"), pi("b")]) == {"a": "mixed", "b": "decode"}
    assert roles([pi("a", role="decode"), pi("b")]) == {"a": "decode", "b": "prefill"}


@pytest.mark.parametrize(("role", "who"), [("prefill", "nobody would decode"), ("decode", "nobody would read")])
def test_a_cluster_in_which_something_is_done_by_nobody_is_refused(role: WorkerRole, who: str) -> None:
    with pytest.raises(ConfigError, match=who):
        placements([pi("a", role=role), pi("b", role=role)], splits=True)


def test_a_model_that_cannot_be_cut_runs_on_mixed_workers_only() -> None:
    assert roles([pi("a"), pi("b")], splits=False) == {"a": "mixed", "b": "mixed"}
    with pytest.raises(ConfigError, match="give a role mixed"):
        placements([pi("a", role="prefill"), pi("b")], splits=False)


def test_boards_that_are_there_keep_their_roles_when_more_come() -> None:
    before: dict[str, WorkerRole] = {"a": "prefill", "b": "decode", "c": "decode", "d": "decode"}
    grown = roles([pi(name) for name in "abcdef"], earlier=before)
    assert {name: grown[name] for name in before} == before
    assert sorted(str(grown[name]) for name in "ef") == ["decode", "prefill"], "a second reader is one of the new ones"


def test_what_is_said_of_a_board_counts_more_than_what_it_did() -> None:
    before: dict[str, WorkerRole] = {"a": "prefill", "b": "decode", "c": "decode"}
    assert roles([pi("a"), pi("b", role="prefill"), pi("c")], earlier=before)["b"] == "prefill"


def test_one_board_that_did_both_goes_on_so_when_a_second_comes() -> None:
    assert roles([pi("a"), pi("b")], earlier={"a": "mixed"}) == {"a": "mixed", "b": "decode"}


def test_where_those_that_are_left_would_leave_something_to_nobody_roles_are_chosen_anew() -> None:
    before: dict[str, WorkerRole] = {"a": "prefill", "b": "decode", "c": "decode"}
    assert roles([pi("b"), pi("c")], earlier=before) == {"b": "prefill", "c": "decode"}
    assert roles([pi("b")], earlier=before) == {"b": "mixed"}


def test_a_model_that_cannot_be_cut_does_not_keep_roles_that_it_cannot_have() -> None:
    before: dict[str, WorkerRole] = {"a": "prefill", "b": "decode"}
    assert roles([pi("a"), pi("b")], splits=False, earlier=before) == {"a": "mixed", "b": "mixed"}


def test_a_role_from_before_that_does_not_fit_any_more_is_called_that() -> None:
    boards = [pi("a", 8), pi("small", 4)]
    with pytest.raises(ConfigError, match="small keeps the role that it was rendered with before"):
        fitted(boards, SETTINGS, sizes, splits=True, gateway_bytes=GATEWAY, earlier={"a": "prefill", "small": "decode"})
    assert "rendered with before" not in refusal([pi("a", 8), pi("small", 4, role="decode")])


@given(
    st.lists(
        st.tuples(
            st.sampled_from([4.0, 8.0, 16.0]),
            st.sampled_from([None, "prefill", "decode", "mixed"]),
            st.booleans(),
            st.sampled_from([None, "prefill", "decode", "mixed"]),
        ),
        min_size=1,
        max_size=9,
    )
)
def test_whatever_is_given_somebody_decodes_and_somebody_reads_or_it_is_refused(
    described: list[tuple[float, WorkerRole | None, bool, WorkerRole | None]],
) -> None:
    boards = [pi(f"b{n}", gib, role, is_server=server) for n, (gib, role, server, _) in enumerate(described)]
    before = {f"b{n}": was for n, (*_, was) in enumerate(described) if was}
    try:
        ways = list(islice(placements(boards, splits=True, earlier=before), 50))
    except ConfigError:
        assert None not in [board.role for board in boards], "a board that may do anything does what is missing"
        return
    assert ways
    for placed in ways:
        assert {board.role for board in placed} & {"decode", "mixed"}
        assert {board.role for board in placed} & {"prefill", "mixed"}
        given = [b.role for b in boards if b.role]
        assert [new.role for new, old in zip(placed, boards, strict=True) if old.role] == given


# -- sums and limits


def test_a_limit_is_the_sum_a_worker_prints_with_a_fifth_of_head_room_in_whole_steps() -> None:
    group = fit([pi("a")]).groups[0]
    assert group.sum == sum_of("mixed", "aarch64", SETTINGS, sizes)
    wanted = group.sum.total_bytes * 1.2 - 0.2 * SIZES.weights_bytes  # pages of a file can be dropped
    assert 0 <= group.limit_bytes - wanted < STEP_BYTES
    assert group.limit_bytes % STEP_BYTES == 0


def test_a_prefill_worker_counts_the_slots_it_keeps_for_others_only() -> None:
    own = sum_of("prefill", "aarch64", SETTINGS, sizes).parts
    assert own["KV of 2 slots"] == 2 * 2048 * SIZES.kv_bytes_per_token
    none = sum_of("prefill", "aarch64", replace(SETTINGS, spare_slots=0), sizes).parts
    assert none["one snapshot in adoption"] == 0


def test_of_two_kinds_of_machine_the_larger_sum_counts_and_it_is_said_that_they_are_two_classes() -> None:
    both = fit([pi("a", role="mixed"), pi("b", role="mixed", arch="amd64", ram_bytes=16 * GIB)])
    assert both.groups[0].sum == sum_of("mixed", "aarch64", SETTINGS, sizes)
    assert any("exactness classes" in note for note in both.notes)
    assert not any("exactness classes" in note for note in fit([pi("a"), pi("b")]).notes)


def test_what_the_system_takes_is_not_given_to_workers() -> None:
    assert pi("a").room_bytes < 8 * GIB * 0.96
    assert pi("a", is_server=True).room_bytes < pi("a").room_bytes
    assert pi("a", reserve_bytes=0).room_bytes == int(8 * GIB * 0.96)
    assert pi("a", 0.5).room_bytes == 0


# -- what does not fit


def refusal(boards: list[Board], settings: Settings = SETTINGS) -> str:
    with pytest.raises(ConfigError) as refused:
        fit(boards, settings)
    return refused.value.message


def test_what_does_not_fit_is_refused_with_board_sum_and_what_would_fit() -> None:
    message = refusal([pi("a", 8), pi("small", 4, role="decode"), pi("c", 8)])
    assert message.startswith("role decode does not fit on small")
    for part in ("weights", "KV of 4 slots", "compute and logits buffers", "sum", "What would fit"):
        assert part in message


def test_a_model_that_is_too_heavy_for_anything_is_called_that() -> None:
    assert "use a board with more memory" in refusal([pi("a", 1)])
    assert "a smaller quantization or model: weights of" in refusal([pi("a", 5)])


def test_a_gateway_without_room_is_refused_and_room_for_one_only_is_said() -> None:
    need = fit([pi("a")]).groups[0].limit_bytes
    tight = pi("a", ram_bytes=int((need + GATEWAY - 8 * MIB) / 0.96), reserve_bytes=0)
    assert "the gateway does not" in refusal([tight])
    one = pi("a", ram_bytes=int((need + GATEWAY + 8 * MIB) / 0.96), reserve_bytes=0)
    assert any("one gateway only" in note for note in fit([one]).notes)
    two = pi("a", ram_bytes=int((need + 2 * GATEWAY + 8 * MIB) / 0.96), reserve_bytes=0)
    assert not any("one gateway only" in note for note in fit([two]).notes)


# -- what is worth knowing


def test_a_processor_that_nobody_knows_is_noted_with_what_was_meant() -> None:
    (note,) = (
        note for note in fit([pi("a", cpu="cortex-a67"), pi("b", cpu="cortex-a76")]).notes if "not known" in note
    )
    assert note.startswith("a: cpu cortex-a67 is not known, did you mean cortex-a76?") or "did you mean" in note
    odd = fit([pi("a", cpu="quantum", role="mixed"), pi("b", cpu="n100", arch="amd64")]).notes
    assert [note.partition(" is not")[0] for note in odd if "not known" in note] == ["a: cpu quantum"]
    assert not [note for note in fit([pi("a"), pi("b", cpu="cortex-a76")]).notes if "not known" in note]
