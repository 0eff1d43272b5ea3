"""An API server that knows EndpointSlices: list and watch as Kubernetes speaks them, on real sockets.

What it keeps to (the API's conventions): every change has a version; a list says the version it shows; a watch tells
every change after the version it names, or that this is forgotten (410, as status of the reply or as an event);
selectors decide what is seen, so that an object whose labels stop to match is DELETED; bookmarks say a version and
nothing else; `timeoutSeconds` ends a watch. What can go wrong is switched on by the test.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from aiohttp import web

NAMESPACE: Final = "edge-llm"
PATH: Final = "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
USER: Final = "system:serviceaccount:edge-llm:edge-llm-gateway"
Object = dict[str, Any]


def endpoint(
    pod: str, address: str, *, ready: bool | None = True, serving: bool | None = None, terminating: bool | None = None
) -> Object:
    """One backend as the control plane writes it."""
    conditions = {"ready": ready, "serving": ready if serving is None else serving, "terminating": terminating}
    return {
        "addresses": [address],
        "conditions": {name: value for name, value in conditions.items() if value is not None},
        "nodeName": "a-node",
        "targetRef": {"kind": "Pod", "name": pod, "namespace": NAMESPACE, "uid": f"uid-of-{pod}"},
    }


def endpoint_slice(
    name: str,
    endpoints: Sequence[Object],
    *,
    role: str = "decode",
    port: int = 9001,
    family: str = "IPv4",
    labels: Mapping[str, str] | None = None,
) -> Object:
    """A slice of a headless Service of workers."""
    ours = {"app.kubernetes.io/part-of": "edge-llm", "edge-llm/role": role}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "labels": {"kubernetes.io/service-name": f"edge-llm-{role}", **(ours if labels is None else labels)},
        },
        "addressType": family,
        "endpoints": list(endpoints),
        "ports": [{"name": "worker", "port": port, "protocol": "TCP"}],
    }


@dataclass
class Asked:
    """A request as it came."""

    verb: str
    query: Mapping[str, str]
    authorization: str


@dataclass
class FakeApiServer:
    """State, history and what goes wrong."""

    slices: dict[str, Object] = field(default_factory=dict)
    version: int = 100
    oldest: int = 0
    asked: list[Asked] = field(default_factory=list)
    forbidden: set[str] = field(default_factory=set)
    """Verbs that no Role allows."""
    token: str = ""
    """The one that is accepted; empty: any."""
    refusal: web.Response | None = None
    """Answers everything instead."""
    is_hanging: bool = False
    """Takes requests and says nothing."""
    is_deaf: bool = False
    """Open watches hear of nothing any more, and do not end."""
    is_short: bool = False
    """Ends every watch as soon as it is open."""
    tells_410_in_stream: bool = False
    tls: ssl.SSLContext | None = None
    watches: int = 0
    port: int = 0
    _history: list[tuple[int, Object | None, Object | None]] = field(default_factory=list)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _raw: dict[int, list[bytes]] = field(default_factory=dict)
    _runner: web.AppRunner | None = None

    # -- what a test does to it

    async def put(self, one: Object) -> None:
        """Create or replace a slice."""
        name = one["metadata"]["name"]
        self.version += 1
        before = self.slices.get(name)
        stored = json.loads(json.dumps(one))
        stored["metadata"]["resourceVersion"] = str(self.version)
        self.slices[name] = stored
        await self._record(before, stored)

    async def delete(self, name: str) -> None:
        self.version += 1
        gone = json.loads(json.dumps(self.slices.pop(name)))
        gone["metadata"]["resourceVersion"] = str(self.version)
        await self._record(gone, None)

    def lose(self, name: str) -> None:
        """It is gone, and no watch is told: an event that got lost."""
        self.version += 1
        del self.slices[name]

    async def bookmark(self) -> None:
        """Tell all watches the version of now, which other objects have moved on."""
        self.version += 5
        await self._record(None, None)

    async def forget(self) -> None:
        """History is compacted: who wants to go on from before now cannot."""
        self.version += 1
        self.oldest = self.version
        await self._wake()

    async def say(self, raw: bytes) -> None:
        """Into all open watches, as it is."""
        for queue in self._raw.values():
            queue.append(raw)
        await self._wake()

    async def up(self) -> None:
        """Listen, on the same port as before."""
        app = web.Application()
        app.router.add_get(PATH, self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self.tls, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def down(self) -> None:
        """Nobody listens, and all connections are gone."""
        if self._runner is not None:
            server = self._runner.server
            for connection in list(server.connections) if server else []:
                if connection.transport is not None:
                    connection.transport.abort()
            await self._runner.cleanup()
            self._runner = None

    # -- what it serves

    async def _refuse(self, request: web.Request, refusal: web.Response) -> web.StreamResponse:
        """In two pieces, as what passes a proxy comes."""
        reply = web.StreamResponse(status=refusal.status, headers=refusal.headers.copy())
        await reply.prepare(request)
        assert isinstance(refusal.body, bytes)
        for piece in (refusal.body[:4], refusal.body[4:]):
            await reply.write(piece)
            await asyncio.sleep(0.02)
        return reply

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        verb = "watch" if request.query.get("watch", "").lower() == "true" else "list"
        self.asked.append(Asked(verb, dict(request.query), request.headers.get("authorization", "")))
        if self.is_hanging:
            await asyncio.sleep(3600)
        if self.refusal is not None:
            return await self._refuse(request, self.refusal)
        if self.token and request.headers.get("authorization", "").lower() != f"bearer {self.token}".lower():
            return _status(401, "Unauthorized")
        if verb in self.forbidden:
            return _status(
                403,
                f'endpointslices.discovery.k8s.io is forbidden: User "{USER}" cannot {verb} resource "endpointslices" '
                f'in API group "discovery.k8s.io" in the namespace "{request.match_info["namespace"]}"',
            )
        is_ours = request.match_info["namespace"] == NAMESPACE
        selector = request.query.get("labelSelector", "")
        if verb == "watch":
            return await self._watch(request, selector)
        items = [one for one in self.slices.values() if is_ours and _matches(selector, one)]
        metadata = {"resourceVersion": str(self.version)}
        return web.json_response({"kind": "EndpointSliceList", "metadata": metadata, "items": items})

    async def _watch(self, request: web.Request, selector: str) -> web.StreamResponse:
        since = int(request.query["resourceVersion"])
        if since < self.oldest and not self.tells_410_in_stream:
            return _status(410, f"too old resource version: {since} ({self.oldest})")
        reply = web.StreamResponse(headers={"content-type": "application/json"})
        await reply.prepare(request)
        queue = self._raw[id(reply)] = []
        self.watches += 1
        try:
            async with asyncio.timeout(None if self.is_short else float(request.query["timeoutSeconds"])):
                while not self.is_short:
                    if since < self.oldest:
                        error = {
                            "code": 410,
                            "reason": "Expired",
                            "message": "too old resource version",
                            "kind": "Status",
                        }
                        await reply.write(_line("ERROR", error))
                        break
                    for version, before, after in list(self._history):
                        if version > since and not self.is_deaf:
                            since = version
                            if event := _event(version, selector, before, after):
                                await reply.write(event)
                    while queue:
                        await reply.write(queue.pop(0))
                    async with self._changed:
                        await self._changed.wait()
        except TimeoutError:
            if self.is_deaf:
                await asyncio.sleep(3600)
        finally:
            del self._raw[id(reply)]
            self.watches -= 1
        return reply

    async def _record(self, before: Object | None, after: Object | None) -> None:
        self._history.append((self.version, before, after))
        await self._wake()

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _line(kind: str, what: Object) -> bytes:
    return json.dumps({"type": kind, "object": what}).encode() + b"\n"


def _event(version: int, selector: str, before: Object | None, after: Object | None) -> bytes:
    """What a watch with this selector hears of a change; nothing where it sees neither side."""
    if before is None and after is None:
        return _line("BOOKMARK", {"kind": "EndpointSlice", "metadata": {"resourceVersion": str(version)}})
    saw, sees = (one is not None and _matches(selector, one) for one in (before, after))
    if sees and after is not None:
        return _line("MODIFIED" if saw else "ADDED", after)
    return _line("DELETED", after or before or {}) if saw else b""


def _matches(selector: str, one: Object) -> bool:
    """`key=value`, `key!=value` and `key`, separated by commas."""
    labels = one["metadata"]["labels"]
    for term in filter(None, selector.split(",")):
        key, _, value = term.partition("=")
        if key.endswith("!"):
            if labels.get(key[:-1]) == value:
                return False
        elif key not in labels or ("=" in term and labels[key] != value):
            return False
    return True


def _status(code: int, message: str) -> web.Response:
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}
    return web.json_response(body, status=code)


@asynccontextmanager
async def serving_api(tls: ssl.SSLContext | None = None) -> AsyncIterator[FakeApiServer]:
    server = FakeApiServer(tls=tls)
    await server.up()
    try:
        yield server
    finally:
        await server.down()


def kubeconfig(path: Path, server: FakeApiServer, token: str = "a-token") -> Path:
    """A file that names this server, as kubectl reads it."""
    name = "only"
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": name,
                "clusters": [{"name": name, "cluster": {"server": f"http://127.0.0.1:{server.port}"}}],
                "users": [{"name": name, "user": {"token": token}}],
                "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
            }
        )
    )
    return path
