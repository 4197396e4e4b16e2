"""The keys of a recipe, and what may stand under each; the one door to pydantic.

The keys are those of MergeKit's YAML. Nothing here knows what a method needs: `_checks` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from weft import methods

Loc = tuple[str | int, ...]


def _shape(value: Any) -> str | None:
    """Which of the forms of a value this is."""
    if isinstance(value, dict):
        return "<mapping>" if "kind" not in value else "<kind>"
    if isinstance(value, list):
        return "<entries>" if any(isinstance(each, dict) for each in value) else "<gradient>"
    return "<text>" if value is not None else None


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)


class PathMapping(_Keys):
    """A folder or a hub id, in which `@` and `+` mean themselves."""

    path: str = Field(description="Folder, file or hub id, taken as it is.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")


class AdapterMapping(PathMapping):
    """An adapter, in whose path `@` and `+` mean themselves."""

    weight: float = Field(
        1.0, allow_inf_nan=False, description="Factor on the adapter's change of the weights."
    )


_Path = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[PathMapping, Tag("<mapping>")], Discriminator(_shape)
]
_Adapter = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[AdapterMapping, Tag("<mapping>")],
    Discriminator(_shape),
]


def _one_or_more(value: Any) -> str:
    return "<entries>" if isinstance(value, list) else "<one>"


class ModelMapping(_Keys):
    """A model written out; the only way to name a path that holds `+` or `@`."""

    model: _Path = Field(description="The model: a path, `path@revision`, or a mapping.")
    lora: (
        Annotated[
            Annotated[_Adapter, Tag("<one>")] | Annotated[list[_Adapter], Tag("<entries>")],
            Discriminator(_one_or_more),
        ]
        | None
    ) = Field(None, description="An adapter on top of the model, or several.")
    override_architecture: str | None = Field(
        None, description="Stands in for `architectures` of the model's config."
    )


Model = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[ModelMapping, Tag("<mapping>")],
    Discriminator(_shape),
]

Scalar = bool | int | float | str


class Entry(_Keys):
    """A value for the tensors whose names contain `filter`."""

    value: Annotated[
        Annotated[Scalar, Tag("<text>")] | Annotated[list[Scalar], Tag("<gradient>")],
        Discriminator(_shape),
    ] = Field(description="A value, or a list that is interpolated over the layers of the slice.")
    filter: str | None = Field(
        None, description="A plain part of a tensor's name; without it, every tensor matches."
    )


Setting = Annotated[
    Annotated[Scalar, Tag("<text>")]
    | Annotated[list[Scalar], Tag("<gradient>")]
    | Annotated[Entry, Tag("<mapping>")]
    | Annotated[list[Entry], Tag("<entries>")],
    Discriminator(_shape),
]
Parameters = dict[str, Setting]
_OF_METHOD = "Parameters of the merge method"


class InputModel(_Keys):
    """A whole model that goes into the merge."""

    model: Model = Field(description="`path[@revision][+adapter[@revision][:weight]]…`.")
    parameters: Parameters | None = Field(None, description=f"{_OF_METHOD} for this model.")


class InputSlice(InputModel):
    """Layers of one model that go into a slice."""

    layer_range: tuple[int, int] = Field(description="The first layer, and the one after the last.")


class OutputSlice(_Keys):
    """Layers that follow each other in the output."""

    sources: list[InputSlice] = Field(min_length=1, description="As many layers of each.")
    base_model: Model | None = Field(None, description="In place of the recipe's, for this slice.")
    residual_weight: float | None = Field(
        None,
        description="Accepted, and used by nothing.",
        json_schema_extra={"deprecated": True},
    )
    parameters: Parameters | None = Field(None, description=f"{_OF_METHOD} for this slice.")


class OutputModule(_Keys):
    """A part of the model with layers of its own, such as the vision tower."""

    slices: list[OutputSlice] | None = Field(None, description="The part, slice by slice.")
    models: list[InputModel] | None = Field(None, description="What the whole part is made from.")
    parameters: Parameters | None = Field(None, description=f"{_OF_METHOD} for this part.")


class TokenKind(_Keys):
    """Where the embedding of a token comes from, if not from the token of the same name."""

    kind: Literal["zero", "model_token"] = Field(
        description="`zero`: zeros; `model_token`: a token of a model."
    )
    model: Model | None = Field(None, description="The model that has the token.")
    token: str | None = Field(None, description="The token's name there.")
    token_id: int | None = Field(None, ge=0, description="The token's number there.")


class TokenSource(_Keys):
    """The embedding of one token."""

    source: (
        Annotated[
            Annotated[str, Tag("<text>")]
            | Annotated[ModelMapping, Tag("<mapping>")]
            | Annotated[TokenKind, Tag("<kind>")],
            Discriminator(_shape),
        ]
        | None
    ) = Field(None, description="A model, or `kind: zero`, or `kind: model_token`.")
    force: bool = Field(False, description="Also for models that have the token themselves.")


class TokenizerMapping(_Keys):
    """The tokenizer of the output."""

    source: Model = Field("union", description="`union` of all, `base`, or a model.")
    tokens: dict[str, TokenSource] | None = Field(None, description="Single tokens.")
    pad_to_multiple_of: int | None = Field(None, ge=1, description="Of the rows of embeddings.")


class Document(_Keys):
    """A recipe: what makes one model."""

    LAYOUTS: ClassVar = ("models", "slices", "modules")

    name: str | None = Field(None, description="By which other documents may use the result.")
    merge_method: str = Field(description="How the models are merged.")
    models: list[InputModel] | None = Field(None, description="Whole models to merge.")
    slices: list[OutputSlice] | None = Field(None, description="The output, slice by slice.")
    modules: dict[str, OutputModule] | None = Field(
        None, description="The output, part by part, for models with several towers."
    )
    base_model: Model | None = Field(None, description="What task vectors are taken against.")
    parameters: Parameters | None = Field(None, description=f"{_OF_METHOD}.")
    input_model_parameters: dict[str, Parameters] | None = Field(
        None,
        description=f"{_OF_METHOD} by model: an old way to write `parameters` of a model.",
        json_schema_extra={"deprecated": True},
    )
    dtype: str | None = Field(None, description="Dtype of the output, if out_dtype is not given.")
    out_dtype: str | None = Field(None, description="Dtype of the output.")
    tokenizer: TokenizerMapping | None = Field(None, description="The tokenizer of the output.")
    tokenizer_source: Model | None = Field(
        None, description="Short for `tokenizer: {source: …}`: `union`, `base`, or a model."
    )
    chat_template: str | None = Field(
        None,
        description="`auto`, `alpaca`, `chatml`, `exaone`, `llama3`, `mistral`, or a template.",
    )


@dataclass(frozen=True, slots=True)
class Mistake:
    """Something that the schema refuses.

    Attributes:
        loc: Where in the data.
        kind: `unknown`, `missing` or `value`.
        what: Of a `value`: what it should be.
        known: The keys that may stand beside it.
    """

    loc: Loc
    kind: str
    what: str = ""
    known: tuple[str, ...] = ()


def check(data: Any) -> tuple[Document | None, list[Mistake]]:
    """The recipe in `data`, or everything that is wrong with its form."""
    try:
        return Document.model_validate(data), []
    except ValidationError as error:
        found: dict[Loc, Mistake] = {}
        for each in error.errors(include_url=False, include_context=False):
            loc = _real(data, each["loc"])
            if _in_layers(each["loc"], each["type"]):
                loc = loc[: loc.index("layer_range") + 1]
                found.setdefault(loc, Mistake(loc, "value", _LAYERS))
            found.setdefault(loc, _mistake(loc, each["type"], each["msg"], each["loc"]))
        return None, list(found.values())
    except RecursionError:
        return None, [Mistake((), "value", "is nested too deeply")]


_LAYERS = "should be two whole numbers, the first layer and the one after the last"


def _in_layers(loc: Loc, kind: str) -> bool:
    """It is what `layer_range` says that is wrong, and not that it stands there or does not."""
    own = loc[-1:] == ("layer_range",) and kind in ("missing", "extra_forbidden")
    return "layer_range" in loc and not own


def _mistake(loc: Loc, kind: str, message: str, tagged: Loc) -> Mistake:
    if kind in ("extra_forbidden", "missing"):
        known = tuple(_model_at(tagged[:-1]).model_fields)
        return Mistake(loc, "unknown" if kind == "extra_forbidden" else "missing", known=known)
    words = {
        "model_type": "should be a mapping, with a key on each line",
        "dict_type": "should be a mapping, with a key on each line",
        "list_type": "should be a list, with a dash before each entry",
        "string_type": "should be text: put it in quotes",
        "union_tag_not_found": "says nothing: write a value, or leave the key out",
        "union_tag_invalid": "has no form that could stand here",
        "too_short": "is an empty list",
    }
    for scalar in ("bool_type", "int_type", "float_type"):
        words[scalar] = "should be a number, true, false or text"
    return Mistake(loc, "value", words.get(kind) or message.replace("Input ", "", 1))


def _real(data: Any, loc: Loc) -> Loc:
    """`loc` without what pydantic says of the form that it tried."""
    real: list[str | int] = []
    for number, each in enumerate(loc):
        inside = isinstance(data, list) and isinstance(each, int) and each < len(data)
        if inside or (isinstance(data, dict) and each in data):
            data = data[each]
        elif number < len(loc) - 1 or not isinstance(data, dict) or str(each).startswith("<"):
            continue
        real.append(each)
    return tuple(real)


def _model_at(loc: Loc) -> type[BaseModel]:
    """The class of the mapping at `loc`, as pydantic spells it."""
    model: type[BaseModel] = Document
    for each in loc:
        if isinstance(each, str) and each in model.model_fields:
            field: Any = model.model_fields[each]
            inside = list(dict.fromkeys(_models(field.annotation) + _models(tuple(field.metadata))))
            if len(inside) == 1:
                model = inside[0]
            options = inside
        elif each == "<kind>":
            model = TokenKind
        elif each == "<mapping>":
            model = next((one for one in options if one is not TokenKind), model)
    return model


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    parts = annotation if isinstance(annotation, tuple) else get_args(annotation)
    return [model for part in parts for model in _models(part)]


def json_schema() -> dict[str, Any]:
    """The schema of one document of a recipe, for editors (draft 2020-12)."""
    schema = Document.model_json_schema()
    schema |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Weft recipe"}
    names = methods.names()
    uses = [f"{name}: {methods.method(name).USE_WHEN}" for name in names]
    schema["properties"]["merge_method"] |= {"enum": names, "enumDescriptions": uses}
    schema["$defs"]["Parameters"] = {"type": "object", "additionalProperties": False} | {
        "properties": _parameters(names, schema["$defs"])
    }
    _use_parameters(schema)
    return schema


def _parameters(names: list[str], definitions: dict[str, Any]) -> dict[str, Any]:
    """The parameters of all methods, each with the methods that have it."""
    types = {bool: "boolean", int: "integer", float: "number", str: "string"}
    said: dict[str, dict[str, list[str]]] = {}
    kinds: dict[str, set[str]] = {}
    bounds: dict[str, dict[str, float]] = {}
    for method in names:
        for name, each in methods.method(method).PARAMETERS.items():
            default = "required" if each.required else f"default {each.default}".lower()
            whose = "each model" if each.each else "all models"
            said.setdefault(name, {}).setdefault(f"{each.what} ({whose}, {default})", [])
            said[name][f"{each.what} ({whose}, {default})"].append(method)
            kinds.setdefault(name, set()).add(types[each.type])
            bounds[name] = _widest(bounds.get(name), each)
    made = {}
    for name, lines in said.items():
        text = "; ".join(f"{', '.join(of)}: {what}" for what, of in lines.items())
        kind = sorted(kinds[name])
        scalar: dict[str, Any] = {"type": kind[0] if len(kind) == 1 else kind} | bounds[name]
        if {"number", "integer"} & kinds[name]:  # 1e-3 is text in YAML 1.1
            scalar = {"anyOf": [scalar, {"type": "string", "pattern": r"^[-+0-9.eE]+$"}]}
        value = {"anyOf": [scalar, {"type": "array", "items": scalar}]}
        entry = {
            "type": "object",
            "additionalProperties": False,
            "required": ["value"],
            "properties": definitions["Entry"]["properties"] | {"value": value},
        }
        entries = {"type": "array", "items": entry}
        made[name] = {"description": text, "anyOf": [*value["anyOf"], entry, entries]}
    return made


def _widest(known: dict[str, float] | None, each: methods.Parameter) -> dict[str, float]:
    """The bounds of a parameter that several methods have, each in its own range."""
    own = {"minimum": each.low, "maximum": each.high}
    own = {key: value for key, value in own.items() if math.isfinite(value)}
    if known is None:
        return own
    wider = {"minimum": min, "maximum": max}
    return {key: wider[key](known[key], own[key]) for key in known.keys() & own.keys()}


def _use_parameters(schema: Any) -> None:
    """Puts the parameters of the methods in the place of any mapping, wherever one stands."""
    if isinstance(schema, list):
        for each in schema:
            _use_parameters(each)
    elif isinstance(schema, dict):
        for key, each in schema.items():
            if key == "properties" and "parameters" in each:
                whole = {"anyOf": [{"$ref": "#/$defs/Parameters"}, {"type": "null"}]}
                each["parameters"] = whole | {"description": each["parameters"]["description"]}
                if "input_model_parameters" in each:
                    by_model = each["input_model_parameters"]["anyOf"][0]
                    by_model["additionalProperties"] = {"$ref": "#/$defs/Parameters"}
            _use_parameters(each)
