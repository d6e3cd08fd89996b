"""Start a command that is asked to end (SIGTERM) when its parent dies, however the parent dies.

    python -I -S src/study/with_parent.py PARENT_PID COMMAND ...

The kernel does it (Linux, prctl(2) PR_SET_PDEATHSIG; it survives exec), in a process of its own
because a function between fork and exec may deadlock under threads. Elsewhere the command simply
outlives a killed parent, and whoever comes next finds its lock held and waits.
"""

import os
import signal
import sys

PR_SET_PDEATHSIG = 1
TRY_AGAIN = 75


def main() -> None:
    """Become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the kernel was told
            sys.exit(TRY_AGAIN)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
