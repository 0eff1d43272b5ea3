"""Workers from a file: how two boards without Kubernetes find each other.

The file is YAML, a list of `{name, address}`, both text; `address` is `IP:port`: decode workers hold the
IP against the networks that they may fetch from, and a name says nothing there. It is read again when it changes, so
that a board can be added while the gateway runs. Owns the format and its errors; refuses to ask workers anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import yaml

from edge_llm.cluster.discovery import Discovery
from edge_llm.cluster.view import Place
from edge_llm.errors import ConfigError

_KEYS: Final = frozenset({"name", "address"})
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
MAX_PORT: Final = 65_535
_ADDRESS: Final = re.compile(r"(?:([0-9.]+)|\[([0-9A-Fa-f:.]+)\]):([0-9]{1,5})")


class StaticFile(Discovery):
    """Places out of one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._places: tuple[Place, ...] = ()

    def places(self) -> tuple[Place, ...]:
        """The current list. Raises ConfigError for a file that cannot be used."""
        try:
            stat = self._path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            if stamp != self._stamp:
                self._places, self._stamp = parse_places(self._path.read_text(), str(self._path)), stamp
        except OSError as error:
            raise ConfigError(f"cannot read the workers file {self._path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"the workers file {self._path} is not text in UTF-8") from error
        return self._places


def text_of(workers: Iterable[tuple[str, str]]) -> str:
    """The file of these names and addresses."""
    return yaml.safe_dump([{"name": name, "address": address} for name, address in workers])


def parse_places(text: str, where: str) -> tuple[Place, ...]:
    """Places out of YAML text. Raises ConfigError that names the file, the entry and the allowed keys."""
    try:
        entries = yaml.safe_load(text) or []
    # the library lets what it cannot make of a date or of a very deep list through as it is
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not YAML: {error}") from error
    if not isinstance(entries, list):
        raise ConfigError(f"{where} must be a list of workers, each with name and address")
    places = tuple(_place(entry, number, where) for number, entry in enumerate(entries, 1))
    if len({place.worker for place in places}) != len(places):
        raise ConfigError(f"{where} names a worker twice")
    return places


def _place(entry: object, number: int, where: str) -> Place:
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        got = ", ".join(map(str, entry)) if isinstance(entry, dict) else repr(entry)
        raise ConfigError(f"{where}, worker {number}: the keys are name and address; it has {got}")
    name, address = entry["name"], entry["address"]
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ConfigError(f"{where}, worker {number}: name {name!r} is not one; a name of digits needs quotes")
    if not (isinstance(address, str) and _is_address(address)):
        raise ConfigError(
            f'{where}, worker {number} ({name}): address {address!r} is not "IP:port", such as "10.0.0.11:9001" or '
            '"[fd00::11]:9001"; host names are not looked up'
        )
    return Place(name, address)


def _is_address(text: str) -> bool:
    found = _ADDRESS.fullmatch(text)
    if found is None:
        return False
    four, six, port = found.groups()
    try:
        ip = ip_address(four or six)
    except ValueError:
        return False
    return ip.version == (4 if four else 6) and 0 < int(port) <= MAX_PORT
