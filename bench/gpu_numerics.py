"""Kernels against float64, one case at a time; the allowed error is that of `fastbegan_kernels.problems`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu_cases import DEVICE, DRY, Case, Outcome, Shape, fold_kinds, tile_of
from bench.poison import poisoned
from fastbegan_kernels import equilibrium_update, problems, reference, tiers, tuning
from fastbegan_kernels.fold import fold_flat, unfold_flat
from fastbegan_kernels.fused import launch, packing
from fastbegan_kernels.problems import Layer, Pointwise

Given = dict[str, Any]  # tensors, lists of tensors, or None
Results = list[Tensor]


class Draw:
    """Random tensors of one type on the device; images channels_last."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.generator = torch.Generator(DEVICE).manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = (torch.randn(shape, generator=self.generator, device=DEVICE) * scale).to(self.dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    def pictures(self, stored: int, picked: int, shape: Shape) -> dict[str, Tensor]:
        """uint8 images [stored, H, W, C], which of them to pick, and which of those to mirror."""
        like: dict[str, Any] = {"generator": self.generator, "device": DEVICE}
        images = torch.randint(0, 256, (stored, *shape), dtype=torch.uint8, **like)
        index = torch.randint(0, stored, (picked,), **like)
        return {"images": images, "index": index, "flip": torch.rand(picked, **like) < 0.5}


def _bias(case: Case, draw: Draw) -> Tensor | None:
    """Values that the data's type holds, in whatever type they come."""
    values = draw(case.shape[4])
    return {"own": values, "float32": values.float(), "none": None}[case.bias]


def _table(case: Case, draw: Draw) -> Tensor | None:
    size = case.skip
    return draw(case.shape[0], 3, 3, size, size, case.shape[4]) if size else None


def _layer_inputs(case: Case, draw: Draw) -> Given:
    """Scaled so that outputs are about 1."""
    n, c, h, w, k = case.shape
    out = reference.output_size((h, w), case.op)
    taps = 4 if case.op == "up" and not case.backward else case.weight_shape[2] ** 2
    x = draw(n, c, h, w)
    weight = draw(*case.weight_shape, scale=(taps * (k if case.backward else c)) ** -0.5)
    if not case.backward:
        return {"x": x, "weight": weight, "bias": _bias(case, draw), "skip": _table(case, draw)}
    if case.extra:
        x = reference.activate(x, case.activation, case.alpha)
    return {"x": x, "weight": weight, "dz": draw(n, k, *out)}


def inputs(case: Case) -> Given:
    """Random inputs of a kernel."""
    n, c, h, w, k = case.shape
    draw = Draw(case.dtype, case.seed)
    if case.op in tiers.KINDS:
        return _layer_inputs(case, draw)
    if case.op == "activation":
        return {"y": draw(n, k, h, w), "bias": _bias(case, draw), "skip": _table(case, draw)}
    if case.op == "activation_backward":
        return {"grad": draw(n, k, h, w), "y": reference.activate(draw(n, k, h, w), case.activation, case.alpha)}
    if case.op == "skip_gradient":
        return {"dz": draw(n, k, h, w)}
    if case.op == "l1_reconstruction_loss":
        return {"prediction": draw(n, c, h, w), "target": draw(n, c, h, w), "scale": draw(n).float()}
    if case.op == "normalize_images":
        given: Given = draw.pictures(n + 3, n, (h, w, c)) | {"corner": None, "margin": 0, "dtype": case.dtype}
        corner = torch.arange(2 * n, device=DEVICE).reshape(n, 2) % 5
        return given | ({"corner": corner, "margin": 4} if case.extra else {"index": None, "flip": None})
    if case.op == "fold":
        master = Draw(torch.float32, case.seed)
        weights = [master(k, c, 3, 3) for _ in fold_kinds(case)]
        weights[0] = weights[0].contiguous()  # the others are channels_last
        size = sum(packing.packed_size(v.shape, kind) for v, kind in zip(weights, fold_kinds(case), strict=True))
        return {"weights": weights, "grad": draw(size)}
    return {"real": draw(n).abs(), "fake": draw(n).abs()}


