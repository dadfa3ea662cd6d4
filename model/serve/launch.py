"""Run a module as ``python -m`` would, in a process that ends with the one that started it.

    python -m model.serve.launch PARENT_PID MODULE [FLAGS …]

``medplib serve`` starts its servers so: should it be killed, none of them is left behind holding a port and a GPU.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int) -> bool:
    """Have SIGTERM sent to this process when its parent dies; false where the parent is dead already.

    Only Linux knows how; elsewhere nothing is asked of the system.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    return os.getppid() == parent


def main() -> None:
    parent, module, *flags = sys.argv[1:]
    if not end_with_parent(int(parent)):
        sys.exit("the process that started this one is gone")
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
