"""The processes of a run: how they find each other, exchange texts, and stop together.

With one process every function here returns at once. With several, process 0 writes and all
compute. Texts go through the key-value store of jax's coordination service, which process 0 runs:
unlike collectives of devices, waiting for it can be interrupted.
"""

import contextlib
import itertools
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed  # jax has no public access to the store

from ldm_jax.runtime.console import leave

log = logging.getLogger(__name__)

WAIT = 300.0  # seconds that processes wait for each other at the start
BEAT, SILENCE = 5.0, 40.0  # seconds between signs of life; without one, a process has ended
HEARD = 2.0  # seconds in which every process reads what one of them has published
POLL = 1000  # milliseconds of one question to the store

_gathered = itertools.count()
_broken = threading.Event()  # this process ends without the others


def join(
    coordinator: str = "",
    process: int | None = None,
    processes: int | None = None,
    wait: float = WAIT,
) -> None:
    """Connects this process with the others, before jax is used.

    Without arguments, jax finds them on TPU pods, SLURM, GKE and Open MPI; elsewhere this process
    is alone. `processes=1` looks for none.

    Args:
      coordinator: HOST:PORT of process 0, the same in every process.
      process: the number of this process, 0 … processes − 1.
      processes: how many there are.
      wait: seconds until the others must have come.

    Raises:
      ValueError: an argument is missing, out of its range, or a port that is taken.
      TimeoutError: the others have not come, or process 0 cannot be reached.
    """
    if processes == 1 and process in (None, 0):
        return
    _check(coordinator, process, processes)
    if process == 0:
        _check_port(coordinator)
    elif coordinator:
        _reach(coordinator, wait)
    # jax's own handler would take SIGTERM from ours.
    jax.config.update("jax_enable_preemption_service", False)
    errors: list[Exception] = []

    def connect():
        try:
            jax.distributed.initialize(
                coordinator or None, processes, process, initialization_timeout=int(wait) + 60
            )
        except Exception as error:
            errors.append(error)

    # In a thread, because it cannot be interrupted, and ends the process if the time is up.
    thread = threading.Thread(target=connect, name="connect", daemon=True)
    thread.start()
    deadline = time.monotonic() + wait
    while thread.is_alive():
        thread.join(0.1)
        if time.monotonic() > deadline:
            where = f" to {coordinator}" if coordinator else ""
            raise TimeoutError(
                f"not all {processes or ''} processes came{where} within {wait:g} s: start each "
                "with the same --coordinator and --processes, and with its own --process"
            )
    if errors and coordinator:
        raise ValueError(f"cannot join the processes at {coordinator}: {errors[0]}") from errors[0]
    if errors and "coordinator_address" not in str(errors[0]):
        raise ValueError(
            f"cannot join the processes of this cluster: {errors[0]}. --processes=1 trains in this "
            "process alone."
        ) from errors[0]
    if jax.process_count() > 1:
        _quieten()
        log.info("%d processes, with %d devices", jax.process_count(), jax.device_count())


