"""The vocabulary of a recipe's output, and every model's embedding in its order.

Which tokens there are and which numbers they have, and which row a model without a token of its
own gets for it, is as MergeKit 0.1.5 has it. It numbers the tokens that `union` takes from further
models in an order that changes from run to run; here it is that of the models, and of the numbers
in each. And where it is silent about rows and tokens that get lost, there are notes here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import sub
from typing import TYPE_CHECKING

from weft.core.errors import PlanError, Problem, WeftError
from weft.core.names import nearest
from weft.core.specs import Run, SideFile
from weft.formats.tokenizer import AddedToken, TokenizerFiles, fingerprint, read
from weft.plan._tokenizer_files import tokenizer_files
from weft.recipes.records import ModelName, Token, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

# The rows that a row is the mean of: (number of the model, row).
Parts = tuple[tuple[int, int], ...]
_NO_RULE = Token()


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The output's tokens.

    Attributes:
        rows: Of the tokens, without padding.
        padding: Further rows, each the mean of all rows.
        runs: Every model's embedding in the new order; sources are numbered as in `models`.
        models: Those that have an embedding.
        files: The output's tokenizer files.
        notes: What became of tokens and rows, a line each.
        alignment: From which `arranged` makes the rows of a part of the models.
    """

    rows: int
    padding: int
    runs: Mapping[ModelName, tuple[Run, ...]] = field(repr=False)
    models: tuple[ModelName, ...]
    files: tuple[SideFile, ...] = field(repr=False)
    notes: tuple[str, ...]
    alignment: Alignment = field(repr=False)


@dataclass(frozen=True, slots=True)
class Alignment:
    """Which row of which model belongs to which token of the output.

    Attributes:
        tokens: By their new numbers; None for a number that no token has.
        rules: What the recipe says of single tokens.
        own: Of each model, its row for every new number; -1 where it has none.
        numbers: Of each model, its tokens' numbers.
        sizes: Of each model, the rows of its embedding.
    """

    tokens: Sequence[str | None]
    rules: Mapping[str, Token]
    own: Mapping[ModelName, Sequence[int]]
    numbers: Mapping[ModelName, Mapping[str, int]]
    sizes: Mapping[ModelName, int]


def build(
    tokenizer: Tokenizer,
    base: ModelName | None,
    folders: Mapping[ModelName, Path],
    sizes: Mapping[ModelName, int],
) -> Vocabulary:
    """The vocabulary that a recipe asks for.

    Args:
        tokenizer: What the recipe says.
        base: The recipe's `base_model`.
        folders: Where the tokenizer files of each model lie, also of one that `tokenizer.source`
            names and that is not merged.
        sizes: Rows of the embedding of every model that is merged, in the order of the recipe.

    Raises:
        PlanError: A tokenizer that cannot be read, a token without a source; all at once.
    """
    first = base if base is not None else next(iter(sizes))
    given = tokenizer.source if isinstance(tokenizer.source, ModelName) else None
    found = _read(dict.fromkeys([first, *sizes, *([given] if given else [])]), folders)
    notes = list(dict.fromkeys(note for files in found.values() for note in files.notes))
    whole = dict(found)
    try:
        found[first] = found[first].without(sizes.get(first, len(found[first].numbers)))
        if given:
            result = whole[given]
        elif tokenizer.source == "base":
            result = found[first]
        else:
            result = _union(first, found, sizes, notes)
        absent = [AddedToken(name) for name in tokenizer.tokens if name not in result.numbers]
        result = result.extended(absent)
    except WeftError as error:
        raise PlanError("the tokenizer", [Problem(str(error), error.hint)]) from None
    alignment = _align(result, tokenizer.tokens, found, sizes)
    runs = arranged(alignment, tuple(sizes), base)
    rows = len(alignment.tokens)
    padding = -rows % (tokenizer.pad_to_multiple_of or 1)
    files, said = tokenizer_files(result)
    notes += said + _losses(alignment, found) + _defaults(alignment)
    return Vocabulary(rows, padding, runs, tuple(sizes), tuple(files), tuple(notes), alignment)


def _read(
    models: Iterable[ModelName], folders: Mapping[ModelName, Path]
) -> dict[ModelName, TokenizerFiles]:
    """The tokenizer of every model; files that are equal are read once."""
    found: dict[ModelName, TokenizerFiles] = {}
    known: dict[str, TokenizerFiles] = {}
    problems = []
    for model in models:
        try:
            folder = folders[model]
            key = fingerprint(folder)
            known[key] = known[key] if key in known else read(folder)
            found[model] = replace(known[key], folder=folder)
        except WeftError as error:
            problems.append(Problem(f"{model}: {error}", error.hint))
    if problems:
        raise PlanError("the tokenizers", problems)
    return found


