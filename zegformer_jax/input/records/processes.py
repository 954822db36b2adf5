"""Work in several processes, which end with the one that started them. No TensorFlow here."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from multiprocessing import connection
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
AHEAD = 2  # tasks per worker that are submitted; results wait until the caller takes them


def count_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def run(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[tuple[Task, Result]]:
    """Yields the tasks with their results as they end; one worker runs in this process, in order.

    Args:
        function: Function of a module, so that other processes can import it.
        tasks: Arguments of the function.
        workers: Number of processes.

    Raises:
        OSError: A worker was killed.
        Exception: The function raised it; no more tasks are started.
    """
    if workers <= 1:
        yield from ((task, function(task)) for task in tasks)
        return
    # Spawned, not forked: the caller's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    tasks = iter(tasks)
    with futures.ProcessPoolExecutor(workers, context, _start) as pool:
        try:
            running = {}
            while True:
                for task in itertools.islice(tasks, AHEAD * workers - len(running)):
                    running[pool.submit(function, task)] = task
                if not running:
                    return
                done, _ = futures.wait(running, return_when=futures.FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        except futures.process.BrokenProcessPool:
            raise OSError("a worker was killed, perhaps because memory ran out") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start() -> None:
    """Ends a worker with its parent, however that ends, and leaves Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
