"""Heartbeats: every process of several tells process 0 that it is there, and hears from it how the others fare.

An exchange of arrays with a process that is gone may never end, or end in an error that does not say who is gone; and
between two exchanges, which may be minutes, nothing would be noticed at all. So a thread beside the work holds a
connection to process 0 (that of process 0: to all others). It ends the work where another process has died, failed, was
interrupted or fell silent, and where all of them wait in the same exchange, as MLX's ring is said to do (its issue
4475). What is said are lines of JSON: a beat every second, with the exchange that a process is in, and once how it
ended.
"""

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from mlxpref.errors import MlxprefError

__all__ = ["Ending", "Heartbeat", "meet"]

Ending = Literal["done", "failed", "interrupted"]

_BEAT, _LOOK = 1.0, 0.25
"""Seconds between two beats, and between two looks at what is to be said."""
_SILENCE = 30.0
"""Seconds without a beat after which a process counts as gone; a closed connection is noticed at once."""
_STUCK = 180.0
"""Seconds that all processes may spend in one exchange."""
_GRACE = 10.0
"""Seconds that the work has to notice that it ends, before the process is ended without it."""
_MEETING = 30.0
"""Seconds in which all processes have to connect."""
_RESUME = "start again (a training with --resume, and with any number of processes)"


@dataclass
class Peer:
    """Another process as it is known here: `exchange` is what it is in, `since` when on this clock."""

    name: str
    wire: socket.socket
    heard: float = 0.0
    unread: bytes = b""
    exchange: int | None = None
    since: float = 0.0
    ended: bool = False


