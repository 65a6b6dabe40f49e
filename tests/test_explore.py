"""`fastbegan explore`: what is on the page, and that it needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastbegan import ModelConfig, TrainConfig, UserError
from fastbegan.cli import main
from fastbegan.commands import explore as explore_module
from fastbegan.commands import explore_page
from fastbegan.commands.explore import Explore
from fastbegan.nets.models import build
from fastbegan.runs.folder import RunConfig, RunFolder
from fastbegan.runs.sheets import banded_sheet, generate, generated_band, sheet_latents
from tests.helpers.processes import TINY

pytestmark = pytest.mark.xdist_group("explore")  # a run and a page for all


def trained(out: Path) -> Path:
    """A short run with four sheets."""
    flags = ["--steps", "40", "--sample-every", "10", "--device", "cpu", "--lr", "0.002"]
    assert main(["train", *TINY, *flags, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("explore") / "run")


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "page.html"
    assert Explore(run, out=out).run() == 0
    return out.read_text(encoding="utf-8")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


class _Reader(HTMLParser):
    """Elements with their attributes, and the text outside of style and scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text, self._open = "", ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts.append(data)
        elif self._open != "style":
            self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def _data(page: str) -> dict[str, Any]:
    return json.loads(_Reader(page).scripts[0])


def pixels(address: str) -> np.ndarray:
    """int [H, W, 3] of a data: address."""
    kind, _, text = address.partition(";base64,")
    with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
        assert kind == f"data:image/{(image.format or '').lower()}"
        return np.asarray(image.convert("RGB")).astype(int)


def samples(run: Path, count: int, seed: int = 0) -> np.ndarray:
    """What `fastbegan sample` draws, int [count, size, size, 3]."""
    folder = RunFolder(run)
    z = sheet_latents(folder.read_config().model.latent, seed, count)
    return generate(folder.load_generator(), z).astype(int)


def test_ways_lead_from_image_to_image(run: Path, page: str) -> None:
    ways, images = _data(page)["ways"], samples(run, 8)
    atlas = pixels(ways["image"])
    assert (ways["ends"], ways["frames"]) == (8, 25) and atlas.shape == (28 * 32, 25 * 32, 3)
    for row, (start, end) in enumerate(combinations(range(8), 2)):
        strip = atlas[32 * row : 32 * row + 32]
        assert np.abs(strip[:, :32] - images[start]).max() <= 1  # a batch of another size rounds differently
        assert np.abs(strip[:, -32:] - images[end]).max() <= 1
    frames = atlas[:32].reshape(32, 25, 32, 3).swapaxes(0, 1)
    steps = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    assert (steps > 0).all() and steps.max() < np.abs(frames[0] - frames[-1]).mean()


def test_the_square_has_four_images_at_its_corners(run: Path, page: str) -> None:
    square, images = _data(page)["square"], samples(run, 12)
    atlas = pixels(square["image"])
    assert square["side"] == 13 and atlas.shape == (13 * 32, 13 * 32, 3)
    for number, (top, left) in zip(range(8, 12), ((0, 0), (0, -32), (-32, 0), (-32, -32)), strict=True):
        corner = np.roll(atlas, (-top, -left), (0, 1))[:32, :32]
        assert np.abs(corner - images[number]).max() <= 1


def test_sheets_are_those_of_the_run(run: Path, page: str) -> None:
    sheets = _data(page)["sheets"]
    assert [sheet["step"] for sheet in sheets["list"]] == [10, 20, 30, 40]
    assert [sheet["images"] for sheet in sheets["list"]] == [80, 160, 240, 320]
    assert len(sheets["real"]) == 1 and pixels(sheets["real"][0]).shape == (64, 320, 3)
    for sheet in sheets["list"]:
        with Image.open(RunFolder(run).sheet_file(sheet["step"])) as whole:
            wanted = np.asarray(generated_band(whole.convert("RGB")))[::2, ::2].astype(int)
        found = pixels(sheet["image"])
        assert found.shape == (3 * 64, 320, 3)
        assert np.abs(found[64:128] - wanted).mean() < 2


def test_curves_are_the_rows(run: Path, page: str) -> None:
    curves, rows = _data(page)["curves"], RunFolder(run).read_metrics()
    for name in ("step", "images", "convergence", "loss_real", "loss_fake", "k"):
        assert curves["rows"][name] == pytest.approx([row[name] for row in rows], rel=1e-4)
    for name in ("sharpness", "variety"):
        assert curves["looks"][name] == pytest.approx([row[name] for row in rows], rel=1e-4)