def _layer(case: Case, given: Given, fused: bool) -> list[Tensor | None]:
    settings: dict[str, Any] = {"kind": case.op, "activation": case.activation, "alpha": case.alpha}
    if fused and not case.backward:
        return [launch.layer(**given, **settings, tile=tile_of(case.tile))]
    if fused:
        dz, weight, y_prev = given["dz"], given["weight"], given["x"] if case.extra else None
        size: Any = case.shape[2:4]
        return [*launch.input_gradient(dz, weight, y_prev, size=size, tile=tile_of(case.tile), **settings)]
    if not case.backward:
        return [tiers.forward(**given, **settings, how="plain")]
    settings["activation"] = case.activation if case.extra else None
    return [*tiers.input_gradient(**given, **settings, how="plain")]


def _activation(case: Case, given: Given, fused: bool) -> list[Tensor | None]:
    if fused:  # writes over what it is given
        settings: dict[str, Any] = {"activation": case.activation, "alpha": case.alpha}
        return [launch.activation(given["y"].clone(), given["bias"], given["skip"], **settings)]
    y, bias, skip = given.values()
    y = y if bias is None else y + bias.to(y.dtype)[:, None, None]
    y = y if skip is None else y + reference.expand_phase_table(skip, y.shape[2], y.shape[3])
    return [reference.activate(y, case.activation, case.alpha)]


def _activation_backward(case: Case, given: Given, fused: bool) -> list[Tensor | None]:
    how = "algebraic" if fused else "plain"
    return [*tiers.activation_backward(**given, activation=case.activation, alpha=case.alpha, how=how)]


def _skip_gradient(case: Case, given: Given, fused: bool) -> list[Tensor | None]:
    return [tiers.skip_gradient(given["dz"], case.skip, how="algebraic" if fused else "plain")]


def _loss(case: Case, given: Given, fused: bool) -> list[Tensor | None]:
    """The loss alone, loss and gradients in one pass, the gradients alone; plainly by autograd."""
    if fused:
        pair, wanted = (given["prediction"], given["target"]), {"eta": case.eta, "to_target": case.extra}
        alone, *_ = launch.l1_reconstruction_loss(*pair, eta=case.eta)
        both = launch.l1_reconstruction_loss(*pair, given["scale"], **wanted)
        return [alone, *both, *launch.l1_reconstruction_loss(*pair, given["scale"], **wanted, loss=False)]
    leaves = [given[name].detach().requires_grad_() for name in ("prediction", "target")]
    loss = reference.l1_reconstruction_loss(*leaves, eta=case.eta)
    gradients = torch.autograd.grad(loss, leaves, given["scale"].to(loss.dtype))[: 2 if case.extra else 1]
    return [loss.detach(), loss.detach(), *gradients, *gradients]


def _normalize(case: Case, given: Given, fused: bool) -> list[Tensor | None]:
    images, index, flip, corner, margin, dtype = given.values()
    if fused:
        return [launch.normalize_images(images, index, flip, corner, margin, dtype)]
    return [reference.normalize_images(images, index, flip, corner, margin=margin, dtype=dtype)]


def _fold(case: Case, given: Given, fused: bool) -> list[Tensor | None]:
    weights, grad, kinds = given["weights"], given["grad"], fold_kinds(case)
    return [fold_flat(weights, kinds, grad.dtype, fused=fused), unfold_flat(grad, weights, kinds, fused=fused)]