def _union(
    first: ModelName,
    found: Mapping[ModelName, TokenizerFiles],
    sizes: Mapping[ModelName, int],
    notes: list[str],
) -> TokenizerFiles:
    """The tokens of all models that have rows: the first one's, then pieces, then added tokens.

    A piece of another model becomes an added token, for a model's own pieces cannot be extended.
    """
    start = found[first]
    # What its config names as special it gets again, though there is no row for it.
    start = start.extended(t for t in start.specials if t.content not in start.numbers)
    added: dict[str, AddedToken] = {}
    pieces: dict[str, None] = {}
    differing: dict[str, None] = {}
    for model in dict.fromkeys([first, *sizes]):
        files, size = found[model], sizes.get(model, len(found[model].numbers))
        for token in sorted(files.added.values(), key=lambda t: files.numbers[t.content]):
            if (
                files.numbers[token.content] < size
                and added.setdefault(token.content, token) != token
            ):
                differing[token.content] = None
        if files.numbers is not found[first].numbers:
            new = files.numbers.keys() - start.numbers.keys() - files.added.keys()
            near = [token for token in new if files.numbers[token] < size]
            pieces |= dict.fromkeys(sorted(near, key=files.numbers.__getitem__))
    if differing:
        what = "tokens that models add with different settings; those of the first count"
        notes.append(f"{what}: {_some(differing)}")
    if looked_for := [piece for piece in pieces if piece not in added]:
        what = "of other models are now looked for in the text before the pieces of"
        notes.append(
            f"{_some(looked_for)} {what} {first}, which may cut it otherwise than that alone"
        )
    start = start.extended(map(AddedToken, looked_for))
    return start.extended(added.values())


def _align(
    result: TokenizerFiles,
    rules: Mapping[str, Token],
    found: Mapping[ModelName, TokenizerFiles],
    sizes: Mapping[ModelName, int],
) -> Alignment:
    numbers = result.numbers
    rows = max(len(numbers), max(numbers.values(), default=-1) + 1)
    tokens: list[str | None] = [None] * rows
    for token, number in numbers.items():  # of two with one number, the one that was added
        tokens[number] = token
    own: dict[ModelName, Sequence[int]] = {}
    known: dict[tuple[int, int], Sequence[int]] = {}
    for model, size in sizes.items():
        have = found[model].numbers
        if (key := (id(have), size)) not in known:
            rows_of = [-1 if token is None else have.get(token, -1) for token in tokens]
            known[key] = [row if row < size else -1 for row in rows_of]
        own[model] = known[key]
    return Alignment(tokens, rules, own, {m: found[m].numbers for m in sizes}, sizes)


def arranged(
    alignment: Alignment, models: Sequence[ModelName], base: ModelName | None
) -> dict[ModelName, tuple[Run, ...]]:
    """The embedding of each of `models` in the output's order.

    A model's own row counts, unless the recipe says `force`. Without one: what the recipe says of
    the token; the row of the only model that has it; zeros if none has; the base's; else the mean
    of the rows of all that have it.

    Args:
        alignment: Of all models.
        models: Those whose embeddings are merged with each other; sources are numbered in it.
        base: Of these, the one that is asked first.

    Raises:
        PlanError: A token's source has no row for it; all of them at once.
    """
    problems: list[Problem] = []
    default: dict[int, Parts] = {}
    rules = _by_number(alignment)
    first = models.index(base) if base in models else None
    columns = list(zip(*(alignment.own[model] for model in models), strict=True))
    for number, rows in enumerate(columns):
        rule = rules.get(number, _NO_RULE)
        if min(rows) >= 0 and not rule.force:
            continue
        try:
            if rule is _NO_RULE:
                default[number] = _usual(rows, first)
            else:
                default[number] = _ruled(alignment, models, number, rule, _usual(rows, first))
        except _NoRow as error:
            problems.append(Problem(str(error), "correct it under `tokenizer.tokens`"))
    if problems:
        raise PlanError("the tokens", problems)
    forced = {number for number, rule in rules.items() if rule.force}
    return {
        model: _runs(i, alignment.own[model], default, forced) for i, model in enumerate(models)
    }


def _by_number(alignment: Alignment) -> dict[int, Token]:
    """What the recipe says, by the tokens' new numbers."""
    rules = alignment.rules
    tokens = enumerate(alignment.tokens)
    return {n: rules[token] for n, token in tokens if token is not None and token in rules}


class _NoRow(Exception):
    """A token whose row the recipe takes from where there is none."""