def test_facts_and_nearest_images_can_be_read_without_a_script(run: Path, page: str) -> None:
    reader = _Reader(page)
    for words in (
        "demo",
        "32 px",
        "gamma",
        "320",
        f"fastbegan explore {run.name} --seed 0",
        "of all 64 training images",
    ):
        assert words in reader.text, words
    assert str(run.parent) not in page  # it may be passed on
    tiles = reader.of("img")
    # as `fastbegan sample --single` counts
    assert [tile["alt"] for tile in tiles[::6]] == [f"generated image {number}" for number in range(12)]
    assert "Images 8 to 11 stand at the corners" in reader.text and "0 to 7 are the ends" in reader.text
    assert len(tiles) == 12 * 6 and all(tile["alt"] and (tile["src"] or "").startswith("data:") for tile in tiles)
    assert re.search(r"a training image is \d+\.\d from the nearest other one", reader.text)
    first = pixels(tiles[0]["src"] or "")
    assert np.abs(first - samples(run, 1)[0]).max() <= 1


def test_the_page_needs_nothing_else(page: str) -> None:
    assert not re.search(r"https?:|url\(|@import|\bimport\b|fetch|XMLHttpRequest|WebSocket", page)
    reader = _Reader(page)
    for _, attributes in reader.elements:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:", "#"))
        assert "style" not in attributes and not any(name.startswith("on") for name in attributes)
    policy = next(meta["content"] for meta in reader.of("meta") if "http-equiv" in meta) or ""
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy
    digest = base64.b64encode(hashlib.sha256(reader.scripts[-1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "@@" not in page


def test_every_control_has_a_name_and_every_id_is_there_once(page: str) -> None:
    reader = _Reader(page)
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = {label.get("for") for label in reader.of("label")}
    for slider in reader.of("input"):
        assert slider["type"] == "checkbox" or slider["id"] in labelled
    used = set(re.findall(r'find\("([\w-]+)"\)', reader.scripts[-1]))
    assert used <= set(ids), used - set(ids)


def test_the_same_run_and_seed_give_the_same_page(run: Path, page: str, tmp_path: Path) -> None:
    assert Explore(run, out=tmp_path / "again.html").run() == 0
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page
    assert Explore(run, out=tmp_path / "other.html", seed=1).run() == 0
    other = (tmp_path / "other.html").read_text(encoding="utf-8")
    assert _data(other)["ways"] != _data(page)["ways"] and _data(other)["sheets"] == _data(page)["sheets"]


@pytest.mark.parametrize("name", ["a <b> & \"c\" 'd' <", "]]> $x @@data ${y} ü 脸", "two\nlines"])
def test_odd_names_are_only_text(run: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(run, tmp_path / f"{name} script> <!--"))
    assert main(["explore", str(folder)]) == 0
    assert capsys.readouterr().out.endswith(f"{folder / 'explore.html'}\n")
    reader = _Reader((folder / "explore.html").read_text(encoding="utf-8"))
    assert len(reader.scripts) == 2 and not reader.of("b")
    assert "script> <!-- · fastbegan explore" in reader.text and str(folder) not in reader.text
    assert json.loads(reader.scripts[0])["ways"]["frames"] == 25


def test_strings_in_the_data_cannot_end_the_script() -> None:
    bad = "</script><script>alert(1)</script><!--"
    places = ("title", "facts", "training", "nearest", "command", "ends", "corners", "version")
    page = explore_page.fill({"value": bad}, **dict.fromkeys(places, ""))
    assert len(_Reader(page).scripts) == 2 and _data(page) == {"value": bad}


def test_a_run_that_has_only_a_generator(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy / "samples")
    shutil.rmtree(copy / "checkpoints")
    (copy / "metrics.jsonl").unlink()
    config = json.loads((copy / "config.json").read_text())
    config["train"]["data"] = "/gone/<i>photos"  # and the page says its last part only
    (copy / "config.json").write_text(json.dumps(config))
    assert Explore(copy).run() == 0
    said = capsys.readouterr().out
    assert "no nearest training images, since the run's data cannot be read: data '/gone/<i>photos' does not" in said
    reader = _Reader((copy / "explore.html").read_text(encoding="utf-8"))
    data = json.loads(reader.scripts[0])
    assert "<i>photos" in reader.text and "/gone" not in reader.text
    assert data["sheets"] is None and data["curves"] is None and not reader.of("img") and not reader.of("i")
    for words in (
        "There are no sheets yet",
        "There are no curves",
        "No nearest training images, since",
        "--data names",
    ):
        assert words in reader.text
    assert "steps" not in reader.text.partition("From one image")[0]


def test_a_damaged_log_is_no_way_to_the_folder(copy: Path) -> None:
    (copy / "metrics.jsonl").write_text('{"step": 3, }\n')
    assert Explore(copy).run() == 0
    page = (copy / "explore.html").read_text(encoding="utf-8")
    assert "metrics.jsonl of the run is damaged" in _Reader(page).text and str(copy.parent) not in page


def test_data_that_was_given_has_to_be_there(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="'/gone/photos' does not exist"):
        Explore(copy, data="/gone/photos").run()
    assert not (copy / "explore.html").exists()
    assert Explore(copy, data="faces:50").run() == 0
    assert "not those that the run was trained on" in capsys.readouterr().out
    text = _Reader((copy / "explore.html").read_text(encoding="utf-8")).text
    assert "These images are not those that the run was trained on" in text and "all 50 training images" in text
    assert "--seed 0 --data faces:50" in text


def test_weights_older_than_the_metrics_say_so(copy: Path) -> None:
    row = {"step": 70, "images": 560, "convergence": float("nan"), "loss_real": 0.5, "loss_fake": 0.25, "k": 0.5}
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + '\n{"images": 3}\n{"step": 4')
    assert Explore(copy).run() == 0
    page = (copy / "explore.html").read_text(encoding="utf-8")
    assert "of step 40" in _Reader(page).text and "560" in _Reader(page).text
    assert _data(page)["curves"]["rows"]["convergence"][-1] is None
    assert _data(page)["curves"]["rows"]["step"] == [10, 20, 30, 40, 70]


def test_long_runs_are_thinned_out(copy: Path) -> None:
    sheet = RunFolder(copy).sheet_file(40).read_bytes()
    for step in range(41, 141):
        RunFolder(copy).sheet_file(step).write_bytes(sheet if step != 140 else sheet[:5000])
    Image.new("RGB", (100, 100)).save(RunFolder(copy).sheet_file(10))
    names = ("convergence", "loss_real", "loss_fake", "k")
    rows = [{"step": s, "images": 8 * s, **dict.fromkeys(names, 1 / s)} for s in range(1, 9001)]
    for row in rows[499::500]:
        row["sharpness"], row["variety"] = 0.5, 0.1
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Explore(copy).run() == 0
    page = (copy / "explore.html").read_text(encoding="utf-8")
    data = _data(page)
    steps = [one["step"] for one in data["sheets"]["list"]]
    assert len(steps) == 38 and steps == sorted(steps) and max(np.diff(steps)) < 20  # the first and the last are broken
    assert "2 of the sheets could not be read and are left out" in _Reader(page).text
    seen = data["curves"]["rows"]["step"]
    assert len(seen) == 2000 and seen[0] == 1 and seen[-1] == 9000 and set(np.diff(seen)) == {4, 5}
    assert data["curves"]["looks"]["step"] == list(range(500, 9001, 500))


@pytest.mark.parametrize(
    ("size", "most"), [(32, 4e6), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((64, 4e6), (128, 8e6)))]
)
def test_pages_stay_small_even_with_noise(
    size: int, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, (*shape, size, size, 3), np.uint8)

    model = ModelConfig(size=size, filters=1, hidden=4, latent=4, repeats=1)
    folder = RunFolder(tmp_path)
    folder.write_config(RunConfig("demo", model, TrainConfig(data="faces:16", steps=1)))
    generator = build(model, seed=0)[0]
    folder.write_weights({f"average.{name}": value for name, value in generator.state_dict().items()})
    folder.samples.mkdir()
    banded_sheet(list(noise(4, 20))).save(folder.sheet_file(1), compress_level=1)
    for step in range(2, 41):
        folder.sheet_file(step).hardlink_to(folder.sheet_file(1))
    monkeypatch.setattr(explore_module, "generate", lambda net, z, batch: noise(len(z)))
    assert Explore(tmp_path).run() == 0
    page = (tmp_path / "explore.html").read_text(encoding="utf-8")
    assert len(page) < most
    plan = _data(page)["ways"]
    assert pixels(plan["image"]).shape[1] % (8 * plan["frames"]) == 0  # tiles are whole blocks of JPEG


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed is -1; accepted: whole numbers from 0"),
        ({"out": Path("page.txt")}, r"out is page\.txt; accepted: a file NAME\.html"),
        ({"device": "tpu"}, "device is 'tpu'; accepted: auto, cpu"),
    ],
)
def test_wrong_options(run: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Explore(run, **options).run()


def test_folders_that_do_not_fit(run: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        Explore(tmp_path / "nowhere").run()
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match=r"folder\.html, a folder; accepted: a file"):
        Explore(run, out=tmp_path / "folder.html").run()
    (copy / "generator.safetensors").unlink()
    with pytest.raises(UserError, match="train until the first checkpoint"):
        Explore(copy).run()
    assert not (copy / "explore.html").exists()


def test_out_may_be_in_a_new_folder(run: Path, tmp_path: Path) -> None:
    assert main(["explore", str(run), "--out", str(tmp_path / "new" / "page.htm"), "--seed", "3"]) == 0
    assert "--seed 3" in _Reader((tmp_path / "new" / "page.htm").read_text(encoding="utf-8")).text
