"""Addresses of a server: binding of its socket, and whether a host is this machine."""

import re
import socket
from ipaddress import ip_address
from urllib.parse import urlsplit

from latentreward.core.errors import InputError


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket to an address, with port 0 to any free port; connections are accepted only after ``listen``.

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
    except (OSError, UnicodeError) as error:  # UnicodeError: of a name with an empty or too long part
        remedy = "--port" if is_loopback(host) else "--port or --host"
        raise InputError(f"cannot serve at {host}:{port} ({error}); choose another {remedy}") from error
    return bound


def is_loopback(host: str) -> bool:
    """Tell whether an IP address, perhaps with a zone, is one by which only this machine can be reached."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:  # a name
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def names_this_machine(place: str) -> bool:
    """Tell whether ``place``, with or without a port, is ``localhost``, a loopback address, or this machine's own name.

    Other names may lead to this machine too, by the will of whoever owns them.
    """
    if not re.fullmatch(r"[\w.-]+(:\d+)?|\[[\w:.%-]+\](:\d+)?", place):  # a user, a path or a blank
        return False
    try:
        host = urlsplit(f"//{place}").hostname or ""
    except ValueError:  # brackets without an IPv6 address
        return False
    return host in ("localhost", socket.gethostname().lower()) or is_loopback(host)
