"""Pools of threads, one of each kind in a process, which survive a fork of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

__all__ = ["ProcessPool"]


class _Threads(NamedTuple):
    pid: int
    first: ThreadPoolExecutor
    """Has one thread."""
    is_free: threading.Lock
    """Held while that thread has work."""
    others: ThreadPoolExecutor


class ProcessPool:
    """A pool of threads that is made when it is first needed, and anew in a process that was forked.

    Parameters
    ----------
    size
        Most threads; each is started when no other is idle.
    name
        Of its threads, before a number.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._made: _Threads | None = None
        self._lock = threading.Lock()

    def here(self) -> ThreadPoolExecutor:
        """The pool of this process, without the thread of `start`; after a fork the parent's is left alone."""
        return self._threads().others

    def start(self, work: Callable[[], object], then: Callable[[], object]) -> None:
        """Run ``work`` in a thread, and ``then``, which tells that it is done, after it. Neither may raise an error.

        Work that is done one after the other has the same thread. An executor of many threads would start them all,
        and take them in turn: if the next work comes before the last thread waits again, it starts another one.

        Raises
        ------
        RuntimeError
            The process is ending, and starts no thread.
        """
        threads = self._threads()
        if not threads.is_free.acquire(blocking=False):
            threads.others.submit(_run, work, then)
            return
        try:
            threads.first.submit(_run, work, threads.is_free.release, then)
        except BaseException:
            threads.is_free.release()
            raise

    def _threads(self) -> _Threads:
        made = self._made
        if made is not None and made.pid == os.getpid():
            return made
        with self._lock:
            if self._made is None or self._made.pid != os.getpid():
                first, others = (ThreadPoolExecutor(size, self._name) for size in (1, max(1, self._size - 1)))
                self._made = _Threads(os.getpid(), first, threading.Lock(), others)
            return self._made


def _run(*steps: Callable[[], object]) -> None:
    for step in steps:
        step()
