"""`make test-cluster`: a real Kubernetes on this machine, edge-llm on it as README says, and what may go wrong.

Owns the command line, the order, Ctrl-C, the time and the exit code: 0 all passed, 1 something failed (the image could
not be built, too), 2 this machine lacks something (the message says what), 3 nothing failed, but the time was up before
all was tried, 130 interrupted. Refuses to know how anything is done.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final

import edge_llm
from edge_llm.bench.models import local_model
from edge_llm.bench.record import RESULTS_DIR
from edge_llm.bench.run import Run
from edge_llm.config import DEFAULT_MODEL, cache_dir
from edge_llm.errors import EdgeLLMError
from tests.kubernetes import (
    image,
    requirements,
    scenarios_cluster,
    scenarios_scale,
    scenarios_serving,
    scenarios_trouble,
    scenarios_upgrade,
)
from tests.kubernetes.build import CLUSTER, KUBERNETES, KWOK, SIMULATOR, NotBuilt, built
from tests.kubernetes.cluster import Cluster, clean, cluster, only_one
from tests.kubernetes.deploy import NAMESPACE, Deployed, make_keys
from tests.kubernetes.ledger import Ledger
from tests.kubernetes.models import Shelf
from tests.kubernetes.outside import outside
from tests.kubernetes.play import OUT_OF_TIME, Ends, play
from tests.kubernetes.shell import Broken, moved_to
from tests.kubernetes.site import NODE_PORT, OUTSIDE, PREFIX
from tests.kubernetes.stage import ROLES, Scenario, Stage

ALL: Final[tuple[Scenario, ...]] = (
    *scenarios_serving.SCENARIOS,
    *scenarios_cluster.SCENARIOS,
    *scenarios_trouble.SCENARIOS,
    *scenarios_scale.SCENARIOS,
    *scenarios_upgrade.SCENARIOS,  # the last one: it leaves the cluster upgraded
)
# Without these nothing else can be tried.
_FIRST: Final = 2
_NOT_FINISHED: Final = 3


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make test-cluster ARGS=...", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="WORDS", help="scenarios with these words only")
    parser.add_argument("--list", action="store_true", help="name the scenarios")
    parser.add_argument("--image", type=Path, help="OCI archive of edge-llm (default: what `make image` left in dist)")
    parser.add_argument("--build-image", action="store_true", help="build that of this checkout first")
    parser.add_argument("--time-s", type=float, help="stop in an orderly way when so many seconds are over")
    parser.add_argument("--again", action="store_true", help="try what failed once more at the end")
    parser.add_argument("--output", type=Path, default=Path(RESULTS_DIR), help="folder of the record")
    parser.add_argument("--install", action="store_true", help="install what is missing by apt-get")
    parser.add_argument(
        "--is-ready", action="store_true", help="say whether it can run without building; start nothing"
    )
    parser.add_argument("--down", action="store_true", help="remove what a run left that was killed; start nothing")
    parser.add_argument("--keep", action="store_true", help="after the scenarios leave the cluster up until Ctrl-C")
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    began_s, asked = time.monotonic(), arguments(words)
    if asked.list:
        print("\n".join(scenario.name for scenario in ALL))
        return 0
    try:
        if asked.install:
            requirements.install(builds_image=asked.build_image)
        if asked.is_ready:
            return _is_ready(asked)
        requirements.check()
        if asked.down:
            with only_one():
                clean(print)
            return 0
        return _tested(asked, Ends(began_s, asked.time_s))
    except EdgeLLMError as error:
        print(f"test-cluster: {error.message}", file=sys.stderr)
        return 2


def _is_ready(asked: argparse.Namespace) -> int:
    """For CI, which runs this where it costs minutes and not an hour. 0: it would start at once."""
    lacks = [f"package {name}" for name in requirements.missing()]
    lacks += [] if os.geteuid() == 0 else ["root"]
    lacks += [] if CLUSTER.is_built else [f"Kubernetes {KUBERNETES} in the cache"]
    lacks += [] if SIMULATOR.is_built else [f"kwok {KWOK} in the cache"]
    lacks += _lacks_image(asked)
    print(f"test-cluster: {'ready' if not lacks else 'not here: no ' + ', no '.join(lacks)}")
    return 2 if lacks else 0


def _lacks_image(asked: argparse.Namespace) -> list[str]:
    if asked.build_image:
        return [lack] if (lack := image.cannot_build()) else []
    archive = _archive(asked)
    return [] if archive.is_file() else [f"image at {archive} (`make image`)"]


def _archive(asked: argparse.Namespace) -> Path:
    return asked.image or image.archive()


def _tested(asked: argparse.Namespace, ends: Ends) -> int:
    signal.signal(signal.SIGTERM, _as_interrupt)
    if asked.build_image and (status := _built(ends)):
        return status
    archive = _archive(asked)
    if not archive.is_file():
        raise Broken(f"there is no image {archive}: `make image` builds it, --image FILE names another one")
    run = Run("test-cluster", ["make", "test-cluster", *sys.argv[1:]], {"only": asked.only}, folder=asked.output)
    run.models.append(local_model(DEFAULT_MODEL, lambda *_: None).facts)
    ledger, archive = Ledger(run, KUBERNETES), _kept(archive)
    ledger.say(
        f"edge-llm {edge_llm.__version__}, commit {run.source.commit}{' and changes' * bool(run.source.is_dirty)}"
    )
    ledger.say(f"image of commit {image.revision(archive)}")
    with suppress(NotBuilt):  # its scenario says why; there, no way leads out to fetch its modules
        built(SIMULATOR, ledger.say)
    shelf = Shelf(cache_dir())
    labels = {node: {"edge-llm/role": role} for node, role in ROLES.items()}
    is_complete = False
    try:
        with cluster(len(ROLES), {"edge-llm": archive}, labels, shelf.stock, ledger.say) as made, moved_to(OUTSIDE):
            asyncio.run(_played(made, ledger, asked, shelf, ends))
            is_complete = OUT_OF_TIME not in ledger.untested.values()
    except KeyboardInterrupt:
        print("interrupted: keeping what was tried", file=sys.stderr)
    ledger.last_lines()
    path = ledger.write(is_complete, asked.output)
    print(f"record: {path}")
    if not is_complete and OUT_OF_TIME not in ledger.untested.values():
        return 130
    return 1 if ledger.failed else 0 if is_complete else _NOT_FINISHED


def _built(ends: Ends) -> int:
    """The exit code that its end means; 0: go on."""
    try:
        image.build(ends.left_s)
    except KeyboardInterrupt:
        return 130
    except TimeoutError as error:
        print(f"test-cluster: {OUT_OF_TIME}: {error}", file=sys.stderr)
        return _NOT_FINISHED
    except Broken as error:
        print(f"test-cluster: {error.message}", file=sys.stderr)
        return 1
    return 0


def _kept(archive: Path) -> Path:
    """A copy: all nodes import the same bytes, whoever builds the next one meanwhile."""
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}image-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(shutil.copy(archive, folder))


def _as_interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


async def _played(made: Cluster, ledger: Ledger, asked: argparse.Namespace, shelf: Shelf, ends: Ends) -> None:
    keys = make_keys(made.site.run / "keys")
    edge = Deployed(made, keys)
    async with outside(f"http://{made.site.control.ip}:{NODE_PORT}", keys.api_key.read_text()) as client:
        stage = Stage(made, edge, client, ledger)
        rest = [one for one in ALL[_FIRST:] if not asked.only or any(words in one.name for words in asked.only)]
        keep_levels = partial(shelf.keep_levels, made.site.run / "volumes")
        await play(stage, ALL[:_FIRST], rest, ends, keep_levels, is_tried_again=asked.again)
        if asked.keep:
            ledger.say(
                f"the cluster stays until Ctrl-C: nsenter --net=/run/netns/{made.site.control.namespace} "
                f"{made.site.binaries}/kubectl --kubeconfig {made.site.admin} -n {NAMESPACE} get pods"
            )
            await asyncio.Event().wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
