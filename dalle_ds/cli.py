"""What every launcher shares: options from a typed dataclass, and user mistakes shown as one line without a traceback."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from dalle_ds.errors import EXIT_REQUEUE, ConfigError, DalleError, Interrupted

Options = TypeVar("Options")


def parse_options(
    kind: type[Options],
    arguments: Sequence[str] | None = None,
    default: Options | None = None,
    description: str | None = None,
) -> Options:
    """Command-line options as a `kind`; the docstring under each field is its help.

    Options are written as the field is and take a value: `--out DIR`, `--train.batch_size 64`, `--overwrite True`; `--data`
    may be given several times. A mistake prints what was found and ends the process with status 2; of several processes, the
    first one prints.

    Args:
        arguments: None takes the process's own; of either, `own_arguments`.
        default: what the options start from.
        description: what the help begins with; None takes the docstring of `kind`.
    """
    arguments = _gathered(own_arguments(arguments))
    markers = (tyro.conf.FlagConversionOff,)
    with contextlib.ExitStack() as silence:
        if _rank() != "0":
            nowhere = silence.enter_context(open(os.devnull, "w"))  # noqa: PTH123
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        if default is None:
            return tyro.cli(kind, args=arguments, description=description, config=markers, use_underscores=True)
        return tyro.cli(
            kind, args=arguments, default=default, description=description, config=markers, use_underscores=True
        )


def own_arguments(arguments: Sequence[str] | None = None) -> list[str]:
    """Arguments, or the process's, without --local_rank=N, which the deepspeed launcher adds; the environment has it."""
    given = sys.argv[1:] if arguments is None else arguments
    return [argument for argument in given if not argument.startswith("--local_rank=")]


def _gathered(arguments: Sequence[str]) -> Sequence[str]:
    """`--data A … --data B` as `… --data A B`, since of an option that is given twice tyro takes the last."""
    if sum(argument.split("=")[0] == "--data" for argument in arguments) < 2:
        return arguments
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data", nargs="+", action="extend")
    known, rest = parser.parse_known_args(arguments)
    return [*rest, "--data", *known.data]


def run_launcher(main: Callable[[], None]) -> None:
    """Call `main`; a `DalleError`, or a file that cannot be read or written, ends the process with status 1 and one line
    on standard error. What every process finds wrong with the configuration, only the first one tells."""
    warnings.showwarning = _show_warning
    status = 0
    try:
        main()
    except KeyboardInterrupt:
        status = 130
    except Interrupted as stopped:
        if _rank() == "0":
            print(stopped, flush=True)
        status = EXIT_REQUEUE
    except (DalleError, OSError) as error:
        words = explain(error)
        if words is None:
            raise
        if _rank() == "0" or not isinstance(error, ConfigError):
            _fail(words)
        status = 1
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _leave(status)
    if status:
        sys.exit(status)


def _leave(status: int) -> None:
    """End one of several processes, without taking the interpreter down first.

    gloo's threads outlive their process group. One that still has the tensor of the last collective to drop asks for the
    interpreter, and where that is just going down, the C++ runtime aborts: a run that went well would end with status -6.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def explain(error: BaseException) -> str | None:
    """An error in the user's words, or None where it is not of the user's making and a traceback is due."""
    if isinstance(error, DalleError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be read or written: {error.strerror}"
    return None


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _fail(message: str) -> None:
    who = "error" if _rank() == "0" else f"error on rank {_rank()}"
    print(f"{who}: {message}", file=sys.stderr)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning for the user of a command line, who does not care which line of code it comes from."""
    print(f"warning: {message}", file=sys.stderr)
