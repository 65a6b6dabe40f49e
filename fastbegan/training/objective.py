"""The gradients of both players (paper §3.3): L_D = L(x) - k L(G(z_D)) on D and L_G = L(G(z_G)) on G, in several ways.

All give the same gradients; they differ in how often D runs and in what it computes:
- `Textbook`: the formulas literally, on plain PyTorch modules, D three times. The specification and the yardstick.
- `SinglePass`: D runs once an image. Both players need gradients of the same two losses, so the backward of L(G(z))
  leaves G's gradient on G and F on D, and D's gradient is that of L(x) minus k F. Never divided by k: it starts at 0.
- `JointPass`: the same with x and G(z) as one batch, whose halves' weight gradients are kept apart.
Where z_D and z_G are different draws, or D is updated in between, G's pass through D is one of its own.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbegan_kernels import l1_reconstruction_loss_with_gradients

from ..nets.models import Discriminator, Generator, Packed, to_plain


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, `module` gets no weight gradients; gradients still pass through it."""
    parameters = list(module.parameters())
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class Objective(ABC):
    """Leaves gradients in the `.grad` of both nets, which must be None before; updates nothing.

    `dtype` is the compute type of both nets (None: that of their weights). Images are [N, 3, H, W] in [-1, 1]; all but
    the textbook compare them in the compute type with what D makes of them. Losses are means over the batch, float32
    (float64 for float64 nets), without their graph. Gradients are scaled by `loss_scale` where one is given.
    `compile_mode` is torch.compile's, None for none. `ready` is called with a net once its gradients are complete.
    """

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        *,
        eta: int = 1,
        dtype: torch.dtype | None = None,
        loss_scale: Tensor | None = None,
        compile_mode: str | None = None,
        ready: Callable[[nn.Module], None] = lambda net: None,
    ) -> None:
        self.eta, self.dtype, self.loss_scale, self.ready = eta, dtype, loss_scale, ready
        self.generator, self.discriminator = generator, discriminator
        self.compiled = compile_mode is not None
        nets = self._nets()
        self.generate, self.reconstruct = (
            net if compile_mode is None else _compiled(net, compile_mode, dtype) for net in nets
        )

    def _nets(self) -> tuple[Any, Any]:
        """G and D as they are run."""
        return self.generator, self.discriminator

    @abstractmethod
    def shared(self, real: Tensor, z: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Both players' gradients for z_D = z_G at the same parameters; returns L(x) and L(G(z))."""

    def independent(self, real: Tensor, z_d: Tensor, z_g: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The same for different draws; returns L(x) and L(G(z_G))."""
        loss_fake = self.for_generator(z_g)
        return self.for_discriminator(real, z_d, k), loss_fake

    @abstractmethod
    def for_discriminator(self, real: Tensor, z: Tensor, k: Tensor) -> Tensor:
        """Gradient of L_D on D; returns L(x)."""

    @abstractmethod
    def for_generator(self, z: Tensor) -> Tensor:
        """Gradient of L_G on G, through both sides of |v - D(v)|; returns L(G(z))."""


def _compiled(net: nn.Module, mode: str, dtype: torch.dtype | None) -> Any:
    # Inductor's own CUDA graphs do not nest in ours
    name = {"max-autotune": "max-autotune-no-cudagraphs"}.get(mode, mode)
    chosen: dict[str, Any] = {"mode": name}
    on_cpu = next(net.parameters()).device.type == "cpu"
    if on_cpu and dtype is not None and torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        from torch._inductor import list_mode_options  # here, as it takes a while

        # g++ 12 at -O3 breaks what Inductor writes for a half type's maps in two memory formats: gradients of NaN
        chosen = {"options": {**list_mode_options(name), "cpp.simdlen": 256}}
    return torch.compile(net, fullgraph=True, dynamic=False, **chosen)


class Textbook(Objective):
    """D runs on x, on G(z) for itself and on G(z) for G; plain modules, the nets' own parameters, autocast."""

    def _nets(self) -> tuple[Any, Any]:
        return to_plain(self.generator, share=True), to_plain(self.discriminator, share=True)

    def shared(self, real: Tensor, z: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        fake = self._run(self.generate, z)
        loss_real, loss_fake = self._loss(real), self._loss(fake.detach())
        self._backward(loss_real - k * loss_fake)
        self.ready(self.discriminator)
        with frozen(self.discriminator):
            self._backward(self._loss(fake))
        self.ready(self.generator)
        return loss_real.detach(), loss_fake.detach()

    def for_discriminator(self, real: Tensor, z: Tensor, k: Tensor) -> Tensor:
        with torch.no_grad():
            fake = self._run(self.generate, z)
        loss_real = self._loss(real)
        self._backward(loss_real - k * self._loss(fake))
        self.ready(self.discriminator)
        return loss_real.detach()

    def for_generator(self, z: Tensor) -> Tensor:
        with frozen(self.discriminator):
            loss = self._loss(self._run(self.generate, z))
            self._backward(loss)
        self.ready(self.generator)
        return loss.detach()

    def _loss(self, images: Tensor) -> Tensor:
        difference = images - self._run(self.reconstruct, images)
        return (difference.abs() if self.eta == 1 else difference.square()).mean()

    def _run(self, net: Any, x: Tensor) -> Tensor:
        if self.dtype is None:
            return net(x)
        with torch.autocast(x.device.type, self.dtype):
            return net(x).float()

    def _backward(self, loss: Tensor) -> None:
        (loss if self.loss_scale is None else loss * self.loss_scale).backward()


class Leaves:
    """A net's packed weights as leaves of the step: graphs of passes end there, and their gradients go back once.

    The net's parameters must have no `.grad`. A graph through the packing would not survive a second backward, and
    would unfold the gradients of each.
    """

    def __init__(
        self, net: Generator | Discriminator, dtype: torch.dtype | None, ready: Callable[[nn.Module], None]
    ) -> None:
        self._net, self._ready = net, ready
        self._parameters = list(net.parameters())
        self._made = net.pack(dtype)
        self.weights = self.another()

    def another(self) -> Packed:
        """The same values as other leaves, to keep two parts' gradients apart."""
        return {name: weight.detach().requires_grad_() for name, weight in self._made.items()}

    def constant(self) -> Packed:
        """The same values, that get no gradient."""
        return {name: weight.detach() for name, weight in self._made.items()}

    def taken(self) -> list[Tensor]:
        """The gradients on `weights`, taken off them."""
        return _taken(list(self.weights.values()))

    def receive(self, output: Tensor, gradient: Tensor | None) -> None:
        """From the gradient at the net's output, give the parameters theirs."""
        output.backward(gradient)
        self.give(self.of_parameters(self.taken()))

    def of_parameters(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the net's parameters, in their type and layout, from those of the leaves."""
        packed, of_packed = [], []
        for made, gradient in zip(self._made.values(), gradients, strict=True):
            if made.is_leaf and not made._backward_hooks and made.stride() == gradient.stride():
                made.grad = gradient  # a parameter as it is: autograd would copy
            else:
                packed.append(made)
                of_packed.append(gradient)
        torch.autograd.backward(packed, of_packed, retain_graph=True)
        return _taken(self._parameters)

    def give(self, gradients: Sequence[Tensor]) -> None:
        """Make `gradients`, as `of_parameters` returns them, the parameters'."""
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self._ready(self._net)


class SinglePass(Objective):
    """One pass of D an image: on G(z) for both players, and on x."""

    def shared(self, real: Tensor, z: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        on_g, on_d = self._leaves()
        fake = self.generate(z, on_g.weights)
        loss_fake, on_fake = self._pass(fake, [on_d.weights], to_images=True)
        of_fake = on_d.taken()
        on_g.receive(fake, on_fake)
        loss_real = self._difference(real, of_fake, on_d, k)
        return loss_real.mean(), loss_fake.mean()

    def independent(self, real: Tensor, z_d: Tensor, z_g: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        on_g, on_d = self._leaves()
        loss_fake = self._on_generator(z_g, on_g, on_d)
        return self._on_discriminator(real, self._draw(z_d, on_g), on_d, k), loss_fake

    def for_discriminator(self, real: Tensor, z: Tensor, k: Tensor) -> Tensor:
        on_g, on_d = self._leaves()
        return self._on_discriminator(real, self._draw(z, on_g), on_d, k)

    def for_generator(self, z: Tensor) -> Tensor:
        return self._on_generator(z, *self._leaves())

    def _draw(self, z: Tensor, on_g: Leaves) -> Tensor:
        with torch.no_grad():
            return self.generate(z, on_g.constant())

    def _on_generator(self, z: Tensor, on_g: Leaves, on_d: Leaves) -> Tensor:
        fake = self.generate(z, on_g.weights)
        loss, on_fake = self._pass(fake, [on_d.constant()], to_images=True)
        on_g.receive(fake, on_fake)
        return loss.mean()

    def _on_discriminator(self, real: Tensor, fake: Tensor, on_d: Leaves, k: Tensor) -> Tensor:
        self._pass(fake, [on_d.weights])
        return self._difference(real, on_d.taken(), on_d, k).mean()

    def _difference(self, real: Tensor, of_fake: list[Tensor], on_d: Leaves, k: Tensor) -> Tensor:
        """Give D the gradient of L(x) minus k times that of L(G(z)), `of_fake`; returns L(x) [N]."""
        loss_real, _ = self._pass(real, [on_d.weights])
        on_d.give(self._combined(on_d, on_d.taken(), k, of_fake))
        return loss_real

    def _combined(self, on_d: Leaves, of_real: list[Tensor], k: Tensor, of_fake: list[Tensor]) -> list[Tensor]:
        """Gradients of D's parameters from those of its leaves; half precision is left before it subtracts."""
        if self.dtype is None:
            return on_d.of_parameters(_minus(of_real, k, of_fake))
        return _minus(on_d.of_parameters(of_real), k, on_d.of_parameters(of_fake))

    def _leaves(self) -> tuple[Leaves, Leaves]:
        nets = self.generator, self.discriminator
        on_g, on_d = (Leaves(net, self.dtype, self.ready) for net in nets)
        return on_g, on_d

    def _pass(
        self, images: Tensor, weights: Sequence[Packed], *, to_images: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """D forward and backward: losses [N], and with `to_images` their gradient at the images, on both ways.

        The batch has a part for each of `weights`, which gather the gradients of that part's mean loss.
        """
        images = images.detach().requires_grad_(to_images)
        prediction = self.reconstruct(images, *weights)
        target = images.detach().to(prediction.dtype)
        scale = torch.full((), len(weights) / len(images), dtype=_wide(target.dtype), device=target.device)
        if self.loss_scale is not None:
            scale = scale * self.loss_scale
        loss, on_prediction, on_images = l1_reconstruction_loss_with_gradients(
            prediction.detach(), target, scale, eta=self.eta, to_target=to_images
        )
        prediction.backward(on_prediction)
        if on_images is None:
            return loss, None
        assert images.grad is not None
        return loss, images.grad.add_(on_images)


def _taken(leaves: Sequence[Tensor]) -> list[Tensor]:
    """The gradients on `leaves`, taken off them."""
    found = []
    for leaf in leaves:
        assert leaf.grad is not None
        found.append(leaf.grad)
        leaf.grad = None
    return found


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _minus(gradients: list[Tensor], k: Tensor, others: list[Tensor]) -> list[Tensor]:
    """gradients - k * others, in place."""
    torch._foreach_mul_(others, k.to(others[0].dtype))
    torch._foreach_sub_(gradients, others)
    return gradients


class JointPass(SinglePass):
    """x and G(z) through D as one batch; the gradients of D's weights are kept apart by halves."""

    def shared(self, real: Tensor, z: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        on_g, on_d = self._leaves()
        fake = self.generate(z, on_g.weights)
        loss_real, loss_fake, on_images = self._both(real, fake, on_d, k, to_images=True)
        assert on_images is not None
        on_g.receive(fake, on_images.chunk(2)[1])
        return loss_real, loss_fake

    def _on_discriminator(self, real: Tensor, fake: Tensor, on_d: Leaves, k: Tensor) -> Tensor:
        return self._both(real, fake, on_d, k)[0]

    def _both(
        self, real: Tensor, fake: Tensor, on_d: Leaves, k: Tensor, *, to_images: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Give D its gradient; returns L(x), L(G(z)) and with `to_images` the gradient at both batches."""
        second = on_d.another()
        images = torch.cat((real.to(fake.dtype), fake.detach())).contiguous(memory_format=torch.channels_last)
        losses, on_images = self._pass(images, [on_d.weights, second], to_images=to_images)
        on_d.give(self._combined(on_d, on_d.taken(), k, _taken(list(second.values()))))
        loss_real, loss_fake = losses.chunk(2)
        return loss_real.mean(), loss_fake.mean(), on_images


OBJECTIVES: dict[str, type[Objective]] = {"textbook": Textbook, "single-pass": SinglePass, "joint": JointPass}
