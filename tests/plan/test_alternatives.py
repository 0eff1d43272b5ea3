"""What is said to fit instead: whatever it is, it is rendered when somebody does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_llm.catalogue.memory import ModelSizes
from edge_llm.config import WorkerRole
from edge_llm.errors import ConfigError
from edge_llm.plan.boards import MIB, Board, Settings, SizesOf
from edge_llm.plan.description import bytes_of
from edge_llm.plan.fit import Fitted, fitted
from tests.plan.test_fit import GATEWAY, SETTINGS, SMALL, pi, sizes

ROLES: Sequence[WorkerRole | None] = (None, "prefill", "decode", "mixed")
KEYS = {"slots": "slots", "spare_slots": "spare_slots", "n_ctx": "n_ctx"}


@dataclass(frozen=True)
class Described:
    """What `fitted` is asked."""

    boards: tuple[Board, ...]
    settings: Settings = SETTINGS
    sizes: SizesOf = sizes
    splits: bool = True
    earlier: tuple[tuple[str, WorkerRole], ...] = ()

    def fit(self) -> Fitted:
        return fitted(
            self.boards,
            self.settings,
            self.sizes,
            splits=self.splits,
            gateway_bytes=GATEWAY,
            earlier=dict(self.earlier),
        )

    def refusal(self) -> str:
        with pytest.raises(ConfigError) as refused:
            self.fit()
        return refused.value.message

    def followed(self, suggestion: str) -> Described:
        """The same with what was suggested, as somebody would write it."""
        match suggestion.split(maxsplit=2):
            case ["role:", *_]:
                parts = [part.removeprefix("role: ").split(" for ") for part in suggestion.split("; ")]
                said = {name: role for role, names in parts for name in names.split(", ")}
                roles = {name: role for name in said for role in ROLES if role == said[name]}
                return replace(self, boards=tuple(replace(board, role=roles[board.name]) for board in self.boards))
            case ["leave", "out", names]:
                gone = names.partition(":")[0].split(", ")
                return replace(self, boards=tuple(board for board in self.boards if board.name not in gone))
            case ["a", "smaller", words]:
                mib = int(words.partition("weights of ")[2].partition(" MiB")[0].replace(",", ""))
                return replace(self, sizes=lambda *key: lighter(self.sizes(*key), mib * MIB))
        changes = dict(part.split(": ") for part in suggestion.split(", "))
        new: dict[str, object] = {key: int(value) for key, value in changes.items() if key in KEYS}
        if "prefix_cache" in changes:
            new["prefix_cache_bytes"] = bytes_of(changes.pop("prefix_cache"))
        if "spare_prompts" in changes:
            new["spare_prompts"] = changes.pop("spare_prompts") != "false"
        if "k_type" in changes:
            new["k_type"] = changes.pop("k_type")
        assert changes.keys() <= KEYS.keys(), "nothing else is suggested"
        return replace(self, settings=replace(self.settings, **new))  # type: ignore[arg-type]


def lighter(found: ModelSizes, weights_bytes: int) -> ModelSizes:
    share = weights_bytes / found.weights_bytes
    return replace(found, weights_bytes=weights_bytes, repacked_bytes=int(found.repacked_bytes * share))


def suggestions(message: str) -> list[str]:
    return [line[4:] for line in message.splitlines() if line.startswith("  - ")]


@st.composite
def described(draw: st.DrawFn) -> Described:
    boards = tuple(
        pi(
            f"b{number}",
            draw(st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 16.0])),
            draw(st.sampled_from(ROLES)),
            is_server=draw(st.booleans()),
            arch=draw(st.sampled_from(["arm64", "arm64", "amd64"])),
        )
        for number in range(draw(st.integers(1, 4)))
    )
    earlier = tuple((board.name, was) for board in boards if (was := draw(st.sampled_from(ROLES))) is not None)
    wanted = Settings(
        slots=draw(st.integers(1, 64)),
        spare_slots=draw(st.integers(0, 8)),
        spare_prompts=draw(st.booleans()),
        n_ctx=draw(st.integers(64, 100_000)),
        chunk_tokens=draw(st.sampled_from([8, 128, 1024])),
        k_type=draw(st.sampled_from(["f16", "q8_0"])),
        v_type="f16",
        prefix_cache_bytes=draw(st.sampled_from([0, 10_000_000, 256 * MIB, 2048 * MIB])),
    )
    return Described(boards, wanted, splits=draw(st.booleans()), earlier=earlier)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(described())
def test_whatever_is_suggested_is_rendered_when_it_is_done(asked: Described) -> None:
    try:
        asked.fit()
    except ConfigError as refused:
        for suggestion in suggestions(refused.message):
            assert suggestion.startswith("nothing with these settings") or asked.followed(suggestion).fit()


def test_a_gateway_without_room_is_counted_in_what_would_fit() -> None:
    """One board of 8 GB and the default model: workers of 19,200 cells would fit, with a gateway beside them none."""
    smol = ModelSizes(94 * MIB, 0, 23_040, 49_152, 9, 576, 1536)
    large = replace(SETTINGS, slots=8, n_ctx=100_000)
    asked = Described((pi("a", ram_bytes=8 * 10**9),), large, sizes=lambda *_: smol)
    found = suggestions(asked.refusal())
    n_ctx = next(line for line in found if line.startswith("n_ctx"))
    assert asked.followed(n_ctx).fit()
    more = f"n_ctx: {int(n_ctx.removeprefix('n_ctx: ')) + 256}"
    assert suggestions(asked.followed(more).refusal()), "it was the most, and what is said of a gateway helps as well"


def test_each_change_is_the_smallest_that_is_enough() -> None:
    asked = Described((pi("a", role="decode"), pi("b", role="prefill")), replace(SETTINGS, slots=16, n_ctx=4096))
    proposed = dict(line.split(": ", 1) for line in suggestions(asked.refusal()))
    assert asked.followed(f"slots: {int(proposed['slots']) + 1}").refusal()
    assert asked.followed(f"n_ctx: {int(proposed['n_ctx']) + 256}").refusal()


def test_where_no_single_change_is_enough_several_are_proposed_together() -> None:
    asked = Described((pi("a", 5),), replace(SETTINGS, slots=8, n_ctx=32_768))
    together = [line for line in suggestions(asked.refusal()) if "spare_slots" in line]
    assert [line.partition(",")[0] for line in together] == ["slots: 4", "slots: 2", "slots: 1"]
    one = Described((pi("a", 5),), replace(SETTINGS, slots=1, n_ctx=131_072))
    assert len([line for line in suggestions(one.refusal()) if "spare_slots" in line]) == 1, "said once"


def test_roles_that_would_fit_come_first_where_others_were_given_and_then_who_could_be_left_out() -> None:
    asked = Described((pi("a", role="prefill"), pi("b"), pi("c", 4, role="decode")), SMALL)
    first, second, *_ = suggestions(asked.refusal())
    assert first == "role: prefill for a, c; role: decode for b", "as near to what was given as can be"
    assert second == "leave out c: the other 2 boards will do"
    kept = Described((pi("a"), pi("c", 4)), SMALL, earlier=(("a", "prefill"), ("c", "decode")))
    assert suggestions(kept.refusal())[0] == "role: prefill for c; role: decode for a"
    assert "c keeps the role that it was rendered with before" in kept.refusal()


def test_nobody_is_left_out_where_the_others_would_not_do() -> None:
    asked = Described((pi("a", 8), pi("b", 1)), replace(SETTINGS, slots=64))
    assert not [line for line in suggestions(asked.refusal()) if line.startswith("leave out")]
