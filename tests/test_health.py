"""Trouble is said once, when it begins."""

from __future__ import annotations

from fastbegan.health import HealthMonitor


def test_stuck_k() -> None:
    monitor = HealthMonitor()
    messages = [monitor.after_log(k) for k in (1.0, 1.0, 0.9, *[1.0] * 8)]
    assert [bool(m) for m in messages] == [False] * 7 + [True] + [False] * 3
    assert "k is stuck at 1" in str(messages[7])


def test_fallen_diversity() -> None:
    monitor = HealthMonitor()
    messages = [monitor.after_sheet(d, 1000) for d in (0.01, 0.2, 0.15, 0.05, 0.04, 0.2, 0.01)]
    assert [bool(m) for m in messages] == [False, False, False, True, False, False, True]
    assert "fell from 0.200" in str(messages[3])


def test_diversity_that_never_rose() -> None:
    monitor = HealthMonitor()
    assert monitor.after_sheet(0.001, 99_999) is None
    assert "never rose in 100,000 images" in str(monitor.after_sheet(0.001, 100_000))
