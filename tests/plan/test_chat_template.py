"""The chat template of a recipe: which one, where it is written, and what it makes of a talk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from vocabulary_cases import bpe, write

from weft.core.errors import PlanError
from weft.core.specs import SideFile
from weft.formats.tokenizer import tokenizer_names
from weft.plan._chat_template import names, with_chat_template
from weft.recipes.records import ModelName

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vocabulary_cases import Files

SYSTEM = {"role": "system", "content": "Be brief."}
USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
TALK = [SYSTEM, USER, REPLY, USER]
# As the models' makers write them.
RENDERED = {
    "alpaca": "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nYo</s>\n\n"
    "### Instruction:\nHi\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nYo<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Yo[|endofturn|]\n"
    "[|user|]Hi\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Yo</s>[INST] Hi [/INST]",
}


def tokenizer(template: Any = None, **more: Any) -> Files:
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    settings |= {} if template is None else {"chat_template": template}
    return bpe("a b <s> </s>", config=settings) | more


def folders(root: Path, *files: Files) -> dict[ModelName, Path]:
    return {ModelName(f"m{i}"): write(root / f"m{i}", each, 4) for i, each in enumerate(files)}


def output(folder: Path) -> list[SideFile]:
    return [SideFile(name, source=f"{folder}/{name}") for name in tokenizer_names(folder)]


def written(files: Sequence[SideFile], folder: Path) -> Path:
    for file in files:
        raw = file.text.encode() if file.text is not None else Path(file.source or "").read_bytes()
        (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.name).write_bytes(raw)
    return folder


@pytest.mark.parametrize("name", RENDERED)
def test_a_named_template_renders_as_its_models_were_trained(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    models = folders(tmp_path, tokenizer())
    files, _ = with_chat_template(name, models, output(models[ModelName("m0")]))
    folder = written(files, tmp_path / "output")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    for _ in range(2):  # from the file of its own, and from the config alone
        made = loaded.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
        assert made == RENDERED[name]
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        loaded = transformers.AutoTokenizer.from_pretrained(folder)


def test_the_names_are_mergekits() -> None:
    assert names() == sorted(RENDERED)


def test_auto_is_the_most_common_template(tmp_path: Path) -> None:
    """Wherever it stands, whatever is around it; of equally common ones, the first model's."""
    one, other = "{{ messages }} one", "{{ messages }} other"
    several = [{"name": "default", "template": other}, {"name": "tools", "template": one}]
    files = (
        tokenizer(one),
        tokenizer(one, **{"chat_template.jinja": f"\n{other}\n"}),
        tokenizer(several),
        tokenizer(),
    )
    models = folders(tmp_path, *files)
    made, notes = with_chat_template("auto", models, output(models[ModelName("m0")]))
    folder = written(made, tmp_path / "output")
    assert (folder / "chat_template.jinja").read_text() == other
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == other
    (note,) = notes
    chosen, _, replaced = note.partition("; ")
    assert chosen == "chat template: that of m1, which 2 of 4 models have"
    assert replaced == "it takes the place of that in tokenizer_config.json"
    first, _ = with_chat_template("auto", dict(list(models.items())[:2]), made)
    assert next(f.text for f in first if f.name == "chat_template.jinja") == one


def test_auto_without_any_template_changes_nothing(tmp_path: Path) -> None:
    models = folders(tmp_path, tokenizer(), tokenizer())
    files = output(models[ModelName("m0")])
    made, (note,) = with_chat_template("auto", models, files)
    assert made == files
    assert "no model has a chat template" in note


def test_a_template_takes_the_place_of_all_others(tmp_path: Path) -> None:
    extra = tokenizer(**{"chat_template.json": {"chat_template": "{{ old }}"}})
    models = folders(tmp_path, extra)
    folder = models[ModelName("m0")] / "additional_chat_templates"
    folder.mkdir()
    (folder / "tools.jinja").write_text("{{ old }}")
    literal = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    made, (note,) = with_chat_template(literal, models, output(folder.parent))
    assert {f.name for f in made} == {
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert next(f.text for f in made if f.name == "chat_template.jinja") == literal
    assert note.endswith("of additional_chat_templates/tools.jinja, chat_template.json")


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("chatlm", "names: auto, alpaca, chatml, exaone, llama3, mistral"),
        ("{{ messages }}", "neither a template in Jinja nor the name of one"),
        ("a long name that is no template", "neither a template in Jinja"),
        ("{% for m in messages %}\n{{ m.content }\n{% endfor %}", "is no Jinja: line 2: "),
    ],
)
def test_what_is_no_template_is_refused(wanted: str, said: str, tmp_path: Path) -> None:
    models = folders(tmp_path, tokenizer())
    with pytest.raises(PlanError) as error:
        with_chat_template(wanted, models, output(models[ModelName("m0")]))
    assert said in f"{error.value}\n{error.value.hint}"


def test_without_a_tokenizer_there_is_no_template() -> None:
    files = [SideFile("config.json", text="{}")]
    assert with_chat_template("chatml", {}, files) == (
        files,
        ["the output has no tokenizer, and so no chat template"],
    )
