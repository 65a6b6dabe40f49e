"""When the learning rate falls (paper §4.1); the balance itself is `fastbegan_kernels.layers.Equilibrium`."""

from __future__ import annotations


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
