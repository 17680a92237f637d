"""All commands by one name: `dalle COMMAND …`, or `python -m dalle_ds COMMAND …`; `deepspeed --module dalle_ds COMMAND …`."""

from __future__ import annotations

import ast
import sys
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from dalle_ds import commands
from dalle_ds.cli import own_arguments, run_launcher
from dalle_ds.errors import ConfigError


def main() -> None:
    """Do what the first argument names with the arguments behind it, or list what there is."""
    run_launcher(_main)


def _main() -> None:
    files = {path.stem: path for path in sorted(Path(commands.__path__[0]).glob("[a-z]*.py"))}
    name, *rest = own_arguments() or ["--help"]
    if name in ("-h", "--help"):
        print("usage: dalle COMMAND [options], and dalle COMMAND --help for what a command takes\n")
        for command, path in files.items():
            print(f"  {command:18}{_first_line(path)}")
        return
    command = name.replace("-", "_")
    if command not in files:
        near = get_close_matches(command, files, n=1)
        raise ConfigError(
            f"{name} is no command{f': did you mean {near[0]}?' if near else ''}; dalle --help lists them"
        )
    sys.argv = [f"dalle {command}", *rest]
    import_module(f"{commands.__name__}.{command}").main()


def _first_line(path: Path) -> str:
    """What a command does, without importing it."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
