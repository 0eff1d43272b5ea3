"""Who may call what on a worker: all routes but probes and metrics are closed to all but the one right ticket."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Final, get_args

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.routing import Route

import edge_llm
from edge_llm.kv.snapshot import ids_digest
from edge_llm.worker.app import HANDLERS, PUBLIC, create_app
from edge_llm.worker.bodies import MAX_BODY_BYTES
from edge_llm.worker.messages import (
    CancelRequest,
    ChatMessage,
    DecodeRequest,
    DrainRequest,
    ErrorReply,
    KeepRequest,
    Message,
    PrefillCandidate,
    PrefillRequest,
    RoleRequest,
    Sampling,
    TokenizeRequest,
    decode,
    encode,
)
from edge_llm.worker.readings import about_node
from edge_llm.worker.tickets import LIFETIME_S, MAX_SKEW_S, Claims, KeyRing, Operation, authorization, body_digest
from tests.loopback import CHUNK, KEYS, Cluster, Node, prompt_of, running_cluster, until

pytestmark = pytest.mark.anyio
NAME: Final = "w1"
KEPT: Final = prompt_of(2 * CHUNK, seed=7)
STRANGER: Final = KeyRing.parse("test1:" + "a5" * 32, "another cluster's key")
UNKNOWN_KID: Final = KeyRing({"other9": next(iter(KEYS.keys.values()))})
_numbers: Final = itertools.count()


@dataclass(frozen=True, slots=True)
class Call:
    """A call that is good in all but, perhaps, its ticket."""

    operation: Operation
    method: str
    path: str
    body: bytes
    request_id: str = ""
    ids_sha256: str = ""
    peers: dict[str, str] = field(default_factory=dict)

    def claims(self, **changes: object) -> Claims:
        """What the right ticket says."""
        binds_body = bool(self.body) and self.operation != "prefill"
        right = Claims(
            audience=NAME,
            operation=self.operation,
            request_id=self.request_id,
            issued_s=time.time(),
            nonce=f"gate-{next(_numbers)}",
            body_sha256=body_digest(self.body) if binds_body else "",
            ids_sha256=self.ids_sha256,
            peers=self.peers,
        )
        return msgspec.structs.replace(right, **changes)


def _tokenize(_node: Node) -> Call:
    return Call("tokenize", "POST", "/tokenize", encode(TokenizeRequest(text="hello")))


def _decode(_node: Node) -> Call:
    request_id = f"d{next(_numbers)}"
    request = DecodeRequest(
        request_id=request_id,
        epoch=0,
        gateway="g1",
        prompt_ids=prompt_of(CHUNK),
        max_tokens=1,
        sampling=Sampling(temperature=0.0),
    )
    return Call("decode", "POST", "/decode", encode(request), request_id)


def _cancel(_node: Node) -> Call:
    return Call("cancel", "POST", "/cancel", encode(CancelRequest(request_id="nobody", epoch=0)), "nobody")


def _prefill(node: Node) -> Call:
    request_id, ids = f"p{next(_numbers)}", prompt_of(CHUNK)
    compatibility = node.worker.facts.identity.compatibility
    body = encode(PrefillRequest(request_id=request_id, ids=ids, compatibility=compatibility))
    return Call("prefill", "POST", "/prefill", body, request_id, ids_digest(ids))


def _keep(node: Node) -> Call:
    """Of a prompt that is kept there already: nothing is fetched."""
    request_id = f"k{next(_numbers)}"
    source = PrefillCandidate(worker="w9", address=node.peer.address, ticket="t", only_stored=True)
    body = encode(KeepRequest(request_id=request_id, ids=KEPT, source=source))
    return Call("keep", "POST", "/keep", body, request_id, peers={"w9": node.peer.address})


def _events(_node: Node) -> Call:
    return Call("events", "GET", "/events?gateway=g9", b"")


def _status(_node: Node) -> Call:
    return Call("status", "GET", "/status", b"")


def _drain(_node: Node) -> Call:
    """Taking back what never began: the worker goes on."""
    return Call("drain", "POST", "/drain", encode(DrainRequest(is_draining=False)))


def _role(_node: Node) -> Call:
    return Call("role", "POST", "/role", encode(RoleRequest(role="mixed")))


ROUTES: Final[dict[str, Callable[[Node], Call]]] = {
    "tokenize": _tokenize,
    "decode": _decode,
    "cancel": _cancel,
    "prefill": _prefill,
    "keep": _keep,
    "events": _events,
    "status": _status,
    "drain": _drain,
    "role": _role,
}
Headers = dict[str, str]


def _signed(call: Call, **changes: object) -> Headers:
    return authorization(KEYS.sign(call.claims(**changes)))


def _other_operation(call: Call) -> Headers:
    return _signed(call, operation="status" if call.operation != "status" else "events")


def _truncated(call: Call) -> Headers:
    return authorization(KEYS.sign(call.claims())[:-1])


def _other_body(call: Call) -> Headers:
    """For a prefill the token ids are bound instead of the body; a GET must have none."""
    if call.operation == "prefill":
        return _signed(call, ids_sha256=ids_digest(prompt_of(CHUNK + 1)))
    return _signed(call, body_sha256=body_digest(call.body + b" "))


CREDENTIALS: Final[dict[str, Callable[[Call], Headers]]] = {
    "none": lambda call: {},
    "empty": lambda call: {"authorization": ""},
    "garbage": lambda call: {"authorization": "EdgeLLM garbage.in.here"},
    "binary garbage": lambda call: {"authorization": "EdgeLLM \xff\xfe.\x80.\xe9"},
    "a ticket too long": lambda call: {"authorization": "EdgeLLM test1." + "A" * 9000 + ".00"},
    "another scheme": lambda call: {"authorization": "Bearer " + KEYS.sign(call.claims())},
    "a ticket cut short": _truncated,
    "expired": lambda call: _signed(call, issued_s=time.time() - LIFETIME_S - MAX_SKEW_S - 5),
    "of the future": lambda call: _signed(call, issued_s=time.time() + MAX_SKEW_S + 5),
    "another cluster's key": lambda call: authorization(STRANGER.sign(call.claims())),
    "an unknown key id": lambda call: authorization(UNKNOWN_KID.sign(call.claims())),
    "another worker's": lambda call: _signed(call, audience="w2"),
    "another operation's": _other_operation,
    "another body's": _other_body,
}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One event loop for all tests here: they share one worker."""
    return "asyncio"


