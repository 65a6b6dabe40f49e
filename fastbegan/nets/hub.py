"""Nets as folders of config.json and model.safetensors, local or on the Hugging Face Hub.

The work is done by huggingface_hub's `PyTorchModelHubMixin`.
"""

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
    """The Hub's methods for a net that has a `config`. They import huggingface_hub when they are called.

    Weights are read from safetensors only, and every name and shape must fit. All methods raise UserError where
    huggingface_hub (extra `hub`) is missing.
    """

    config: ModelConfig

    @classmethod
    def from_pretrained(cls: type[Net], name: str | Path, *, map_location: str = "cpu", **options: Any) -> Net:
        """Load a net from a folder or from the Hub.

        Args:
            name: A folder that `save_pretrained` wrote, or a repository on the Hub ("user/name").
            map_location: Device of the net.
            **options: Passed to huggingface_hub: revision, token, cache_dir, local_files_only, force_download.

        Returns:
            The net in float32, channels_last, in eval mode.

        Raises:
            UserError: There is no such net, its config or weights are not of this class, or huggingface_hub is missing.
        """
        carrier = _carrier()
        if Path(name).is_dir():
            read_json(Path(name) / "config.json")  # the mixin only warns where there is none
        with _as_user_error(
            f"{cls.__name__} {str(name)!r} cannot be loaded", "a folder of save_pretrained, a repository's name"
        ):
            return carrier.from_pretrained(name, kind=cls, map_location=map_location, **options).net

    def save_pretrained(self, folder: str | Path, **options: Any) -> str | None:
        """Write config.json, model.safetensors and, where there is none yet, a README.md.

        Args:
            folder: Where to write; it is made if it does not exist.
            **options: Passed to huggingface_hub: push_to_hub, repo_id and those of `push_to_hub`.

        Returns:
            The commit's URL with `push_to_hub=True`, else None.

        Raises:
            UserError: The folder cannot be written, or huggingface_hub is missing.
        """
        carrier = _carrier()
        with _as_user_error(f"{folder} cannot be written", "a folder that can"):
            return carrier(self).save_pretrained(folder, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the files that `save_pretrained` writes.

        Args:
            repo_id: Repository on the Hub ("user/name"); it is made if it does not exist.
            **options: Passed to huggingface_hub: private, token, branch, create_pr, commit_message.

        Returns:
            The commit's URL.

        Raises:
            UserError: The Hub cannot be reached or refuses, or huggingface_hub is missing.
        """
        carrier = _carrier()
        with _as_user_error(f"{repo_id!r} cannot be pushed to", "a repository that you may write to"):
            return carrier(self).push_to_hub(repo_id, **options)


@contextlib.contextmanager
def _as_user_error(what: str, accepted: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # what huggingface_hub raises derives from one of them
        raise UserError(f"{what} ({error}); accepted: {accepted}") from None


@functools.cache
def _carrier() -> Any:
    """A class that holds a net and has the mixin as its base. Raises UserError where huggingface_hub is missing.

    The nets themselves do not derive from the mixin, because importing it takes twice as long as importing `models`.
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
