"""A Job in a Kubernetes namespace, from a template that is there: started, followed to its end, stopped.

Owns the requests for CronJobs, Jobs, pods, events and logs, beside kubernetes.py, which owns EndpointSlices and the way
to the API server. Needs get on CronJobs, get, create and delete on Jobs, list on pods and events, get on pods/log:
those of whoever applied the manifests. Refuses to know what a Job measures.

The template is a CronJob that is suspended: image, volumes, Secret and policies are those of the cluster, and nothing
of them is known here. Of its first container the arguments after `--` are replaced.

Invariants: a log is read from its beginning to its end, whatever connection breaks on the way: lines that were heard
are skipped. A Job whose pod cannot start says why and is not left behind; one that is gone is not waited for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import msgspec
from kubernetes.aio.client import ApiClient, ApiException, BatchV1Api, CoreV1Api

from edge_llm.cluster.kubernetes import start_of
from edge_llm.errors import ConfigError, EdgeLLMError

TEMPLATE: Final = "edge-llm-bench"
ARGUMENTS_AFTER: Final = "--"
_OF_JOB: Final = "batch.kubernetes.io/job-name"
_CREATED_BY: Final = "cronjob.kubernetes.io/instantiate"
_ENDED: Final = ("Succeeded", "Failed")
_BLOCK: Final = 1 << 16
_LATER: Final = 429


class JobTrouble(EdgeLLMError):
    """A Job could not be started, or came to no end that says something."""

    code = "job_trouble"


class Refused(JobTrouble):
    """The API server answered, and will answer the same again."""


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds. `silent_s`: a log that says nothing for so long is asked for again, in case its connection is dead."""

    ask_s: float = 20.0
    look_s: float = 1.0
    start_s: float = 600.0
    silent_s: float = 60.0
    lost_s: float = 300.0
    end_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Ended:
    """`exit_code`: None when the pod is gone. `reason`: the kubelet's (OOMKilled, Error, Completed)."""

    exit_code: int | None
    reason: str = ""


def job_of(template: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """What to create. Raises ConfigError when the CronJob is no template of ours."""
    name = template["metadata"]["name"]
    made = msgspec.json.decode(msgspec.json.encode(template["spec"]["jobTemplate"]))  # a copy
    container = made["spec"]["template"]["spec"]["containers"][0]
    given = container.get("args", [])
    if ARGUMENTS_AFTER not in given:
        raise ConfigError(f"the CronJob {name} is no template of a bench: its container has no arguments after `--`")
    container["args"] = [*given[: given.index(ARGUMENTS_AFTER) + 1], *arguments]
    metadata = made.get("metadata", {})
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "generateName": f"{name}-",
            "labels": metadata.get("labels", {}),
            "annotations": {**metadata.get("annotations", {}), _CREATED_BY: "manual"},
        },
        "spec": made["spec"],
    }


