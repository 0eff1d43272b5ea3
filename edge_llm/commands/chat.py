"""`edge-llm chat`: talk to a cluster in the terminal."""

from __future__ import annotations

import http.client
import io
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import click

from edge_llm.commands.cluster_state import url_of_the_only_one
from edge_llm.commands.endpoint import Address, open_url
from edge_llm.errors import WorkerUnreachable
from edge_llm.reasons import reason_of

_HELP: Final = "/reset forgets what was said, /quit leaves; Ctrl-C ends an answer"


@click.command()
@click.option(
    "--url",
    type=Address(),
    help="The endpoint (default: that of the only cluster of `up`, or http://127.0.0.1:8080).",
)
@click.option(
    "--api-key-file", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="File with your API key alone."
)
@click.option("--model", help="Model to ask for (default: the only one).")
@click.option("--system", help="System prompt.")
@click.option("--max-tokens", type=int, default=512, show_default=True)
@click.option("--temperature", type=float, default=0.7, show_default=True)
@click.option("--mode", type=click.Choice(["auto", "split", "local"]), default="auto", show_default=True)
def chat(url: str | None, api_key_file: Path | None, system: str | None, **options: Any) -> None:
    """Chat; answers stream. /reset forgets, /quit leaves; Ctrl-C ends an answer, and between answers the chat.

    Reads one question per line when piped; then the first failure ends it. At a terminal a question that failed is
    forgotten and can be asked again.
    """
    url = url or url_of_the_only_one()
    history = [{"role": "system", "content": system}] if system else []
    start = list(history)
    headers = {"authorization": f"Bearer {api_key_file.read_text().strip()}"} if api_key_file else {}
    _check_reachable(url, headers)
    for question in _questions():
        if question in ("/quit", "/exit", "/bye"):
            return
        if question == "/reset":
            history = list(start)
            continue
        if question in ("/help", "/?"):
            click.echo(_HELP, err=True)
            continue
        history.append({"role": "user", "content": question})
        try:
            answer, timings = _ask(url, headers, history, options)
        except WorkerUnreachable as error:
            if not sys.stdin.isatty():
                raise
            click.echo(f"edge-llm: {error.message}", err=True)
            history.pop()
            continue
        history.append({"role": "assistant", "content": answer})
        click.secho("stopped" if timings is None else _summary(timings), dim=True, err=True)


def _check_reachable(url: str, headers: dict[str, str]) -> None:
    """Before the first question is typed. Raises WorkerUnreachable."""
    try:
        with open_url(urllib.request.Request(f"{url}/v1/models", headers=headers), timeout_s=10):
            return
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise WorkerUnreachable(
            f"no answer from {url}: {reason_of(error)}; is a cluster running (`edge-llm up`)?"
        ) from error


def _questions() -> Iterator[str]:
    is_terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no text must not end the conversation
    while True:
        if is_terminal:
            click.secho("> ", nl=False, bold=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _ask(
    url: str, headers: dict[str, str], history: list[dict[str, str]], options: dict[str, Any]
) -> tuple[str, dict[str, Any] | None]:
    """Print an answer as it comes; returns it with its timings; None: it was stopped at a terminal."""
    body = {"messages": history, "stream": True, "edge_llm": {"mode": options["mode"]}}
    body |= {key: options[key] for key in ("model", "max_tokens", "temperature") if options[key] is not None}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json", **headers}
    )
    text = ""
    timings: dict[str, Any] = {}
    with _open(url, request) as reply:
        try:
            for data in _events(reply):
                timings = data.get("timings", timings)
                for choice in data["choices"]:
                    piece = choice["delta"].get("content") or ""
                    text += piece
                    click.echo(piece, nl=False)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            return text, None  # what it said so far stays said
        except (OSError, http.client.HTTPException) as error:
            raise WorkerUnreachable(f"the answer broke off: {error}") from error
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise WorkerUnreachable(f"{url} gives no answer of ours; is it the endpoint of `edge-llm up`?") from error
        finally:
            click.echo()  # whatever follows begins a line
    return text, timings


def _open(url: str, request: urllib.request.Request) -> http.client.HTTPResponse:
    """The reply to a question, nothing of it read. Raises WorkerUnreachable with the words of the other side."""
    try:
        return open_url(request, timeout_s=600)
    except urllib.error.HTTPError as error:
        raise WorkerUnreachable(_complaint(error) or f"{url} answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise WorkerUnreachable(
            f"no answer from {url}: {reason_of(error)}; is a cluster running (`edge-llm up`)?"
        ) from error


def _complaint(error: urllib.error.HTTPError) -> str:
    """What the gateway says is wrong; empty when somebody else answered (a proxy's HTML page)."""
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, LookupError, TypeError, ValueError, http.client.HTTPException):
        return ""


def _events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Until the answer says that it is whole: a connection that ends before that has broken."""
    for line in lines:
        if line.strip() == b"data: [DONE]":
            return
        if line.startswith(b"data: "):
            data = json.loads(line[6:])
            if "error" in data:
                raise WorkerUnreachable(data["error"]["message"])
            yield data
    raise ConnectionError("it has no end")


def _summary(timings: dict[str, Any]) -> str:
    own = timings.get("edge_llm", {})
    return (
        f"{timings.get('prompt_n')} prompt tokens, first token after {own.get('ttft_ms')} ms, "
        f"{timings.get('predicted_per_second')} tokens/s; {own.get('mode')}: "
        f"{own.get('prefill_node')} -> {own.get('decode_node')}, level {own.get('level')}"
    )
