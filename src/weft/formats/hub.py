"""What a user writes for a model or an adapter -> a local folder; the one door to huggingface_hub.

`path`, `org/name`, `org/name@revision`, `org/name/subfolder@revision`, and the `models--org--name`
folders of the hub's own cache. Token, offline mode, cache directory and patience are those of
huggingface_hub: `HF_TOKEN`, `HF_HUB_OFFLINE`, `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_ETAG_TIMEOUT`.
"""

from __future__ import annotations

import glob
import os
import re
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from weft.core.errors import NotFound, WeftError
from weft.core.units import clean
from weft.formats.side_files import KEPT_FOLDERS, KEPT_NAMES, KEPT_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_ID = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<subfolder>[\w./-]+?))?(?:@(?P<revision>[\w./-]+))?"
)
_CACHED = re.compile(r"(?:^|[/\\])models--(?P<repo>[\w.-]+)(?:[/\\]|$)")
_FOLDERS = {
    *("model", "models", "base_models", "pretrained", "weights", "checkpoints", "ckpt", "ckpts"),
    *("output", "outputs", "results", "runs", "saves", "data", "home", "mnt", "workspace"),
}
_PICKLES = re.compile(r"(pytorch|adapter)_model.*\.bin|adapter_(model|\d+)\.pt")
_SAVES = re.compile(r"\d+_adapters\.safetensors")  # mlx-lm's, of single iterations
_NOWHERE = "no such file or folder"
_Asked = tuple[str, str | None, str | None, str | None]
_FOUND: ContextVar[dict[_Asked, Path] | None] = ContextVar("found", default=None)
_FETCHES: ContextVar[bool] = ContextVar("fetches", default=True)


class NotFetched(Exception):
    """The hub has it, and it was not to be fetched."""


