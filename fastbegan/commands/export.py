"""`fastbegan export`: a run's nets for use without fastbegan, made from the plain modules of `plain`."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import io
import json
import tempfile
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tyro.conf import Positional

from .. import plain
from ..config import ModelConfig
from ..errors import UserError
from ..files import atomic, make_folder, read_json
from ..runs.folder import RunFolder
from ..version import __version__

Format = Literal["onnx", "pt2", "plain"]
Nets = Literal["generator", "autoencoder", "both"]

_STEMS: dict[Nets, tuple[str, ...]] = {
    "generator": ("generator",),
    "autoencoder": ("discriminator",),
    "both": ("generator", "discriminator"),
}
_BATCHES = (1, 5)
_LIMITS: dict[Format, float] = {
    "onnx": 1e-4,
    "pt2": 1e-6,
    "plain": 1e-6,
}  # the order of sums differs

_HEADER = f'''\
"""The networks of a BEGAN (arXiv 1703.10717) of nothing but torch; written by `fastbegan export` {__version__}.

    from model import load
    generator = load("generator")
    images = generator(torch.rand(16, generator.expand.in_features) * 2 - 1)  # [16, 3, size, size], of -1 to 1 or so
"""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import NamedTuple
'''

_CONFIG = '''

class ModelConfig(NamedTuple):
    """Shape of both networks: config.json."""

'''

_LOADER = '''

def load(net: str = "generator", folder: str | Path = Path(__file__).parent) -> Generator | Discriminator:
    """The net "generator" or "discriminator" of this folder: float32, on the CPU, in eval mode."""
    config = ModelConfig(**json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
    module = {"generator": Generator, "discriminator": Discriminator}[net](config)
    module.load_state_dict(_weights(Path(folder) / f"{net}.safetensors"))
    return module.eval()


def _weights(path: Path) -> dict[str, Tensor]:
    """Float32 tensors of a .safetensors file: the header's length in 8 bytes, the header (JSON), then the values."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        values = torch.frombuffer(data, dtype=torch.float32, count=(end - begin) // 4, offset=start + begin)
        tensors[name] = values.reshape(entry["shape"])
    return tensors
