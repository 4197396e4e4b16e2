"""docs/reference/methods.md has every method, with its formula, source, parameters and defaults."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from subprocess import run

import pytest

from weft import methods

TEXT = (Path(__file__).parents[2] / "docs/reference/methods.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("name", methods.names())
def test_a_method_is_documented(name: str) -> None:
    own = methods.method(name)
    section = SECTIONS[name]
    assert f"| [{name}](#{name}) | {own.USE_WHEN} |" in TEXT
    assert own.USE_WHEN in section
    assert "\n" not in own.USE_WHEN
    assert own.USE_WHEN.endswith(".")
    assert "y = " in section
    doc = own.__doc__ or ""
    sources = re.findall(r"arXiv:\d{4}\.\d{5}|https://\S+|Source: MergeKit", doc)
    assert sources
    assert all(source in section for source in sources)
    rows = dict(re.findall(r"^\| `(\w+)` \| [\w ]+ \| ([^|]+) \|", section, re.MULTILINE))
    assert list(rows) == list(own.PARAMETERS)
    for parameter, stated in rows.items():
        default = own.PARAMETERS[parameter].default
        if own.PARAMETERS[parameter].required:
            assert stated == "required"
        elif default is None:
            assert stated == "none"
        elif isinstance(default, bool):
            assert stated == str(default).lower()
        else:
            assert isinstance(default, int | float)
            assert float(stated) == default


def test_no_section_is_about_a_method_that_is_not_there() -> None:
    assert set(SECTIONS) <= set(methods.names())


def test_the_catalogue_is_read_without_torch() -> None:
    code = (
        "import sys; from weft import methods\n"
        "for name in methods.names(): methods.method(name).PARAMETERS\n"
        "print(*({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
