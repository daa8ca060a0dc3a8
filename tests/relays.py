"""A network between copies and the service: slow towards the service, or one that forgets what is idle."""

import asyncio
import threading
import time
from typing import Dict

from local_log_service import LocalLogService


class Flow:
    """One connection through the relay."""

    def __init__(self) -> None:
        self.is_asking = False  # since the last byte of an answer, a request has begun
        self.is_put = False  # it is a put
        self.last_byte = time.monotonic()
        self.is_forgotten = False


class Relay:
    """Stands between copies and the service; use it as a context manager, and start copies with `settings()`.

    Attributes:
        rate: bytes a second that all puts together may bring to the service, None for as many as may be. Whatever
            else is called passes at once, so that a test needs to shorten nothing but what concerns puts.
        forgets_after: seconds after which a connection on which no call waits is forgotten as by a NAT: what either
            side sends from then on gets lost, and neither is told.
        puts_at_once: the most puts that were under way at a time; may be set back.
        forgotten: how many connections were used after they had been forgotten.
    """

    PIECE = 1024  # bytes, after which it is another connection's turn

    def __init__(self, service: LocalLogService, address: str = "127.0.0.1") -> None:
        """`address` is one of this machine that the copies reach."""
        self.service, self.address = service, address
        self.rate = None
        self.forgets_after = float("inf")
        self.puts_at_once = self.forgotten = 0
        self._flows = set()
        self._next = 0.0  # when the line is free again
        self._loop = asyncio.new_event_loop()
        self._port = 0

    def settings(self) -> Dict[str, str]:
        """Changes for a copy that is to reach the service this way."""
        return dict.fromkeys(("http_proxy", "HTTP_PROXY"), "http://%s:%d" % (self.address, self._port))

    def connections(self) -> int:
        """How many there are now."""
        return len(self._flows)

    def __enter__(self) -> "Relay":
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        listening = asyncio.start_server(self._serve, self.address, 0, limit=self.PIECE)
        self._server = asyncio.run_coroutine_threadsafe(listening, self._loop).result()
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *exception: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _end(self) -> None:
        self._server.close()  # else who comes now is left half way
        await asyncio.sleep(0)  # for those that have come
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        flow = Flow()
        self._flows.add(flow)
        try:
            of_service = await asyncio.open_connection("127.0.0.1", self.service.port)
            try:
                directions = self._ask(flow, reader, of_service[1]), self._answer(flow, of_service[0], writer)
                await asyncio.gather(*directions)
            finally:
                of_service[1].close()
        except OSError:
            pass  # one side is gone, and so will be the other
        finally:
            self._flows.discard(flow)
            writer.close()

    def _is_forgotten(self, flow: Flow) -> bool:
        if not flow.is_forgotten and not flow.is_asking:
            flow.is_forgotten = time.monotonic() - flow.last_byte > self.forgets_after
            self.forgotten += flow.is_forgotten
        return flow.is_forgotten

    async def _ask(self, flow: Flow, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            data = await reader.read(self.PIECE)
            if not data:
                break
            if self._is_forgotten(flow):
                continue
            if not flow.is_asking:
                flow.is_asking, flow.is_put = True, b"/shards/lb" in data.split(b"\r\n", 1)[0]
                self.puts_at_once = max(self.puts_at_once, sum(one.is_asking and one.is_put for one in self._flows))
            if flow.is_put and self.rate:
                self._next = max(self._next, time.monotonic()) + len(data) / self.rate
                await asyncio.sleep(self._next - time.monotonic())
            flow.last_byte = time.monotonic()
            writer.write(data)
            await writer.drain()
        if not flow.is_forgotten:
            writer.close()

    async def _answer(self, flow: Flow, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            data = await reader.read(1 << 16)
            if not data:
                break
            if not flow.is_forgotten:
                flow.is_asking, flow.last_byte = False, time.monotonic()
                writer.write(data)
                await writer.drain()
        if not flow.is_forgotten:
            writer.close()
