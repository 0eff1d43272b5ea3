"""Workers from a Kubernetes namespace: the only door to its API server.

Owns the connection, list and watch of EndpointSlices, patience with a server that fails, and the words for what is
wrong. What slices mean is endpoint_slices.py's. Needs get, list and watch on EndpointSlices of one namespace and
nothing else. Refuses to ask workers anything: the prober does, so that a slow worker never holds up the watch.

The official client's request is used, its Watch is not: that one connects again without a pause for as long as a server
hangs up at once, and hides from its caller whether anything was heard.

Invariants: whatever the server does, the last known places stay until it names others: workers live on without it.
A list is asked for first, after every failure and every `resync_s`; else the watch goes on where it stopped. A watch
that lasts longer than was asked for was cut somewhere on the way: it is given up. After a failure comes a pause, longer
each time and with jitter, so that the gateways of a cluster do not come back in one moment; and credentials are read
anew, as tokens and certificates are replaced.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
import structlog
from kubernetes.aio import config as loading
from kubernetes.aio.client import ApiClient, ApiException, Configuration, DiscoveryV1Api
from kubernetes.aio.config.incluster_config import InClusterConfigLoader
from kubernetes.aio.config.kube_config import KUBE_CONFIG_DEFAULT_LOCATION

from edge_llm.cluster.discovery import Discovery, Heard, OnNews
from edge_llm.cluster.endpoint_slices import (
    ROLE_LABEL,
    ROLES,
    SELECTOR,
    EndpointSlice,
    Found,
    Metadata,
    news,
    places_of,
    unknown_roles,
)
from edge_llm.cluster.view import Place
from edge_llm.errors import ConfigError

SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
MAX_LINE_BYTES: Final = 16 << 20
# A failure that lasts is said again after so long, not at every try.
REPEAT_S: Final = 60.0
# What worked for so long and then failed starts the back-off anew; a watch that ends sooner is a failure.
LASTING_S: Final = 1.0
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Patience:
    """How long things may take, in seconds."""

    list_s: float = 10.0
    """A list, from connecting to its last byte."""
    watch_s: float = 30.0
    """The server is asked to end a watch after so long: the bound on how long a dead one goes unnoticed."""
    grace_s: float = 5.0
    """What a watch may take longer than that."""
    resync_s: float = 300.0
    """Then everything is listed anew, in case an event was lost."""
    backoff_s: tuple[float, float] = (0.5, 15.0)
    """Before the second try and before later ones at most; up to half of it is taken off by chance."""
    first_s: float = 5.0
    """How long a start waits for the first list."""


PATIENCE: Final = Patience()


class ApiTrouble(Exception):
    """The server did not give what was asked for. The message is for people."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Expired(ApiTrouble):
    """What the watch should go on from is forgotten (410): list again, nothing is wrong."""


class _Status(msgspec.Struct, frozen=True):
    """How the API server says no."""

    code: int = 0
    message: str = ""


class _Page(msgspec.Struct, frozen=True):
    metadata: Metadata
    items: tuple[EndpointSlice, ...] | None = None


class _Event(msgspec.Struct, frozen=True):
    type: str
    object: msgspec.Raw


class _Bookmark(msgspec.Struct, frozen=True):
    metadata: Metadata


async def client_of(kubeconfig: Path | None, account: Path = SERVICE_ACCOUNT) -> ApiClient:
    """A client by the file where one is named; else by the service account of the pod; else as kubectl finds its
    cluster (KUBECONFIG, ~/.kube/config). Raises ConfigError."""
    found, tried = Configuration(), ""
    try:
        if kubeconfig is None:
            try:
                in_pod: Callable[..., Any] = InClusterConfigLoader
                in_pod(str(account / "token"), str(account / "ca.crt")).load_and_set(found)
                return ApiClient(found)
            except loading.ConfigException as error:
                tried = f"no service account of a pod ({error}); "
        tried += _kubeconfig(kubeconfig)
        file = str(kubeconfig) if kubeconfig else None
        load: Callable[..., Awaitable[object]] = loading.load_kube_config
        await load(file, client_configuration=found, persist_config=False)
        return ApiClient(found)
    except ConfigError:
        raise
    except Exception as error:  # a file of others, read by a library that says of no error that it may come
        raise ConfigError(f"no way to a Kubernetes API server: {tried}: {error}") from error


def _kubeconfig(given: Path | None) -> str:
    """Which file will be read, or files (KUBECONFIG may name several). Raises ConfigError where there is none: the
    library would go on with an empty one, and complain of that."""
    usual = os.path.expanduser(KUBE_CONFIG_DEFAULT_LOCATION)
    files = [given] if given is not None else [Path(name) for name in usual.split(os.pathsep) if name]
    if not any(file.exists() for file in files):
        names = " or ".join(map(str, files)) or "that KUBECONFIG names"
        raise ConfigError(
            f"no way to a Kubernetes API server: there is no file {names}: say where your kubeconfig is, by "
            "`export KUBECONFIG=FILE` or --kubeconfig FILE (on a server of K3s: /etc/rancher/k3s/k3s.yaml)"
        )
    return os.pathsep.join(map(str, files))


