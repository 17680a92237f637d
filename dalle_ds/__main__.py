"""All commands by one name: `dalle COMMAND …`, or `python -m dalle_ds COMMAND …`; `deepspeed --module dalle_ds COMMAND …`."""

from __future__ import annotations

import sys
from difflib import get_close_matches

from dalle_ds.cli import own_arguments, run_launcher
from dalle_ds.commands import COMMANDS
from dalle_ds.errors import ConfigError


def main() -> None:
    """Do what the first argument names with the arguments behind it, or list what there is."""
    run_launcher(_main)


def _main() -> None:
    name, *rest = own_arguments() or ["--help"]
    if name in ("-h", "--help"):
        print("usage: dalle COMMAND [options], and dalle COMMAND --help for what a command takes\n")
        for command, function in COMMANDS.items():
            print(f"  {command:18}{(function.__doc__ or '').partition(chr(10))[0]}")
        return
    command = name.replace("-", "_")
    if command not in COMMANDS:
        near = get_close_matches(command, COMMANDS, n=1)
        raise ConfigError(
            f"{name} is no command{f': did you mean {near[0]}?' if near else ''}; dalle --help lists them"
        )
    sys.argv = [f"dalle {command}", *rest]
    COMMANDS[command]()


if __name__ == "__main__":
    main()
