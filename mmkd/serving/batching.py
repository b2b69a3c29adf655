"""Collect single items of concurrent requests into batches for a model that runs in one thread.

While the model works on one batch, the next one fills. A lone item waits at most ``wait`` seconds for others. Items
whose caller has left are dropped, and a batch that fails is repeated item by item, so that an error reaches only the
item that causes it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class QueueFullError(Exception):
    """More items wait than the queue may hold, or the service is about to stop."""


@dataclass(eq=False)
class _Entry(Generic[Item, Result]):
    item: Item
    arrived: float
    result: asyncio.Future[Result]


class Batcher(Generic[Item, Result]):
    """One queue of items and the task that computes them in batches.

    Attributes:
        waiting: items that are queued and not yet computed.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Item]], Sequence[Result]],
        thread: Executor,
        turn: asyncio.Lock,
        largest: int,
        wait: float,
        capacity: int,
        observe: Callable[[int], object] = lambda size: None,
    ) -> None:
        """Describe the queue; `start` begins to compute.

        Args:
            compute: from a batch to as many results, in ``thread``.
            thread: an executor with one thread, which several batchers may share.
            turn: held while a batch is computed; batchers with one thread share it.
            largest: most items of a batch.
            wait: seconds that the first item of a batch waits for others.
            capacity: most items that wait.
            observe: called with the size of every batch.
        """
        self._compute, self._thread, self._turn = compute, thread, turn
        self._largest, self._wait, self._capacity, self._observe = largest, wait, capacity, observe
        self._entries: deque[_Entry[Item, Result]] = deque()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def waiting(self) -> int:
        """Items in the queue."""
        return len(self._entries)

    def start(self) -> None:
        """Begin to compute; needs a running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Compute items, together with those of other callers.

        Args:
            items: of one request; they enter the queue together.

        Returns:
            One result for each item.

        Raises:
            QueueFullError: the queue has no room for them all, or is closed.
            Exception: what ``compute`` raises for one of the items alone.
        """
        if self._closing or len(self._entries) + len(items) > self._capacity:
            raise QueueFullError("the queue is full")
        loop = asyncio.get_running_loop()
        entries: list[_Entry[Item, Result]] = [_Entry(item, loop.time(), loop.create_future()) for item in items]
        self._entries.extend(entries)
        self._changed.set()
        try:
            return list(await asyncio.gather(*(entry.result for entry in entries)))
        finally:  # after an error or a cancellation, none of them is wanted any more
            for entry in entries:
                entry.result.cancel()  # no effect on results that are there
            if any(entry.result.cancelled() for entry in entries):
                self._entries = deque(entry for entry in self._entries if not entry.result.cancelled())

    async def close(self) -> None:
        """Refuse new items, compute those that wait, and end."""
        self._closing = True
        self._changed.set()
        if self._task is not None:
            await self._task

    async def _work(self) -> None:
        while True:
            while not self._entries:
                if self._closing:
                    return
                self._changed.clear()
                await self._changed.wait()
            await self._fill()
            async with self._turn:
                batch = [self._entries.popleft() for _ in range(min(self._largest, len(self._entries)))]
                if batch:
                    await self._run(batch)

    async def _fill(self) -> None:
        """Wait until the batch is full, or its first item has waited long enough."""
        loop = asyncio.get_running_loop()
        while self._entries and len(self._entries) < self._largest and not self._closing:
            left = self._entries[0].arrived + self._wait - loop.time()
            if left <= 0:
                return
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except asyncio.TimeoutError:
                return

    async def _run(self, batch: list[_Entry[Item, Result]]) -> None:
        """Compute a batch, or its items one by one where the whole fails."""
        loop = asyncio.get_running_loop()
        self._observe(len(batch))
        try:
            results = await loop.run_in_executor(self._thread, self._compute, [entry.item for entry in batch])
            if len(results) != len(batch):
                raise ValueError(f"the model gave {len(results)} results for {len(batch)} items")
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # also a panic of Rust, which is no Exception: it must not end the worker
            if len(batch) == 1:
                if not batch[0].result.done():
                    known = isinstance(error, Exception)
                    batch[0].result.set_exception(error if known else RuntimeError(f"{type(error).__name__}: {error}"))
                return
            for entry in batch:
                if not entry.result.done():
                    await self._run([entry])
            return
        for entry, result in zip(batch, results, strict=True):
            if not entry.result.done():
                entry.result.set_result(result)
