"""Who is blamed when a rank dies or hangs; a clock that tests turn."""

from __future__ import annotations

from typing import Any

from fastbegan.distributed.watch import Beat, Judge


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class _Ranks:
    """Four ranks that beat and tick once a second, but for what a test changes."""

    def __init__(self, patience: float = 60.0, *, settled: bool = True) -> None:
        self.clock = _Clock()
        self.judge = Judge(patience, self.clock)
        self.beats = {rank: Beat(0, 1, settled, closed=False, lost="") for rank in range(4)}

    def run(
        self, seconds: int, *, still: tuple[int, ...] = (), **changes: dict[int, object]
    ) -> tuple[list[int], str, int] | None:
        """Who is blamed, why, and after how many seconds; None where nobody is. `still` ranks say nothing."""
        for second in range(1, seconds + 1):
            self.clock.now += 1
            for rank, beat in self.beats.items():
                if rank not in still:
                    new = {"number": beat.number + 1, "ticks": beat.ticks + 1}
                    new |= {name: values[rank] for name, values in changes.items() if rank in values}
                    self.beats[rank] = Beat(**{**vars(beat), **new})
            if found := self.judge.look(self.beats, all_ranks=True):
                return *found, second
        return None

    def blame(self, seconds: int, **how: Any) -> tuple[list[int], str, int]:
        """The same, where somebody must be blamed."""
        found = self.run(seconds, **how)
        assert found is not None
        return found


def test_all_is_well() -> None:
    assert _Ranks().run(500) is None


def test_the_silent_one_is_dead() -> None:
    ranks = _Ranks()
    assert ranks.run(5) is None
    blamed, why, after = ranks.blame(100, still=(2,))
    assert blamed == [2] and "no sign of life" in why and after <= 22


def test_once_contact_is_lost_it_takes_seconds() -> None:
    ranks = _Ranks()
    assert ranks.run(5) is None
    blamed, _, after = ranks.blame(100, still=(3,), lost={0: "broken pipe"})
    assert blamed == [3] and after <= 8


def test_contact_may_be_lost_with_everybody_alive() -> None:
    blamed, why, after = _Ranks().blame(100, lost={1: "no space in /dev/shm"})
    assert blamed == [] and why == "the ranks lost contact; rank 1: no space in /dev/shm" and after <= 22


def test_the_one_that_the_others_wait_for_hangs() -> None:
    ranks = _Ranks()
    assert ranks.run(7) is None  # eight meetings
    blamed, why, after = ranks.blame(200, ticks={0: 9, 1: 8, 2: 9, 3: 9})
    assert blamed == [1] and "kept the others waiting for 60 seconds" in why and 60 <= after <= 63


def test_nobody_gets_on() -> None:
    blamed, why, _ = _Ranks().blame(200, ticks=dict.fromkeys(range(4), 9))
    assert blamed == [] and "no rank got on" in why


def test_first_steps_may_compile() -> None:
    ranks = _Ranks(settled=False)
    assert ranks.run(500, ticks={0: 1, 1: 2, 2: 2, 3: 2}) is None
    assert ranks.run(200, ticks={0: 1, 1: 2, 2: 2, 3: 2}) is not None


def test_before_the_first_meeting_ranks_may_take_hours() -> None:
    assert _Ranks().run(5000, ticks=dict.fromkeys(range(4), 0)) is None


def test_who_ended_in_peace_is_not_dead() -> None:
    ranks = _Ranks()
    assert ranks.run(3, closed={1: True}) is None
    assert ranks.run(50, still=(1,)) is None


def test_who_is_silent_is_not_said_to_dawdle() -> None:
    ranks = _Ranks(patience=10)
    assert ranks.run(5) is None
    blamed, why, after = ranks.blame(100, still=(1,))
    assert blamed == [1] and "without a sign of life" in why and after <= 12
