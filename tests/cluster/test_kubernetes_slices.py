"""What EndpointSlices say about where workers may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.cluster.endpoint_slices import EndpointSlice, Found, news, places_of, unknown_roles
from edge_llm.cluster.static import parse_places, text_of
from edge_llm.cluster.view import Place
from tests.cluster.fake_apiserver import endpoint, endpoint_slice


def read(*slices: dict[str, Any]) -> list[EndpointSlice]:
    return [msgspec.json.decode(msgspec.json.encode(one), type=EndpointSlice) for one in slices]


def found(*slices: dict[str, Any]) -> list[Found]:
    return list(places_of(read(*slices)))


def places(*slices: dict[str, Any]) -> list[Place]:
    return [one.place for one in found(*slices)]


def test_a_worker_is_a_pod_by_its_own_address_and_the_port_of_its_slice() -> None:
    assert places(
        endpoint_slice("decode-1", [endpoint("d-0", "10.42.1.7"), endpoint("d-1", "10.42.2.3")]),
        endpoint_slice("prefill-1", [endpoint("p-0", "10.42.0.9")], role="prefill", port=9002),
    ) == [Place("d-0", "10.42.1.7:9001"), Place("d-1", "10.42.2.3:9001"), Place("p-0", "10.42.0.9:9002")]


def test_of_several_ports_the_one_named_worker_counts_and_one_alone_needs_no_name() -> None:
    one = endpoint_slice("decode-1", [endpoint("d-0", "10.42.1.7")])
    one["ports"] = [{"name": "metrics", "port": 1}, {"name": "worker", "port": 2}]
    assert places(one) == [Place("d-0", "10.42.1.7:2")]
    one["ports"] = [{"port": 3}]
    assert places(one) == [Place("d-0", "10.42.1.7:3")]
    for unusable in ([], None, [{"name": "worker"}], [{"name": "a", "port": 1}, {"name": "b", "port": 2}]):
        one["ports"] = unusable
        assert places(one) == []


def test_an_ipv6_address_is_written_in_brackets_and_a_dual_stack_pod_is_one_place_by_ipv4() -> None:
    six = endpoint_slice("decode-6", [endpoint("d-0", "fd00:42::7")], family="IPv6")
    four = endpoint_slice("decode-4", [endpoint("d-0", "10.42.1.7")])
    assert places(six) == [Place("d-0", "[fd00:42::7]:9001")]
    assert places(six, four) == places(four, six) == [Place("d-0", "10.42.1.7:9001")]


@pytest.mark.parametrize("conditions", [{"ready": False}, {"ready": False, "serving": True, "terminating": True}])
def test_a_pod_that_loads_or_drains_stays_a_place(conditions: dict[str, bool]) -> None:
    assert found(endpoint_slice("decode-1", [endpoint("d-0", "10.42.1.7", **conditions)])) == [
        Found(Place("d-0", "10.42.1.7:9001"), is_ready=False)
    ]


def test_a_pod_that_ends_its_answers_with_its_readiness_off_is_not_left_out() -> None:
    ending = endpoint("d-0", "10.42.1.7", ready=False, serving=False, terminating=True)
    assert places(endpoint_slice("decode-1", [ending])) == [Place("d-0", "10.42.1.7:9001")]


def test_what_is_not_said_of_a_pod_counts_as_ready() -> None:
    for conditions in ({}, None, {"ready": None}):
        one = endpoint_slice("decode-1", [endpoint("d-0", "10.42.1.7") | {"conditions": conditions}])
        assert found(one) == [Found(Place("d-0", "10.42.1.7:9001"), is_ready=True)]


def test_a_pod_in_two_services_is_one_worker() -> None:
    one, other = (
        endpoint_slice(f"{role}-1", [endpoint("m-0", "10.42.1.7")], role=role) for role in ("prefill", "mixed")
    )
    assert places(one, other) == [Place("m-0", "10.42.1.7:9001")]


def test_while_an_endpoint_moves_to_another_slice_the_pod_is_there_once() -> None:
    old = endpoint_slice("decode-1", [endpoint("d-0", "10.42.1.7"), endpoint("d-1", "10.42.1.8")])
    new = endpoint_slice("decode-2", [endpoint("d-1", "10.42.1.8", ready=False)])
    assert found(new, old) == found(old, new) == found(old)


def test_of_two_pods_of_one_name_the_one_that_does_not_end_is_meant() -> None:
    stale = endpoint_slice("decode-1", [endpoint("d-0", "10.42.1.7", serving=True, terminating=True)])
    loading = endpoint_slice("decode-2", [endpoint("d-0", "10.42.2.9", ready=False)])
    assert found(stale, loading) == [Found(Place("d-0", "10.42.2.9:9001"), is_ready=False)]


def test_what_is_no_pod_or_has_no_ip_is_no_place() -> None:
    by_hand = endpoint("d-0", "10.42.1.7")
    del by_hand["targetRef"]
    node = endpoint("d-0", "10.42.1.7") | {"targetRef": {"kind": "Node", "name": "n"}}
    nameless = endpoint("", "10.42.1.7")
    assert places(endpoint_slice("decode-1", [by_hand, node, nameless])) == []
    named = endpoint_slice("decode-1", [endpoint("d-0", "worker.example")], family="FQDN")
    nowhere = endpoint_slice("decode-2", [endpoint("d-0", "") | {"addresses": []}])
    empty = endpoint_slice("decode-3", [])
    assert places(named, nowhere, empty | {"endpoints": None}) == []


def test_a_role_that_means_nothing_is_told_and_its_workers_are_not_used() -> None:
    wrong = endpoint_slice("wrong", [endpoint("d-0", "10.42.1.7")], role="decod")
    right = endpoint_slice("right", [endpoint("d-1", "10.42.1.8")])
    assert places(wrong, right) == [Place("d-1", "10.42.1.8:9001")]
    assert unknown_roles(read(wrong, right)) == {"wrong": "decod"}


def test_news_is_who_came_went_moved_or_became_ready() -> None:
    before = places_of(
        read(
            endpoint_slice(
                "decode-1",
                [
                    endpoint("stays", "10.0.0.1"),
                    endpoint("goes", "10.0.0.2"),
                    endpoint("moves", "10.0.0.3"),
                    endpoint("loads", "10.0.0.4", ready=False),
                ],
            )
        )
    )
    after = places_of(
        read(
            endpoint_slice("decode-2", [endpoint("comes", "10.0.0.5"), endpoint("moves", "10.0.0.6")]),
            endpoint_slice("decode-1", [endpoint("loads", "10.0.0.4"), endpoint("stays", "10.0.0.1")]),
        )
    )
    assert news(before, after) == {"goes", "moves", "loads", "comes"}
    assert news(after, after) == frozenset()


pods = st.builds(
    endpoint,
    st.sampled_from([f"pod-{number}" for number in range(6)]),
    st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str) | st.just("no.address"),
    ready=st.none() | st.booleans(),
    serving=st.none() | st.booleans(),
    terminating=st.none() | st.booleans(),
)
any_slices = st.lists(
    st.builds(
        endpoint_slice,
        st.uuids().map(str),
        st.lists(pods, max_size=5),
        role=st.sampled_from(["prefill", "decode", "mixed", "none"]),
        port=st.integers(1, 65_535),
    ),
    max_size=5,
)


@given(any_slices, st.randoms(use_true_random=False))
def test_the_order_of_slices_and_endpoints_says_nothing(slices: list[dict[str, Any]], chance: Any) -> None:
    expected = found(*slices)
    shuffled = [one | {"endpoints": chance.sample(one["endpoints"], len(one["endpoints"]))} for one in slices]
    chance.shuffle(shuffled)
    assert found(*shuffled) == expected


@given(any_slices)
def test_an_endpoint_that_is_listed_twice_says_nothing_new(slices: Sequence[dict[str, Any]]) -> None:
    assert found(*slices, *slices) == found(*slices)


@given(any_slices)
def test_whatever_slices_say_the_places_are_such_as_a_file_may_name(slices: Sequence[dict[str, Any]]) -> None:
    given_places = places(*slices)
    text = text_of((place.worker, place.address) for place in given_places)
    assert list(parse_places(text, "w.yaml")) == given_places
