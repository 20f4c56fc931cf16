"""Messages through a stream socket: the length in 8 bytes, big endian, then the content."""

import socket
import struct

_LENGTH = struct.Struct(">Q")


def send(target: socket.socket, content: bytes) -> None:
    """Send one message."""
    target.sendall(_LENGTH.pack(len(content)) + content)


def receive(source: socket.socket, *, most: int) -> bytes:
    """Receive one message.

    Raises:
        EOFError: The other end was closed, or the message is longer than ``most``.
    """
    (length,) = _LENGTH.unpack(_exactly(source, _LENGTH.size))
    if length > most:
        raise EOFError
    return _exactly(source, length)


def _exactly(source: socket.socket, length: int) -> bytes:
    parts: list[bytes] = []
    while length:
        if not (part := source.recv(min(length, 2**20))):
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
