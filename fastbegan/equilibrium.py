"""The balance of the game: k, the convergence measure M and the gap (paper §3.3, §3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastbegan_kernels import equilibrium_update


class Equilibrium(nn.Module):
    """k and what is logged about it, float32 on the device; nothing here is read by the host inside a step.

    Buffers: `k` []; `sums` [6], the sums since the last `take` of L(x), L(G(z)), k, M, gap and of ones;
    `window` [2], the sum of M since the last `read_window` and the count. k moves by about 1e-5 a step, which bf16
    and fp16 cannot hold: keep this module out of `.half()` and `.bfloat16()`.
    """

    NAMES = ("loss_real", "loss_fake", "k", "convergence", "gap")

    k: Tensor
    sums: Tensor
    window: Tensor

    def __init__(self, gamma: float = 0.5, lambda_k: float = 1e-3) -> None:
        super().__init__()
        self.gamma, self.lambda_k = gamma, lambda_k
        self.register_buffer("k", torch.zeros(()))
        self.register_buffer("sums", torch.zeros(len(self.NAMES) + 1))
        self.register_buffer("window", torch.zeros(2, dtype=torch.float64))

    @torch.no_grad()
    def update(self, loss_real: Tensor, loss_fake: Tensor, skip: Tensor | None = None) -> None:
        """Advance by one step from losses, scalar or one a sample; where the bool `skip` holds, change nothing."""
        equilibrium_update(
            loss_real, loss_fake, self.k, self.sums, self.window, skip, gamma=self.gamma, lambda_k=self.lambda_k
        )

    def read(self) -> dict[str, float]:
        """Means since the last call (k itself as it is now), then start over. Waits for the device."""
        return self.means(self.take().tolist())

    def take(self) -> Tensor:
        """`sums` and k [7] on the device, for `means`; then start over."""
        taken = torch.cat((self.sums, self.k[None]))
        self.sums.zero_()
        return taken

    def means(self, taken: Sequence[float]) -> dict[str, float]:
        """Means by `NAMES` of what `take` gave, with k as it was then."""
        *sums, count, k = taken
        found = {name: total / max(count, 1.0) for name, total in zip(self.NAMES, sums, strict=True)}
        return found | {"k": k}

    def read_window(self) -> float:
        """Mean of M since the last call, then start over. Waits for the device."""
        total, count = self.window.tolist()
        self.window.zero_()
        return total / max(count, 1.0)


class StallHalving:
    """Halve the learning rate when M stalls (§4.1): the mean of M over a window did not fall below the best so far."""

    def __init__(self, lr: float, floor: float) -> None:
        self.lr, self.floor, self.best = lr, floor, float("inf")

    def update(self, mean_convergence: float) -> float:
        """Take the mean of M over the last window; return the learning rate from now on."""
        if mean_convergence < self.best:
            self.best = mean_convergence
        else:
            # lower rates were reported to collapse, so the floor is reached exactly and never passed
            self.lr = max(self.lr / 2, min(self.floor, self.lr))
        return self.lr

    def state_dict(self) -> dict[str, float]:
        return {"lr": self.lr, "best": self.best}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.lr, self.best = state["lr"], state["best"]