'''


@dataclass(frozen=True)
class Export:
    """Write the nets of a run, the averaged generator and the auto-encoder D, for use without fastbegan."""

    run_folder: Positional[Path]
    """The folder that `fastbegan train` made."""
    format: Literal["onnx", "pt2", "plain"]
    """onnx; pt2: PyTorch's own, for torch.export.load; plain: model.py and safetensors, which need only torch."""
    out: Path | None = None
    """Folder for the files. Default: export/ in the run folder."""
    net: Literal["generator", "autoencoder", "both"] = "both"
    """The nets to write."""
    check: Literal["on", "off"] = "on"
    """on: run the files before they are written, and refuse them where they differ from PyTorch's modules."""

    def run(self) -> int:
        return export(self)


def export(options: Export) -> int:
    """Write the averaged generator and the auto-encoder D of a run, in float32, for any batch size.

    With `check`, the files are first read as their users read them and run on batches of 1 and 5. Their outputs may
    differ from the modules' by 1e-4 (ONNX, run by onnxruntime) or 1e-6. Prints the files and returns the exit code.
    Raises UserError for larger differences and for bad options.
    """
    for name, value, accepted in (("format", options.format, _LIMITS), ("net", options.net, _STEMS)):
        if value not in accepted:
            raise UserError(f"{name} is {value!r}; accepted: {', '.join(accepted)}")
    if options.format == "onnx":
        _require_packages("onnx", "onnxscript")
        if options.check == "on":
            _require_packages("onnxruntime", instead=", or take --check off")
    run = RunFolder(options.run_folder)
    config = run.read_config().model
    nets = {stem: _load(run, stem) for stem in _STEMS[options.net]}
    folder = make_folder(options.out or run.path / "export")
    if options.format == "plain":
        _require_no_other(folder / "config.json", config)
        files = _plain_files(nets, config)
    else:
        make = _onnx if options.format == "onnx" else _pt2
        files = {f"{stem}.{options.format}": make(module, _example(config, stem, 2)) for stem, module in nets.items()}
    findings = _check(files, nets, config, options.format) if options.check == "on" else []
    for name, data in files.items():
        with atomic(folder / name) as file:
            file.write(data)
        print(folder / name)
    print("\n".join(findings) or "not checked")
    return 0


def _require_packages(*names: str, instead: str = "") -> None:
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise UserError(f"format 'onnx' needs {', '.join(missing)}; pip install 'fastbegan[export]'{instead}")


def _require_no_other(path: Path, config: ModelConfig) -> None:
    """Raise UserError where `path` holds anything else than this export would write, such as a run's config.json."""
    if path.exists() and read_json(path) != json.loads(json.dumps(dataclasses.asdict(config))):
        raise UserError(f"{path} exists and belongs to something else; give another --out")


def _load(run: RunFolder, stem: str) -> nn.Module:
    """Load a net of `run` as plain modules: float32, on the CPU, in eval mode. Raises UserError."""
    config = run.read_config().model
    if stem == "generator":
        path, net = run.generator_file, plain.Generator(config)
    else:
        path, net = run.discriminator_file, plain.Discriminator(config)
    if not path.exists():
        raise UserError(f"{path} does not exist; train until the first checkpoint")
    try:
        net.load_state_dict(load_file(path))
    except Exception as error:  # safetensors raises its own types, load_state_dict RuntimeError
        raise UserError(f"{path} does not fit {run.config_file}: {error}") from None
    return net.eval().requires_grad_(False)


def _example(config: ModelConfig, stem: str, batch: int) -> Tensor:
    """An input of the net: latents or images, uniform in [-1, 1), the same for every call with this `batch`."""
    shape = (config.latent,) if stem == "generator" else (3, config.size, config.size)
    return torch.rand(batch, *shape, generator=torch.Generator().manual_seed(batch)) * 2 - 1


def _pt2(net: nn.Module, example: Tensor) -> bytes:
    file = io.BytesIO()
    torch.export.save(torch.export.export(net, (example,), dynamic_shapes=_any_batch()), file)
    return file.getvalue()


def _onnx(net: nn.Module, example: Tensor) -> bytes:
    source, result = ("z", "images") if isinstance(net, plain.Generator) else ("images", "reconstruction")
    program = torch.onnx.export(
        net,
        (example,),
        dynamo=True,
        verbose=False,
        dynamic_shapes=_any_batch(),
        input_names=[source],
        output_names=[result],
    )
    assert program is not None
    return program.model_proto.SerializeToString()


def _any_batch() -> tuple[dict[int, torch.export.Dim]]:
    return ({0: torch.export.Dim("batch")},)


def _plain_files(nets: dict[str, nn.Module], config: ModelConfig) -> dict[str, bytes]:
    files = {
        "model.py": _source().encode(),
        "config.json": f"{json.dumps(dataclasses.asdict(config), indent=2)}\n".encode(),
    }
    return files | {f"{stem}.safetensors": save(net.state_dict()) for stem, net in nets.items()}


def _source() -> str:
    """The text of model.py: the source of `plain`, the part of `ModelConfig` that it uses, and `load`."""
    hints = typing.get_type_hints(ModelConfig)  # without the ranges, which model.py does not know
    kinds = {name: hint.__name__ if isinstance(hint, type) else hint for name, hint in hints.items()}
    fields = [f"    {field.name}: {kinds[field.name]}\n" for field in dataclasses.fields(ModelConfig)]
    channels = ModelConfig.level_channels.fget
    assert channels is not None
    _, _, source = inspect.getsource(plain).partition("from __future__ import annotations\n")
    imports, line, nets = source.partition("from .config import ModelConfig\n")
    assert line and "from ." not in imports + nets
    return "".join(
        (_HEADER, imports.rstrip("\n"), "\n", _CONFIG, *fields, "\n", inspect.getsource(channels), nets, _LOADER)
    )


def _check(files: dict[str, bytes], nets: dict[str, nn.Module], config: ModelConfig, format: Format) -> list[str]:
    """Read `files` as their users do, run them and compare; returns a line per net. Raises UserError."""
    findings = []
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        for name, data in files.items():
            (Path(scratch) / name).write_bytes(data)
        for stem, net in nets.items():
            call, reader = _READERS[format](Path(scratch), stem)
            examples = [_example(config, stem, batch) for batch in _BATCHES]
            worst = max(float((call(x) - net(x)).abs().max().nan_to_num(torch.inf)) for x in examples)
            if worst > _LIMITS[format]:
                raise UserError(
                    f"{stem} as {format}, run by {reader}, differs from PyTorch's modules by {worst:.1e}; accepted: at "
                    f"most {_LIMITS[format]:.0e}; nothing was written"
                )
            batches = " and ".join(map(str, _BATCHES))
            findings.append(f"checked: {stem} run by {reader} differs by {worst:.1e} at most (batches of {batches})")
    return findings


Reader = Callable[[Path, str], tuple[Callable[[Tensor], Tensor], str]]
"""Folder and stem to the net as a function, and the name of what runs it."""


def _read_onnx(folder: Path, stem: str) -> tuple[Callable[[Tensor], Tensor], str]:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / f"{stem}.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.as_tensor(session.run(None, {name: x.numpy()})[0]), f"onnxruntime {onnxruntime.__version__}"


def _read_pt2(folder: Path, stem: str) -> tuple[Callable[[Tensor], Tensor], str]:
    return torch.export.load(folder / f"{stem}.pt2").module(), "torch.export"


def _read_plain(folder: Path, stem: str) -> tuple[Callable[[Tensor], Tensor], str]:
    spec = importlib.util.spec_from_file_location("_fastbegan_exported_model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(stem), "model.py"


_READERS: dict[Format, Reader] = {"onnx": _read_onnx, "pt2": _read_pt2, "plain": _read_plain}
