"""The ways to use two nodes that are compared, and each of them running, with a client before it.

Owns what is started for each and what its requests say of how to be served. Refuses to know how servers are started
(`Launch`), what is sent and when.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from edge_llm.bench.goodput import REGIMES, Limits, Regime
from edge_llm.bench.layout import Launch, Layout, LocalProcess
from edge_llm.bench.least_busy import LeastBusy
from edge_llm.bench.record import Process
from edge_llm.bench.run import Run
from edge_llm.bench.serve.answers import Answer, Call
from edge_llm.bench.serve.driver import replay, sending
from edge_llm.machine import peak_memory_bytes, process_usage

SPLIT, LOCAL, AUTO, SERVER = "split", "local", "auto", "llama_server"
UNSPLIT: Final = "local_and_auto"
BASELINE: Final = "baseline"
NODES: Final = 2
# A gateway refuses by itself who is predicted to wait longer than its bound. Here the client's limits say what is too
# late, and it hangs up then: nobody shall be refused whose limit would have allowed the wait.
NO_BOUND: Final = ("--queue-predicted-wait-s", "3600", "--queue-wait-s", "3600")
NO_BOUND_NOTE: Final = (
    "our gateways refuse nobody for a predicted wait (bounds set to an hour): clients hang up when no limit can be kept"
)
FLAGS_NOTE: Final = (
    "llama-server's flags are one choice for each trace, by the requests that keep limits at a middle rate, both "
    "regimes together: flags chosen for one regime might serve that one better"
)
_CUT_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Arrangement:
    """A way to use the nodes: what is started, and what goes into every body sent to it. `regime`: whose limits it is
    told; it is measured for that one only. None: it knows no limits, one replay serves all regimes."""

    name: str
    layout: Layout
    launches: tuple[Launch, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    regime: Regime | None = None

    @property
    def label(self) -> str:
        return f"{self.name} ({self.regime.name})" if self.regime else self.name

    def shares(self, other: Arrangement) -> bool:
        """Whether both are the same servers, asked otherwise."""
        return (self.layout, self.launches, self.regime) == (other.layout, other.launches, other.regime)

    @property
    def regimes(self) -> tuple[Regime, ...]:
        """Those that its replays are judged by."""
        return (self.regime,) if self.regime else REGIMES

    def body(self, limits: Mapping[str, Limits]) -> Mapping[str, Any]:
        """What its requests say of how to be served, given the limits of each regime."""
        if self.regime is None:
            return self.extra
        own = limits[self.regime.name]
        return {"edge_llm": {**self.extra["edge_llm"], "slo": {"ttft_s": own.ttft_s, "tpot_s": own.tpot_s}}}


@dataclass(frozen=True, slots=True)
class Servers:
    """Two servers that know nothing of each other, started with flags to be tried; the best ones are used. They are in
    order of what is expected of them: the last ones are used when there is no time to try."""

    trials: Mapping[str, tuple[Launch, ...]]


def arrangements(launch: Launch, options: tuple[str, ...]) -> list[Arrangement]:
    """Ours. A mixed worker may read prompts for the other one: in mode local it never does, in auto when that is
    predicted to be better. All three are told the limits and run once for each regime, so that they differ in nothing
    but who reads the prompts: a mixed worker that knows the limits of its streams reads beside them what they can bear
    (engine/pacing.py), and that is no merit of auto's. Local and auto are asked of the same servers."""
    split, both = (
        Layout(SPLIT, prefill=1, decode=1, options=options, gateway_options=NO_BOUND),
        _unsplit(UNSPLIT, options),
    )
    return [
        Arrangement(name, layout, (launch,), _mode(name), regime)
        for regime in REGIMES
        for name, layout in ((SPLIT, split), (LOCAL, both), (AUTO, both))
    ]


def groups(contestants: Sequence[Arrangement]) -> list[tuple[Arrangement, ...]]:
    """Neighbours that share servers together."""
    found: list[tuple[Arrangement, ...]] = []
    for one in contestants:
        if found and found[-1][0].shares(one):
            found[-1] = (*found[-1], one)
        else:
            found.append((one,))
    return found


def baseline(launch: Launch, options: tuple[str, ...]) -> Arrangement:
    """Two nodes that do everything themselves and know no limits: what the limits are derived from."""
    return Arrangement(BASELINE, _unsplit(BASELINE, options), (launch,), _mode(LOCAL))


def _unsplit(name: str, options: tuple[str, ...]) -> Layout:
    return Layout(name, mixed=NODES, options=options, gateway_options=NO_BOUND)


def _mode(mode: str) -> Mapping[str, Any]:
    return {"edge_llm": {"mode": mode}}


def plain(launches: tuple[Launch, ...]) -> Arrangement:
    """Servers without a gateway: the client asks the least busy one."""
    return Arrangement(SERVER, Layout(SERVER), launches)


class Send(Protocol):
    """Replays calls to a running arrangement."""

    async def __call__(
        self, calls: Sequence[Call], cut_after_s: float = ..., on_sent: Callable[[int], None] = ...
    ) -> list[Answer]: ...


@asynccontextmanager
async def running(run: Run, *sharing: Arrangement) -> AsyncIterator[Send]:
    """The servers of one arrangement, or of several that share them, started for the block; what the processes used
    goes into `run`."""
    arrangement, label = sharing[0], " and ".join(one.label for one in sharing)
    async with AsyncExitStack() as stack:
        started = [await stack.enter_async_context(launch(arrangement.layout)) for launch in arrangement.launches]
        session = await stack.enter_async_context(sending())
        servers = LeastBusy([server.url for server in started])
        processes = [process for server in started for process in server.processes]
        before, began_s = {process.pid: _rss(process) for process in processes}, time.monotonic()

        async def send(
            calls: Sequence[Call], cut_after_s: float = _CUT_S, on_sent: Callable[[int], None] = lambda _sent: None
        ) -> list[Answer]:
            return await replay(calls, session, servers, cut_after_s, on_sent)

        try:
            yield send
        finally:
            wall_s = time.monotonic() - began_s
            for process in processes:
                name = f"{label}: {process.name}"
                run.used(_usage(process, name, before[process.pid], wall_s))


def _rss(process: LocalProcess) -> int:
    usage = process_usage(process.pid)
    return usage.rss_bytes if usage else 0


def _usage(process: LocalProcess, name: str, rss_before: int, wall_s: float) -> Process | None:
    usage = process_usage(process.pid)
    if usage is None:
        return None
    peak = peak_memory_bytes(process.pid) or usage.rss_bytes
    return Process(name, process.cores, wall_s, usage.cpu_s, rss_before, usage.rss_bytes, peak, readings=2)
