"""The model card: what the output was made from, with the command that makes it again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from weft.core.units import show_size, show_survival

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weft.core.specs import Adapter, Checkpoint
    from weft.recipes.records import Recipe
    from weft.write.manifest import Totals

_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def card(
    base: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    totals: Totals,
    *,
    command: str,
    version: str,
) -> str:
    """`README.md` for a merged checkpoint, with the metadata that the hub reads."""
    name = base_name(base, adapters)
    head: dict[str, Any] = {
        "base_model": [name, *(_repository(a.given) for a, _ in adapters if _is_id(a.given))],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "weft", *sorted({adapter.kind.lower() for adapter, _ in adapters})],
    } | carried(Path(base.folder, "README.md"))
    rows = [
        f"| {adapter.given} | {adapter.kind} | {weight:g} | {adapter.base_model or '—'} |"
        for adapter, weight in adapters
    ]
    worst = (
        f"; least in `{totals.worst[0]}`: {show_survival(totals.worst[1])}" if totals.worst else ""
    )
    changed = f"{totals}, {show_size(totals.nbytes)}."
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            f"# {name.rpartition('/')[2]} with {_list([a.given for a, _ in adapters])}",
            "",
            f"Merged by weft {version} in one pass, float32 arithmetic, one rounding:",
            "",
            "```",
            command,
            "```",
            "",
            "| adapter | kind | weight | trained on |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            changed,
            f"Share of the update left after rounding: {show_survival(totals.survival)}{worst}.",
            "",
            "`weft.json` says for each tensor what was done to it.",
            "",
        ]
    )


def recipe_card(
    recipe: Recipe, credits: Sequence[str], totals: Totals, *, command: str, version: str
) -> str:
    """`README.md` for what a recipe made: every input, and the recipe itself."""
    head: dict[str, Any] = {
        "base_model": [_repository(given) if _is_id(given) else given for given in credits],
        "library_name": "transformers",
        "tags": ["mergekit", "merge", "weft", recipe.method],
    }
    survival = (
        f"Share of the update left after rounding: {show_survival(totals.survival)}."
        if totals.survival is not None
        else ""
    )
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            f"# Merge of {_list(credits)}",
            "",
            f"Made by weft {version} with the method `{recipe.method}`, in one pass, rounded once:",
            "",
            "```",
            command,
            "```",
            "",
            "## Made from",
            "",
            *(f"- {given}" for given in credits),
            "",
            "## Recipe",
            "",
            "```yaml",
            recipe.text.strip(),
            "```",
            "",
            f"{totals}, {show_size(totals.nbytes)}. {survival}".strip(),
            "",
            "`weft.json` says for each tensor what was done to it.",
            "",
        ]
    )


def base_name(base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]) -> str:
    """The base's id on the hub, as far as anything tells it."""
    candidates = [base.given, base.config.get("_name_or_path")]
    candidates += [adapter.base_model for adapter, _ in adapters]
    found = next((str(c) for c in candidates if c and _is_id(str(c))), Path(base.folder).name)
    return _repository(found)


def _repository(given: str) -> str:
    """`org/name` of `org/name/subfolder@revision`."""
    return "/".join(given.partition("@")[0].split("/")[:2])


def _is_id(text: str) -> bool:
    return text.count("/") >= 1 and not text.startswith((".", "/", "~")) and not Path(text).exists()


def _list(names: Sequence[str]) -> str:
    short = [name.rstrip("/").rpartition("/")[2] for name in names]
    return " and ".join([", ".join(short[:-1]), short[-1]] if len(short) > 1 else short)


def carried(readme: Path) -> dict[str, Any]:
    """What of the base's own card stays true: its licence, language and task."""
    try:
        _, head, _ = readme.read_text(encoding="utf-8").split("---", 2)
        found = yaml.safe_load(head)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {k: found[k] for k in _CARRIED if k in found} if isinstance(found, dict) else {}