@dataclass(frozen=True, slots=True)
class Door:
    """A mixed worker, which has every route, and a caller."""

    cluster: Cluster
    node: Node

    async def knock(self, call: Call, headers: Headers) -> tuple[int, bytes]:
        """Status and the first bytes of the body."""
        url = f"http://{self.node.peer.address}{call.path}"
        async with self.cluster.session.request(
            call.method, url, data=call.body or None, headers=headers, allow_redirects=False
        ) as reply:
            if reply.status == 200 and call.operation == "events":
                return 200, b""  # it never ends
            return reply.status, await reply.read()

    async def send(self, call: Call) -> tuple[int, bytes]:
        return await self.knock(call, _signed(call))


@pytest.fixture(scope="module")
async def door() -> AsyncIterator[Door]:
    async with running_cluster() as cluster:
        node = await cluster.start("mixed", NAME, prefix_cache_bytes=1 << 20)
        await (await cluster.gateway.ask(node.peer, KEPT)).over()
        await until(lambda: node.worker.prefixes.used_bytes > 0)
        yield Door(cluster, node)


def refusal(status: int, body: bytes) -> ErrorReply:
    reply = decode(ErrorReply, body)
    assert (status, reply.code) == (401, "unauthorized"), (status, reply)
    return reply


@pytest.mark.parametrize("credential", CREDENTIALS)
@pytest.mark.parametrize("route", ROUTES)
async def test_a_wrong_ticket_opens_no_route(door: Door, route: str, credential: str) -> None:
    call = ROUTES[route](door.node)
    refusal(*await door.knock(call, CREDENTIALS[credential](call)))
    assert door.node.worker.decode is not None
    assert door.node.worker.decode.sequences_running == 0
    assert door.node.worker.prefill.admitted == 0


@pytest.mark.parametrize("route", ROUTES)
async def test_the_right_ticket_opens_its_route_once(door: Door, route: str) -> None:
    call = ROUTES[route](door.node)
    headers = _signed(call)
    status, _ = await door.knock(call, headers)
    assert status == (202 if route == "decode" else 200)
    assert "used before" in refusal(*await door.knock(call, headers)).message
    assert (await door.knock(ROUTES[route](door.node), headers))[0] == 401
    again = ROUTES[route](door.node)
    assert (await door.send(again))[0] == status, "a new ticket was refused"


@pytest.mark.parametrize("route", ["tokenize", "decode", "cancel"])
async def test_a_refused_body_does_not_use_its_ticket_up_for_the_right_one(door: Door, route: str) -> None:
    """Nobody can spoil a gateway's call by sending its ticket with another body first."""
    call = ROUTES[route](door.node)
    headers = _signed(call)
    refusal(*await door.knock(replace(call, body=call.body + b" "), headers))
    assert (await door.knock(call, headers))[0] < 300


