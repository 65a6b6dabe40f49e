"""The record of an experiment: its settings, its figures as they come, and the time it took."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastbegan_kernels

from ..display import Display, duration
from ..errors import UserError
from ..files import make_folder, read_json, write_json
from ..version import __version__
from .scales import SCALES

FILE = "study.json"


@dataclass(frozen=True)
class Settings:
    """The options of an experiment; its folder is resumed only with the same."""

    name: str
    scale: str
    data: str | None
    """None with `trained`, whose run knows its data."""
    trained: str | None
    """Folder of a run that is used instead of training one."""
    weights: str | None
    """SHA-256 of the generator of `trained`."""
    seed: int
    seeds: int | None
    """For those of many seeds; None for the others."""
    extractor: str | None
    """None for `continuity`, which compares no features."""


class Record:
    """The file study.json and the folder measures/ of an experiment."""

    def __init__(
        self, folder: Path, settings: Settings, device_type: str, display: Display, *, any_code: bool = False
    ) -> None:
        """Start a record in `folder`, or resume the one there.

        Args:
            folder: The experiment's folder.
            settings: Its options.
            device_type: "cpu" or "cuda".
            display: Where finished figures are announced.
            any_code: Also resume what other code, or another kind of device, has begun.

        Raises:
            UserError: The folder holds an experiment with other settings, lengths, code or device.
        """
        self.folder, self.display = folder, display
        self._start = time.monotonic()
        self._file = folder / FILE
        self._earlier_seconds = 0.0
        makers = [{"fastbegan": __version__, "code": fingerprint(), "device": device_type}]
        scale = dataclasses.asdict(SCALES[settings.scale])
        content = {"settings": dataclasses.asdict(settings), "scale": scale, "made_by": makers}
        self._content: dict[str, Any] = json.loads(json.dumps(content))  # tuples become lists, as in the file
        if self._file.exists():
            stored = read_json(self._file)
            if any_code:
                earlier = stored.get("made_by") or []
                self._content["made_by"] = earlier if makers[0] in earlier else [*earlier, *makers]
                stored["made_by"] = self._content["made_by"]
            for part, words, advice in (
                ("settings", "settings", ""),
                ("scale", "lengths", ""),
                ("made_by", "code or device", ", or go on with --any-code"),
            ):
                if stored.get(part) != self._content[part]:
                    raise UserError(
                        f"{folder} holds an experiment with other {words}; remove it or give another --out{advice}"
                    )
            self._earlier_seconds = float(stored.get("seconds", 0.0))
        make_folder(folder / "measures")
        make_folder(folder / "runs")
        self.save()

    def save(self) -> None:
        """Write study.json, with the time so far."""
        write_json(self._file, {**self._content, "seconds": self.seconds})

    @property
    def seconds(self) -> float:
        """Time that the experiment took, over all starts."""
        return self._earlier_seconds + time.monotonic() - self._start

    @property
    def makers(self) -> list[dict[str, str]]:
        """Versions of the code, and kinds of device, that have worked on the experiment."""
        return self._content["made_by"]

    def measure(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of `compute`; read it from its file where an earlier start has computed it."""
        path = self.folder / "measures" / f"{name}.json"
        if not path.exists():
            start = time.monotonic()
            write_json(path, compute())
            self.save()
            self.display.say(f"{name}: {duration(time.monotonic() - start)}")
        return read_json(path)


def fingerprint() -> str:
    """Hash of all code that figures may depend on."""
    digest = hashlib.sha256()
    for package in (Path(fastbegan_kernels.__file__).parent, Path(__file__).parents[1]):
        for path in sorted(package.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:20]
