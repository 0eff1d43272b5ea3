"""A Kubernetes API server that knows one CronJob, its Jobs, their pods and logs: for tests, over a real socket.

Owns what kube-apiserver, the Job controller and a kubelet would do with one Job; a test says how it goes. Refuses what
it was not asked for by this project, with a 404 that names it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

NAMESPACE = "edge-llm"
POD = "bench-pod"
JOB = "edge-llm-bench-1"
TEMPLATE: dict[str, Any] = {
    "metadata": {"name": "edge-llm-bench"},
    "spec": {
        "suspend": True,
        "jobTemplate": {
            "metadata": {"labels": {"app.kubernetes.io/component": "bench"}},
            "spec": {
                "backoffLimit": 0,
                "template": {
                    "spec": {
                        "containers": [
                            {"name": "bench", "image": "i", "args": ["bench", "job", "--output=/r", "--", "cluster"]}
                        ]
                    }
                },
            },
        },
    },
}


@dataclass
class JobServer:
    """`log`: what the container writes; it ends with `exit_code` after that, or when it is told to stop, when it is
    `endless`. `breaks_after`: the first connection to the log is cut after so many lines. `waits`: looks at the pod
    until it runs, -1: for ever, with `waiting` and `events`; `waiting` None: there is no pod yet. `away`: so many looks
    at the pod fail. `takes_pod_away`: its log is gone once it has ended. A Job is there until it is deleted, if it has
    the right name."""

    log: list[str] = field(default_factory=list)
    exit_code: int = 0
    reason: str = "Completed"
    template: dict[str, Any] | None = field(default_factory=lambda: TEMPLATE)
    waits: int = 0
    waiting: dict[str, str] | None = field(default_factory=dict)
    events: list[dict[str, str]] = field(default_factory=list)
    breaks_after: int | None = None
    endless: bool = False
    last_words: list[str] = field(default_factory=list)
    takes_pod_away: bool = False
    refuses: int | None = None
    away: int = 0
    created: list[dict[str, Any]] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    log_reads: int = 0
    is_over: bool = False
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    reading: asyncio.Event = field(default_factory=asyncio.Event)
    asked_again: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def running(self, folder: Path) -> AsyncIterator[Path]:
        """Gives a kubeconfig."""
        app = web.Application()
        batch, core = f"/apis/batch/v1/namespaces/{NAMESPACE}", f"/api/v1/namespaces/{NAMESPACE}"
        app.router.add_get(f"{batch}/cronjobs/edge-llm-bench", self._template)
        app.router.add_post(f"{batch}/jobs", self._create)
        app.router.add_delete(f"{batch}/jobs/{{name}}", self._delete)
        app.router.add_get(f"{batch}/jobs/{{name}}", self._job)
        app.router.add_get(f"{core}/pods", self._pods)
        app.router.add_get(f"{core}/events", self._events)
        app.router.add_get(f"{core}/pods/{POD}/log", self._log)
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        file = folder / "kubeconfig"
        file.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
                    "users": [{"name": "u", "user": {"token": "t"}}],
                    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                    "current-context": "x",
                }
            )
        )
        try:
            yield file
        finally:
            await runner.cleanup()

    async def _template(self, request: web.Request) -> web.StreamResponse:
        if self.refuses is not None:  # in two pieces, as what passes a proxy comes
            reply = web.StreamResponse(status=self.refuses)
            await reply.prepare(request)
            for piece in (b'{"kind": "Status", ', b'"message": "cronjobs is forbidden"}'):
                await reply.write(piece)
                await asyncio.sleep(0.02)
            return reply
        if self.template is None:
            return web.json_response({"kind": "Status", "message": "not found"}, status=404)
        return web.json_response(self.template)

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.created.append(body)
        return web.json_response({"metadata": {"name": f"{body['metadata']['generateName']}1"}}, status=201)

    async def _delete(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name in self.deleted:
            return web.json_response({"kind": "Status", "message": "not found"}, status=404)
        self.deleted.append(name)
        self.stopped.set()
        return web.json_response({})

    async def _job(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name in self.deleted or name != JOB:
            return web.json_response({"kind": "Status", "message": "not found"}, status=404)
        return web.json_response({"metadata": {"name": name}})

    async def _pods(self, request: web.Request) -> web.Response:
        assert request.query["labelSelector"].startswith("batch.kubernetes.io/job-name=")
        if self.away:
            self.away -= 1
            return web.json_response({"kind": "Status", "message": "etcd has no leader"}, status=503)
        if self.waits and self.waiting is None:
            self.waits -= self.waits > 0
            return web.json_response({"items": []})
        if self.is_over:
            state: dict[str, Any] = {"terminated": {"exitCode": self.exit_code, "reason": self.reason}}
        elif self.waits:
            self.waits -= self.waits > 0
            state = {"waiting": self.waiting}
        else:
            state = {"running": {}}
        pod = {"metadata": {"name": POD}, "status": {"phase": "Pending", "containerStatuses": [{"state": state}]}}
        return web.json_response({"items": [pod]})

    async def _events(self, _request: web.Request) -> web.Response:
        return web.json_response({"items": self.events})

    async def _log(self, request: web.Request) -> web.StreamResponse:
        self.log_reads += 1
        if self.is_over and self.takes_pod_away:
            return web.json_response({"kind": "Status", "message": "pods not found"}, status=404)
        if self.log_reads > 2:
            self.asked_again.set()
        reply = web.StreamResponse()
        await reply.prepare(request)
        for number, line in enumerate(self.log):
            if number == self.breaks_after:
                self.breaks_after = None
                await reply.write(line.encode()[: len(line) // 2])  # in the middle of a line
                assert request.transport is not None
                request.transport.abort()
                return reply
            await reply.write(line.encode() + b"\n")
        self.reading.set()
        if self.endless and request.query.get("follow") == "true":
            await self.stopped.wait()
            self.log, self.last_words, self.endless = [*self.log, *self.last_words], [], False
            for line in self.log[number + 1 :] if self.log else ():
                await reply.write(line.encode() + b"\n")
        self.is_over = True
        return reply


def template(**changes: Any) -> dict[str, Any]:
    """The CronJob with other arguments, as a copy."""
    copy: dict[str, Any] = json.loads(json.dumps(TEMPLATE))
    copy["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0].update(changes)
    return copy