def _update(case: Case, given: Given, fused: bool) -> list[Tensor | None]:
    """k, sums and window after one update; with a flag to skip it, set or not, where not `extra`."""
    like: dict[str, Any] = {"device": DEVICE, "dtype": given["real"].dtype}
    k, sums = torch.full((), 0.2, **like), torch.ones(6, **like)
    window = torch.ones(2, device=DEVICE, dtype=torch.float64)
    skip = None if case.extra else torch.tensor(case.seed % 2 == 0, device=DEVICE)
    impl = "fused" if fused else "reference"
    equilibrium_update(given["real"], given["fake"], k, sums, window, skip, gamma=0.5, lambda_k=0.01, impl=impl)
    return [k, sums, window]


_OPS: dict[str, Callable[[Case, Given, bool], list[Tensor | None]]] = {
    **dict.fromkeys(tiers.KINDS, _layer),
    "activation": _activation,
    "activation_backward": _activation_backward,
    "skip_gradient": _skip_gradient,
    "l1_reconstruction_loss": _loss,
    "normalize_images": _normalize,
    "fold": _fold,
    "equilibrium_update": _update,
}


def _run(case: Case, given: Given, fused: bool) -> Results:
    return [value for value in _OPS[case.op](case, given, fused) if value is not None]


def _double(value: Any) -> Any:
    """What is given, in float64."""
    if isinstance(value, list):
        return [_double(one) for one in value]
    if isinstance(value, torch.dtype):
        return torch.float64
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _excess(got: Tensor, own: Tensor, exact: Tensor, mode: str) -> float:
    """Largest error over the allowed one; above 1 is wrong."""
    cut = DRY and mode == "bf16"  # the interpreter cuts bf16 off where GPUs round: half of what that takes is put back
    if cut and got.dtype == torch.bfloat16:
        got = got.double() * (1 + 2**-9)
    return problems.excess(got, own, exact, tf32=cut or mode == "tf32")


def _verdict(got: Results, again: Results, own: Results, exact: Results, mode: str) -> Outcome:
    """Right, wrong, or unsteady where two runs differ in a bit."""
    worst = max(_excess(*three, mode) for three in zip(got, own, exact, strict=True))
    same = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    return {"status": "wrong" if worst > 1 else "right" if same else "unsteady", "excess": worst}


def check(case: Case) -> Outcome:
    """A kernel by its launcher, twice."""
    torch.backends.cudnn.allow_tf32 = case.mode == "tf32"
    given = inputs(case)
    own = _run(case, given, False)
    exact = _run(case, {name: _double(value) for name, value in given.items()}, False)
    with poisoned():
        got, again = _run(case, given, True), _run(case, given, True)
    return _verdict(got, again, own, exact, case.mode)


def pointwise(case: Case) -> Outcome:
    """One of the package's own problems, which it verifies before it trusts a kernel."""
    problem = Pointwise(case.op, str(case.dtype).removeprefix("torch."))
    own, exact = problem.expected(DEVICE)
    with poisoned():
        got, again = problem.results("fused", DEVICE), problem.results("fused", DEVICE)
    return _verdict(got, again, own, exact, case.mode)


def tuned(case: Case) -> Outcome:
    """The package's own choice as a user meets it: trials in child processes, verified, measured, kept on disk."""
    torch.backends.cudnn.allow_tf32 = False
    dtype, start = str(case.dtype).removeprefix("torch."), time.perf_counter()
    problem = Pointwise(case.op, dtype)
    if case.op in tiers.KINDS:
        activation = "elu" if not case.backward or case.extra else None
        problem = Layer(case.op, case.backward, dtype, case.shape[:4], case.weight_shape, activation=activation)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        how = tuning.choose(problem, DEVICE, tuning.forms(problem, DEVICE, "auto"), "auto")
    notes = [str(one.message) for one in told if "fastbegan_kernels" in str(one.message)]
    kept = tuning.choices(DEVICE)["choices"].get(f"{problem!r} auto") == how and how in tuning.cache_file().read_text()
    notes += [] if kept else ["the choice was not kept"]
    chosen = {"chosen": how, "seconds": time.perf_counter() - start}
    return {"status": "wrong" if notes or how == "plain" else "right", "note": "; ".join(notes), **chosen}