def part() -> None:
    """Leaves the others at the end of a run; every process calls it.

    After an error or an early signal, which `together` has published, it does nothing.
    """
    if not jax.distributed.is_initialized() or _broken.is_set():
        return
    state = distributed.global_state
    if is_first():
        # The store must outlive the others: jax aborts a process that loses it while it leaves.
        client, state.client = state.client, None
        client.shutdown()
        time.sleep(HEARD)
    jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this is process 0, which writes."""
    return jax.process_index() == 0


def gather(text: str = "") -> list[str]:
    """The `text` of every process, in their order.

    Every process calls it, the same number of times; it waits for the last one.

    Raises:
      ConnectionError: process 0 cannot be reached.
    """
    count, own = jax.process_count(), jax.process_index()
    if count == 1:
        return [text]
    number, client = next(_gathered), distributed.global_state.client
    client.key_value_set(f"ldm_jax/gather/{number}/{own}", text)
    texts = [_get(f"ldm_jax/gather/{number}/{process}") for process in range(count)]
    if number:  # whoever has published this one has read all of the last
        client.key_value_delete(f"ldm_jax/gather/{number - 1}/{own}")
    return texts


def check_alike(settings: dict[str, Any], compare: Callable[[dict, dict], dict]) -> None:
    """Checks that all processes have the same settings, JSON-able.

    `compare(a, b)` is {name: (value in a, value in b)} for all that differ.

    Raises:
      ValueError: lists what differs, and where.
    """
    first, *others = map(json.loads, gather(json.dumps(settings)))
    lines = [
        f"  {name}: {a} in process 0, {b} in process {process}"
        for process, other in enumerate(others, 1)
        for name, (a, b) in compare(first, other).items()
    ]
    if lines:
        raise ValueError(
            "the processes of this run have different settings:\n" + "\n".join(lines) + "\n"
            "Start every process with the same command, except for --process."
        )


class Together:
    """`close` ends `together` before its block ends."""

    def __init__(self):
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


@contextlib.contextmanager
def together(saved: Callable[[], str] = lambda: "") -> Iterator[Together]:
    """Ends this process when another one fails, is stopped, or gives no sign of life.

    An exception in the block is published, so that the other processes end too, with a message
    that names it. `saved` says what of the run is saved.
    """
    if jax.process_count() == 1:
        yield Together()
        return
    watch, own = Together(), jax.process_index()
    thread = threading.Thread(target=_watch, args=(watch, saved), name="watch", daemon=True)
    thread.start()
    try:
        yield watch
    except BaseException as error:
        if watch.closed.is_set():
            raise
        lost = _is_lost_contact(error)
        if lost:  # the other process may say why, or have failed before this one
            time.sleep(2 * HEARD)
        watch.close()
        _broken.set()
        stopped = isinstance(error, SystemExit) and error.code == 0
        reason = str(error) or type(error).__name__
        with contextlib.suppress(Exception):  # another one was faster, or process 0 is gone
            text = json.dumps([own, 0 if stopped else 1, reason])
            distributed.global_state.client.key_value_set("ldm_jax/end", text)
        if own == 0:
            time.sleep(HEARD)  # the store ends with this process
        if lost:
            first_line = reason.strip().partition("\n")[0][:300]
            raise ConnectionError(
                f"a computation of all {jax.process_count()} processes failed; another process has "
                f"probably ended ({first_line}); {saved()}"
            ) from error
        raise
    finally:
        watch.close()
        thread.join(3 * POLL / 1000)  # Python aborts if it exits while a thread asks the store


def _watch(watch: Together, saved: Callable[[], str]) -> None:
    """Gives signs of life, and ends this process if another one has ended."""
    client, own = distributed.global_state.client, jax.process_index()
    beats, seen, due = itertools.count(), {}, 0.0
    while not watch.closed.is_set():
        now = time.monotonic()
        try:
            if now >= due:
                due = now + BEAT
                client.key_value_set(f"ldm_jax/beat/{own}", str(next(beats)), allow_overwrite=True)
                for key, beat in client.key_value_dir_get("ldm_jax/beat/"):
                    if seen.get(key, ("", 0))[0] != beat:
                        seen[key] = beat, now
            end = _ask("ldm_jax/end")
        except Exception:
            end = json.dumps([0, 1, "it cannot be reached"])
        silent = [key for key, (_, since) in seen.items() if now - since > SILENCE]
        if silent and not end:
            process = int(silent[0].rsplit("/", 1)[-1])
            end = json.dumps([process, 1, f"it gave no sign of life for {SILENCE:g} s"])
        if not end:
            continue
        process, code, reason = json.loads(end)
        if watch.closed.wait(HEARD):  # this process has ended for the same reason
            return
        parts = f"Process {process} ended: {reason}", saved()
        leave("; ".join(text for text in parts if text and text not in reason), code)


def _get(key: str) -> str:
    """The value of a key, as soon as there is one."""
    while True:
        try:
            value = _ask(key)
        except Exception as error:
            raise ConnectionError(f"process 0 cannot be reached: {error}") from error
        if value is not None:
            return value


def _ask(key: str) -> str | None:
    """The value of a key; None after `POLL` without one."""
    try:
        return distributed.global_state.client.blocking_key_value_get(key, POLL)
    except Exception as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
    return None


def _is_lost_contact(error: BaseException) -> bool:
    """Whether an error is that of a collective that another process has left."""
    signs = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "NCCL", "coordination service")
    text = str(error)
    return isinstance(error, Exception) and any(sign in text for sign in signs)


def _quieten() -> None:
    """Processes other than 0 show warnings and their end alone, with their number."""
    if is_first():
        return
    logger = logging.getLogger("ldm_jax")
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        handler.setFormatter(logging.Formatter(f"process {jax.process_index()}: %(message)s"))


def _check(coordinator: str, process: int | None, processes: int | None) -> None:
    given = {"--coordinator": coordinator, "--process": process, "--processes": processes}
    missing = [flag for flag, value in given.items() if value in ("", None)]
    if len(missing) == 3:
        return
    if missing:
        there = ", ".join(flag for flag in given if flag not in missing)
        raise ValueError(
            f"{there} without {' and '.join(missing)}: give all three, or none on a cluster that "
            "jax knows (TPU, SLURM, GKE, Open MPI)"
        )
    host, colon, port = coordinator.rpartition(":")
    if not host or not colon or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"--coordinator={coordinator}: give HOST:PORT of process 0")
    if processes < 1 or not 0 <= process < processes:
        raise ValueError(
            f"--process={process} of --processes={processes}: processes are numbered from 0 to "
            f"{max(processes, 1) - 1}"
        )


def _check_port(coordinator: str) -> None:
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ValueError(
                f"port {port} of --coordinator={coordinator} cannot be used ({error.strerror}): "
                "choose another one, in every process"
            ) from error


def _reach(coordinator: str, wait: float) -> None:
    """Waits until process 0 listens."""
    host, _, port = coordinator.rpartition(":")
    deadline, told = time.monotonic() + wait, False
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except socket.gaierror as error:
            raise ValueError(f"--coordinator={coordinator}: there is no host {host}") from error
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"process 0 does not answer at {coordinator} within {wait:g} s ({error}): "
                    "start it there, with --process=0, and let the port through firewalls"
                ) from error
        if not told:
            log.info("Waiting for process 0 at %s", coordinator)
            told = True
        time.sleep(0.2)
