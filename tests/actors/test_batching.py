import asyncio
import threading
import time

import pytest

from modip_ray.actors.batching import BatchQueue


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 10))


def test_requests_of_all_live_clients_make_one_batch():
    async def main():
        batches = []
        queue = BatchQueue(lambda items: batches.append(items) or [i * 10 for i in items], max_rows=100, max_wait_s=5.0)
        queue.seen = {c: time.monotonic() for c in range(3)}
        results = await asyncio.gather(*(queue.submit(c, c, 2) for c in range(3)))
        assert results == [0, 10, 20] and batches == [[0, 1, 2]]
    run(main())


def test_the_first_request_does_not_wait_longer_than_max_wait():
    async def main():
        queue = BatchQueue(lambda items: items, max_rows=100, max_wait_s=0.05)
        queue.seen = {"dead": time.monotonic() + 100}
        begun = time.monotonic()
        assert await queue.submit("alive", 1, 1) == 1
        assert 0.04 < time.monotonic() - begun < 4
    run(main())


def test_a_client_that_was_silent_for_long_is_not_waited_for():
    async def main():
        queue = BatchQueue(lambda items: items, max_rows=100, max_wait_s=5.0)
        queue.seen = {"dead": time.monotonic() - 2}
        begun = time.monotonic()
        await queue.submit("alive", 1, 1)
        assert time.monotonic() - begun < 4
    run(main())


def test_max_rows_splits_and_an_oversized_request_goes_alone():
    async def main():
        sizes = []
        queue = BatchQueue(lambda items: sizes.append(len(items)) or items, max_rows=4, max_wait_s=0.02)
        await asyncio.gather(*(queue.submit(i, i, rows) for i, rows in enumerate((2, 2, 2, 9, 1))))
        assert sizes == [2, 1, 1, 1] and queue.totals[1] == 16
    run(main())


def test_one_bad_request_fails_alone():
    async def main():
        queue = BatchQueue(lambda items: [ValueError(f"bad {i}") if i == 1 else i for i in items], max_rows=10, max_wait_s=0.02)
        results = await asyncio.gather(*(queue.submit(i, i, 1) for i in range(3)), return_exceptions=True)
        assert results[0] == 0 and results[2] == 2 and isinstance(results[1], ValueError)
    run(main())


def test_a_crash_reaches_every_waiting_client_and_the_queue_goes_on():
    async def main():
        queue = BatchQueue(lambda items: 1 / 0 if 0 in items else items, max_rows=10, max_wait_s=0.02)
        results = await asyncio.gather(*(queue.submit(i, i, 1) for i in range(2)), return_exceptions=True)
        assert all(isinstance(r, ZeroDivisionError) for r in results)
        assert await queue.submit(5, 5, 1) == 5
    run(main())


def test_the_loop_is_free_while_a_batch_is_computed():
    async def main():
        release = threading.Event()
        queue = BatchQueue(lambda items: release.wait(5) and items, max_rows=1, max_wait_s=0.0)
        first = asyncio.create_task(queue.submit(0, 0, 1))
        await asyncio.sleep(0.05)
        assert not first.done()
        release.set()                           # only a free loop gets here
        assert await first == 0
    run(main())


@pytest.mark.parametrize("inline", [False, True], ids=["thread", "inline"])
@pytest.mark.parametrize("clients", [1, 7])
def test_every_client_gets_its_own_answer_in_a_closed_loop(clients, inline):
    async def main():
        queue = BatchQueue(lambda items: [i + 1 for i in items], max_rows=4, max_wait_s=0.002, inline=inline)

        async def client(number):
            for step in range(50):
                assert await queue.submit(number, 1000 * number + step, 1) == 1000 * number + step + 1
        await asyncio.gather(*(client(i) for i in range(clients)))
        assert queue.totals[1] == queue.totals[2] == 50 * clients
    run(main())
