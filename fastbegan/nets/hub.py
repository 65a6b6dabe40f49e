"""Nets as folders of config.json and model.safetensors, and on the Hugging Face Hub, by its `PyTorchModelHubMixin`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save

from ..config import ModelConfig
from ..errors import UserError
from ..fields import from_dict
from ..files import atomic, read_json

_WEIGHTS = "model.safetensors"

Net = TypeVar("Net", bound="HubMixin")


class HubMixin:
    """What a net with a `config` gets: the methods of huggingface_hub's mixin, which is imported when one is called.

    Weights are only ever read from safetensors, and have to fit. All raise UserError where huggingface_hub (extra
    `hub`) is missing.
    """

    config: ModelConfig

    @classmethod
    def from_pretrained(cls: type[Net], name: str | Path, *, map_location: str = "cpu", **options: Any) -> Net:
        """The net in a folder that `save_pretrained` wrote, or in a repository on the Hub; in eval mode, channels_last.

        Further options are huggingface_hub's: revision, token, cache_dir, local_files_only, force_download. Raises
        UserError where there is no such net or it is of another kind.
        """
        carrier = _carrier()
        if Path(name).is_dir():
            read_json(Path(name) / "config.json")  # the mixin only warns where there is none
        with _naming(
            f"{cls.__name__} {str(name)!r} cannot be loaded", "a folder of save_pretrained, a repository's name"
        ):
            return carrier.from_pretrained(name, kind=cls, map_location=map_location, **options).net

    def save_pretrained(self, folder: str | Path, **options: Any) -> str | None:
        """Write config.json, model.safetensors and a README.md (kept where there is one); options: huggingface_hub's.

        Raises UserError where `folder` cannot be written.
        """
        carrier = _carrier()
        with _naming(f"{folder} cannot be written", "a folder that can"):
            return carrier(self).save_pretrained(folder, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes; returns the commit's URL. Options: private, token, branch, create_pr.

        Raises UserError where the Hub cannot be reached or refuses.
        """
        carrier = _carrier()
        with _naming(f"{repo_id!r} cannot be pushed to", "a repository that you may write to"):
            return carrier(self).push_to_hub(repo_id, **options)


@contextlib.contextmanager
def _naming(what: str, accepted: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # what huggingface_hub raises derives from one of them
        raise UserError(f"{what} ({error}); accepted: {accepted}") from None


@functools.cache
def _carrier() -> Any:
    """The mixin around a net that it need not be a base of: importing huggingface_hub takes twice as long as `models`.

    Raises UserError where it is missing.
    """
    try:
        from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
    except ImportError:
        raise UserError("the Hub's methods need huggingface_hub; pip install 'fastbegan[hub]'") from None

    class Carrier(
        PyTorchModelHubMixin,
        library_name="fastbegan",
        paper_url="https://arxiv.org/abs/1703.10717",
        pipeline_tag="unconditional-image-generation",
    ):
        def __init__(self, net: Any) -> None:
            self.net = net
            self._hub_mixin_config = dataclasses.asdict(net.config)

        def _save_pretrained(self, save_directory: Path) -> None:
            values = {name: value.detach().cpu().contiguous() for name, value in self.net.state_dict().items()}
            with atomic(save_directory / _WEIGHTS) as file:
                file.write(save(values, {"format": "pt"}))

        @classmethod
        def _from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
            cls,
            *,
            model_id: str,
            kind: type[Any],
            map_location: str,
            config: dict[str, Any] | None = None,
            **options: Any,
        ) -> Carrier:
            if config is None:
                raise UserError(f"{model_id} has no config.json; give a repository that push_to_hub wrote")
            net = kind(from_dict(ModelConfig, config))
            path = Path(model_id) / _WEIGHTS
            if not Path(model_id).is_dir():
                path = Path(hf_hub_download(model_id, _WEIGHTS, **options))
            elif not path.exists():
                raise UserError(f"{path} does not exist; give a folder that save_pretrained wrote")
            try:
                net.load_state_dict(load_file(path))
            except Exception as error:  # safetensors raises its own types, load_state_dict RuntimeError
                raise UserError(f"{path} is no {kind.__name__} of this config: {error}") from None
            return cls(net.to(device=map_location, memory_format=torch.channels_last).eval())

    return Carrier
