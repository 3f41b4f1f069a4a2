"""Read the addresses that clients use for a server."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit


def host_of(address: str) -> str | None:
    """Return the host of an address, in lower case and without brackets, or `None` if it is not an address."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def is_address(host: str) -> bool:
    """Return whether a host is an IP address. It cannot be pointed elsewhere, as a name can."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
