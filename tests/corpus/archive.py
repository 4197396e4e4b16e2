"""What of the corpus is kept, and the archives that it is kept in.

An adapter is dropped where the release before that has the kind wrote the same: the bytes of the
weights, the values in the config, what the models compute and how they merge. New fields in the
config are no difference; the oldest and the newest adapter of a kind stay in any case.
"""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

INDENT = "\n  "


def archive(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write a .tar.xz that depends on nothing but the files' names and bytes."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in sorted(files):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(lzma.compress(raw.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def contents(folder: Path) -> list[tuple[str, bytes]]:
    """Relative path and bytes of every file in `folder`."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return [(path.relative_to(folder).as_posix(), path.read_bytes()) for path in paths]


def pack_folder(folder: Path, path: Path) -> None:
    archive(path, contents(folder))


@dataclass(frozen=True)
class Made:
    """What one release wrote of one kind."""

    release: str
    record: dict[str, Any]
    config: dict[str, Any]
    weights: list[tuple[str, bytes]]
    outputs: dict[str, Tensor]

    def like(self, other: Made) -> bool:
        shared = self.config.keys() & other.config.keys() - {"peft_version"}
        return (
            self.record == other.record
            and self.weights == other.weights
            and all(self.config[key] == other.config[key] for key in shared)
            and self.outputs.keys() == other.outputs.keys()
            and all(
                float((value - other.outputs[key]).abs().max() / value.abs().max()) < 1e-9
                for key, value in self.outputs.items()
            )
        )


def _made(folder: Path, index: dict[str, Any]) -> dict[str, Made]:
    outputs = load_file(folder / "expected.safetensors")
    found = {}
    for kind, record in index["kinds"].items():
        files = contents(folder / kind)
        config = next(json.loads(data) for name, data in files if name == "adapter_config.json")
        weights = sorted(file for file in files if not file[0].endswith("adapter_config.json"))
        own = {key: value for key, value in outputs.items() if key.split("/")[0] == kind}
        found[kind] = Made(folder.name, record, config, weights, own)
    return found


def pack(folders: list[Path], into: Path) -> None:
    """Write an archive and an index into `into` for each folder, the oldest release first."""
    indices = [json.loads((folder / "index.json").read_text()) for folder in folders]
    everything = [_made(*pair) for pair in zip(folders, indices, strict=True)]
    newest = {kind: made.release for found in everything for kind, made in found.items()}
    last: dict[str, Made] = {}
    for folder, index, found in zip(folders, indices, everything, strict=True):
        alike = {
            kind: last[kind].release
            for kind, made in found.items()
            if kind in last and newest[kind] != made.release and made.like(last[kind])
        }
        kept = {kind: made for kind, made in found.items() if kind not in alike}
        last |= kept
        outputs = {key: value for made in kept.values() for key, value in made.outputs.items()}
        files = [(f"{kind}/{n}", data) for kind in kept for n, data in contents(folder / kind)]
        archive(into / f"{folder.name}.tar.xz", [*files, ("expected.safetensors", save(outputs))])
        index["kinds"] = {kind: made.record for kind, made in kept.items()}
        (into / f"{folder.name}.json").write_text(text({**index, "alike": alike}))


def text(index: dict[str, Any]) -> str:
    """JSON with a line for each kind."""
    fields = []
    for key, value in index.items():
        said = json.dumps(value)
        if isinstance(value, dict) and value:
            lines = [f"{json.dumps(name)}: {json.dumps(value[name])}" for name in sorted(value)]
            said = "{" + INDENT + f",{INDENT}".join(lines) + "\n }"
        fields.append(f"{json.dumps(key)}: {said}")
    return "{\n " + ",\n ".join(fields) + "\n}\n"
