"""The command line: commands by import path, so that `weft --help` imports none of them.

The one door to cyclopts, with `commands.py`. Exit codes: 0 done, 1 the check ran and the answer is
no, 2 the user can fix it, 3 a defect of weft, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib.metadata import version

from cyclopts import App, CycloptsError

from weft.core.errors import WeftError
from weft.core.units import clean

# name -> (function, the line in `weft --help`)
_COMMANDS = {
    "merge": ("weft.cli.commands:merge", "Merge adapters into a base model."),
    "inspect": ("weft.cli.commands:inspect", "Say what a file or folder is."),
    "demo": ("weft.cli.commands:demo", "Teach a real model something new, and check the result."),
}


def build() -> App:
    """The app, without its commands' code."""
    app = App(
        name="weft",
        help="The whole life of a LoRA adapter, streamed from disk to disk.",
        version=version("weft"),
        version_flags=["--version", "-V"],
    )
    for name, (path, line) in _COMMANDS.items():
        app.command(path, name=name, help=line)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    app = build()
    try:
        app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _say("error", str(error).replace("\n", " "))
        _say("hint", f"weft {'merge' if 'merge' in sys.argv else ''} --help".replace("  ", " "))
        sys.exit(2)
    except WeftError as error:
        _say("error", str(error))
        if error.hint:
            _say("hint", error.hint)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _say("error", "interrupted")
        _say("hint", "run the same command with --resume to go on from there")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output left, as `| head` does; keep the interpreter from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception:
        traceback.print_exc()
        _say("error", "this is a defect of weft, please report it with the lines above")
        sys.exit(3)


def _say(kind: str, text: str) -> None:
    first, *rest = [clean(line) for line in text.split("\n")]
    print(f"{kind}: {first}", *rest, sep="\n" + " " * (len(kind) + 2), file=sys.stderr)
