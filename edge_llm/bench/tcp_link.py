"""One link between two boards, plain TCP, without a cluster: round trip, bandwidth both ways, bursts like a hand-off.

Owns both ends: `Listener` on one board, `Link` on the other. Blocking sockets and a thread for each connection: an
event loop would be part of a round trip. Refuses to know workers and records.

A connection is one question: a line `EDGE-LLM-NET 1 <what> <number>`, then `echo` sends back what comes, `source` sends
for so many seconds, `sink` reads until the other end has sent all and says in a line what came, `burst` sends so many
bytes whenever a byte asks for it. Whoever can reach the port may ask: bounded in time, size and number, nothing else is
told; it is for networks of one's own and for the minutes of a measurement.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Final

from edge_llm.bench.processes import MeasureFailed

MAGIC: Final = "EDGE-LLM-NET 1"
MAX_SECONDS: Final = 60.0
MAX_BURST_BYTES: Final = 1 << 30
MAX_BURSTS: Final = 64
MAX_CONNECTIONS: Final = 8
PING_BYTES: Final = 64
_BLOCK: Final = bytes(256 << 10)
_LINE_BYTES: Final = 256
# A peer that says nothing for so long is gone.
_SILENCE_S: Final = 10.0


class Listener:
    """The end that answers. `port` 0 takes a free one."""

    def __init__(self, host: str, port: int) -> None:
        try:
            self._socket = socket.create_server((host, port), family=_family(host, port), backlog=MAX_CONNECTIONS)
        except OSError as error:
            raise MeasureFailed(f"cannot listen at {host}:{port}: {error.strerror or error}") from error
        self._room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.answered = 0

    @property
    def port(self) -> int:
        port: int = self._socket.getsockname()[1]
        return port

    def serve(self, on_peer: Callable[[str, str], None] = lambda _peer, _what: None) -> None:
        """Until `close`. `on_peer` hears who asks for what."""
        while True:
            try:
                peer, address = self._socket.accept()
            except OSError:
                return  # closed
            if not self._room.acquire(blocking=False):
                peer.close()
                continue
            threading.Thread(target=self._answer, args=(peer, str(address[0]), on_peer), daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._socket.close()

    def _answer(self, peer: socket.socket, who: str, on_peer: Callable[[str, str], None]) -> None:
        try:
            with closing(peer):
                _ready(peer)
                what, number = _question(_line(peer))
                on_peer(who, what)
                _ANSWERS[what](peer, number)
                self.answered += 1
        except (OSError, ValueError):
            pass  # the other end knows: it got nothing
        finally:
            self._room.release()


class Link:
    """The end that asks."""

    def __init__(self, host: str, port: int, connect_s: float = 5.0) -> None:
        self._host, self._port, self._connect_s = host, port, connect_s

    def round_trips_s(self, count: int) -> list[float]:
        """Of messages of `PING_BYTES`, one at a time; a first one, which opens the way, is left out."""
        with self._asked("echo", 0) as peer:
            return [_ping(peer) for _ in range(count + 1)][1:]

    def from_peer(self, seconds: float) -> tuple[int, float]:
        """Bytes that came, and in how many seconds."""
        with self._asked("source", seconds) as peer:
            return _drain(peer)

    def to_peer(self, seconds: float) -> tuple[int, float]:
        """Bytes that the peer says came, and in how many seconds."""
        with self._asked("sink", seconds) as peer:
            _send_for(peer, seconds)
            peer.shutdown(socket.SHUT_WR)
            said = json.loads(_line(peer))
            return int(said["bytes"]), float(said["seconds"])

    def bursts_s(self, size: int, count: int) -> list[float]:
        """Seconds from asking for `size` bytes, which are there to be sent, until all have come; a first one is left
        out."""
        with self._asked("burst", size) as peer:
            return [_one_burst(peer, size) for _ in range(count + 1)][1:]

    @contextmanager
    def _asked(self, what: str, number: float) -> Iterator[socket.socket]:
        """Raises MeasureFailed, whatever goes wrong."""
        where = f"{self._host}:{self._port}"
        try:
            peer = socket.create_connection((self._host, self._port), timeout=self._connect_s)
        except OSError as error:
            raise MeasureFailed(
                f"nobody answers at {where} ({error.strerror or error}): "
                f"run `edge-llm bench net --listen {where}` on that board"
            ) from error
        try:
            with closing(peer):
                _ready(peer)
                peer.sendall(f"{MAGIC} {what} {number!r}\n".encode())
                yield peer
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MeasureFailed(
                f"{where} broke off at {what}: {str(error) or type(error).__name__}: does bench net listen there?"
            ) from error


# -- what the listener answers


def _echo(peer: socket.socket, _number: float) -> None:
    until_s = time.monotonic() + MAX_SECONDS
    while (data := peer.recv(1 << 16)) and time.monotonic() < until_s:
        peer.sendall(data)


def _source(peer: socket.socket, seconds: float) -> None:
    _send_for(peer, seconds)


def _sink(peer: socket.socket, _seconds: float) -> None:
    size, seconds = _drain(peer)
    peer.sendall(json.dumps({"bytes": size, "seconds": seconds}).encode() + b"\n")


def _burst(peer: socket.socket, size: float) -> None:
    if not 0 < size <= MAX_BURST_BYTES:
        raise ValueError("no size of a burst")
    for _ in range(MAX_BURSTS):
        if not peer.recv(1):
            return
        left, until_s = int(size), time.monotonic() + MAX_SECONDS  # for each: a Pi's Wi-Fi needs minutes for all
        while left:
            if time.monotonic() > until_s:
                return
            left -= peer.send(memoryview(_BLOCK)[: min(left, len(_BLOCK))])


_ANSWERS: Final[dict[str, Callable[[socket.socket, float], None]]] = {
    "echo": _echo,
    "source": _source,
    "sink": _sink,
    "burst": _burst,
}


def _question(line: str) -> tuple[str, float]:
    """Raises ValueError for what is none."""
    magic, _, rest = line.rpartition(f"{MAGIC} ")
    what, _, number = rest.partition(" ")
    if magic or what not in _ANSWERS:
        raise ValueError("no question of bench net")
    return what, float(number)


# -- both ends


def _ready(peer: socket.socket) -> None:
    peer.settimeout(_SILENCE_S)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _line(peer: socket.socket) -> str:
    """Byte by byte: what follows it is not ours to take."""
    data = b""
    while not data.endswith(b"\n"):
        byte = peer.recv(1)
        if not byte or len(data) >= _LINE_BYTES:
            raise ValueError("no line came")
        data += byte
    return data.decode("ascii").rstrip("\n")


def _send_for(peer: socket.socket, seconds: float) -> None:
    until_s = time.monotonic() + min(seconds, MAX_SECONDS)
    while time.monotonic() < until_s:
        peer.sendall(_BLOCK)


def _drain(peer: socket.socket) -> tuple[int, float]:
    """What comes until the other end closes, and the seconds from the first bytes to the last. The first ones came
    before the watch started: they are not counted."""
    buffer = bytearray(1 << 20)
    if not peer.recv_into(buffer):
        raise ValueError("nothing came")
    began_s = last_s = time.monotonic()
    size = 0
    while (came := peer.recv_into(buffer)) and last_s - began_s < 2 * MAX_SECONDS:
        size, last_s = size + came, time.monotonic()
    return size, last_s - began_s


def _ping(peer: socket.socket) -> float:
    began_s = time.monotonic()
    peer.sendall(_BLOCK[:PING_BYTES])
    left = PING_BYTES
    while left:
        data = peer.recv(left)
        if not data:
            raise ValueError("the echo ended")
        left -= len(data)
    return time.monotonic() - began_s


def _one_burst(peer: socket.socket, size: int) -> float:
    buffer, left = bytearray(1 << 20), size
    began_s = time.monotonic()
    peer.sendall(b"?")
    while left:
        came = peer.recv_into(buffer, min(left, len(buffer)))
        if not came:
            raise ValueError("the burst ended early")
        left -= came
    return time.monotonic() - began_s


def _family(host: str, port: int) -> socket.AddressFamily:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
