"""What every launcher shares: options from a typed dataclass, and user mistakes shown as one line instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from dalle_ds.errors import DalleError

Options = TypeVar("Options")


def parse_options(
    kind: type[Options], arguments: Sequence[str] | None = None, default: Options | None = None
) -> Options:
    """Command-line options as a `kind`; the docstring under each field is its help.

    Options are written as the field is and take a value: `--out DIR`, `--train.batch_size 64`, `--overwrite True`. A
    mistake prints what was found and ends the process with status 2.
    """
    markers = (tyro.conf.FlagConversionOff,)
    if default is None:
        return tyro.cli(kind, args=arguments, config=markers, use_underscores=True)
    return tyro.cli(kind, args=arguments, default=default, config=markers, use_underscores=True)


def run_launcher(main: Callable[[], None]) -> None:
    """Call `main`; a `DalleError` ends the process with status 1 and its message on standard error."""
    try:
        main()
    except DalleError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
