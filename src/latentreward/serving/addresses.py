"""Binding of a server's socket."""

import socket

from latentreward.errors import InputError


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket to an address; connections are accepted only after ``listen``.

    Args:
        host: Host name or IP address of this machine.
        port: Port, 0 for any free one.

    Raises:
        InputError: If the port is in use or out of range, or the address is not one of this machine.
    """
    if not 0 <= port < 2**16:
        raise InputError(f"port={port} is no port; choose one from 1 to {2**16 - 1}, or 0 for a free one")
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, number)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise InputError(f"cannot serve at {host}:{port} ({error}); choose another --port or --host") from error
    return bound
