"""TCP acknowledgements without delay.

Behind a proxy urllib3 leaves Nagle's algorithm on: a client sends the headers of a request, and its body only
when the headers were acknowledged. Linux delays that acknowledgement by 40 ms unless told not to, and forgets
having been told, so it is told anew after every answer.
"""

import asyncio
import socket
from typing import Optional

_TCP_QUICKACK = getattr(socket, "TCP_QUICKACK", None)  # Linux only


def arm(transport: Optional[asyncio.BaseTransport]) -> None:
    """Have what the peer of a connection sends next acknowledged at once, where the platform can."""
    if _TCP_QUICKACK is None or transport is None or transport.is_closing():
        return
    connection = transport.get_extra_info("socket")
    try:
        connection.setsockopt(socket.IPPROTO_TCP, _TCP_QUICKACK, 1)
    except OSError:  # the connection broke just now, which whoever uses it will see
        pass
