"""The command line: commands by import path, so that `weft --help` imports none of them.

The one door to cyclopts, with `commands.py`. Exit codes: 0 done, 2 the user can fix it, 3 a defect
of weft, 130 interrupted; 1 is kept for commands that check something, and find it wanting.
"""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import os
import sys
import traceback
from importlib.metadata import version

from cyclopts import App, CycloptsError, MissingArgumentError, UnusedCliTokensError

from weft.cli import mergekit_options
from weft.core import lazy
from weft.core.errors import WeftError
from weft.core.units import clean
from weft.formats.hub import asked_once

_RESUMABLE = {"merge", "run", "extract"}
# name -> (function, the line in `weft --help`)
_COMMANDS = {
    "merge": ("weft.cli.commands:merge", "Merge adapters into a base model."),
    "run": ("weft.cli.recipe_commands:run", "Make the model that a MergeKit recipe describes."),
    "extract": ("weft.cli.extract_commands:extract", "Take an adapter out of a tuned model."),
    "methods": ("weft.cli.recipe_commands:methods", "List the merge methods, or describe one."),
    "schema": ("weft.cli.recipe_commands:schema", "Print the JSON Schema of recipes."),
    "resize": ("weft.cli.resize_command:resize", "Make an adapter's factors smaller."),
    "inspect": ("weft.cli.commands:inspect", "Say what a file or folder is."),
    "diff": (
        "weft.cli.diff_commands:diff",
        "Say which tensors of two models differ, and how much.",
    ),
    "doctor": ("weft.cli.commands:doctor", "Examine an adapter; repair what has one reading."),
    "demo": ("weft.cli.commands:demo", "Teach a real model something new, and check the result."),
}


def build(arguments: list[str]) -> App:
    """The app, without its commands' code.

    The line that says what a command does is for the list of them; the command's own help is its
    docstring.
    """
    app = App(
        name="weft",
        help="The whole life of a LoRA adapter, streamed from disk to disk.",
        version=_version,
        version_flags=["--version", "-V"],
        suppress_keyboard_interrupt=False,
    )
    for name, (path, line) in _COMMANDS.items():
        app.command(path, name=name, help=None if name in arguments[:1] else line)
    return app


def _version() -> str:
    """With the loops that do the arithmetic: those of torch take longer."""
    from weft import native

    return f"{version('weft')} ({'compiled' if native.library() else 'plain'} loops)"


def run() -> None:
    """`weft` as a process: `main`, without most of a second in the garbage collector.

    The system takes a million objects of torch back faster than the interpreter does.
    """
    gc.set_threshold(50_000)
    lazy.alone = True
    code: str | int | None = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    gc.freeze()
    if isinstance(code, int):
        with contextlib.suppress(OSError):  # the reader has left: the interpreter knows the way out
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    app = build(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not know ‖ and Δ
    try:
        with asked_once():
            app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _say("error", _in_words(error, arguments))
        command = [name for name in arguments[:1] if name in _COMMANDS]
        known = mergekit_options.hints(arguments[1:]) if command == ["run"] else []
        _say("hint", "\n".join(known) or " ".join(["weft", *command, "--help"]))
        sys.exit(2)
    except WeftError as error:
        _say("error", str(error))
        if error.hint:
            _say("hint", error.hint)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _say("error", "interrupted")
        if _RESUMABLE & set(arguments[:1]):
            _say("hint", "run the same command with --resume to go on from there")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output left, as `| head` does; keep the interpreter from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _say("error", f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        _say("error", "this is a defect of weft, please report it with the lines above")
        sys.exit(3)


def _in_words(error: CycloptsError, arguments: list[str]) -> str:
    if isinstance(error, UnusedCliTokensError):
        return f"too many arguments: {' '.join(error.unused_tokens or [])}"
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        negative = _negative(error.keyword, arguments)
        if error.keyword and negative:
            return f"{error.keyword} {negative}: there is no such value below zero"
        if error.keyword:
            return f"{error.keyword} needs a value behind it"
        name = error.argument.name
        return f"{name if error.argument.index is None else name.lstrip('-').upper()} is missing"
    return str(error).replace("\n", " ")


def _negative(option: str | None, arguments: list[str]) -> str | None:
    """What stands behind `option`, if it is a number and not the next option."""
    following = [b for a, b in itertools.pairwise(arguments) if a == option]
    return next((each for each in following if each[:1] == "-" and each[1:2].isdigit()), None)


def _say(kind: str, text: str) -> None:
    first, *rest = [clean(line) for line in text.split("\n")]
    print(f"{kind}: {first}", *rest, sep="\n" + " " * (len(kind) + 2), file=sys.stderr)