def _usual(rows: Sequence[int], base: int | None) -> Parts:
    """The row of a token that not all models have, if the recipe does not say."""
    having = tuple((i, row) for i, row in enumerate(rows) if row >= 0)
    if base is not None and len(having) > 1 and rows[base] >= 0:
        return ((base, rows[base]),)
    return having


def _ruled(
    alignment: Alignment, models: Sequence[ModelName], number: int, rule: Token, usual: Parts
) -> Parts:
    """The row that the recipe gives a token."""
    if rule.zero:
        return ()
    if rule.source is not None:
        return (_explicit(alignment, models, number, rule),)
    if rule.force:
        raise _NoRow(f"token {alignment.tokens[number]!r} has `force` and no `source`")
    return usual


def _explicit(
    alignment: Alignment, models: Sequence[ModelName], number: int, rule: Token
) -> tuple[int, int]:
    """The row of another token, or another model, that the recipe names for a token."""
    token, model = alignment.tokens[number], rule.source
    what = f"token {token!r} takes its row from {model}"
    if model is None or model not in models:
        merged = ", ".join(map(str, models))
        raise _NoRow(f"{what}, whose embedding is not merged; those that are: {merged}")
    size, numbers = alignment.sizes[model], alignment.numbers[model]
    row = rule.token_id
    if row is None:
        name = rule.token if rule.token is not None else token or ""
        if (row := numbers.get(name)) is None:
            near = ", ".join(map(repr, nearest(name, numbers)))
            raise _NoRow(f"{what}, which has no {name!r}" + (f"; nearest: {near}" if near else ""))
    if not 0 <= row < size:
        raise _NoRow(f"{what}, row {row}, and its embedding has the rows 0 to {size - 1}")
    return models.index(model), row


def _runs(
    source: int, own: Sequence[int], default: Mapping[int, Parts], forced: set[int]
) -> tuple[Run, ...]:
    """Rows that follow each other in the output and in every source become one run.

    Along a run the row's number there less its number here stays the same.
    """
    shifts: list[int | Parts] = list(map(sub, own, range(len(own))))
    for number, parts in default.items():
        if own[number] < 0 or number in forced:
            shift = tuple((i, row - number) for i, row in parts)
            alone = len(shift) == 1 and shift[0][0] == source
            shifts[number] = shift[0][1] if alone else shift
    runs: list[Run] = []
    start = 0
    for key, group in groupby(shifts):
        count = len(list(group))
        each = ((source, key),) if isinstance(key, int) else key
        runs.append(Run(count, tuple((i, shift + start) for i, shift in each)))
        start += count
    return tuple(runs)


def _losses(alignment: Alignment, found: Mapping[ModelName, TokenizerFiles]) -> list[str]:
    """Rows and tokens that are not in the output, which has another vocabulary than a model."""
    notes = []
    present = set(alignment.tokens)
    for model, size in alignment.sizes.items():
        numbers = found[model].numbers
        used = {row for row in numbers.values() if row < size}
        if spare := size - len(used):
            what = "is padding, and left out" if spare == 1 else "are padding, and left out"
            notes.append(
                f"{model}: its embedding has {size} rows for {len(used)} tokens; {spare} {what}"
            )
        beyond = {token for token, row in numbers.items() if row >= size} | found[model].stripped
        if beyond:
            notes.append(f"{model}: beyond the {size} rows of its embedding: {_some(beyond)}")
        if lost := [t for t, row in numbers.items() if row < size and t not in present]:
            notes.append(f"{model}: not in the output's tokenizer, and lost: {_some(lost)}")
    return notes


def _defaults(alignment: Alignment) -> list[str]:
    """Which tokens have rows that no rule and no model of their own gave them."""
    columns = zip(*alignment.own.values(), strict=True)
    nowhere = [
        token
        for token, rows in zip(alignment.tokens, columns, strict=True)
        if max(rows) < 0 and token is not None and not _says(alignment.rules.get(token, _NO_RULE))
    ]
    gaps = alignment.tokens.count(None)
    notes = [f"in no model, and so rows of zeros: {_some(nowhere)}"] if nowhere else []
    return notes + ([f"{gaps} rows of zeros for numbers that no token has"] if gaps else [])


def _says(rule: Token) -> bool:
    return rule.zero or rule.source is not None


def _some(tokens: Iterable[str]) -> str:
    """`3 tokens ('a', 'b', 'c')`, the first few by name."""
    names = sorted(tokens) if isinstance(tokens, set | frozenset) else list(tokens)
    shown = ", ".join(map(repr, names[:4])) + (", …" if len(names) > 4 else "")
    return f"{len(names)} token{'s' if len(names) != 1 else ''} ({shown})"
