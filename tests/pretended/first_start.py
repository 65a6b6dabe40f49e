"""What a first start tries: prints JSON of the children and of what was told, for a step of 64 px and n = 64.

Children that answer at once stand for real ones, and every form is right: only the way is of interest.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch

from fastbegan.config import ModelConfig, TrainConfig
from fastbegan.training.tune import tune
from fastbegan_kernels import child, conv_layer, problems, tuning

_ANSWERS = """
from fastbegan_kernels import problems, trial
problems.Layer.results = problems.Pointwise.results = lambda *_: []
trial.main()
"""


def main() -> None:
    children: list[child.Child] = []

    class Counted(child.Child):
        def __init__(self) -> None:
            super().__init__()
            children.append(self)

    module: Any = child
    module.Child, module.command = Counted, lambda: [sys.executable, "-c", _ANSWERS]
    module = tuning
    module._checked = lambda problem, device, form, own, exact: tuning.Outcome(form, None)
    for kind in (conv_layer.Layer, conv_layer.WeightGradient, problems.Pointwise):
        setattr(kind, "expected", lambda *_: ([], []))  # noqa: B010
    conv_layer.Layer.tensors = conv_layer.WeightGradient.tensors = lambda *_, **__: {}
    told: list[tuple[int, int]] = []
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        device = torch.device("cuda", 0)
        model, train = ModelConfig(size=64, filters=64), TrainConfig(batch_size=2)
        failed = tune(model, train, device, torch.bfloat16, lambda done, total: told.append((done, total)))
    row = {"name": "first start", "problems": len(tuning._chosen), "failed": failed, "children": len(children)}
    print(json.dumps(row | {"told": told, "warned": [str(one.message) for one in heard]}))


if __name__ == "__main__":
    main()
