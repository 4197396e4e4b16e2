"""What a recipe says, as frozen records: names and numbers, nothing looked up on a disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

Scalar = bool | int | float | str


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model as a recipe names it: `path[@revision][+adapter[@revision][:weight]]…`.

    Attributes:
        path: A folder, a file or `org/name`; or the name of another document of the recipe.
        revision: Of it, on the hub.
        adapters: (path, revision, weight) of each.
        override_architecture: Takes the place of `architectures` in its config.
    """

    path: str
    revision: str | None = None
    adapters: tuple[tuple[str, str | None, float], ...] = ()
    override_architecture: str | None = None

    def __str__(self) -> str:
        """As a recipe would spell it."""
        text = self.path + (f"@{self.revision}" if self.revision else "")
        for path, revision, weight in self.adapters:
            text += f"+{path}" + (f"@{revision}" if revision else "")
            text += f":{weight:g}" if weight != 1 else ""
        return text


@dataclass(frozen=True, slots=True)
class Condition:
    """One entry of a parameter's list: a value, or a gradient, for the tensors that it matches.

    Attributes:
        value: A scalar, or the values of a gradient over the layers.
        filter: A plain part of a tensor's name; None or `*` match every tensor.
    """

    value: Scalar | tuple[Scalar, ...]
    filter: str | None = None


# The settings of one place in a recipe: parameter -> conditions, of which the first that matches
# counts.
Settings = dict[str, tuple[Condition, ...]]


@dataclass(frozen=True, slots=True)
class Source:
    """A model that a slice takes layers from.

    Attributes:
        model: Which.
        layers: From and up to, without the last; None for all of them.
        parameters: Its own.
        where: The place in the YAML, such as `slices[0].sources[1]`.
    """

    model: ModelName
    layers: tuple[int, int] | None
    parameters: Settings
    where: str


@dataclass(frozen=True, slots=True)
class Slice:
    """Layers that follow each other in the output, made from as many of each source."""

    sources: tuple[Source, ...]
    base_model: ModelName | None
    parameters: Settings
    where: str


@dataclass(frozen=True, slots=True)
class Module:
    """A part of the model with layers of its own, such as the vision tower; usually all of it.

    Attributes:
        name: As the recipe calls it; None for the whole model.
        slices: In the order of the output. A list of `models` is one slice of whole models, to
            which a base that is not among them has been appended.
        parameters: Of all slices.
        where: The place in the YAML.
    """

    name: str | None
    slices: tuple[Slice, ...]
    parameters: Settings
    where: str


@dataclass(frozen=True, slots=True)
class Token:
    """Where the embedding of one token comes from.

    Attributes:
        source: A model, which has the token under the same name; or None.
        zero: A row of zeros.
        token: Its name in the source, if it is another.
        token_id: Its number in the source, if the recipe gives that.
        force: Also for the models that have a row of their own.
    """

    source: ModelName | None = None
    zero: bool = False
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The tokenizer of the output.

    Attributes:
        source: `union`, `base`, or a model.
        tokens: What the recipe says of single tokens.
        pad_to_multiple_of: Of the number of rows.
    """

    source: str | ModelName = "union"
    tokens: Mapping[str, Token] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """One document: what makes one model.

    Attributes:
        name: By which other documents refer to it; None for the only one, or the last.
        method: File name in `weft.methods`.
        modules: In the order of the recipe.
        base_model: What task vectors are taken against.
        parameters: Of the whole model.
        dtype, out_dtype: Of the output; the second counts where both are given.
        tokenizer: None keeps a model's files as they are.
        chat_template: `auto`, a name, or a Jinja template.
        text: The YAML as it was given, with the other documents of the file.
        positions: Place in the YAML -> (line, column), from 1 on.
        notes: What was understood of old spellings, a line each.
    """

    name: str | None
    method: str
    modules: tuple[Module, ...]
    base_model: ModelName | None
    parameters: Settings
    dtype: str | None
    out_dtype: str | None
    tokenizer: Tokenizer | None
    chat_template: str | None
    text: str = field(repr=False)
    positions: Mapping[str, tuple[int, int]] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whole models are merged, and not some of their layers."""
        slices = [each for module in self.modules for each in module.slices]
        one = len(slices) == len(self.modules)
        return one and all(s.layers is None for each in slices for s in each.sources)

    def models(self) -> list[ModelName]:
        """Every model that the recipe names, in its order, each once."""
        found: list[Any] = [
            source.model
            for module in self.modules
            for each in module.slices
            for source in each.sources
        ]
        found += [each.base_model for module in self.modules for each in module.slices]
        found += [self.base_model]
        if self.tokenizer:
            found += [self.tokenizer.source, *(t.source for t in self.tokenizer.tokens.values())]
        return list(dict.fromkeys(each for each in found if isinstance(each, ModelName)))
