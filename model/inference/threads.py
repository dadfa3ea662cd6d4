"""OpenMP on a CPU: only one thread of a process may have helpers, or all become slow.

GNU OpenMP gives every thread that computes helpers of its own. As soon as there are more of them than cores, idle or
not, it lets none of them wait actively any more, and each of the thousands of small operations of a pass pays for
waking them (1.5 times the time on two cores). So the thread that steps an engine keeps its helpers; no other has any.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_SOFT = 1  # omp_pause_soft: helpers end, settings stay


def lone_thread(name: str) -> ThreadPoolExecutor:
    """An executor of one thread whose torch operations run without helpers."""
    executor = ThreadPoolExecutor(1, thread_name_prefix=name)
    count = torch.get_num_threads()
    if count > 1:
        executor.submit(_be_alone).result()
        torch.set_num_threads(count)  # for threads that begin later: the last caller's number is theirs
    return executor


def release_helpers() -> None:
    """End the helpers of the calling thread; they come back with its next operation that is large enough."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        pause = getattr(ctypes.CDLL(str(library)), "omp_pause_resource_all", None)
        if pause is not None:
            pause(_SOFT)


def _be_alone() -> None:
    torch.get_num_threads()  # a thread's first question sets its number, and would undo what follows
    torch.set_num_threads(1)