async def test_a_prefill_ticket_serves_one_request_and_one_prompt(door: Door) -> None:
    call = _prefill(door.node)
    other_request = replace(call, request_id="p-other")
    refusal(*await door.knock(call, _signed(other_request)))
    ids = prompt_of(CHUNK, 1)
    compatibility = door.node.worker.facts.identity.compatibility
    body = encode(PrefillRequest(request_id=call.request_id, ids=ids, compatibility=compatibility))
    refusal(*await door.knock(replace(call, body=body), _signed(call)))


async def test_kv_is_fetched_only_from_where_the_ticket_says(door: Door) -> None:
    call = _keep(door.node)
    elsewhere: tuple[dict[str, str], ...] = ({}, {"w9": "127.0.0.1:1"}, {"w8": door.node.peer.address})
    for peers in elsewhere:
        reply = refusal(*await door.knock(call, _signed(call, peers=peers)))
        assert "does not name worker w9" in reply.message


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
async def test_the_probes_need_no_ticket_and_say_nothing_else(door: Door, path: str) -> None:
    status, body = await door.knock(Call("status", "GET", path, b""), {})
    assert status == 200
    assert len(body) < 32


async def test_the_metrics_need_no_ticket_and_name_the_worker_but_no_request(door: Door) -> None:
    call = _decode(door.node)
    assert (await door.send(call))[0] == 202
    status, body = await door.knock(Call("status", "GET", "/metrics", b""), {})
    assert status == 200
    labels = {
        (name, value)
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
        for name, value in sample.labels.items()
        if name != "le"
    }
    facts = door.node.worker.facts
    numbers = {"direction", "outcome", "kind", "peer", "core", "package", "rail"}
    texts = {(name, value) for name, value in labels if name not in numbers}
    assert texts == {
        ("model_name", facts.model_name),
        ("role", "mixed"),
        ("node", NAME),
        ("version", edge_llm.__version__),
        ("level", facts.level),
        ("quantization", facts.quantization),
        *about_node().items(),  # of the board, as anybody's node exporter says it
    }
    assert call.request_id not in body.decode()


def test_what_is_open_is_named_here() -> None:
    assert PUBLIC == {"/healthz", "/readyz", "/metrics"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/metrics/"),
        ("POST", "/metrics"),
        ("GET", "/status/"),
        ("GET", "//status"),
        ("GET", "/Status"),
        ("GET", "/healthz/../status"),
        ("GET", "/healthz/%2e%2e/status"),
        ("GET", "/%73tatus"),
        ("GET", "/healthz;/status"),
        ("POST", "/healthz"),
        ("POST", "/status"),
        ("GET", "/decode"),
        ("HEAD", "/status"),
        ("OPTIONS", "/decode"),
        ("DELETE", "/cancel"),
        ("TRACE", "/status"),
    ],
)
async def test_unknown_routes_and_methods_are_closed_too(door: Door, method: str, path: str) -> None:
    status, reply = await _raw(door, f"{method} {path} HTTP/1.1\r\nhost: w\r\ncontent-length: 0\r\n\r\n".encode())
    assert status == 401
    if method != "HEAD":
        assert decode(ErrorReply, reply).code == "unauthorized"


def test_every_operation_that_a_ticket_can_name_has_its_route_and_is_tried_here() -> None:
    assert set(get_args(Operation)) == set(HANDLERS) == set(ROUTES)


async def test_the_app_has_the_routes_that_are_tried_here_and_those_without_a_ticket_and_no_other(door: Door) -> None:
    paths = [route.path for route in create_app(door.node.worker).routes if isinstance(route, Route)]
    assert sorted(paths) == sorted([*PUBLIC, *(f"/{operation}" for operation in ROUTES)])
    assert len(create_app(door.node.worker).routes) == len(paths), "nothing is mounted beside them"


async def test_head_is_no_way_around_get(door: Door) -> None:
    for operation in ("status", "events"):
        call = ROUTES[operation](door.node)
        status, _ = await _raw(
            door,
            f"HEAD {call.path} HTTP/1.1\r\nhost: w\r\nauthorization: {_signed(call)['authorization']}\r\n\r\n".encode(),
        )
        assert status == 401


async def test_no_ticket_opens_an_unknown_route(door: Door) -> None:
    for operation in ROUTES:
        call = ROUTES[operation](door.node)
        refusal(*await door.knock(replace(call, path="/admin"), _signed(call)))


