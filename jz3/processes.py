"""Child processes that end with the process that started them, however that ends."""

import contextlib
import ctypes
import os
import signal

_SET_PARENT_DEATH_SIGNAL = 1


def end_with(parent: int, number: int = signal.SIGKILL) -> bool:
    """Have the kernel send this process a signal when its parent dies, so that no orphan works on.

    Args:
        parent: the parent's process id.
        number: the signal.

    Returns:
        Whether the parent is still alive.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, int(number))
    return os.getppid() == parent
