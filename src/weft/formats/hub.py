"""What a user writes for a model or an adapter -> a local folder; the one door to huggingface_hub.

`path`, `org/name`, `org/name@revision`, `org/name/subfolder@revision`, and the `models--org--name`
folders of the hub's own cache. Token, offline mode and cache directory are huggingface_hub's:
`HF_TOKEN`, `HF_HUB_OFFLINE`, `HF_HOME`, `HF_HUB_CACHE`.
"""

from __future__ import annotations

import re
from pathlib import Path

from weft.core.errors import NotFound, WeftError
from weft.core.units import clean

_ID = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<subfolder>[\w./-]+?))?(?:@(?P<revision>[\w./-]+))?"
)
_CACHED = re.compile(r"(?:^|[/\\])models--(?P<repo>[\w.-]+)(?:[/\\]|$)")
_FOLDERS = {
    *("model", "models", "base_models", "pretrained", "weights", "checkpoints", "ckpt", "ckpts"),
    *("output", "outputs", "results", "runs", "saves", "data", "home", "mnt", "workspace"),
}
_WEIGHTS = ("*.safetensors", "*.bin")
_REST = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.bpe", "*.md", "LICENSE*")


def resolve(given: str, *, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The local file or folder that `given` means, fetched from the hub if need be.

    Raises:
        NotFound: Neither a path nor, as far as can be reached, a repository on the hub.
    """
    if path := _local(given):
        return _snapshot_of(path, revision) if path.name.startswith("models--") else path
    match = _ID.fullmatch(given)
    if match is None or given.startswith((".", "/", "~")):
        raise NotFound(
            f"no such file or folder: {clean(given)[:200]}", "give a path, or org/name on the hub"
        )
    revision = match["revision"] or revision
    folder = _download(match["repo"], match["subfolder"], revision, cache_dir)
    return folder / match["subfolder"] if match["subfolder"] else folder


def _local(given: str) -> Path | None:
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
    if match is None or text.startswith((".", "/", "~")) or _local(text):
        return None
    return None if match["repo"].partition("/")[0].lower() in _FOLDERS else match["repo"]


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
    import huggingface_hub
    from huggingface_hub import errors

    name = f"{repo}@{revision}" if revision else repo
    inside = f"{subfolder}/" if subfolder else ""
    ignore: list[str] = []
    offline = False
    try:
        files = huggingface_hub.HfApi().list_repo_files(repo, revision=revision)
        # A repository often has the same weights twice; the pickles are the ones not to want.
        if any(f.startswith(inside) and f.endswith(".safetensors") for f in files):
            ignore = ["*.bin"]
    except errors.RevisionNotFoundError:
        raise NotFound(f"{repo} on the hub has no revision {revision!r}") from None
    except errors.GatedRepoError:
        raise NotFound(
            f"{repo} is gated on the hub", "accept its terms there and set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise NotFound(
            f"no such file or folder, and no such repository on the hub: {repo}",
            "check the spelling; a private repository needs HF_TOKEN",
        ) from None
    except Exception:  # offline mode, no network, a server in trouble: the cache may still have it
        offline = True
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=[inside + pattern for pattern in (*_WEIGHTS, *_REST)],
            ignore_patterns=ignore or None,
            local_files_only=offline,
        )
    except errors.HFValidationError:
        raise NotFound(f"no such file or folder, and no id on the hub: {name}") from None
    except errors.LocalEntryNotFoundError:
        raise NotFound(
            f"no such file or folder: {name}; the hub cannot be reached and its cache has no copy",
            "download it first, or point --cache-dir or HF_HOME at the cache that has it",
        ) from None
    except (OSError, errors.HfHubHTTPError) as error:
        raise WeftError(f"cannot download {name}: {str(error).splitlines()[0]}") from None
    return Path(folder)
