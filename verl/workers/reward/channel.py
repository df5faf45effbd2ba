"""How the scoring pool and its processes talk: framed messages over a socket, and a clock in shared memory."""

import mmap
import pickle
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

HEADER = struct.Struct("!Q")
READ_SIZE = 1 << 18


def pack(message: Any) -> bytes:
    """A message with its length before it. Raises what pickle raises."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


class Unpacker:
    """Messages out of a stream of bytes that arrive in pieces."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            end = HEADER.size + HEADER.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[HEADER.size : end])
            del self._buffer[:end]
            yield pickle.loads(body)


def receive(connection: socket.socket, unpacker: Unpacker) -> list[Any]:
    """Wait for data; the messages that it completes. Raises EOFError when the other side has closed."""
    data = connection.recv(READ_SIZE)
    if not data:
        raise EOFError
    return list(unpacker.feed(data))


class Clock:
    """What a worker is doing, readable by the driver without the worker's help: which call it is in, and since when.

    The driver can also `revoke` the rest of a batch: the worker then leaves the calls that it has not begun.
    """

    SIZE = 24
    NOTHING = -1

    def __init__(self, descriptor: int):
        self._words = memoryview(mmap.mmap(descriptor, self.SIZE)).cast("q")  # call, start in ns, revoked batch

    def reset(self) -> None:
        self._words[0], self._words[2] = self.NOTHING, self.NOTHING

    def start(self, call: int) -> None:
        self._words[1] = time.monotonic_ns()
        self._words[0] = call

    def stop(self) -> None:
        self._words[0] = self.NOTHING

    def read(self) -> tuple[int, float]:
        """The call that runs (NOTHING if none) and the time.monotonic() at which it began, in seconds."""
        while True:
            call, start = self._words[0], self._words[1]
            if self._words[0] == call and self._words[1] == start:  # not overwritten while it was read
                return call, start * 1e-9

    def revoke(self, batch: int) -> None:
        self._words[2] = batch

    def is_revoked(self, batch: int) -> bool:
        return self._words[2] >= batch
