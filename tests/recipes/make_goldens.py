"""What MergeKit makes of settings and of recipes, for the tests to compare with.

python tests/recipes/make_goldens.py [SEED] > tests/recipes/goldens.json

with a Python that has mergekit 0.1.5; it needs nothing of Weft.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import sys
from typing import Any

import yaml
from mergekit import config, merge_methods, parameter_resolver
from mergekit.merge_methods import registry
from pydantic import TypeAdapter, ValidationError

TENSORS = (
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.11.self_attn.q_proj.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
)
FILTERS = ("mlp", "self_attn", "down_proj", "layers.1.", "embed", "lm_head", "zzz", "*", None)
PLACES = (0, 1, 0.5, 1 / 3, 0.25, 30 / 31)
TYPES = {"float": float, "int": int, "bool": bool, "str": str}


def spec_of(name: str) -> dict[str, Any]:
    spec = merge_methods.get(name).spec
    contract = spec.contract
    return {
        "base": contract.base.value,
        "inputs": [contract.min_inputs, contract.max_inputs],
        "non_base": [contract.min_non_base, contract.max_non_base],
        "parameters": {
            each.name: {
                "type": "float" if "float" in str(each.value_type) else each.value_type.__name__,
                "scope": each.scope.value,
                "required": each.required,
                "default": None if each.required else each.default,
            }
            for each in spec.parameters
        },
    }


class Maker:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def scalar(self, kind: str) -> Any:
        pick = self.random.choice
        if kind == "bool":
            return pick([True, False, True, False, 0, 1, "yes", "False"])
        if kind == "int":
            return pick([1, 2, 10, 7.0, "12"])
        if kind == "str":
            return pick(["a", "b", "c"])
        return pick([0, 1, 0.5, round(self.random.random(), 3), "1e-3", "0.25"])

    def value(self, kind: str) -> Any:
        if self.random.random() < 0.5:
            return self.scalar(kind)
        return [self.scalar(kind) for _ in range(self.random.randrange(5))]

    def setting(self, kind: str) -> Any:
        roll = self.random.random()
        if roll < 0.5:
            return self.value(kind)
        entries = []
        for _ in range(self.random.randrange(1, 4)):
            entry = {"value": self.value(kind)}
            wanted = self.random.choice(FILTERS)
            if wanted is not None:
                entry["filter"] = wanted
            entries.append(entry)
        return entries[0] if roll > 0.9 else entries

    def settings(self) -> list[Any]:
        made = []
        for _ in range(150):
            kind = self.random.choice(list(TYPES))
            setting = self.setting(kind)
            tensor, t = self.random.choice(TENSORS), self.random.choice(PLACES)
            parsed = TypeAdapter(config.ParameterSetting).validate_python(setting)
            try:
                validate = TypeAdapter(TYPES[kind]).validate_python
                found = config.evaluate_setting(tensor, parsed, t, validate=validate)
            except ValidationError:
                found = "refused"
            made.append([kind, setting, tensor, t, found])
        return made

    def level(self, parameters: dict[str, Any], *, own: bool, chance: float) -> dict[str, Any]:
        return {
            name: self.setting(each["type"])
            for name, each in parameters.items()
            if (not own or each["scope"] != "shared") and self.random.random() < chance
        }

    def recipe(self, method: str, spec: dict[str, Any]) -> dict[str, Any]:
        parameters = spec["parameters"]
        names = ["org/a", "org/b", "org/c"]
        if spec["inputs"][1]:
            names = names[: spec["inputs"][1]]
        sources = [
            {"model": name, "parameters": self.level(parameters, own=True, chance=0.4)}
            for name in names
        ]
        made: dict[str, Any] = {"merge_method": method}
        if spec["base"] != "ignored":
            made["base_model"] = names[-1]
        made["parameters"] = self.level(parameters, own=False, chance=0.4)
        for name, each in parameters.items():
            if each["required"] and self.random.random() < 0.95:
                made["parameters"].setdefault(name, self.scalar(each["type"]))
        of_slice = self.level(parameters, own=False, chance=0.2)
        of_module = self.level(parameters, own=False, chance=0.2)
        for source in sources:
            source["layer_range"] = [0, 4]
        slices = [{"sources": sources, "parameters": of_slice}]
        form = self.random.choice(["models", "slices", "modules"])
        if form == "models":
            for source in sources:
                del source["layer_range"]
            made["models"] = sources
        elif form == "slices":
            made["slices"] = slices
        else:
            made["modules"] = {"text": {"slices": slices, "parameters": of_module}}
        return made

    def recipes(self, specs: dict[str, Any]) -> list[Any]:
        # della refuses most random densities, and has the parameters of breadcrumbs otherwise
        names = [name for name in specs if not name.startswith("della")]
        made = []
        for number in range(5 * len(names)):
            method = names[number % len(names)]
            recipe = self.recipe(method, specs[method])
            output, t = self.random.choice(TENSORS), self.random.choice(PLACES)
            inputs = [self.random.choice([output, *TENSORS]) for _ in range(3)]
            found = resolved(method, recipe, output, inputs, t)
            made.append([yaml.safe_dump(recipe, sort_keys=False), output, inputs, t, found])
        return made


def resolved(method: str, recipe: dict[str, Any], output: str, inputs: list[str], t: float) -> Any:
    whole = config.MergeConfiguration.model_validate(recipe)
    module = None
    if whole.models:
        sources = [
            config.InputSliceDefinition(
                model=each.model, layer_range=(0, 4), parameters=each.parameters
            )
            for each in whole.models
        ]
        slice_out = config.OutputSliceDefinition(sources=sources)
    else:
        module = whole.modules["text"] if whole.modules else None
        slice_out = (module or whole).slices[0]
    reader = config.ConfigReader(config=whole, t=t, slice_out=slice_out, module=module)
    try:
        shared, each = parameter_resolver.resolve_parameters(
            merge_methods.get(method).spec,
            tensor_name=output,
            inputs={
                source.model: name for source, name in zip(slice_out.sources, inputs, strict=False)
            },
            sources=reader.parameter_sources,
            base_model=whole.base_model,
            t=t,
        )
    except (ValidationError, RuntimeError):
        return "refused"
    return [shared, list(each.values())]


def main() -> None:
    maker = Maker(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    specs = {
        name: spec_of(name)
        for name in sorted(each.spec.name for each in registry.registered_methods())
    }
    goldens = {
        "mergekit": importlib.metadata.version("mergekit"),
        "specs": specs,
        "settings": maker.settings(),
        "recipes": maker.recipes(specs),
    }
    lines = [f" {json.dumps(key)}: {_listed(value)}" for key, value in goldens.items()]
    sys.stdout.write("{\n" + ",\n".join(lines) + "\n}\n")


def _listed(value: Any) -> str:
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n  " + ",\n  ".join(json.dumps(each) for each in value) + "\n ]"


if __name__ == "__main__":
    main()
