"""Documents that name each other: streamed into one output, nothing in between on the disk."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from running import MATRIX, checkpoint, llama, load, lora, run

from weft.core.errors import WeftError
from weft.methods import _random

if TYPE_CHECKING:
    from pathlib import Path

NAME = f"{MATRIX.format(1)}.weight"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`base`, and `a`, `b` and `c` tuned from it, in float32; the working folder."""
    for number, name in enumerate(("base", "a", "b", "c")):
        checkpoint(tmp_path / name, llama(number or None, dtype="float32"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


LEFT = """\
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 0.7, density: 0.4}}
  - {model: b, parameters: {weight: 0.4, density: 0.6}}
"""
LINEAR = """\
merge_method: slerp
base_model: b
models: [model: b, model: c]
parameters: {t: 0.3}
"""
LAST = """\
merge_method: task_arithmetic
base_model: base
models:
  - {model: left, parameters: {weight: 0.5}}
  - {model: linear, parameters: {weight: [0.2, 0.8]}}
  - {model: c, parameters: {weight: 0.1}}
"""
CHAIN = f"name: left\n{LEFT}---\n{LAST}---\nname: linear\n{LINEAR}"


def test_equal_to_one_after_the_other(root: Path) -> None:
    """In float32, where nothing is rounded in between: to the last bit."""
    run(root, LEFT, "left")
    run(root, LINEAR, "linear")
    one_by_one = run(root, LAST, "last")
    for name in ("left", "linear"):
        (root / name).rename(root / f"{name}-done")
    chained = run(root, CHAIN)
    assert chained.keys() == one_by_one.keys()
    for name, value in chained.items():
        assert torch.equal(value, one_by_one[name]), name
    assert not (root / "left").exists()
    assert not (root / "linear").exists()


def test_a_document_named_like_its_method(root: Path) -> None:
    """MergeKit takes the name of a merge for that of a method."""
    ties = "merge_method: ties\nbase_model: base\nmodels: [model: a, model: b]\n"
    ties += "parameters: {weight: 0.6, density: 0.5}\n"
    last = "merge_method: passthrough\nmodels: [model: ties]\n"
    alone = run(root, ties, "alone")
    named = run(root, f"name: ties\n{ties}---\n{last}")
    assert named.keys() == alone.keys()
    assert all(torch.equal(value, alone[name]) for name, value in named.items())


def test_nothing_in_between_is_rounded(root: Path) -> None:
    """A bfloat16 document in the middle of a chain costs no precision, unlike one on the disk."""
    first = LINEAR.replace("slerp", "slerp\ndtype: bfloat16")
    last = "merge_method: passthrough\nmodels: [model: linear]\nout_dtype: float32\n"
    found = run(root, f"name: linear\n{first}---\n{last}")
    exact = run(root, LINEAR, "exact")
    assert all(torch.equal(value, exact[name]) for name, value in found.items())


def test_the_card_credits_all_and_quotes_all(root: Path) -> None:
    run(root, CHAIN)
    card = (root / "out/README.md").read_text()
    for name in ("base", "a", "b", "c"):
        assert f"\n- {name}\n" in card
    assert LEFT in card
    assert LINEAR.strip() in card
    assert (root / "out/mergekit_config.yml").read_text() == CHAIN
    files = {entry["file"] for entry in _manifest(root)["inputs"]}
    assert files >= {str(root / name / "model.safetensors") for name in ("base", "a", "b", "c")}


DARE = """\
merge_method: dare_linear
base_model: base
models: [model: {}]
parameters: {{weight: 1, density: 0.5, rescale: false}}
"""


def test_documents_draw_apart(root: Path) -> None:
    """Two that keep half of the elements each keep a quarter, and not the same half twice."""
    found = run(root, f"name: x\n{DARE.format('a')}---\nname: y\n{DARE.format('x')}")
    base = load(root / "base")
    kept = torch.cat([(value != base[name]).flatten() for name, value in found.items()])
    assert abs(kept.double().mean() - 0.25) < 5 * (0.25 * 0.75 / len(kept)) ** 0.5


def test_a_document_without_a_name_draws_by_seed_method_and_tensor(root: Path) -> None:
    """A merge of today is made again by any later version: its key must never change."""
    kept = (run(root, DARE.format("a"))[NAME] != load(root / "base")[NAME]).flatten()
    mask = _random.bernoulli(f"0 0:dare_linear:{NAME}", 0.5, 0, len(kept))
    assert kept.tolist() == mask.tolist()


def test_a_document_under_another_architecture(root: Path) -> None:
    config = root / "c/config.json"
    other = {"architectures": ["MyLlamaForCausalLM"]}
    config.write_text(json.dumps(json.loads(config.read_text()) | other))
    last = "merge_method: linear\nmodels: [model: left, model: c]\nparameters: {weight: 1}\n"
    with pytest.raises(WeftError, match="left is a LlamaForCausalLM, and c is a MyLlama"):
        run(root, f"name: left\n{LEFT}---\n{last}")
    named = "model: {model: {path: left}, override_architecture: MyLlamaForCausalLM}"
    run(root, f"name: left\n{LEFT}---\n{last.replace('model: left', named)}")
    written = json.loads((root / "out/config.json").read_text())
    assert written["architectures"] == ["MyLlamaForCausalLM"]


def test_what_is_wrong_with_all_documents_is_said_at_once(root: Path) -> None:
    """But not what only follows from it: the last one lacks x, whose own model is not there."""
    checkpoint(root / "deep", llama(1, layers=3, dtype="float32"))
    one = "name: {}\nmerge_method: linear\nparameters: {{weight: 1}}\nmodels: [{}]\n---\n"
    text = one.format("x", "model: ./nowhere") + one.format("y", "model: a, model: deep")
    text += "merge_method: slerp\nbase_model: x\nmodels: [model: x, model: ./neither]\n"
    with pytest.raises(WeftError) as error:
        run(root, text + "parameters: {t: 0.5}\n")
    message = str(error.value)
    assert message.startswith("3 problems in recipe.yml\n")
    assert "./nowhere" in message
    assert "@ models[0], line 4, column 10" in message
    assert "2 and 3 layers in model.layers  @ models[1], line 9, column 20" in message
    assert "@ models[1], line 13, column 20" in message


def _manifest(root: Path) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = json.loads((root / "out/weft.json").read_text())
    return found


def test_an_adapter_on_what_another_document_makes(root: Path) -> None:
    """W′ + sBA, W′ never rounded; and as a task vector against W′ it is sBA."""
    d = lora(root / "adapter", 1, rms=1e-4)[NAME]
    text = f"name: left\n{LEFT}---\nmerge_method: passthrough\nmodels: [model: left+adapter]\n"
    found = run(root, text)
    left = run(root, LEFT, "exact")
    assert (found[NAME].double() - left[NAME].double() - d).abs().max() < 1e-8
    assert torch.equal(found["lm_head.weight"], left["lm_head.weight"])
    text = f"name: left\n{LEFT}---\nmerge_method: task_arithmetic\nbase_model: left\n"
    text += "models: [{model: left+adapter:0.5, parameters: {weight: 2000}}]\n"
    found = run(root, text, "more")
    change = (found[NAME].double() - left[NAME].double()) / 1000
    assert float((change - d).norm() / d.norm()) < 1e-6


def test_a_folder_is_meant_by_its_path(root: Path) -> None:
    """`./left` is a folder, whatever documents there are."""
    checkpoint(root / "left", llama(7, dtype="float32"))
    last = "merge_method: passthrough\nmodels: [model: ./left]\n"
    found = run(root, f"name: left\n{LEFT}---\n{last}")
    assert torch.equal(found[NAME], load(root / "left")[NAME])


LAST_WITH = {
    "kept": "merge_method: passthrough\nmodels: [model: left]\n",
    "merged again": "merge_method: slerp\nbase_model: left\nmodels: [model: left, model: c]\n"
    "parameters: {t: 0.3}\ntokenizer: {source: union, pad_to_multiple_of: 8}\n",
    "given to another": "merge_method: slerp\nbase_model: c\nmodels: [model: left, model: c]\n"
    "parameters: {t: 0.3}\ntokenizer:\n  source: left\n"
    "  tokens: {t5: {source: {kind: model_token, model: left, token: b}, force: true}}\n",
    "the template alone": "merge_method: linear\nmodels: [model: left, model: c]\n"
    "parameters: {weight: 1}\ntokenizer_source: union\nchat_template: auto\n",
}


@pytest.mark.parametrize("last", LAST_WITH)
def test_tokenizers_that_a_document_makes(last: str, root: Path) -> None:
    """They are merged again by those after it, as if they lay on the disk."""
    _tokenizers(root)
    first = f"tokenizer: {{source: union}}\nchat_template: chatml\n{LEFT}"
    run(root, first, "left")
    one_by_one = run(root, LAST_WITH[last], "last")
    (root / "left").rename(root / "left-done")
    chained = run(root, f"name: left\n{first}---\n{LAST_WITH[last]}")
    assert chained.keys() == one_by_one.keys()
    for name, value in chained.items():
        assert torch.equal(value, one_by_one[name]), name
    assert "b" in (root / "out/tokenizer.json").read_text()
    config = json.loads((root / "out/config.json").read_text())
    assert config["vocab_size"] == chained["model.embed_tokens.weight"].shape[0]
    for file in (root / "last").iterdir():
        if file.name not in ("model.safetensors", "README.md", "weft.json", "mergekit_config.yml"):
            assert (root / "out" / file.name).read_bytes() == file.read_bytes(), file.name
            assert not (root / "out" / file.name).is_symlink()
    assert "chat_template.jinja" in {file.name for file in (root / "out").iterdir()}


def _tokenizers(root: Path) -> None:
    for name in ("base", "a", "b", "c"):
        vocab = {f"t{n}": n for n in range(39)} | {name: 39}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"}
        (root / name / "tokenizer.json").write_text(
            json.dumps({"version": "1.0", "added_tokens": [], "model": model})
        )
        (root / name / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast"}'
        )
