"""`python -m jaxft.cli.child PARENT VERB ...`: the `jaxft` command as a child process that ends when its parent does.

Without it the child of a process that was killed trains on. Linux sends it SIGTERM, at which a run saves its state;
other systems have no such signal.
"""

import ctypes
import os
import signal
import sys

from jaxft import cli

PR_SET_PDEATHSIG = 1  # linux/prctl.h; the parent is the thread that started the process


def command(words: list[str]) -> list[str]:
    """What to start for a verb and its words."""
    return [sys.executable, "-m", "jaxft.cli.child", str(os.getpid()), *words]


if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(sys.argv[1]):  # it ended before it could be told
            sys.exit(128 + signal.SIGTERM)
    sys.exit(cli.main(sys.argv[2:]))
