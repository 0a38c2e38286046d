"""`os.fork` in a process that may have threads, such as those of pytest-xdist."""

from __future__ import annotations

import os
import select
import signal

_START_SECONDS, _TRIES = 10.0, 4


def fork() -> int:
    """As `os.fork`. A child that gives no sign of life is killed, and another one made.

    Before Python 3.12 a child deadlocks inside `os.fork` if at that instant another thread of the parent was entering
    or leaving Python. Such a child has done nothing yet.
    """
    for _ in range(_TRIES):
        life, sign = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(life)
            os.write(sign, b"1")
            os.close(sign)
            return 0
        os.close(sign)
        has_started = bool(select.select([life], [], [], _START_SECONDS)[0])
        os.close(life)
        if has_started:
            return pid
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    raise RuntimeError(f"no child has started in {_TRIES} tries")
