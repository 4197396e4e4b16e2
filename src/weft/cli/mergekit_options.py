"""What became of MergeKit's options: whoever comes from there has them in a script."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_NOT_NEEDED = "leave it out: "
_STREAMED = f"{_NOT_NEEDED}models are streamed, in memory that does not grow with them"
_CUDA = "--device cuda does the arithmetic on a GPU"
_IN_ONE_PASS = f"{_NOT_NEEDED}the documents of a recipe are streamed into one output, -o OUT"
_OPTIONS = {
    "--cuda": _CUDA,
    "--gpu-rich": _CUDA,
    "--multi-gpu": f"{_CUDA}, one of them",
    "--read-to-gpu": _STREAMED,
    "--low-cpu-memory": _STREAMED,
    "--lazy-unpickle": _STREAMED,
    "--async-write": _STREAMED,
    "--write-threads": "--threads says how many cores are used",
    "--num-threads": "--threads says how many cores are used",
    "-j": "--threads says how many cores are used",
    "--random-seed": "--seed says it, and without one it is 0: every run draws the same",
    "--out-shard-size": "--max-shard-size says it, in bytes, such as 5GB",
    "--transformers-cache": "--cache-dir says where the hub's cache is",
    "--copy-tokenizer": f"{_NOT_NEEDED}the tokenizer comes along",
    "--clone-tensors": f"{_NOT_NEEDED}no tensor is held in memory",
    "--write-model-card": f"{_NOT_NEEDED}the card is always written",
    "--safe-serialization": f"{_NOT_NEEDED}safetensors is what is written",
    "--trust-remote-code": f"{_NOT_NEEDED}no code of a model is ever run",
    "--allow-crimes": (
        "models of one architecture under two names take override_architecture in the recipe"
    ),
    "--unsafe-truncate-embeddings": (
        "no rows are cut off: `tokenizer: {source: base}` in the recipe says which are kept"
    ),
    "--intermediate-dir": _IN_ONE_PASS,
    "-I": _IN_ONE_PASS,
    "--out-path": "-o OUT says where the output goes",
    "--lazy": "--resume goes on with an interrupted run",
    "--verbose": f"{_NOT_NEEDED}notes and warnings are always said, but with -q",
    "-v": f"{_NOT_NEEDED}notes and warnings are always said, but with -q",
}


def hints(arguments: Iterable[str]) -> list[str]:
    """A line about each of MergeKit's options among `arguments`."""
    found = []
    for argument in arguments:
        option = argument.partition("=")[0]
        known = _OPTIONS.get(option) or _OPTIONS.get(option.replace("--no-", "--", 1))
        if known:
            found.append(f"{option} is MergeKit's; {known}")
    return found