async def _raw(door: Door, *parts: bytes) -> tuple[int, bytes]:
    """Status and body of a reply to hand-made bytes."""
    host, _, port = door.node.peer.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(10):
            for part in parts:
                writer.write(part)
                await writer.drain()
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            _, _, length = head.partition("content-length: ")
            size = 0 if parts[0].startswith(b"HEAD") else int(length.split("\r\n")[0])
            return int(head.split()[1]), await reader.readexactly(size)
    finally:
        writer.close()
        await writer.wait_closed()


def _head(call: Call, headers: Headers, framing: str) -> bytes:
    lines = [f"{call.method} {call.path} HTTP/1.1", "host: w", framing]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@pytest.mark.parametrize("route", [route for route in ROUTES if route not in ("events", "status")])
async def test_a_body_that_says_it_is_too_large_is_refused_before_it_comes(door: Door, route: str) -> None:
    call = ROUTES[route](door.node)
    head = _head(call, _signed(call), f"content-length: {MAX_BODY_BYTES + 1}")
    status, body = await _raw(door, head)
    assert (status, decode(ErrorReply, body).code) == (413, "payload_too_large")


async def test_a_body_that_grows_too_large_is_refused_when_it_does(door: Door) -> None:
    call = _tokenize(door.node)
    head = _head(call, _signed(call), "transfer-encoding: chunked")
    piece = b"%x\r\n" % (1 << 20) + b" " * (1 << 20) + b"\r\n"
    status, body = await _raw(door, head, *[piece] * (MAX_BODY_BYTES >> 20), b"1\r\n \r\n")
    assert (status, decode(ErrorReply, body).code) == (413, "payload_too_large")


async def test_without_a_ticket_the_body_is_not_even_looked_at(door: Door) -> None:
    """No byte of it was sent: an answer shows that nobody waited for one."""
    for framing in (f"content-length: {MAX_BODY_BYTES + 1}", "content-length: 10", "transfer-encoding: chunked"):
        status, body = await _raw(door, _head(_tokenize(door.node), {}, framing))
        refusal(status, body)


@pytest.mark.parametrize("route", ["tokenize", "decode", "cancel", "prefill", "keep"])
async def test_an_unknown_field_is_refused_by_its_name(door: Door, route: str) -> None:
    call = ROUTES[route](door.node)
    body = json.dumps(json.loads(call.body) | {"priority_hint": 1}).encode()
    status, reply = await door.send(replace(call, body=body))
    assert status >= 400
    error = decode(ErrorReply, reply)
    assert error.code == "protocol_error"
    assert "priority_hint" in error.message


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (_decode, "prompt_ids", [-1]),
        (_decode, "prompt_ids", []),
        (_decode, "max_tokens", 0),
        (_decode, "epoch", 1.5),
        (_decode, "request_id", "a b"),
        (_decode, "gateway", "../g"),
        (_decode, "protocol", 2),
        (_decode, "sampling", {"temperature": 0.0, "seed": "-1"}),
        (_prefill, "start", -1),
        (_prefill, "compatibility", "x"),
        (_cancel, "epoch", None),
        (_tokenize, "text", 5),
    ],
)
async def test_a_field_out_of_bounds_is_refused_by_its_name(
    door: Door, kind: Callable[[Node], Call], field: str, value: object
) -> None:
    call = kind(door.node)
    body = json.dumps(json.loads(call.body) | {field: value}).encode()
    status, reply = await door.send(replace(call, body=body))
    assert status >= 400
    assert field in decode(ErrorReply, reply).message
    assert door.node.worker.prefill.admitted == 0


@pytest.mark.parametrize("body", [b"null", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"text": "\\ud800"}', b""])
async def test_a_body_that_is_no_message_is_refused(door: Door, body: bytes) -> None:
    status, reply = await door.send(replace(_tokenize(door.node), body=body))
    assert 400 <= status < 600
    assert decode(ErrorReply, reply).code in {"protocol_error", "invalid_request"}


async def test_tokenizing_needs_exactly_one_kind_of_input(door: Door) -> None:
    requests: list[Message] = [
        TokenizeRequest(),
        TokenizeRequest(text="a", messages=[ChatMessage(role="user", content="a")]),
        TokenizeRequest(messages=[]),
    ]
    for request in requests:
        status, reply = await door.send(replace(_tokenize(door.node), body=encode(request)))
        assert (status, decode(ErrorReply, reply).param) == (400, "messages")


async def test_an_event_stream_needs_a_name(door: Door) -> None:
    for path in ("/events", "/events?gateway=", "/events?gateway=" + "g" * 129):
        status, reply = await door.send(replace(_events(door.node), path=path))
        assert (status, decode(ErrorReply, reply).param) == (400, "gateway")
