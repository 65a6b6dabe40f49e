"""A starved player (paper §4.5): with a small N_h D can hardly encode, with a small N_z G can hardly vary."""

from __future__ import annotations

from .comparison import check_stable, compare
from .study import Study


def run(study: Study) -> None:
    """Train with N_h or N_z far below 64; both have to stay stable."""
    few = study.scale.starved
    wanted = {"balanced": (), "starved-d": ("--hidden", few), "starved-g": ("--latent", few)}
    titles = {
        "balanced": "N_h = N_z = 64", "starved-d": f"N_h = {few}: D starved", "starved-g": f"N_z = {few}: G starved"
    }  # fmt: skip
    found = compare(study, wanted, titles)
    for name in ("starved-d", "starved-g"):
        check_stable(study, titles[name], found[name])
    study.say(
        "M compares little between these runs: with a small N_h images are reconstructed worse, so L(x) is larger."
    )
    study.finish(
        "Unbalanced: a starved player",
        "The paper's §4.5: k keeps the game in balance even where one player is much weaker. D's code has N_h numbers, "
        "G's input N_z; each is made small in turn.",
        found,
    )