class Heartbeat:
    """The thread of one process; who exchanges arrays sets `exchange` to its number meanwhile.

    Where the work has to end, an error is raised in the main thread, once: MlxprefError, with the one line to be
    said, where this process is the one to say it (`speaks`), SystemExit where it is not, and KeyboardInterrupt where
    another process was interrupted. SIGTERM and SIGHUP raise SystemExit, so that what is done is saved. A main thread
    that does not come back to Python in time is ended with its process.
    """

    def __init__(self, rank: int, size: int, peers: Mapping[int, Peer]) -> None:
        self.rank, self.size = rank, size
        self.exchange: int | None = None
        self.speaks = rank == 0
        self._peers, self._launcher, self._stderr = peers, os.getppid(), sys.stderr
        self._error: BaseException | None = None
        self._line = ""
        self._ending = False
        """Whether the main thread is on its way out: it is not interrupted again."""
        self._outbox: deque[dict[str, Any]] = deque()
        self._left = threading.Event()
        self._handlers: dict[int, Any] = {}
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat, and to listen to signals if this is the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self._handlers[number] = signal.signal(number, self._on_signal)
        for peer in self._peers.values():
            peer.heard = time.monotonic()
        self._thread.start()

    def ending(self) -> None:
        """The work ends by itself: nothing that is heard from now on interrupts how it does."""
        self._ending = True

    def leave(self, ending: Ending, why: str = "") -> None:
        """Tell the others how the work ended here, and end the thread."""
        self.ending()
        self._outbox.append({"end": ending, "why": why})
        self._left.set()
        self._thread.join(timeout=5.0)
        for number, handler in self._handlers.items():
            # Where one process has failed, the launcher ends the others: it must not cut off the last words.
            ignored = ending != "done" and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if ignored else handler)

    def wait_for_word(self, seconds: float) -> None:
        """Wait until it is known why an exchange failed, which is then raised."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._error and not self._ending:
                self._ending = True
                raise self._error
            time.sleep(0.05)

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            self._ending = True
            self._outbox.append({"end": "interrupted", "why": ""})
            raise KeyboardInterrupt
        if not self._ending:
            self._ending = True
            raise self._error or SystemExit(128 + number)

    def _beat(self) -> None:
        """The life of the thread."""
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer.wire, selectors.EVENT_READ, rank)
            next_beat = 0.0
            while not (left := self._left.is_set()) or self._outbox:
                for key, _ in selector.select(0.0 if left else _LOOK):
                    if not self._hear(key.data):
                        selector.unregister(key.fileobj)
                while self._outbox:
                    self._say(self._outbox.popleft())
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + _BEAT
                    self._say({"exchange": self.exchange})
                    self._look_around()
        for peer in self._peers.values():
            peer.wire.close()

    def _say(self, message: Mapping[str, Any]) -> None:
        for peer in self._peers.values():
            try:
                peer.wire.sendall(json.dumps(message).encode() + b"\n")
            except OSError:  # it is gone, which is heard
                continue

    def _hear(self, rank: int) -> bool:
        """Take in what a process says; False where its connection is closed."""
        peer = self._peers[rank]
        try:
            received = peer.wire.recv(1 << 16)
        except OSError:
            received = b""
        if not received:
            if not peer.ended:
                self._lose(rank, "has died")
            return False
        peer.heard = time.monotonic()
        *lines, peer.unread = (peer.unread + received).split(b"\n")
        for message in map(json.loads, lines):
            if "end" in message:
                peer.ended = True
                self._end_as(rank, message["end"], message["why"])
            elif message["exchange"] != peer.exchange:
                peer.exchange, peer.since = message["exchange"], peer.heard
        return True

    def _end_as(self, rank: int, ending: Ending, why: str) -> None:
        """End as another process did; where that is process 0, it says why itself."""
        if ending == "interrupted":
            self._end(KeyboardInterrupt(), ending)
        elif ending == "failed":
            self._end(MlxprefError(f"{self._called(rank)}: {why}") if rank else SystemExit(1), ending)

    def _lose(self, rank: int, how: str) -> None:
        self._peers[rank].ended = True
        self.speaks = self.rank == 0 or (rank == 0 and self.rank == 1)
        line = f"{self._called(rank)} {how}, so the others end as well; {_RESUME}"
        self._end(MlxprefError(line) if self.speaks else SystemExit(1), "failed")

    def _called(self, rank: int) -> str:
        return f"process {rank} of {self.size} (on {self._peers[rank].name})"

    def _look_around(self) -> None:
        """Look for what nobody says: silence, a launcher that is gone, an exchange that does not end."""
        now = time.monotonic()
        for rank, peer in self._peers.items():
            if not peer.ended and now - peer.heard > _SILENCE:
                self._lose(rank, f"has not been heard of for {_SILENCE:.0f} s")
        if os.getppid() != self._launcher:
            line = f"what launched the {self.size} processes has ended, so they end as well; {_RESUME}"
            self._end(MlxprefError(line) if self.speaks else SystemExit(1), "failed")
        stuck = [peer.exchange == self.exchange and now - peer.since > _STUCK for peer in self._peers.values()]
        if self.rank == 0 and self.exchange is not None and all(stuck):
            self._end(MlxprefError(f"all processes have waited for each other for {_STUCK:.0f} s; {_RESUME}"), "failed")

    def _end(self, error: BaseException, ending: Ending) -> None:
        """End the work of the main thread, once, and let those know who are connected to this process only."""
        if self._error or self._ending:
            return
        self._error = error
        if self.rank == 0:
            self._outbox.append({"end": ending, "why": ""})
        threading.Thread(target=self._insist, daemon=True).start()
        if self._handlers:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _insist(self) -> None:
        """End the process where its main thread waits for what does not come."""
        until = time.monotonic() + _GRACE
        while not self._ending:
            if time.monotonic() > until:
                if isinstance(self._error, MlxprefError):
                    with suppress(OSError):  # who would read it may be gone, too
                        print(f"Error: {self._error}", file=self._stderr, flush=True)
                os._exit(130 if isinstance(self._error, KeyboardInterrupt) else 1)
            time.sleep(_LOOK)


def meet(rank: int, size: int, address: str, agreed: Callable[[Any], Any]) -> Heartbeat:
    """Connect all processes to process 0, at an address that it knows itself by, and begin to beat.

    `agreed` gives every process what process 0 gave it. MlxprefError where not all have connected in time.
    """
    name = socket.gethostname()
    if rank:
        host, port, token, other = agreed(None)
        heartbeat = Heartbeat(rank, size, {0: Peer(other, _called_on(rank, host, port, token, name))})
    else:
        with _listening(address) as listener:
            token = secrets.token_hex(8)
            agreed([address, listener.getsockname()[1], token, name])
            heartbeat = Heartbeat(rank, size, _callers(listener, size, token))
    heartbeat.start()
    return heartbeat


def _listening(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, 0), family=family)
    except OSError as error:
        raise MlxprefError(f"process 0 cannot listen at {address} ({error.strerror}); correct the hostfile") from error


def _callers(listener: socket.socket, size: int, token: str) -> dict[int, Peer]:
    """The processes that have connected, by number; whoever does not know the token is turned away."""
    peers: dict[int, Peer] = {}
    until = time.monotonic() + _MEETING
    while len(peers) < size - 1:
        listener.settimeout(max(until - time.monotonic(), 0.01))
        try:
            wire, _ = listener.accept()
            wire.settimeout(5.0)
            with wire.makefile("r", encoding="utf-8") as lines:
                said = json.loads(lines.readline(1000))
            if said["token"] == token:
                peers[said["rank"]] = Peer(said["name"], wire)
        except TimeoutError as error:
            missing = ", ".join(str(rank) for rank in range(1, size) if rank not in peers)
            raise MlxprefError(f"of {size} processes, {missing} did not connect to process 0") from error
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return peers


def _called_on(rank: int, host: str, port: int, token: str, name: str) -> socket.socket:
    try:
        wire = socket.create_connection((host, port), timeout=_MEETING)
        wire.sendall(json.dumps({"token": token, "rank": rank, "name": name}).encode() + b"\n")
    except OSError as error:
        raise MlxprefError(
            f"process {rank} (on {name}) cannot reach process 0 at {host}:{port} ({error}); let its firewall allow it"
        ) from error
    wire.settimeout(5.0)
    return wire
