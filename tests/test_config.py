"""Configs refuse, in one line, what no run can have; types too, since Python checks none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbegan import ModelConfig, TrainConfig, UserError
from fastbegan.config import FREE_ON_RESUME

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("make", "field", "value", "accepted"),
    [
        (TrainConfig, "gamma", 2, "0 to 1"),
        (TrainConfig, "gamma", "0.5", "0 to 1"),
        (TrainConfig, "gamma", float("nan"), "0 to 1"),
        (TrainConfig, "lr", 0, "numbers above 0"),
        (TrainConfig, "lr", "1e-4", "numbers above 0"),
        (TrainConfig, "workers", 1.5, "whole numbers from 1"),
        (TrainConfig, "batch_size", 0, "whole numbers from 1"),
        (TrainConfig, "images", 0, "whole numbers from 1"),
        (TrainConfig, "minutes", -1.0, "numbers above 0"),
        (TrainConfig, "requeue_code", 256, "0 to 255"),
        (TrainConfig, "passes", "three", "auto, single-pass, joint, textbook"),
        (TrainConfig, "eta", 3, "1, 2"),
        (TrainConfig, "flip", 1, "True, False"),
        (TrainConfig, "data", Path("faces"), "text"),
        (TrainConfig, "seed", "0", "whole numbers from 0 to 2^63 - 1"),
        (ModelConfig, "size", "64", "8 * 2^k: 8, 16, 32, 64, ..."),
        (ModelConfig, "size", True, "8 * 2^k: 8, 16, 32, 64, ..."),
        (ModelConfig, "size", 48, "8 * 2^k: 8, 16, 32, 64, ..."),
        (ModelConfig, "filters", 2.5, "whole numbers from 1"),
        (TrainConfig, "lr", float("inf"), "numbers above 0"),
        (TrainConfig, "eta", True, "1, 2"),
        (ModelConfig, "widths", (1, 2), "4 whole numbers from 1"),
        (ModelConfig, "widths", (1, 2, 3, 0), "4 whole numbers from 1"),
        (ModelConfig, "widths", 3, "4 whole numbers from 1"),
        (ModelConfig, "skips", "yes", "True, False"),
    ],
)
def test_what_no_run_can_have_is_named(make: Any, field: str, value: object, accepted: str) -> None:
    with pytest.raises(UserError) as raised:
        make(**{field: value})
    assert str(raised.value) == f"{field} is {value!r}; accepted: {accepted}"


def test_what_is_alike_is_taken() -> None:
    assert ModelConfig(widths=[1, 2, 3, 4]).widths == (1, 2, 3, 4)  # pyright: ignore[reportArgumentType]
    assert TrainConfig(gamma=1, lr=1, minutes=3).gamma == 1
    wide = ModelConfig(size=np.int64(64), filters=np.int32(8), widths=range(1, 5))  # pyright: ignore[reportArgumentType]
    assert wide == ModelConfig(size=64, filters=8, widths=(1, 2, 3, 4)) and type(wide.filters) is int
    sweep = TrainConfig(lr=np.float64(1e-3), seed=np.int64(3), steps=1e5)  # pyright: ignore[reportArgumentType]
    assert json.loads(json.dumps(sweep.__dict__)) == {**TrainConfig().__dict__, "lr": 1e-3, "seed": 3, "steps": 100_000}


def test_what_is_learned_may_not_change_on_resume() -> None:
    fixed = set(TrainConfig().__dict__) - FREE_ON_RESUME
    learned = (
        "crop flip jitter gamma lambda_k eta updates latents carry_steps batch_size beta1 lr_floor scaling lr_window"
    )
    assert fixed == {*learned.split(), "ema_half_life", "seed", "precision", "deterministic"}
