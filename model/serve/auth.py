"""API keys of a server, and the worker addresses that a controller may connect to.

A key is a shared secret in ``Authorization: Bearer KEY``, compared in constant time. A worker is reached only at
addresses that were checked when it registered: its name is resolved once, every address it stands for has to be on
the allow-list, and connections are made to those addresses, not to the name, so that a name that is made to point
elsewhere later leads nowhere. Redirects are never followed.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import Request

from model.errors import MedPLIBError
from model.serve.errors import Refusal
from model.serve.protocol import ErrorCode

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
_LOOPBACK: tuple[IPNetwork, ...] = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
_MAX_NAME = 300
_RESOLVE_SECONDS = 5.0


def bearer(key: str | None) -> dict[str, str]:
    """Headers that show the key, where there is one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def checked_key(key: str | None, flag: str) -> str | None:
    """The key, or None for an empty one.

    Raises:
        MedPLIBError: it cannot be sent in a header.
    """
    if not key:
        return None
    if not (key.isascii() and key.isprintable()) or key != key.strip():
        raise MedPLIBError(f"{flag} has spaces around it or characters that no header carries; give letters and digits")
    return key


def shows_key(header: str | None, key: str) -> bool:
    """Whether an ``Authorization`` header shows the key; takes as long for a nearly right one as for a wrong one."""
    scheme, _, shown = (header or "").partition(" ")
    same = hmac.compare_digest(shown.strip().encode("utf-8", "replace"), key.encode())
    return same and scheme.lower() == "bearer"


class KeyGuard:
    """FastAPI dependency: lets through who shows one of the keys, or everyone where there is none.

    Args:
        keys: the secrets; empty ones are none.
        name: what to call them in the refusal.
    """

    def __init__(self, *keys: str | None, name: str = "key") -> None:
        self.keys, self.name = [key for key in keys if key], name

    async def __call__(self, request: Request) -> None:
        """Let the request through.

        Raises:
            Refusal: 401, the key is missing or wrong.
        """
        header = request.headers.get("authorization")
        if self.keys and not sum(shows_key(header, key) for key in self.keys):
            sentence = f"the {self.name} is missing or wrong; send it as Authorization: Bearer KEY"
            raise Refusal(ErrorCode.BAD_INPUT, sentence, status=401)


class WorkerGuard(KeyGuard):
    """Lets through workers and administrators: who shows the key, or where there is none, programs of this machine.

    A page in a browser of this machine is none: browsers say where their requests originate.
    """

    async def __call__(self, request: Request) -> None:
        """Let the request through.

        Raises:
            Refusal: 401, the key is missing or wrong; 403, there is no key and the request is not of this machine.
        """
        await super().__call__(request)
        peer = request.client.host if request.client else None
        if not self.keys and (not from_loopback(peer) or "origin" in request.headers):
            sentence = "without a key only programs of this machine may do this; start this server with --api-key"
            raise Refusal(ErrorCode.BAD_INPUT, sentence, status=403)


@dataclass(frozen=True)
class CheckedAddress:
    """Where a worker is reached.

    Attributes:
        name: ``http(s)://host:port`` as it calls itself.
        endpoints: the same with each address that the host stood for when it was checked.
    """

    name: str
    endpoints: tuple[str, ...]

    @property
    def host(self) -> str:
        """Host and port, for the ``Host`` header."""
        return urlsplit(self.name).netloc

    @property
    def server_name(self) -> str:
        """The host alone, for TLS."""
        return urlsplit(self.name).hostname or ""