class Kubernetes(Discovery):
    """Places out of the EndpointSlices of one namespace, kept up while `watching` is entered."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[ApiClient]],
        namespace: str,
        patience: Patience = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._connect, self._namespace = connect, namespace
        self._patience, self._clock, self._chance = patience, clock, chance
        self._slices: dict[str, EndpointSlice] = {}
        self._found: tuple[Found, ...] = ()
        self._unknown: dict[str, str] = {}
        self._on_news: OnNews = lambda _: None
        self._tried = asyncio.Event()
        self._has_listed = False
        self._heard_s = self._failing_s = clock()
        self._problem = self._said = ""
        self._said_s, self._is_said = float("-inf"), False
        self._places: tuple[Place, ...] = ()

    def places(self) -> tuple[Place, ...]:
        return self._places

    def heard(self) -> Heard:
        return Heard(self._clock() - self._heard_s, self._problem)

    @asynccontextmanager
    async def watching(self, on_news: OnNews) -> AsyncIterator[None]:
        """Waits, for a few seconds, until the first list is there or has failed; then the gateway starts without."""
        self._on_news = on_news
        running = asyncio.create_task(self._run(), name="kubernetes")
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._patience.first_s):
                    await self._tried.wait()
            yield
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    # -- the loop

    async def _run(self) -> None:
        failures = 0
        while True:
            began_s = self._clock()
            trouble = await self._follow()
            self._tried.set()
            failures = 1 if self._clock() - began_s >= LASTING_S else failures + 1
            await asyncio.sleep(pause_s(self._patience, failures, self._chance(), trouble.retry_after_s))

    async def _follow(self) -> ApiTrouble:
        """List and watch until something fails."""
        try:
            async with await self._connect() as client:
                api = DiscoveryV1Api(client)
                while True:
                    version, listed_s = await self._list(api), self._clock()
                    while self._clock() - listed_s < self._patience.resync_s:
                        version = await self._watch(api, version)
        except Expired as error:
            log.info("listing EndpointSlices anew", reason=str(error))
            return error
        except ApiTrouble as error:
            self._say(str(error))
            return error
        except ConfigError as error:
            self._say(error.message)
            return ApiTrouble(error.message)
        except Exception as error:  # top of the task: places that nobody renews would be believed for ever
            log.error("discovery failed", error=repr(error), exc_info=True)
            self._problem = f"discovery failed: {error!r}; see the log"
            return ApiTrouble(self._problem)

    async def _list(self, api: DiscoveryV1Api) -> str:
        """Everything as it is now; the version to watch from."""
        async with self._asking("list", self._patience.list_s):
            reply = await api.list_namespaced_endpoint_slice_without_preload_content(
                self._namespace, label_selector=SELECTOR, _request_timeout=float(self._patience.list_s)
            )
            async with reply:
                await self._refuse("list", reply)
                page = msgspec.json.decode(await reply.read(), type=_Page)
        self._heard_s = self._clock()
        self._slices = {one.metadata.name: one for one in page.items or ()}
        self._renew()
        self._tried.set()
        if not self._has_listed:
            self._has_listed = True
            log.info("places from Kubernetes", namespace=self._namespace, places=len(self._places))
            if not page.items:
                log.warning("no Service of workers", namespace=self._namespace, selector=SELECTOR)
        return page.metadata.resource_version

    async def _watch(self, api: DiscoveryV1Api, version: str) -> str:
        """Changes since `version` until the server ends the watch; the version to go on from."""
        watch_s = max(1, round(self._patience.watch_s * (1 + self._chance() / 5)))
        limit_s = watch_s + self._patience.grace_s
        began_s = self._clock()
        async with self._asking("watch", limit_s):
            reply = await api.list_namespaced_endpoint_slice_without_preload_content(
                self._namespace,
                label_selector=SELECTOR,
                resource_version=version,
                watch=True,
                allow_watch_bookmarks=True,
                timeout_seconds=watch_s,
                _request_timeout=limit_s + 1.0,
            )
            async with reply:
                await self._refuse("watch", reply)
                self._well()
                async for line in _lines(reply.content):
                    version = self._take(msgspec.json.decode(line, type=_Event)) or version
                    self._heard_s = self._clock()
        self._heard_s = self._clock()
        if self._heard_s - began_s < min(LASTING_S, watch_s / 2):
            raise ApiTrouble("the API server ends a watch as soon as it is open")
        return version

    # -- what was heard

    def _take(self, event: _Event) -> str:
        """The version after this event."""
        if event.type == "ERROR":
            raise _trouble("watch", msgspec.json.decode(event.object, type=_Status), self._namespace)
        if event.type == "BOOKMARK":
            return msgspec.json.decode(event.object, type=_Bookmark).metadata.resource_version
        one = msgspec.json.decode(event.object, type=EndpointSlice)
        if event.type == "DELETED":
            self._slices.pop(one.metadata.name, None)
        elif event.type in ("ADDED", "MODIFIED"):
            self._slices[one.metadata.name] = one
        self._renew()
        return one.metadata.resource_version

    def _renew(self) -> None:
        """The slices changed."""
        before, self._found = self._found, places_of(self._slices.values())
        unknown = unknown_roles(self._slices.values())
        for name, role in unknown.items() - self._unknown.items():
            log.warning(
                "unknown role: its workers are not used",
                endpoint_slice=name,
                label=ROLE_LABEL,
                role=role,
                known=", ".join(ROLES),
            )
        self._unknown = unknown
        if changed := news(before, self._found):
            self._places = tuple(found.place for found in self._found)
            self._on_news(changed)

    def _say(self, problem: str) -> None:
        """A failure is said once a minute while it lasts, and at once when it is another one."""
        now_s = self._clock()
        if not self._problem:
            self._failing_s = self._heard_s
        self._problem = problem
        if problem != self._said or now_s - self._said_s >= REPEAT_S:
            self._said, self._said_s, self._is_said = problem, now_s, True
            log.warning(
                "no word from the Kubernetes API server; the last known places are kept",
                message=problem,
                places=len(self._places),
                silent_s=round(now_s - self._heard_s, 1),
            )

    def _well(self) -> None:
        if self._is_said:
            log.info("the Kubernetes API server answers again", silent_s=round(self._clock() - self._failing_s, 1))
        self._problem, self._is_said = "", False
        self._heard_s = self._clock()

    @asynccontextmanager
    async def _asking(self, verb: str, limit_s: float) -> AsyncIterator[None]:
        """A deadline, and what goes wrong in words."""
        try:
            async with asyncio.timeout(limit_s):
                yield
        except TimeoutError as error:
            raise ApiTrouble(
                f"cannot {verb} EndpointSlices: the answer did not come to its end within {limit_s:.0f} s"
            ) from error
        except (aiohttp.ClientError, ApiException, loading.ConfigException, OSError) as error:
            raise ApiTrouble(f"cannot {verb} EndpointSlices: {str(error) or type(error).__name__}") from error
        except (msgspec.DecodeError, ValueError) as error:
            raise ApiTrouble(f"cannot {verb} EndpointSlices: what came is not the API's JSON: {error}") from error

    async def _refuse(self, verb: str, reply: aiohttp.ClientResponse) -> None:
        """Raises ApiTrouble unless the answer is one."""
        if reply.status == 200:
            return
        try:
            status = msgspec.json.decode(await start_of(reply.content, 1 << 16), type=_Status)
        except msgspec.DecodeError:
            status = _Status()
        said = _Status(reply.status, status.message or reply.reason or "")
        retry = reply.headers.get("retry-after", "")
        raise _trouble(verb, said, self._namespace, float(retry) if retry.isdecimal() else 0.0)


async def start_of(content: aiohttp.StreamReader, most_bytes: int) -> bytes:
    """To the end, or so much of it. One `read` gives what has come by then."""
    found = b""
    while len(found) < most_bytes and (more := await content.read(most_bytes - len(found))):
        found += more
    return found


def pause_s(patience: Patience, failures: int, chance: float, retry_after_s: float = 0.0) -> float:
    """Before the next try, after so many failures in a row. `chance`: 0 to 1. A server that says when to come back is
    believed, within a minute."""
    least_s, most_s = patience.backoff_s
    longest_s = min(most_s, least_s * 2.0 ** min(failures - 1, 32))
    return max(longest_s * (1 - chance / 2), min(REPEAT_S, retry_after_s))


def _trouble(verb: str, status: _Status, namespace: str, retry_after_s: float = 0.0) -> ApiTrouble:
    """What the server said, and what to do about it."""
    what = f"the API server refuses to {verb} EndpointSlices in namespace {namespace}"
    if status.code == 410:
        return Expired(f"the version to watch from is too old: {status.message}")
    if status.code == 403:
        return ApiTrouble(
            f"{what}: a Role with apiGroups [discovery.k8s.io], resources [endpointslices], verbs [get, list, watch] "
            f"is not bound to this gateway's service account, or lacks {verb}. It says: {status.message}"
        )
    if status.code == 401:
        return ApiTrouble(f"{what}: it does not know this identity (a token that expired or was taken back)")
    if status.code == 404:
        return ApiTrouble(f"{what}: it has no discovery.k8s.io/v1 (Kubernetes 1.21 or newer), or is something else")
    return ApiTrouble(f"{what}: {status.code} {status.message}".rstrip(), retry_after_s)


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Whole lines, however they were cut; the rest after the last one was cut off in the middle."""
    pending = bytearray()
    async for data in content.iter_any():
        pending += data
        if len(pending) > MAX_LINE_BYTES:
            raise ValueError(f"a line of more than {MAX_LINE_BYTES} bytes")
        *whole, rest = bytes(pending).split(b"\n")
        pending = bytearray(rest)
        for line in whole:
            if line.strip():
                yield line
    if pending.strip():
        raise ValueError("it ends in the middle of a line")
