"""The card of an adapter that weft wrote: from what, how near, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from weft.core.units import show_share, show_size
from weft.write.card import carried

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weft.core.specs import Adapter


def resized_card(adapter: Adapter, manifest: Mapping[str, Any]) -> str:
    """`README.md` of what `weft resize` made, with the metadata that the hub reads."""
    totals, modules = manifest["totals"], manifest["modules"]
    head: dict[str, Any] = {
        **({"base_model": adapter.base_model} if adapter.base_model else {}),
        "library_name": "peft",
        "tags": ["lora", "weft"],
    } | carried(Path(adapter.folder, "README.md"))
    rows = [
        f"| {name} | {modules[name]['rank_before']} | {modules[name]['rank']} "
        f"| {show_share(modules[name]['kept'])} | {show_share(modules[name]['relative_error'])} |"
        for name in manifest["worst"]
    ]
    summary = (
        f"{show_size(totals['bytes_before'])} before, {show_size(totals['bytes'])} now; "
        f"{show_share(totals['kept'])} of ‖ΔW‖² is left, and the error is "
        f"{show_share(totals['relative_error'])} of ‖ΔW‖. Where it is largest:"
    )
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            f"# {adapter.given.rstrip('/').rpartition('/')[2]}, resized",
            "",
            f"Made by weft {manifest['weft']} from {adapter.given}:",
            "",
            "```",
            manifest["command"],
            "```",
            "",
            summary,
            "",
            "| module | rank before | rank | kept | error |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            "`weft.json` says it of each module.",
            "",
        ]
    )


def extracted_card(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """`README.md` of what `weft extract` made, with the metadata that the hub reads."""
    totals, modules = manifest["totals"], manifest["modules"]
    head = {
        "base_model": manifest["base"],
        "library_name": "peft",
        "tags": [
            "lora",
            "extract",
            "weft",
            *([config["model_type"]] if "model_type" in config else []),
        ],
    }
    rows = [
        f"| {name} | {modules[name]['rank']} | {show_share(modules[name]['kept'])} "
        f"| {show_share(modules[name]['relative_error'])} |"
        for name in manifest["worst"]
    ]
    summary = (
        f"{totals['modules']} modules, {totals['saved']} tensors saved in full, "
        f"{show_size(totals['bytes'])}. {show_share(totals['kept'])} of ‖ΔW‖² is kept; merged "
        f"back, the model differs from the tuned one by {show_share(totals['model_error'])} of its "
        "norm. Where the error is largest:"
    )
    table = ["| module | rank | kept | error |", "| --- | --- | --- | --- |", *rows, ""]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            f"# {manifest['tuned'].rstrip('/').rpartition('/')[2]} as an adapter",
            "",
            f"Extracted by weft {manifest['weft']}:",
            "",
            "```",
            manifest["command"],
            "```",
            "",
            summary,
            "",
            *(table if rows else []),
            f"Loads in: {manifest['serving']}.",
            "",
            "`weft.json` says it of each module.",
            "",
        ]
    )
