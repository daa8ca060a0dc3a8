"""An HTTP proxy that knows CONNECT only: how HTTPS clients reach the service by naming it in https_proxy."""

import asyncio
from typing import Optional, Set

from . import quick_acknowledgement

_ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
_REFUSED = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_CHUNK = 1 << 18


class Tunnel:
    """The listening side of the tunnel."""

    def __init__(self, host: str, endpoint_host: str, target_port: int) -> None:
        """Tunnel connections to ``<anything>.<endpoint_host>`` to ``host``:``target_port``, others nowhere."""
        self._host = host
        self._endpoint_host = endpoint_host
        self._target_port = target_port
        self._server: Optional[asyncio.AbstractServer] = None
        self._connections: Set[asyncio.Task[None]] = set()

    async def start(self, port: int) -> int:
        """Listen; return the port, which is a free one for ``port`` 0."""
        self._server = await asyncio.start_server(self._serve, self._host, port)
        return self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and end every connection."""
        self._server.close()
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        self._connections.add(connection)
        try:
            quick_acknowledgement.arm(writer.transport)
            await self._connect(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # one of the two sides went away, or the service stops
        finally:
            self._connections.discard(connection)
            writer.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        method, _, rest = head.decode("latin-1").partition(" ")
        host = rest.partition(" ")[0].rpartition(":")[0]
        if method != "CONNECT" or not ("." + host).endswith("." + self._endpoint_host):
            writer.write(_REFUSED)
            await writer.drain()
            return
        target_reader, target_writer = await asyncio.open_connection(self._host, self._target_port)
        directions = set()
        try:
            writer.write(_ESTABLISHED)
            quick_acknowledgement.arm(writer.transport)
            directions = {
                asyncio.ensure_future(_pipe(reader, target_writer)),
                asyncio.ensure_future(_pipe(target_reader, writer)),
            }
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)
            target_writer.close()


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        data = await reader.read(_CHUNK)
        if not data:
            return
        writer.write(data)
        await writer.drain()
        quick_acknowledgement.arm(writer.transport)
