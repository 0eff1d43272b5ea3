"""What the test's volumes hold from the beginning: boards here have no network to fetch a model by.

Owns where in a volume things lie. Files are real copies, so that one volume's damage is not another's. What `edge-llm
verify` measured in a pod is kept between runs: it says for which build, machine and model it holds, and is measured
again for any other. Refuses to know Kubernetes.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from edge_llm.catalogue.resolve import resolve
from edge_llm.config import DEFAULT_MODEL
from tests.kubernetes.shell import run

# In a volume that is mounted at /var/lib/edge-llm
MODELS: Final = Path("models")
STATE: Final = "edge-llm"
LEVELS: Final = "levels"
WIDE: Final = "random-wide-kv-Q8_0-1.gguf"
_USER: Final = 10001
_MADE: Final = (
    "from pathlib import Path; import sys; from edge_llm.engine.random_model import make_model; "
    "make_model(Path(sys.argv[1]), 'wide-kv', 'Q8_0')"
)


@dataclass(slots=True)
class Shelf:
    """Files by name."""

    cache: Path
    _files: dict[str, Path] = field(default_factory=dict)

    @property
    def _levels(self) -> Path:
        return self.cache / "kubernetes" / LEVELS

    def files(self) -> dict[str, Path]:
        """Fetched or made when they are not there."""
        if not self._files:
            chat = resolve(DEFAULT_MODEL).path
            folder = self.cache / "random"
            if not (folder / WIDE).is_file():  # in a process of its own: it needs the engine
                run(sys.executable, "-c", _MADE, folder, deadline_s=300)
            self._files |= {chat.name: chat, WIDE: folder / WIDE}
        return self._files

    def stock(self, _namespace: str, _claim: str, _node: str, folder: Path) -> None:
        """A new volume gets all of it, as a user copies a model onto a board."""
        target = folder / MODELS
        target.mkdir(parents=True)
        for name, path in self.files().items():
            shutil.copyfile(path, target / name)
        if self._levels.is_dir():
            shutil.copytree(self._levels, folder / STATE / LEVELS)
        # as `chown -R 10001:10001`: pods are user 10001
        for path in (folder, *folder.rglob("*")):
            shutil.chown(path, _USER, _USER)

    def keep_levels(self, volumes: Path) -> None:
        """What was measured in there, for later volumes. `volumes`: folders of nodes with their volumes."""
        for path in volumes.glob(f"*/*/{STATE}/{LEVELS}/*.json"):
            place = self._levels / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
