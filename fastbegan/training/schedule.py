"""The schedule of the learning rate: halved when M stalls (paper §4.1), and falling at the end of a run."""

from __future__ import annotations


def falling(lr: float, floor: float, share: float, fraction: float) -> float:
    """The rate that falls from `lr` to `floor`, linearly, in the last `share` of a run of which `fraction` is done."""
    left = (1 - fraction) / share if share else 1.0
    return lr if left >= 1 else min(lr, floor + (lr - floor) * max(left, 0.0))


class StallHalving:
    """Halves the learning rate when M stalls (§4.1): when its mean over a window is not under the best so far.

    Args:
        lr: Learning rate at first.
        floor: Lowest learning rate.
    """

    def __init__(self, lr: float, floor: float) -> None:
        self.lr, self.floor, self.best = lr, floor, float("inf")

    def update(self, mean_convergence: float) -> float:
        """Take the mean of M over the last window. Returns the learning rate from now on."""
        if mean_convergence < self.best:
            self.best = mean_convergence
        else:
            # exactly the floor, never less: lower rates were reported to cause mode collapse
            self.lr = max(self.lr / 2, min(self.floor, self.lr))
        return self.lr

    def state_dict(self) -> dict[str, float]:
        return {"lr": self.lr, "best": self.best}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.lr, self.best = state["lr"], state["best"]
