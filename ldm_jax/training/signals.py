"""Ctrl-C and SIGTERM: they stop at once before the first step, later after the current step."""

import contextlib
import dataclasses
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


class Interrupted(SystemExit):
    """Training was stopped by SIGINT or SIGTERM, with everything saved; `str` says what is saved.

    A SystemExit of code 0: a program that does not catch it ends in success.
    """

    def __init__(self, message: str):
        super().__init__(0)
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclasses.dataclass
class StopRequest:
    """`requested` is the name of the signal that has arrived, else ""; `agreed` that of one that
    has arrived at any process of the run, and all know of it at the same step.

    Until `training` is set, a signal raises `Interrupted` where it arrives, with `saved` in its
    message. After `release`, signals act as usual.
    """

    requested: str = ""
    agreed: str = ""
    training: bool = False
    saved: str = "nothing to save"
    release: Callable[[], None] = lambda: None

    def is_saved(self, step: int, workdir: Path) -> None:
        """Notes that the state after `step` steps is saved in `workdir`."""
        self.saved = f"step {step} is saved in {workdir}"


def signal_number(name: str) -> int:
    """The number of a signal; 0 for ""."""
    return int(signal.Signals[name]) if name else 0


def signal_name(number: int) -> str:
    """The name of a signal; "" for 0."""
    return signal.Signals(number).name if number else ""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Handles the first SIGINT or SIGTERM as in `StopRequest`; a second one acts as usual."""
    stop, before = StopRequest(), {}
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread alone
        return

    def restore():
        for number, handler in before.items():  # None: not of Python, such as jax's own
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def request(number, frame):
        stop.requested = signal.Signals(number).name
        restore()
        if not stop.training:
            raise Interrupted(f"Stopped by {stop.requested} before the first step; {stop.saved}")
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of a print
            log.info("%s: stopping after this step", stop.requested)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, request)
    stop.release = restore
    try:
        yield stop
    finally:
        restore()


def in_thread(function: Callable[[], T]) -> T:
    """`function()`, computed in a thread while the main thread handles signals.

    A handler runs only between two Python instructions of the main thread, and a compilation is
    one instruction of minutes. If a handler raises, the thread continues until it has compiled, and
    Python waits for it before it exits, because an exit during compilation crashes.
    """
    if threading.current_thread() is not threading.main_thread():
        return function()
    results, errors = [], []

    def work():
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="compute")
    thread.start()
    while thread.is_alive():
        thread.join(0.1)  # short waits: some systems handle no signal in an unlimited wait
    if errors:
        raise errors[0]
    return results[0]
