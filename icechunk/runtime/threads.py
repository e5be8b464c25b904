"""Pools of threads, one of each kind in a process, which survive a fork of it."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

__all__ = ["ProcessPool"]


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
        self._made: tuple[int, ThreadPoolExecutor] | None = None
        self._lock = threading.Lock()

    def here(self) -> ThreadPoolExecutor:
        """The pool of this process; after a fork the parent's is left alone."""
        made = self._made
        if made is not None and made[0] == os.getpid():
            return made[1]
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                self._made = (os.getpid(), ThreadPoolExecutor(self._size, thread_name_prefix=self._name))
            return self._made[1]
