"""Data sets that can be had by name, byte for byte: where from, at which commit, with which hash.

Owns the list. Refuses to fetch (catalogue/fetch.py does, verified and continued as for models). Only files that are
used as they are published can be had by name; others have to be laid into the folder by hand, and the list says where
they are from. Licences are the sets' own: read them before you publish anything made from these files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_llm.bench.accuracy.datasets import SOURCES
from edge_llm.catalogue.manifest import ModelEntry, Source
from edge_llm.errors import ConfigError

_RAW: Final = "https://raw.githubusercontent.com"
_FOUNDRY: Final = "mosaicml/llm-foundry/8c8dd48f72168c5d51e2f7b151595892a8fba43d/scripts/eval/local_data"


@dataclass(frozen=True, slots=True)
class Published:
    """One file. `place` is repository, commit and path."""

    place: str
    size: int
    sha256: str
    licence: str


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A set that somebody has to lay out as the task needs it. `origin`: repository and commit, or paper."""

    origin: str
    licence: str


_ARC: Final = Elsewhere(
    "AGI-Edgerunners/LLM-Adapters at 8166572, dataset/ARC-*/test.json; arXiv 1803.05457", "CC BY-SA 4.0"
)
ELSEWHERE: Final[dict[str, Elsewhere]] = {
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "hellaswag": Elsewhere("rowanz/hellaswag; arXiv 1905.07830", "MIT"),
    "ifeval": Elsewhere(
        "google-research/google-research, instruction_following_eval/data; arXiv 2311.07911", "Apache-2.0"
    ),
    "mmlu": Elsewhere("hendrycks/test at 785eba5, data; arXiv 2009.03300", "MIT"),
    "wikitext": Elsewhere("wiki.test.raw of WikiText-2 raw; arXiv 1609.07843", "CC BY-SA 3.0, GFDL"),
}
PUBLISHED: Final[dict[str, Published]] = {
    "boolq": Published(
        f"{_FOUNDRY}/reading_comprehension/boolq.jsonl",
        2_210_395,
        "454ff101e614370bb1807fe7ebbda6fdb57e794b9662cc1ccae211bf1ff626c8",
        "CC BY-SA 3.0",
    ),
    "gsm8k": Published(
        "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/test.jsonl",
        749_738,
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        "MIT",
    ),
    "lambada": Published(
        f"{_FOUNDRY}/language_understanding/lambada_openai.jsonl",
        1_895_241,
        "411bfbe5b9054346b6a19299c0242670adbefb9162efd958593cbc0290b8c9dc",
        "MIT; evaluation only",
    ),
    "piqa": Published(
        f"{_FOUNDRY}/commonsense_reasoning/piqa.jsonl",
        533_992,
        "d2870e73aec5154df3faf259b7700876e11608eebdf69e9d6667435673dbe4e0",
        "AFL-3.0",
    ),
    "truthfulqa": Published(
        "benedictflorance/truthfulqa_experiments/6fdfd38288e86296582a584694df5cf43d1f634a/datasets/TruthfulQA.csv",
        443_719,
        "99d6ae7755e3b435eade956068c9de7c0c474770344237aeb66b56519ba4b697",
        "Apache-2.0",
    ),
    "winogrande": Published(
        f"{_FOUNDRY}/language_understanding/winogrande.jsonl",
        312_369,
        "ea1592526f3bfdd0948ed3acb1b4dfa3f83d23698917118688ee1df7f8d4b8d7",
        "CC BY",
    ),
}


def wanted(names: Sequence[str], folder: Path) -> list[tuple[ModelEntry, Path]]:
    """What to fetch, and where it belongs below `folder`. Raises ConfigError with the known names."""
    unknown = [name for name in names if name not in PUBLISHED]
    if unknown:
        raise ConfigError(
            f"{unknown[0]!r} cannot be fetched by name: known are {', '.join(PUBLISHED)}. "
            "Lay other sets into the folder of --data yourself (`--list` says which file each needs)"
        )
    return [(entry_of(name, PUBLISHED[name]), folder / SOURCES[name].file) for name in dict.fromkeys(names)]


def licence_of(name: str) -> str | None:
    """None of what ships with this program: its own."""
    known = PUBLISHED.get(name) or ELSEWHERE.get(name)
    return known.licence if known else None


def entry_of(name: str, published: Published) -> ModelEntry:
    """As the catalogue has it."""
    return ModelEntry(
        name=name,
        file=Path(SOURCES[name].file).name,
        size=published.size,
        sha256=published.sha256,
        licence=published.licence,
        sources=(Source(url=f"{_RAW}/{published.place}"),),
    )
