"""`edge-llm chat` with a scripted user: against a simulated cluster, and against servers that do not behave."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from edge_llm.catalogue.resolve import resolve
from edge_llm.config import DEFAULT_MODEL, cache_dir

DEADLINE_S = 60.0
GREEDY = ("--temperature", "0", "--max-tokens", "4")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "edge_llm", *arguments]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a simulated cluster; one for all conversations of this module."""
    resolve(DEFAULT_MODEL)
    folder = tmp_path_factory.mktemp("chat")
    variables = {name: str(folder / name) for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")}
    environment = {**os.environ, **variables, "EDGE_LLM_CATALOGUE_MODELS_DIR": str(cache_dir() / "models")}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    up = command("up", "--port", port, "--detach", "--", "--simulate")
    subprocess.run(up, env=environment, check=True, capture_output=True, timeout=DEADLINE_S)
    yield f"http://127.0.0.1:{port}"
    subprocess.run(command("down", "--port", port), env=environment, check=True, capture_output=True)


def environment() -> dict[str, str]:
    """With a proxy that cannot reach what is on this machine."""
    rest = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    return {**rest, "http_proxy": "http://127.0.0.1:1/"}


def talk(url: str, said: str, *options: str) -> subprocess.CompletedProcess[str]:
    """One conversation to its end: what `said` has in its lines, then end of input."""
    done = subprocess.run(
        command("chat", "--url", url, *options),
        input=said,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
        env=environment(),
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def prompt_tokens(done: subprocess.CompletedProcess[str]) -> list[int]:
    """How long the prompt of each question was."""
    return [int(number) for number in re.findall(r"^(\d+) prompt tokens", done.stderr, re.MULTILINE)]


# --- a cluster ----------------------------------------------------------------------------------------------------


def test_a_question_is_answered_and_the_end_of_input_ends_it(cluster: str) -> None:
    done = talk(cluster, "What is a prefill?\n", *GREEDY, "--mode", "split")
    assert done.returncode == 0
    assert done.stdout.strip()
    (summary,) = done.stderr.splitlines()
    assert "split: prefill-1 -> decode-1" in summary


def test_a_conversation_is_remembered_until_reset(cluster: str) -> None:
    done = talk(cluster, "Hello\nHello\n/reset\nHello\n", *GREEDY)
    first, second, third = prompt_tokens(done)
    assert second > 2 * first - 10 > first
    assert third == first
    answers = done.stdout.splitlines()
    assert answers[0] == answers[-1]


def test_a_system_prompt_stays_over_a_reset(cluster: str) -> None:
    done = talk(
        cluster, "Hello\n/reset\nHello\n", *GREEDY, "--system", "Answer in rhymes, always, and at great length."
    )
    first, second = prompt_tokens(done)
    assert first == second
    assert first > prompt_tokens(talk(cluster, "Hello\n", *GREEDY))[0]


def test_blank_lines_ask_nothing_and_quit_leaves_the_rest_unasked(cluster: str) -> None:
    done = talk(cluster, "\n   \nHello\n/quit\nHello\n", *GREEDY)
    assert done.returncode == 0
    assert len(prompt_tokens(done)) == 1


def test_nothing_asked_is_nothing_answered(cluster: str) -> None:
    done = talk(cluster, "")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_answers_come_while_they_are_written(cluster: str) -> None:
    """The first words are there while the process waits for the next question."""
    process = subprocess.Popen(
        command("chat", "--url", cluster, *GREEDY), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("Hello\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    assert process.poll() is None
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--model", "no-such-model"), "no-such-model"), (("--max-tokens", "0"), "max_tokens")],
)
def test_what_the_cluster_refuses_is_said_in_its_words(cluster: str, options: tuple[str, ...], words: str) -> None:
    done = talk(cluster, "Hello\n", *options)
    assert done.returncode == 1
    assert done.stderr.startswith("edge-llm: ")
    assert words in done.stderr


# --- servers that do not behave -----------------------------------------------------------------------------------


class Server:
    """Answers every question with `body`, claiming `length` bytes of it; the second and later ones with `then` if it
    is given. `asked` are the messages of each question. `hold`: the first answer does not end before it is set."""

    def __init__(
        self,
        status: int,
        body: bytes,
        length: int | None = None,
        then: bytes | None = None,
        hold: threading.Event | None = None,
    ) -> None:
        self.asked: list[list[dict[str, str]]] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()

            def do_POST(self) -> None:
                asked.append(json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"])
                is_later = then is not None and len(asked) > 1
                said = then if then is not None and is_later else body
                claimed = len(said) if is_later or length is None else length
                self.send_response(200 if is_later else status)
                if claimed >= 0:
                    self.send_header("content-length", str(claimed))
                else:
                    self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                self.wfile.write(said)
                if hold is not None and not is_later:
                    hold.wait(DEADLINE_S)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


PIECE = event(choices=[{"delta": {"content": "half an ans"}}])
CHUNKED = b"%x\r\n" % len(PIECE) + PIECE + b"\r\n"


@pytest.mark.parametrize(
    ("status", "body", "length", "words"),
    [
        (200, PIECE, len(PIECE) + 100, "broke off"),
        (200, CHUNKED, -1, "broke off"),
        (200, PIECE + event(error={"message": "both workers are gone"}), None, "both workers are gone"),
        (503, b'{"error": {"message": "come back later"}}', None, "come back later"),
        (502, b"<html>Bad Gateway</html>", None, "502"),
        (500, b'["not ours"]', None, "500"),
        (200, b"data: <html>\n\n", None, "no answer of ours"),
        (200, event(other="thing"), None, "no answer of ours"),
    ],
    ids=["cut", "cut-chunks", "error-event", "refused", "proxy", "stranger", "no-json", "other-json"],
)
def test_a_failing_answer_is_one_line_and_exit_code_1(status: int, body: bytes, length: int | None, words: str) -> None:
    with Server(status, body, length) as server:
        done = talk(server.url, "Hello\n")
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line] == [done.stderr.strip()]
    assert done.stderr.strip().startswith("edge-llm: ")
    assert words in done.stderr


def test_at_a_terminal_a_failed_question_is_forgotten_and_the_next_one_is_asked() -> None:
    refusal = b'{"error": {"message": "come back later"}}'
    ours, theirs = pty.openpty()
    try:
        with Server(503, refusal, then=PIECE + b"data: [DONE]\n\n") as server:
            os.write(ours, b"Hello\nAgain\n/quit\n")
            done = subprocess.run(
                command("chat", "--url", server.url),
                stdin=theirs,
                capture_output=True,
                text=True,
                check=False,
                timeout=DEADLINE_S,
                env=environment(),
            )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0
    assert "edge-llm: come back later" in done.stderr
    assert "half an ans" in done.stdout
    assert [[message["content"] for message in question] for question in server.asked] == [["Hello"], ["Again"]]


def test_ctrl_c_ends_an_answer_at_a_terminal_and_the_chat_goes_on_with_what_was_said() -> None:
    over = threading.Event()
    ours, theirs = pty.openpty()
    try:
        with Server(200, PIECE, len(PIECE) + 100, then=PIECE + b"data: [DONE]\n\n", hold=over) as server:
            process = subprocess.Popen(
                command("chat", "--url", server.url),
                stdin=theirs,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment(),
            )
            os.write(ours, b"/help\nHello\n")
            assert process.stdout is not None
            said = b""
            while b"half an ans" not in said:
                said += os.read(process.stdout.fileno(), 100)
            process.send_signal(signal.SIGINT)
            os.write(ours, b"Again\n/exit\n")
            _, words = process.communicate(timeout=DEADLINE_S)
            over.set()
    finally:
        over.set()
        os.close(ours)
        os.close(theirs)
    assert process.returncode == 0
    assert b"/quit leaves" in words
    assert b"stopped" in words
    asked = [[message["content"] for message in question] for question in server.asked]
    assert asked == [["Hello"], ["Hello", "half an ans", "Again"]]


def test_an_empty_delta_and_comments_are_no_text() -> None:
    quiet = event(choices=[{"delta": {"role": "assistant", "content": None}}]) + b": still here\n\n"
    with Server(200, quiet + event(choices=[{"delta": {"content": "yes"}}]) + b"data: [DONE]\n\n") as server:
        done = talk(server.url, "Hello\n")
    assert (done.returncode, done.stdout) == (0, "yes\n")


@pytest.mark.parametrize("url", ["nonsense", "localhost:1", "http://[::1", "http://127.0.0.1:x"])
def test_an_impossible_address_is_said_in_words(url: str) -> None:
    done = talk(url, "Hello\n")
    assert done.returncode == 2
    assert f"{url!r} is no address of a server" in done.stderr


def test_bytes_that_are_no_text_do_not_end_the_conversation() -> None:
    with Server(200, PIECE + b"data: [DONE]\n\n") as server:
        done = subprocess.run(
            command("chat", "--url", server.url),
            input=b"caf\xe9\n",
            capture_output=True,
            check=False,
            timeout=DEADLINE_S,
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        )
    assert done.returncode == 0
    assert done.stdout == b"half an ans\n"
