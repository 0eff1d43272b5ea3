"""How commands talk to a gateway of ours: its address, the API key, and what can go wrong, in words.

Owns the options and the translation of errors. Refuses to know what is asked.
"""

from __future__ import annotations

import http.client
import json
import shlex
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

import click

from edge_llm.commands.endpoint import Address, open_url
from edge_llm.errors import ConfigError, EdgeLLMError, InvalidRequest, WorkerUnreachable

ASK_S: Final = 10.0
# An order is passed on to a worker, which may be slow to answer while it computes.
ORDER_S: Final = 40.0
MAX_BYTES: Final = 64 << 20
_USUAL: Final = "http://127.0.0.1:8080"
Function = TypeVar("Function", bound=Callable[..., Any])


def gateway_options(command: Function) -> Function:
    """--url and --api-key-file, as parameters of these names."""
    command = click.option(
        "--api-key-file",
        type=click.Path(path_type=Path, dir_okay=False, exists=True),
        help="File with your API key alone.",
    )(command)
    return click.option("--url", type=Address(), default=_USUAL, show_default=True, help="The gateway.")(command)


@dataclass(frozen=True, slots=True)
class Gateway:
    """One gateway, asked as whoever the key says. `options`: those of a command that asks it the same way."""

    url: str
    headers: Mapping[str, str]
    options: Sequence[str] = ()

    @classmethod
    def of(cls, url: str, api_key_file: Path | None) -> Gateway:
        """Raises ConfigError for a key that cannot be used."""
        place = () if url == _USUAL else ("--url", url)
        key = ("--api-key-file", str(api_key_file)) if api_key_file is not None else ()
        return cls(url, _headers(api_key_file), (*place, *key))

    def command(self, *words: str) -> str:
        """`edge-llm cluster WORDS` for this gateway with this key, as a shell takes it."""
        return shlex.join(["edge-llm", "cluster", *words, *self.options])

    def overview(self) -> dict[str, Any]:
        """GET /cluster."""
        return self._ask(urllib.request.Request(f"{self.url}/cluster", headers=dict(self.headers)), ASK_S)

    def order(self, worker: str, what: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST /cluster/WORKER/WHAT: how the worker is then."""
        headers = {**self.headers, "content-type": "application/json"}
        path = f"{self.url}/cluster/{quote(worker, safe='')}/{what}"
        request = urllib.request.Request(path, json.dumps(body).encode(), headers, method="POST")
        return self._ask(request, ORDER_S)

    def _ask(self, request: urllib.request.Request, timeout_s: float) -> dict[str, Any]:
        try:
            with open_url(request, timeout_s) as reply:
                found = json.loads(reply.read(MAX_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                raise _refused(self.url, error) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = getattr(error, "reason", None) or error
            raise WorkerUnreachable(f"no answer from a gateway at {self.url}: {why}") from error
        if not isinstance(found, dict):
            raise WorkerUnreachable(f"{self.url} gives no answer of ours; is it the gateway?")
        return found


def _headers(api_key_file: Path | None) -> dict[str, str]:
    if api_key_file is None:
        return {}
    try:
        key = api_key_file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the API key {api_key_file}: {error}") from error
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{api_key_file} must hold your API key alone, in one line")
    return {"authorization": f"Bearer {key}"}


def _refused(url: str, error: urllib.error.HTTPError) -> EdgeLLMError:
    """The gateway's own words where it has some."""
    try:
        message = str(json.loads(error.read(MAX_BYTES))["error"]["message"])
    except (OSError, LookupError, TypeError, ValueError, http.client.HTTPException):
        return WorkerUnreachable(f"{url} answered {error.code} {error.reason}; is it the gateway?")
    hint = " (give it with --api-key-file)" if error.code == 401 else ""
    return InvalidRequest(f"{message}{hint}") if error.code < 500 else WorkerUnreachable(message)
