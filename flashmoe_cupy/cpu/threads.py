"""Threads for the NumPy back end: the caller and some helpers take pieces of work that write to different places.

NumPy lets go of the interpreter inside its loops and products, so pieces run at the same time. What a piece computes
does not depend on who takes it, and pieces are cut by shapes alone: the bits are the same with any number of threads.
OpenBLAS would bring threads of its own into every large product; products of less than `SINGLE` run on the caller's.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")

# OpenBLAS takes a second thread for a product when m * n * k is at least twice 4 * 65536, and for a product of a matrix
# and a vector when m * n is at least 4 * 2304 (interface/gemm.c, interface/gemv.c).
SINGLE = 2 * 4 * 65536 - 1
SINGLE_VECTOR = 4 * 2304 - 1


def count() -> int:
    """Threads that a call may use: the processors that this process may run on, at most OMP_NUM_THREADS."""
    try:
        here = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux
        here = os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list is one number per nesting level
    return max(1, min(here, int(wanted))) if wanted.isdecimal() and int(wanted) else here


_pool: ThreadPoolExecutor | None = None
_workers = 0
_lock = threading.Lock()


def _forget() -> None:
    """In a forked child: the pool's threads are the parent's."""
    global _pool, _workers, _lock
    _pool, _workers, _lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _helpers(wanted: int) -> ThreadPoolExecutor:
    """The pool, with at least so many workers. They wait asleep, and only as many are started as are used at once."""
    global _pool, _workers
    with _lock:
        if _pool is None or _workers < wanted:
            _pool, _workers = ThreadPoolExecutor(wanted, "flashmoe_cupy"), wanted  # the old one ends when it is idle
        return _pool


def each(worker: Callable[[], Callable[[Item], None]], items: Iterable[Item], one_thread: bool = False) -> None:
    """Make one function with worker() in each thread, and call one of them with every item; warnings of NumPy are off.

    Items are taken in their order, by whichever thread is free. one_thread: this thread does all.
    Raises what a call raised first; items that no thread has taken by then are left out.
    """
    queue = deque(items)
    failed: list[BaseException] = []

    def work() -> None:
        with np.errstate(all="ignore"):  # of this thread only
            function = worker()
            while not failed:
                try:
                    item = queue.popleft()
                except IndexError:
                    return
                try:
                    function(item)
                except BaseException as error:
                    failed.append(error)

    others: list[Future[None]] = []
    helpers = 0 if one_thread or len(queue) < 2 else min(count(), len(queue)) - 1
    if helpers:
        try:
            pool = _helpers(helpers)
            others = [pool.submit(work) for _ in range(helpers)]
        except RuntimeError:  # the interpreter ends, or no thread can be started: the others do the work
            pass
    work()
    for other in others:
        if not other.cancel():  # one that never started has nothing to do: the queue is empty
            other.result()
    if failed:
        raise failed[0]
