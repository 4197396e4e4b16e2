"""What MergeKit makes of the cases; run it where mergekit 0.1.5 is installed, it takes minutes.

It writes `goldens.npz` beside it: outputs only, the inputs follow from the cases' names. With names
of cases as arguments it makes only those, which may draw nothing at random, in seconds.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from merge_cases import APART, DETERMINISTIC, DRAWS, RANDOM, Case, tensors
from mergekit import merge_methods


def merged(case: Case) -> np.ndarray:
    base, inputs = tensors(case)
    # A base that is listed among the models stands where the recipe has it: here, first.
    every = [torch.from_numpy(each) for each in ([base] if base is not None else []) + inputs]
    result = merge_methods.merge_tensors(
        every,
        case.method,
        parameters={**case.params, **case.each},
        base_index=0 if base is not None else None,
    )
    return result.float().numpy()


def main() -> None:
    assert version("mergekit") == "0.1.5"
    torch.manual_seed(0)
    torch.set_num_threads(1)
    path = Path(__file__).parent / "goldens.npz"
    chosen = sys.argv[1:]
    found = dict(np.load(path)) if chosen else {}
    cases = DETERMINISTIC + APART
    found |= {case.name: merged(case) for case in cases if not chosen or case.name in chosen}
    for case in () if chosen else RANDOM:
        drawn = np.stack([merged(case).astype(np.float64) for _ in range(20 * DRAWS)])
        found[f"{case.name} mean"] = drawn.mean(0).astype(np.float32)
        found[f"{case.name} std"] = drawn.std(0).astype(np.float32)
    names = sorted(method.spec.name for method in merge_methods.registered_methods())
    found["methods"] = np.array(names)
    parameters = []
    for method in merge_methods.registered_methods():
        for each in method.spec.parameters:
            default = "required" if each.required else repr(each.default)
            parameters.append(f"{method.spec.name} {each.name} {each.scope.value} {default}")
    found["parameters"] = np.array(sorted(parameters))
    np.savez_compressed(path, **found)


if __name__ == "__main__":
    main()
