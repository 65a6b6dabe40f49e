"""Nets in the layout of huggingface_hub's `PyTorchModelHubMixin`: saved, loaded, pushed, without a network."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, RepoUrl, constants, hub_mixin
from safetensors.torch import load_file, save_file

from fastbegan import Discriminator, Generator, ModelConfig, UserError, plain
from fastbegan.nets import hub
from fastbegan.nets.models import build
from tests.helpers.processes import environment

SKIPS = ModelConfig(size=32, filters=4, hidden=6, latent=5)
FADING = ModelConfig(size=16, filters=4, hidden=6, latent=5, widths=(1, 2), skips=False, vanishing=True)
Nets = tuple[Generator, Discriminator]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # read from the environment on import


@pytest.fixture(params=[SKIPS, FADING], ids=["skips", "fading"])
def nets(request: pytest.FixtureRequest) -> Nets:
    found = build(request.param, seed=0)
    for net in found:
        for buffer in net.buffers():
            buffer.fill_(0.3)
    return found


def _check(loaded: Generator | Discriminator, net: Generator | Discriminator) -> None:
    config = net.config
    assert type(loaded) is type(net) and loaded.config == config and not loaded.training
    x = torch.rand(2, config.latent) if isinstance(net, Generator) else torch.rand(2, 3, config.size, config.size)
    assert torch.equal(loaded(x), net(x))


def test_what_is_saved_loads_again(nets: Nets, tmp_path: Path) -> None:
    for net in nets:
        folder = tmp_path / type(net).__name__
        assert net.save_pretrained(folder) is None
        assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
        _check(type(net).from_pretrained(folder), net)
        _check(type(net).from_pretrained(str(folder), map_location="cpu", local_files_only=True), net)


def test_the_layout_is_that_of_the_mixin(nets: Nets, tmp_path: Path) -> None:
    """A net that has huggingface_hub's mixin for a base reads ours and writes what ours reads."""

    class Theirs(plain.Generator, PyTorchModelHubMixin):
        def __init__(self, config: Any) -> None:
            super().__init__(config)

    Theirs._hub_mixin_init_parameters = {
        name: parameter.replace(annotation=ModelConfig) if name == "config" else parameter
        for name, parameter in Theirs._hub_mixin_init_parameters.items()
    }
    generator, config = nets[0], nets[0].config
    generator.save_pretrained(tmp_path / "ours")
    theirs = Theirs.from_pretrained(tmp_path / "ours", strict=True)
    z = torch.rand(2, config.latent)
    torch.testing.assert_close(theirs(z), generator(z), rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    _check(Generator.from_pretrained(tmp_path / "theirs"), generator)


def test_push_to_hub_uploads_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = build(FADING, seed=0)[0]

    class Api:
        def __init__(self, token: str | None) -> None:
            assert token == "of a test"

        def create_repo(self, repo_id: str, **_: object) -> RepoUrl:
            return RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, folder_path: Path, repo_id: str, revision: str, **_: object) -> str:
            Path(folder_path).rename(tmp_path / "uploaded")
            return f"{repo_id}@{revision}"

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    assert generator.push_to_hub("someone/faces", token="of a test", branch="new") == "someone/faces@new"
    card = ModelCard.load(tmp_path / "uploaded" / "README.md")
    assert card.data.to_dict()["library_name"] == "fastbegan"
    assert "pytorch_model_hub_mixin" in card.data.to_dict()["tags"]
    _check(Generator.from_pretrained(tmp_path / "uploaded"), generator)


def test_a_repository_is_fetched_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = build(SKIPS, seed=0)[0]
    generator.save_pretrained(tmp_path / "cache")
    fetched = []

    def fetch(repo_id: str, filename: str, revision: str | None = None, **_: object) -> str:
        fetched.append((repo_id, filename, revision))
        return str(tmp_path / "cache" / filename)

    monkeypatch.setattr(hub_mixin, "hf_hub_download", fetch)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    hub._carrier.cache_clear()  # made anew, it finds `fetch`
    try:
        _check(Generator.from_pretrained("someone/faces", revision="v1"), generator)
    finally:
        hub._carrier.cache_clear()
    assert fetched == [("someone/faces", "config.json", "v1"), ("someone/faces", "model.safetensors", "v1")]


def test_without_a_network_repositories_are_named() -> None:
    with pytest.raises(UserError, match="Generator 'nobody/nothing-of-that-name' cannot be loaded"):
        Generator.from_pretrained("nobody/nothing-of-that-name")
    with pytest.raises(UserError, match="'nobody/nothing-of-that-name' cannot be pushed to"):
        build(FADING, seed=0)[0].push_to_hub("nobody/nothing-of-that-name")


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _configure(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        stored = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**stored, **values}))

    return change


def _drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["expand.bias"]
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(_remove("config.json"), r"config\.json does not exist", id="no config"),
        pytest.param(_remove("model.safetensors"), r"model\.safetensors does not exist", id="no weights"),
        pytest.param(_configure(depth=3), "ModelConfig has no field 'depth'", id="unknown field"),
        pytest.param(_configure(size="big"), "ModelConfig.size is 'big'", id="wrong type"),
        pytest.param(_configure(filters=5), "is no Generator of this config", id="another shape"),
        pytest.param(_drop_a_weight, "is no Generator of this config", id="a weight less"),
        pytest.param(
            lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read as JSON", id="no JSON"
        ),
        pytest.param(
            lambda f: (f / "config.json").write_text("[]"), "holds list; expected a JSON object", id="no object"
        ),
    ],
)
def test_folders_that_hold_no_such_net_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    build(SKIPS, seed=0)[0].save_pretrained(tmp_path / "net")
    change(tmp_path / "net")
    with pytest.raises(UserError, match=message):
        Generator.from_pretrained(tmp_path / "net")


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    generator = build(SKIPS, seed=0)[0]
    generator.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(generator.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        Generator.from_pretrained(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file cannot be written"):
        build(FADING, seed=0)[0].save_pretrained(tmp_path / "file")


def test_without_huggingface_hub_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = build(FADING, seed=0)[0]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    hub._carrier.cache_clear()
    for call in (generator.save_pretrained, Generator.from_pretrained, generator.push_to_hub):
        with pytest.raises(UserError, match=r"pip install 'fastbegan\[hub\]'"):
            call(str(tmp_path))
    assert not list(tmp_path.iterdir())


OFFLINE = """
import sys
from fastbegan import Generator, build
from fastbegan import ModelConfig
assert "huggingface_hub" not in sys.modules
generator = build(ModelConfig(size=16, filters=2, widths=(1, 1)), seed=0)[0]
generator.save_pretrained(sys.argv[1])
loaded = Generator.from_pretrained(sys.argv[1])
assert all((a == b).all() for a, b in zip(generator.parameters(), loaded.parameters(), strict=True))
from huggingface_hub import constants
assert constants.HF_HUB_OFFLINE
"""


def test_offline_and_imported_only_when_called(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path / "net")],
        env={**environment(), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout
