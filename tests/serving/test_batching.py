import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmkd.serving.batching import Batcher, QueueFullError


class Doubler:
    """Doubles numbers; remembers batches and threads; fails for items in ``broken``; waits for ``gate``."""

    def __init__(self, broken=()):
        self.batches, self.threads, self.broken, self.gate = [], set(), set(broken), threading.Event()
        self.gate.set()

    def __call__(self, items):
        self.gate.wait(10)
        self.batches.append(list(items))
        self.threads.add(threading.get_ident())
        if self.broken & set(items):
            raise ValueError("a broken item")
        return [2 * item for item in items]


def batched(work, compute, largest=4, wait=0.01, capacity=100):
    """Run ``work(batcher)`` in an event loop."""

    async def run():
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(compute, thread, asyncio.Lock(), largest, wait, capacity)
            batcher.start()
            try:
                return await work(batcher)
            finally:
                compute.gate.set()
                await batcher.close()

    return asyncio.run(run())


def test_concurrent_items_are_computed_together_in_one_thread_and_come_back_to_their_callers():
    compute = Doubler()

    async def work(batcher):
        return await asyncio.gather(*(batcher.submit([number]) for number in range(10)))

    assert batched(work, compute) == [[2 * number] for number in range(10)]
    assert [len(batch) for batch in compute.batches] == [4, 4, 2]
    assert len(compute.threads) == 1


def test_a_lone_item_does_not_wait_for_a_full_batch():
    async def work(batcher):
        began = time.monotonic()
        await batcher.submit([1])
        return time.monotonic() - began

    assert 0.05 <= batched(work, Doubler(), largest=1000, wait=0.05) < 2


def test_a_request_of_more_items_than_a_batch_is_spread_over_batches():
    compute = Doubler()
    assert batched(lambda b: b.submit(range(10)), compute) == [2 * n for n in range(10)]
    assert [len(batch) for batch in compute.batches] == [4, 4, 2]


class PanicError(BaseException):
    """As libraries in Rust raise it: no `Exception`."""


@pytest.mark.parametrize("fault", ["panic", "too few results"])
def test_a_fault_of_the_model_does_not_end_the_worker(fault):
    """Or every later request would wait until its time is over."""
    whole = Doubler()

    def compute(items):
        if 7 not in items:
            return whole(items)
        if fault == "panic":
            raise PanicError(fault)
        return []

    compute.gate = whole.gate

    async def work(batcher):
        with pytest.raises(Exception, match=r"PanicError: panic|0 results for 1 items"):
            await batcher.submit([7])
        return await asyncio.wait_for(batcher.submit([1]), 10)

    assert batched(work, compute) == [2]


def test_a_broken_item_fails_alone():
    compute = Doubler(broken=[2])

    async def work(batcher):
        return await asyncio.gather(*(batcher.submit([n]) for n in range(4)), return_exceptions=True)

    found = batched(work, compute)
    assert isinstance(found[2], ValueError)
    assert [found[n] for n in (0, 1, 3)] == [[0], [2], [6]]
    assert compute.batches == [[0, 1, 2, 3], [0], [1], [2], [3]]


def test_what_has_no_room_is_refused_and_the_rest_is_computed():
    compute = Doubler()

    async def work(batcher):
        compute.gate.clear()
        first = asyncio.create_task(batcher.submit([0]))
        while batcher.waiting or not first:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)  # the first one is with the model
        rest = asyncio.create_task(batcher.submit([1, 2, 3]))
        await asyncio.sleep(0)
        assert batcher.waiting == 3
        with pytest.raises(QueueFullError):
            await batcher.submit([4])
        compute.gate.set()
        return await first, await rest

    assert batched(work, compute, capacity=3) == ([0], [2, 4, 6])


def test_items_of_a_caller_that_leaves_are_not_computed():
    compute = Doubler()

    async def work(batcher):
        compute.gate.clear()
        first = asyncio.create_task(batcher.submit([0]))
        await asyncio.sleep(0)
        while batcher.waiting:  # until the first one is with the model
            await asyncio.sleep(0.01)
        gone, stays = asyncio.create_task(batcher.submit([1, 2])), asyncio.create_task(batcher.submit([3]))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert batcher.waiting == 1
        compute.gate.set()
        return await first, await stays

    assert batched(work, compute) == ([0], [6])
    assert compute.batches == [[0], [3]]


def test_closing_finishes_what_waits_and_refuses_the_rest():
    compute = Doubler()

    async def work(batcher):
        compute.gate.clear()
        waiting = [asyncio.create_task(batcher.submit([n])) for n in range(9)]
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFullError):
            await batcher.submit([9])
        compute.gate.set()
        await closing
        return await asyncio.gather(*waiting)

    assert batched(work, compute) == [[2 * n] for n in range(9)]