class Jobs:
    """Jobs of one namespace."""

    def __init__(self, client: ApiClient, namespace: str, patience: Patience = Patience()) -> None:
        self._client, self._namespace = client, namespace
        self._batch, self._core = BatchV1Api(client), CoreV1Api(client)
        self._patience = patience

    async def start(self, arguments: Sequence[str], template: str = TEMPLATE) -> str:
        """The name of a new Job. Raises JobTrouble, ConfigError."""
        found = await self._asked(
            f"read the CronJob {template}",
            lambda seconds: self._batch.read_namespaced_cron_job_without_preload_content(
                template, self._namespace, _request_timeout=seconds
            ),
            missing=f"there is no CronJob {template} in namespace {self._namespace}, the template of what measures: "
            "kubectl apply -k k3s_manifests/bench",
        )
        body = job_of(found, arguments)
        made = await self._asked(
            "create a Job",
            lambda seconds: self._posted("/apis/batch/v1/namespaces/{namespace}/jobs", body, seconds),
        )
        return str(made["metadata"]["name"])

    async def stop(self, job: str) -> None:
        """Its pod is told to end, and keeps what it has; the Job is gone after that."""
        await self._asked(
            f"delete the Job {job}",
            lambda seconds: self._batch.delete_namespaced_job_without_preload_content(
                job, self._namespace, propagation_policy="Foreground", _request_timeout=seconds
            ),
            missing="",
        )

    async def follow(self, job: str, say: Callable[[str], None], take: Callable[[str], None]) -> Ended:
        """Until its container has ended. `say`: what it waits for; `take`: each line of its log. Raises JobTrouble."""
        pod = await self._started(job, say)
        heard, lost_s = 0, time.monotonic()
        while True:
            try:
                async for line in self._log(pod, heard):
                    heard, lost_s = heard + 1, time.monotonic()
                    take(line)
                ended = await self._ended(job)
            except JobTrouble as error:
                if time.monotonic() - lost_s > self._patience.lost_s:
                    raise
                say(f"lost the log, trying again: {error.message}")
                await asyncio.sleep(self._patience.look_s)
                continue
            lost_s = time.monotonic()
            if ended is not None:
                # a pod may be gone by now; what was heard so far may be all there was, and says so itself
                with suppress(JobTrouble):
                    async for line in self._log(pod, heard, follow=False) if ended.exit_code is not None else _none():
                        take(line)
                return ended

    # -- the pod

    async def _started(self, job: str, say: Callable[[str], None]) -> str:
        """The name of its pod, once its container has started. The Job is deleted when it cannot start in time."""
        said, began_s = "", time.monotonic()
        heard_s = began_s
        while True:
            try:
                pod = await self._pod(job)
                if pod is not None and (pod["status"].get("phase") in _ENDED or _is_running(pod)):
                    return str(pod["metadata"]["name"])
                why = (await self._why(job, pod)) or "waiting for a board that takes it"
                if pod is None:
                    await self._is_there(job)
                heard_s = time.monotonic()
            except JobTrouble as error:
                if isinstance(error, Refused) or time.monotonic() - heard_s > self._patience.lost_s:
                    raise
                why = f"trying again: {error.message}"
            if why != said:
                said = why
                say(f"{job}: {why}")
            if time.monotonic() - began_s > self._patience.start_s:
                await self.stop(job)
                raise JobTrouble(f"the Job {job} did not start within {self._patience.start_s:.0f} s: {why}")
            await asyncio.sleep(self._patience.look_s)

    async def _is_there(self, job: str) -> None:
        """Raises ConfigError when it is not: never made, or deleted."""
        await self._asked(
            f"read the Job {job}",
            lambda seconds: self._batch.read_namespaced_job_without_preload_content(
                job, self._namespace, _request_timeout=seconds
            ),
            missing=f"there is no Job {job} in namespace {self._namespace}: it was deleted before it started, or never "
            "was",
        )

    async def _pod(self, job: str) -> dict[str, Any] | None:
        found = await self._asked(
            "list pods",
            lambda seconds: self._core.list_namespaced_pod_without_preload_content(
                self._namespace, label_selector=f"{_OF_JOB}={job}", _request_timeout=seconds
            ),
        )
        pods: list[dict[str, Any]] = found.get("items") or []
        return max(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", ""))) if pods else None

    async def _ended(self, job: str) -> Ended | None:
        """None while it runs. The kubelet needs a moment after the log's end."""
        began_s = time.monotonic()
        while True:
            pod = await self._pod(job)
            if pod is None:
                return Ended(None, "its pod is gone")
            state = _state(pod)
            if "terminated" in state:
                done = state["terminated"]
                return Ended(int(done.get("exitCode", 1)), str(done.get("reason", "")))
            if pod["status"].get("phase") in _ENDED:
                return Ended(None, str(pod["status"].get("reason", pod["status"]["phase"])))
            if time.monotonic() - began_s > 2 * self._patience.look_s:
                return None
            await asyncio.sleep(self._patience.look_s / 4)

    async def _why(self, job: str, pod: Mapping[str, Any] | None) -> str:
        """What a pod that does not start waits for: its own words, else the latest event about it or its Job."""
        waiting = _state(pod).get("waiting", {}) if pod else {}
        if waiting.get("message"):
            return f"{waiting.get('reason', 'waiting')}: {waiting['message']}"
        name = pod["metadata"]["name"] if pod else job
        found = await self._asked(
            "list events",
            lambda seconds: self._core.list_namespaced_event_without_preload_content(
                self._namespace, field_selector=f"involvedObject.name={name},type=Warning", _request_timeout=seconds
            ),
        )
        events = sorted(found.get("items") or [], key=lambda event: str(event.get("lastTimestamp") or ""))
        if events:
            return f"{events[-1].get('reason', '')}: {events[-1].get('message', '')}"
        return str(waiting.get("reason", ""))

    async def _log(self, pod: str, skip: int, follow: bool = True) -> AsyncIterator[str]:
        """Lines after the first `skip`, until the container ends or nothing came for a while."""
        number = 0
        async with self._asking(f"read the log of {pod}"):
            reply = await self._core.read_namespaced_pod_log_without_preload_content(
                pod, self._namespace, follow=follow, _request_timeout=86_400.0
            )
            async with reply:
                await _refuse(f"read the log of {pod}", reply)
                async for line in _lines(reply.content, self._patience.silent_s):
                    number += 1
                    if number > skip:
                        yield line

    # -- requests

    async def _posted(self, path: str, body: Mapping[str, Any], seconds: float) -> aiohttp.ClientResponse:
        """The object as it is: the library's models would drop what a newer cluster put into its template."""
        request = await self._client.param_serialize(
            "POST",
            path,
            path_params={"namespace": self._namespace},
            header_params={"Accept": "application/json", "Content-Type": "application/json"},
            body=body,
            auth_settings=["BearerToken"],
        )
        reply = await self._client.call_api(*request, _preload_content=False, _request_timeout=seconds)
        answered: aiohttp.ClientResponse = reply.response
        return answered

    async def _asked(
        self, what: str, ask: Callable[[float], Awaitable[Any]], missing: str | None = None
    ) -> dict[str, Any]:
        """`missing`: what a 404 means; empty: nothing bad."""
        async with self._asking(what):
            reply = await ask(self._patience.ask_s)
            async with reply:
                if reply.status == 404 and missing is not None:
                    if missing:
                        raise ConfigError(missing)
                    return {}
                await _refuse(what, reply)
                found: dict[str, Any] = msgspec.json.decode(await reply.read())
                return found

    @asynccontextmanager
    async def _asking(self, what: str) -> AsyncIterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise JobTrouble(f"cannot {what}: the API server did not answer in time") from error
        except (aiohttp.ClientError, ApiException, OSError) as error:
            raise JobTrouble(f"cannot {what}: {str(error) or type(error).__name__}") from error
        except msgspec.DecodeError as error:
            raise JobTrouble(f"cannot {what}: what came is not the API's JSON: {error}") from error


def _state(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    statuses = pod["status"].get("containerStatuses") or [{}]
    state: Mapping[str, Any] = statuses[0].get("state") or {}
    return state


def _is_running(pod: Mapping[str, Any]) -> bool:
    return bool({"running", "terminated"} & _state(pod).keys())


async def _refuse(what: str, reply: aiohttp.ClientResponse) -> None:
    """Raises JobTrouble unless the answer is one."""
    if reply.status < 300:
        return
    said = (await start_of(reply.content, _BLOCK)).decode(errors="replace")
    try:
        said = msgspec.json.decode(said, type=dict[str, Any]).get("message", said)
    except msgspec.DecodeError:
        pass
    kind = Refused if reply.status < 500 and reply.status != _LATER else JobTrouble
    raise kind(f"the API server refuses to {what}: {reply.status} {said}".rstrip())


async def _lines(content: aiohttp.StreamReader, silent_s: float) -> AsyncIterator[str]:
    """Whole lines; a last one that was cut off comes whole when the log is asked for again."""
    pending = b""
    while True:
        try:
            async with asyncio.timeout(silent_s):
                data = await content.readany()
        except TimeoutError:
            return
        if not data:
            return
        *whole, pending = (pending + data).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")


async def _none() -> AsyncIterator[str]:
    return
    yield ""
