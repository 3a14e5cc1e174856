"""Shared code of the command lines: flags, logging and error messages."""

import glob
import logging
import os
import sys
from collections.abc import Callable

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags
from tqdm import tqdm

TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where an error was raised.")


class _AboveProgress(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))
        sys.stdout.flush()  # a file or pipe is read while the run goes on


def log_to_console() -> None:
    """Shows ldm_jax's messages from INFO on, and other libraries' from WARNING on."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    logger = logging.getLogger("ldm_jax")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers:
        handler = _AboveProgress()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


def run(main: Callable[..., None], arguments: tuple[str, ...] = ()) -> None:
    """Runs a command line: flags, logging, and errors as one clear message and exit code 1.

    `arguments` are the names of positional arguments, which `main` gets in order.

    An unknown config key, which ml_collections reports with its nearest known one, is an error of
    the command line like any other.
    """

    def parse(argv):
        try:
            return flags.FLAGS(argv)
        except (AttributeError, KeyError) as error:
            _fail(f"unknown setting in --config: {_unquoted(error)}")
        except flags.Error as error:
            # An error inside a config file has its whole traceback; the last line is the reason.
            message = str(error).strip()
            _fail(message.splitlines()[-1].strip() if "Traceback" in message else message)

    def guarded(argv):
        given = argv[1:]
        if len(given) > len(arguments):
            _fail(f"unexpected argument {given[len(arguments)]!r}")
        if len(given) < len(arguments):
            _fail(f"missing argument {arguments[len(given)]}: give {' '.join(arguments)}")
        log_to_console()
        try:
            main(*given)
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            if TRACEBACK.value:
                raise
            _fail(f"{error}\n(--traceback shows where)")
        except KeyboardInterrupt:
            leave("Stopped by SIGINT", 130)

    app.run(guarded, flags_parser=parse)


def config_file(flag: flags.Flag) -> tuple[str, str]:
    """The path and the variant, "" for none, that a flag of a config file names.

    Raises:
      FileNotFoundError: there is no such file; lists those that are there.
    """
    path, _, variant = config_flags.get_config_filename(flag).partition(":")
    if not os.path.isfile(path):
        known = ", ".join(sorted(set(glob.glob("configs/*.py")) - {"configs/common.py"}))
        raise FileNotFoundError(f"no config file {path}; there are {known or 'none here'}")
    return path, variant


def leave(message: str = "", code: int = 0) -> None:
    """Ends the process at once, whatever its threads do: an exit during compilation crashes."""
    if message:
        tqdm.write(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _unquoted(error: Exception) -> str:
    # "'\\'lrr\\'\\nDid you mean …": the key quoted, then the whole message by KeyError.
    message = error.args[0] if isinstance(error, KeyError) else str(error)
    plain = str(message).replace("\\'", "'").replace("\\n", ". ").replace("\n", ". ")
    return plain.strip("'\"").replace("'. Did", ". Did")


def _fail(message: str) -> None:
    tqdm.write(f"error: {message}", file=sys.stderr)
    if jax.distributed.is_initialized():
        leave(code=1)  # a usual exit waits for the other processes, which may have ended
    sys.exit(1)
