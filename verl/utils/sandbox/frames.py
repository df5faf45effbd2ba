"""Messages between the process that wants code run and the supervisor: a JSON header and byte strings."""

import json
import struct
from typing import IO, Any

_SIZE = struct.Struct("!Q")


def write_frame(file: IO[bytes], header: dict[str, Any], *blobs: bytes) -> None:
    text = json.dumps(header | {"sizes": [len(blob) for blob in blobs]}).encode()
    file.write(_SIZE.pack(len(text)) + text)
    for blob in blobs:
        file.write(blob)
    file.flush()


def read_frame(file: IO[bytes]) -> tuple[dict[str, Any], list[bytes]] | None:
    """The next header and its byte strings; None if the other side has ended."""
    prefix = file.read(_SIZE.size)
    if len(prefix) < _SIZE.size:
        return None
    header = json.loads(file.read(_SIZE.unpack(prefix)[0]))
    blobs = [file.read(size) for size in header.pop("sizes")]
    return header, blobs