def resolve(given: str, *, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The local file or folder that `given` means, fetched from the hub if need be.

    Raises:
        NotFound: Neither a path nor, as far as can be reached, a repository on the hub.
    """
    if path := local(given):
        return _snapshot_of(path, revision) if path.name.startswith("models--") else path
    match = _ID.fullmatch(given)
    if match is None or given.startswith((".", "/", "~")):
        raise NotFound(
            f"{_NOWHERE}: {clean(given)[:200]}{_looked(given)}",
            "give a path, or org/name on the hub",
        )
    revision = match["revision"] or revision
    folder = _download(match["repo"], match["subfolder"], revision, cache_dir)
    return folder / match["subfolder"] if match["subfolder"] else folder


@contextmanager
def asked_once() -> Iterator[None]:
    """Within it the hub is asked once for each name: one run is of one state of a repository."""
    token = _FOUND.set({})
    try:
        yield
    finally:
        _FOUND.reset(token)


@contextmanager
def nothing_fetched() -> Iterator[None]:
    """Within it the hub is only asked: `resolve` raises NotFetched for what it has."""
    token = _FETCHES.set(False)
    try:
        yield
    finally:
        _FETCHES.reset(token)


def local(given: str) -> Path | None:
    """The path that `given` is on this machine, if it is one."""
    try:
        path = Path(given).expanduser()
        return path if given and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a NUL
        return None


def repository(text: str) -> str | None:
    """`org/name` of an id, or of a path into the hub's cache; None for what is neither.

    `models/llama` is both an id and a path on somebody's machine: by its first part it is a path.
    """
    if cached := _CACHED.search(text):
        return cached["repo"].replace("--", "/")
    match = _ID.fullmatch(text)
    if match is None or text.startswith((".", "/", "~")) or local(text):
        return None
    return None if match["repo"].partition("/")[0].lower() in _FOLDERS else match["repo"]


def sought(error: WeftError, given: str) -> str:
    """What the error says, with where `given` was looked for if it was taken for a path, too."""
    said, at = str(error), _looked(given)
    return said if at in said or not said.startswith(_NOWHERE) else said + at


def _looked(given: str) -> str:
    """The whole of a relative path: what names it may lie in another folder."""
    if given.startswith(("/", "~")):
        return ""
    whole = os.path.abspath(given)  # noqa: PTH100, which says nothing of what is on the disk
    return f" (looked for at {clean(whole)[:400]})"


def _snapshot_of(path: Path, revision: str | None) -> Path:
    """A repository's folder in the hub's cache -> the snapshot of `revision`."""
    ref = path / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision or ""
    snapshot = path / "snapshots" / commit
    if commit and snapshot.is_dir():
        return snapshot
    raise NotFound(f"{path} has no snapshot of revision {revision or 'main'}")


def _download(
    repo: str, subfolder: str | None, revision: str | None, cache_dir: str | None
) -> Path:
    key, found = (repo, subfolder, revision, cache_dir), _FOUND.get()
    if found is None:
        return _fetch(*key)
    if key not in found:
        found[key] = _fetch(*key)
    return found[key]


def _fetch(repo: str, subfolder: str | None, revision: str | None, cache_dir: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    name = f"{repo}@{revision}" if revision else repo
    inside = f"{subfolder}/" if subfolder else ""
    why = ""
    try:
        files, why = _list(repo, revision)
        if files is None:
            # Patterns of what must be in the cache, of which only newer releases of huggingface_hub
            # take notice; which weights there must be, their index says.
            allow = [f"{inside}*{suffix}" for suffix in sorted(KEPT_SUFFIXES - {".md"})]
            ignore = [f"{inside}*/*"]
        else:
            allow = [glob.escape(file) for file in wanted(files, inside, name)]
            ignore = []
            if not _FETCHES.get():
                raise NotFetched(name)
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=allow,
            ignore_patterns=ignore or None,
            local_files_only=files is None,
        )
    except errors.RevisionNotFoundError:
        raise NotFound(f"{repo} on the hub has no revision {revision!r}") from None
    except errors.GatedRepoError:
        raise NotFound(
            f"{repo} is gated on the hub", "accept its terms there and set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise NotFound(
            f"{_NOWHERE}, and no such repository on the hub: {repo}",
            "check the spelling; a private repository needs HF_TOKEN",
        ) from None
    except errors.HFValidationError:
        raise NotFound(f"{_NOWHERE}, and no id on the hub: {name}") from None
    except errors.LocalEntryNotFoundError:
        raise NotFound(
            f"{_NOWHERE}: {name}; the hub cannot be reached "
            f"({why or 'the connection broke'}) and its cache has "
            "no whole copy",
            "download it first, or point --cache-dir or HF_HOME at the cache that has it",
        ) from None
    except (OSError, errors.HfHubHTTPError) as error:
        raise WeftError(f"cannot download {name}: {_first_line(error)}") from None
    return Path(folder)


def _list(repo: str, revision: str | None) -> tuple[list[str] | None, str]:
    """The files of a repository; or None and why, if the hub cannot be asked.

    One request, without the retries that huggingface_hub makes elsewhere: where there is no network
    that should be said at once, and the cache may have what is wanted. Downloads are retried.
    """
    from huggingface_hub import HfApi, constants, errors

    patience = constants.HF_HUB_ETAG_TIMEOUT
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=patience)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        raise
    except errors.OfflineModeIsEnabled:
        return None, "offline mode"
    except Exception as error:  # whatever the HTTP client of this release raises
        if "Timeout" in type(error).__name__:
            return None, f"no answer in {patience} s; HF_HUB_ETAG_TIMEOUT=60 waits longer"
        return None, _first_line(error)
    return [sibling.rfilename for sibling in info.siblings or []], ""


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return clean(lines[0])[:160]


def wanted(files: Iterable[str], inside: str, name: str) -> list[str]:
    """Of a repository's files those that weft reads: one copy of the weights, and what is beside.

    Many repositories hold their weights several times: as pickles, as their authors had them
    (`original/`, `consolidated…`), for other frameworks, of every step of the training.

    Args:
        files: All of them, by path.
        inside: The folder that is meant, with a slash behind it, or nothing.
        name: Of the repository, for errors.

    Raises:
        NotFound: There is no such folder, or no weights in it.
    """
    here = [file.removeprefix(inside) for file in files if file.startswith(inside)]
    if inside and not here:
        raise NotFound(f"{name} on the hub has no folder {inside.rstrip('/')}")
    top = [file for file in here if "/" not in file]
    safe = [file for file in top if file.endswith(".safetensors")]
    weights = [file for file in safe if not file.startswith("consolidated")]
    if "adapters.safetensors" in weights:
        weights = [file for file in weights if not _SAVES.fullmatch(file)]
    weights = weights or [file for file in top if _PICKLES.fullmatch(file)] or safe
    if not weights:
        others = sorted({PurePosixPath(file).suffix for file in here} & {".gguf", ".pth", ".onnx"})
        raise NotFound(
            f"{name} on the hub holds no .safetensors and no pytorch_model.bin"
            + (f", but {', '.join(others)}, which weft does not read" if others else ""),
            "give the repository with the Hugging Face checkpoint, or with PEFT's adapter",
        )
    modular = "modules.json" in top  # sentence-transformers: one folder per module, with a number
    beside = [file for file in here if _is_beside(PurePosixPath(file), modular)]
    return [inside + file for file in (*weights, *beside)]


def _is_beside(file: PurePosixPath, modular: bool) -> bool:
    if len(file.parts) > 1:
        first = file.parts[0]
        return first in KEPT_FOLDERS or (modular and re.match(r"\d+_", first) is not None)
    return file.suffix in KEPT_SUFFIXES or file.name in KEPT_NAMES