def normal_name(name: str) -> str:
    """A worker's name as ``http(s)://host:port``: in lower case, with its port, without a slash at the end.

    Raises:
        MedPLIBError: it is no such address.
    """
    expected = "expected http://host:port"
    if not isinstance(name, str) or len(name) > _MAX_NAME or not name.isascii() or not name.isprintable():
        raise MedPLIBError(f"the worker's name is no address; {expected}")
    try:
        parts = urlsplit(name)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise MedPLIBError(f"the worker's name {name!r} is no address; {expected}") from error
    if parts.scheme.lower() not in ("http", "https") or not host:
        raise MedPLIBError(f"the worker's name {name!r} is no address; {expected}")
    if "@" in parts.netloc or parts.path not in ("", "/") or parts.query or parts.fragment or set(name) & set("?#\\ "):
        raise MedPLIBError(f"a worker's name has no user, path or query; {expected}")
    if port == 0:
        raise MedPLIBError(f"the worker's name {name!r} has port 0; {expected}")
    port = port or (443 if parts.scheme.lower() == "https" else 80)
    return f"{parts.scheme.lower()}://{f'[{host}]' if ':' in host else host}:{port}"


def ip_address(text: str | None) -> IPAddress | None:
    """The address that a text writes, an IPv4 one inside an IPv6 one taken out; None where it is a name."""
    try:
        address = ipaddress.ip_address((text or "").partition("%")[0])
    except ValueError:
        return None
    inner = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return inner or address


def from_loopback(address: str | None) -> bool:
    """Whether a peer's address is of this machine alone."""
    found = ip_address(address)
    return found is not None and found.is_loopback


class WorkerAllowList:
    """Addresses at which workers may be.

    Args:
        entries: hosts, addresses and networks (CIDR). Where there are none, a worker may be where its registration
            comes from, and one whose registration comes from this machine anywhere on loopback.

    Raises:
        MedPLIBError: an entry is malformed.
    """

    def __init__(self, entries: Sequence[str] = ()) -> None:
        self.networks: list[IPNetwork] = []
        self.hosts: list[str] = []
        for entry in entries:
            try:
                self.networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError as error:
                if not entry or set(entry) & set("/:@ \\?#"):
                    raise MedPLIBError(f"--allow-worker {entry!r:.80} is no host, address or network") from error
                self.hosts.append(entry.lower())

    async def check(self, name: str, peer: str | None) -> CheckedAddress:
        """Where the worker of this name may be reached.

        Args:
            name: what it calls itself.
            peer: address its registration comes from.

        Raises:
            MedPLIBError: the name is malformed, or stands for an address that is not on the list.
        """
        name = normal_name(name)
        parts = urlsplit(name)
        assert parts.hostname and parts.port
        addresses = await _resolve(parts.hostname)
        networks = await self._allowed(peer)
        if not addresses:
            raise MedPLIBError(f"the host {parts.hostname!r} of the worker's name has no address; name one that has")
        if any(one.is_unspecified or one.is_multicast or one.is_link_local for one in addresses):  # a cloud's services
            raise MedPLIBError(f"no worker is at {parts.hostname}; name the address at which it is reached")
        if not all(any(address in network for network in networks) for address in addresses):
            raise MedPLIBError(
                f"workers at {parts.hostname} are not allowed here; start the controller with "
                f"--allow-worker {parts.hostname}, or register from that address"
            )
        hosts = (f"[{address}]" if address.version == 6 else str(address) for address in addresses)
        return CheckedAddress(name, tuple(f"{parts.scheme}://{host}:{parts.port}" for host in hosts))

    async def _allowed(self, peer: str | None) -> list[IPNetwork]:
        if self.networks or self.hosts:
            named = [address for host in self.hosts for address in await _resolve(host)]
            return [*self.networks, *(ipaddress.ip_network(address) for address in named)]
        if from_loopback(peer):
            return list(_LOOPBACK)
        address = ip_address(peer)
        return [] if address is None else [ipaddress.ip_network(address)]


async def _resolve(host: str) -> list[IPAddress]:
    """Addresses that a host stands for now; empty where it has none. IPv4 first."""
    if address := ip_address(host):
        return [address]
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_RESOLVE_SECONDS):
            found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # a timeout is an OSError
        return []
    addresses = {address for entry in found if (address := ip_address(str(entry[4][0])))}
    return sorted(addresses, key=lambda address: (address.version, int(address)))
