"""The gradients of both players (paper §3.3): L_D = L(x) - k L(G(z_D)) on D and L_G = L(G(z_G)) on G, in several ways.

All ways give the same gradients. They differ in how often D runs:
- `Textbook`: the formulas as written, on plain PyTorch modules, D three times. The specification and the yardstick.
- `SinglePass`: D runs once per image. Both players need gradients of the same two losses. One backward of L(G(z))
  leaves G's gradient on G and a gradient F on D; D's gradient is that of L(x) minus k F. It is formed by
  subtraction: recovering F by a division would fail at k = 0.
- `JointPass`: as `SinglePass`, with x and G(z) as one batch, whose halves' weight gradients are kept apart.
G's pass through D is a separate one where z_D and z_G are different draws, or where D is updated in between.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastbegan_kernels import l1_reconstruction_loss_with_gradients

from ..config import ObjectiveConfig
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
    """Computes losses, and leaves gradients in the `.grad` of both nets, which must be None before; updates nothing.

    `for_discriminator`, `for_generator` and `for_both` return the losses that they computed: means over the batch,
    float32 (float64 for float64 nets), without their graph. Images are [N, 3, H, W] in [-1, 1], latents [N, latent].
    All but the textbook compare images with D's output in the compute type.
    """

    words: ClassVar[str]
    """How often D runs, for a run's first lines."""

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        k: Tensor,
        config: ObjectiveConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
        loss_scale: Tensor | None = None,
        compile_mode: str | None = None,
        ready: Callable[[nn.Module], None] = lambda net: None,
    ) -> None:
        """Take both nets.

        Args:
            generator: G; its weights get gradients.
            discriminator: D; its weights get gradients.
            k: The weight of L(G(z)) in L_D, [] on the nets' device; read at each call.
            config: `eta` and `latents` are used. Default: the paper's.
            dtype: Compute type of both nets; None for that of their weights.
            loss_scale: Factor of all gradients, [] on the nets' device; None for 1.
            compile_mode: torch.compile's mode; None for none.
            ready: Called with a net once its gradients are complete.
        """
        self.config = config or ObjectiveConfig()
        self.k, self.dtype, self.loss_scale, self.ready = k, dtype, loss_scale, ready
        self.generator, self.discriminator = generator, discriminator
        self.compiled = compile_mode is not None
        nets = self._nets()
        self.generate, self.reconstruct = (
            net if compile_mode is None else _compiled(net, compile_mode, dtype) for net in nets
        )

    def _nets(self) -> tuple[Any, Any]:
        """G and D as they are run."""
        return self.generator, self.discriminator

    def for_both(self, real: Tensor, z_d: Tensor, z_g: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of L_D on D and of L_G on G, at the same parameters; returns L(x) and L(G(z_G)).

        With `latents` "shared", z_D = z_G and `z_g` is not read.
        """
        if self.config.latents == "shared":
            return self._shared(real, z_d)
        return self._independent(real, z_d, z_g)

    @abstractmethod
    def for_discriminator(self, real: Tensor, z: Tensor) -> tuple[Tensor]:
        """Gradient of L_D on D; returns L(x)."""

    @abstractmethod
    def for_generator(self, z: Tensor) -> tuple[Tensor]:
        """Gradient of L_G on G, through both sides of |v - D(v)|; returns L(G(z))."""

    @abstractmethod
    def _shared(self, real: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """`for_both` with one draw of z."""

    def _independent(self, real: Tensor, z_d: Tensor, z_g: Tensor) -> tuple[Tensor, Tensor]:
        """`for_both` with two draws of z."""
        (loss_fake,) = self.for_generator(z_g)
        (loss_real,) = self.for_discriminator(real, z_d)
        return loss_real, loss_fake


def _compiled(net: nn.Module, mode: str, dtype: torch.dtype | None) -> Any:
    # Inductor's own CUDA graphs do not nest in ours
    name = {"max-autotune": "max-autotune-no-cudagraphs"}.get(mode, mode)
    options: dict[str, Any] = {"mode": name}
    on_cpu = next(net.parameters()).device.type == "cpu"
    if on_cpu and dtype is not None and torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        from torch._inductor import list_mode_options  # here, as it takes a while

        # g++ 12 at -O3 breaks what Inductor writes for a half type's maps in two memory formats: gradients of NaN
        options = {"options": {**list_mode_options(name), "cpp.simdlen": 256}}
    return torch.compile(net, fullgraph=True, dynamic=False, **options)


class Textbook(Objective):
    """D runs on x, on G(z) for itself and on G(z) for G; plain modules, the nets' own parameters, autocast."""

    words = "textbook, D three times"

    def _nets(self) -> tuple[Any, Any]:
        return to_plain(self.generator, share=True), to_plain(self.discriminator, share=True)

    def _shared(self, real: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        fake = self._run(self.generate, z)
        loss_real, loss_fake = self._loss(real), self._loss(fake.detach())
        self._backward(loss_real - self.k * loss_fake)
        self.ready(self.discriminator)
        with frozen(self.discriminator):
            self._backward(self._loss(fake))
        self.ready(self.generator)
        return loss_real.detach(), loss_fake.detach()

    def for_discriminator(self, real: Tensor, z: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            fake = self._run(self.generate, z)
        loss_real = self._loss(real)
        self._backward(loss_real - self.k * self._loss(fake))
        self.ready(self.discriminator)
        return (loss_real.detach(),)

    def for_generator(self, z: Tensor) -> tuple[Tensor]:
        with frozen(self.discriminator):
            loss = self._loss(self._run(self.generate, z))
            self._backward(loss)
        self.ready(self.generator)
        return (loss.detach(),)

    def _loss(self, images: Tensor) -> Tensor:
        difference = images - self._run(self.reconstruct, images)
        return (difference.abs() if self.config.eta == 1 else difference.square()).mean()

    def _run(self, net: Any, x: Tensor) -> Tensor:
        if self.dtype is None:
            return net(x)
        with torch.autocast(x.device.type, self.dtype):
            return net(x).float()

    def _backward(self, loss: Tensor) -> None:
        (loss if self.loss_scale is None else loss * self.loss_scale).backward()


class Leaves:
    """A net's packed weights as leaves: graphs of passes end there, and their gradients go back to the parameters once.

    Why not let autograd go through the packing: D runs several times on the same packed weights, and a graph through
    them would be freed by the first backward. It would also unpack the gradients of each pass, where unpacking
    their weighted sum once is enough; only half precision unpacks each (`_combined`). The net's parameters must have no
    `.grad`.
    """

    def __init__(
        self, net: Generator | Discriminator, dtype: torch.dtype | None, ready: Callable[[nn.Module], None]
    ) -> None:
        self._net, self._ready = net, ready
        self._parameters = list(net.parameters())
        self._packed = net.pack(dtype)
        self.weights = self.another()

    def another(self) -> Packed:
        """The same values as other leaves, to keep two parts' gradients apart."""
        return {name: weight.detach().requires_grad_() for name, weight in self._packed.items()}

    def constant(self) -> Packed:
        """The same values, without gradients."""
        return {name: weight.detach() for name, weight in self._packed.items()}

    def take(self) -> list[Tensor]:
        """The gradients on `weights`, which have none afterwards."""
        return _take_gradients(list(self.weights.values()))

    def backward(self, output: Tensor, gradient: Tensor | None) -> None:
        """From the gradient at the net's output to those of the parameters."""
        output.backward(gradient)
        self.give(self.unpack(self.take()))

    def unpack(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the net's parameters, in their type and layout, from those of the leaves."""
        packed, of_packed = [], []
        for weight, gradient in zip(self._packed.values(), gradients, strict=True):
            if weight.is_leaf and not weight._backward_hooks and weight.stride() == gradient.stride():
                weight.grad = gradient  # a parameter that needs no packing: autograd would copy its gradient
            else:
                packed.append(weight)
                of_packed.append(gradient)
        torch.autograd.backward(packed, of_packed, retain_graph=True)
        return _take_gradients(self._parameters)

    def give(self, gradients: Sequence[Tensor]) -> None:
        """Put `gradients`, as `unpack` returns them, into the parameters' `.grad`."""
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self._ready(self._net)


class SinglePass(Objective):
    """One pass of D per image: on G(z) for both players, and on x."""

    words = "D once per image"

    def _shared(self, real: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        leaves_g, leaves_d = self._leaves()
        fake = self.generate(z, leaves_g.weights)
        loss_fake, fake_gradient = self._pass(fake, [leaves_d.weights], to_images=True)
        gradients_fake = leaves_d.take()
        leaves_g.backward(fake, fake_gradient)
        loss_real = self._difference(real, gradients_fake, leaves_d)
        return loss_real.mean(), loss_fake.mean()

    def _independent(self, real: Tensor, z_d: Tensor, z_g: Tensor) -> tuple[Tensor, Tensor]:
        leaves_g, leaves_d = self._leaves()
        loss_fake = self._on_generator(z_g, leaves_g, leaves_d)
        return self._on_discriminator(real, self._draw(z_d, leaves_g), leaves_d), loss_fake

    def for_discriminator(self, real: Tensor, z: Tensor) -> tuple[Tensor]:
        leaves_g, leaves_d = self._leaves()
        return (self._on_discriminator(real, self._draw(z, leaves_g), leaves_d),)

    def for_generator(self, z: Tensor) -> tuple[Tensor]:
        return (self._on_generator(z, *self._leaves()),)

    def _draw(self, z: Tensor, leaves_g: Leaves) -> Tensor:
        with torch.no_grad():
            return self.generate(z, leaves_g.constant())

    def _on_generator(self, z: Tensor, leaves_g: Leaves, leaves_d: Leaves) -> Tensor:
        fake = self.generate(z, leaves_g.weights)
        loss, fake_gradient = self._pass(fake, [leaves_d.constant()], to_images=True)
        leaves_g.backward(fake, fake_gradient)
        return loss.mean()

    def _on_discriminator(self, real: Tensor, fake: Tensor, leaves_d: Leaves) -> Tensor:
        self._pass(fake, [leaves_d.weights])
        return self._difference(real, leaves_d.take(), leaves_d).mean()

    def _difference(self, real: Tensor, gradients_fake: list[Tensor], leaves_d: Leaves) -> Tensor:
        """Give D the gradient of L(x) minus k times that of L(G(z)), `gradients_fake`; returns L(x) [N]."""
        loss_real, _ = self._pass(real, [leaves_d.weights])
        leaves_d.give(self._combined(leaves_d, leaves_d.take(), gradients_fake))
        return loss_real

    def _combined(self, leaves_d: Leaves, real: list[Tensor], fake: list[Tensor]) -> list[Tensor]:
        """Gradients of D's parameters from those of its leaves."""
        if self.dtype is None:
            return leaves_d.unpack(_minus(real, self.k, fake))
        # subtracting in half precision would lose what the two have in common
        return _minus(leaves_d.unpack(real), self.k, leaves_d.unpack(fake))

    def _leaves(self) -> tuple[Leaves, Leaves]:
        leaves_g, leaves_d = (Leaves(net, self.dtype, self.ready) for net in (self.generator, self.discriminator))
        return leaves_g, leaves_d

    def _pass(
        self, images: Tensor, weights: Sequence[Packed], *, to_images: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """D forward and backward: losses [N], and with `to_images` the gradient at the images.

        That gradient has both parts: through D's output and through the target that it is compared with. The batch has
        a part for each of `weights`, which gather the gradients of that part's mean loss.
        """
        images = images.detach().requires_grad_(to_images)
        prediction = self.reconstruct(images, *weights)
        target = images.detach().to(prediction.dtype)
        scale = torch.full((), len(weights) / len(images), dtype=_wide(target.dtype), device=target.device)
        if self.loss_scale is not None:
            scale = scale * self.loss_scale
        loss, on_prediction, on_images = l1_reconstruction_loss_with_gradients(
            prediction.detach(), target, scale, eta=self.config.eta, to_target=to_images
        )
        prediction.backward(on_prediction)
        if on_images is None:
            return loss, None
        assert images.grad is not None
        return loss, images.grad.add_(on_images)


def _take_gradients(leaves: Sequence[Tensor]) -> list[Tensor]:
    """The gradients on `leaves`, which have none afterwards."""
    gradients = []
    for leaf in leaves:
        assert leaf.grad is not None
        gradients.append(leaf.grad)
        leaf.grad = None
    return gradients


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _minus(gradients: list[Tensor], k: Tensor, others: list[Tensor]) -> list[Tensor]:
    """gradients - k * others, in the memory of `gradients`; `others` is overwritten."""
    torch._foreach_mul_(others, k.to(others[0].dtype))
    torch._foreach_sub_(gradients, others)
    return gradients


class JointPass(SinglePass):
    """x and G(z) through D as one batch; the gradients of D's weights are kept apart by halves."""

    words = "D once per batch"

    def _shared(self, real: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        leaves_g, leaves_d = self._leaves()
        fake = self.generate(z, leaves_g.weights)
        loss_real, loss_fake, gradient = self._one_batch(real, fake, leaves_d, to_images=True)
        assert gradient is not None
        leaves_g.backward(fake, gradient.chunk(2)[1])
        return loss_real, loss_fake

    def _on_discriminator(self, real: Tensor, fake: Tensor, leaves_d: Leaves) -> Tensor:
        return self._one_batch(real, fake, leaves_d)[0]

    def _one_batch(
        self, real: Tensor, fake: Tensor, leaves_d: Leaves, *, to_images: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Give D its gradient; returns L(x), L(G(z)) and with `to_images` the gradient at both halves of the batch."""
        weights_fake = leaves_d.another()
        images = torch.cat((real.to(fake.dtype), fake.detach())).contiguous(memory_format=torch.channels_last)
        losses, gradient = self._pass(images, [leaves_d.weights, weights_fake], to_images=to_images)
        gradients_fake = _take_gradients(list(weights_fake.values()))
        leaves_d.give(self._combined(leaves_d, leaves_d.take(), gradients_fake))
        loss_real, loss_fake = losses.chunk(2)
        return loss_real.mean(), loss_fake.mean(), gradient


OBJECTIVES: dict[str, type[Objective]] = {"textbook": Textbook, "single-pass": SinglePass, "joint": JointPass}


def objective_for(passes: str) -> type[Objective]:
    """The class for `ObjectiveConfig.passes`. "auto" is single-pass here; only `fastbegan train` measures."""
    return OBJECTIVES["single-pass" if passes == "auto" else passes]
