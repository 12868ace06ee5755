"""End a command cleanly on Ctrl-C and SIGTERM: at most one line, an exit status, and no temporary folder left behind.

The command lines import this module before all others. The import alone has an effect: a Ctrl-C while the rest is
imported prints no traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

INTERRUPTED, TERMINATED = 130, 143
"""Exit statuses: 128 and the signal's number, as shells count."""


class Terminated(BaseException):
    """SIGTERM or SIGHUP as an exception, so that ``finally`` clauses remove folders and end processes.

    It is not an ``Exception``, so that no handler of errors catches it.
    """


@contextmanager
def termination_raises() -> Iterator[None]:
    """Raise Terminated within; a second signal ends the process at once. For the main thread only."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    # A signal that is ignored, as SIGHUP is under nohup, stays ignored.
    previous = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) == signal.SIG_DFL}

    def on_signal(number: int, frame: FrameType | None) -> None:
        for each in previous:
            signal.signal(each, signal.SIG_DFL)
        raise Terminated

    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _quiet_interrupts() -> None:
    """Print one line for a Ctrl-C that nothing handles; the process still ends by the signal."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
        elif sys.stderr is not None:
            name = os.path.basename(sys.argv[0]) if sys.argv else ""
            with suppress(OSError):
                print(f"{name if name.startswith('edge-ssm') else 'edge-ssm'}: error: interrupted", file=sys.stderr)

    if sys.excepthook is sys.__excepthook__:  # A host program's own hook stays.
        sys.excepthook = hook


_quiet_interrupts()
