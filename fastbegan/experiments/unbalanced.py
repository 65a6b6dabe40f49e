"""A starved player (paper §4.5): a small N_h leaves D little code, a small N_z leaves G little variety."""

from __future__ import annotations

from ..config import PRESETS
from .comparison import check_balance, check_finite, compare
from .study import Study


def run(study: Study) -> None:
    """Train with N_h or N_z far below 64, and once with k fixed at 0; check that control keeps the balance."""
    few = study.scale.starved
    gamma = PRESETS[study.scale.preset].train.gamma
    starved_d = ("--hidden", few)
    options = {"balanced": (), "starved-d": starved_d, "starved-g": ("--latent", few)}
    options |= {"starved-d-free": (*starved_d, "--lambda-k", 0)}
    titles = {
        "balanced": "N_h = N_z = 64",
        "starved-d": f"N_h = {few}: D starved",
        "starved-g": f"N_z = {few}: G starved",
        "starved-d-free": f"N_h = {few}, k kept at 0",
    }
    results = compare(study, options, titles)
    for name in ("balanced", "starved-d", "starved-g"):
        check_finite(study, titles[name], results[name])
        check_balance(study, titles[name], results[name], gamma)
    if (free := results["starved-d-free"])["finite"]:
        study.note(f"without control (k kept at 0) the starved D ends with L(G(z)) / L(x) at {free['ratio']:.3f}")
    study.say(
        "M compares little between these runs: with a small N_h images are reconstructed worse, so L(x) is larger."
    )
    study.finish(
        "Unbalanced: a starved player",
        "The paper's §4.5: k keeps the game in balance even where one player is much weaker. D's code has N_h numbers, "
        "G's input N_z; each is made small in turn. What has to stay is the ratio of the losses, gamma, and a last run "
        "shows what becomes of it without control.",
        results,
    )
