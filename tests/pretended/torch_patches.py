"""torch.cuda and what else of torch asks for a device."""

from __future__ import annotations

import collections
import threading
import types
from collections.abc import Callable
from typing import Any

import torch

from .captures import capture_on, require_no_capture
from .devices import ARCHES, CARDS, THREAD, index_of
from .generators import Generator
from .graphs import CUDAGraph, graph
from .memory import MEMORY, card_of
from .streams import Event, Stream, StreamContext, current_stream, default_stream, set_stream, synchronize

_checked: list[bool] = []


class DeviceContext:
    """torch.cuda.device: the current card of this thread; nothing for a negative number."""

    def __init__(self, device: Any) -> None:
        self.idx = device if isinstance(device, int) and device < 0 else index_of(device)
        self.prev_idx = -1

    def __enter__(self) -> None:
        self.prev_idx = THREAD.card
        if self.idx >= 0:
            THREAD.card = self.idx

    def __exit__(self, *reason: object) -> None:
        THREAD.card = self.prev_idx


class DeviceOfContext(DeviceContext):
    """torch.cuda.device_of: that of a tensor, nothing for the host's."""

    def __init__(self, tensor: Any) -> None:
        super().__init__(-1 if (card := card_of(tensor)) is None else card)


def set_device(device: Any) -> None:
    if not (isinstance(device, int) and device < 0):
        THREAD.card = index_of(device)


def properties(device: Any = None) -> types.SimpleNamespace:
    card = CARDS[index_of(device)]
    return types.SimpleNamespace(
        name=card.name,
        major=card.capability[0],
        minor=card.capability[1],
        total_memory=card.memory,
        multi_processor_count=108,
        L2_cache_size=1 << 25,
        max_threads_per_multi_processor=2048,
        warp_size=32,
        regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=166912,
        gcnArchName="",
        is_integrated=0,
        is_multi_gpu_board=0,
    )


def free_and_total(device: Any = None) -> tuple[int, int]:
    MEMORY.purge()
    index = index_of(device)
    return max(0, MEMORY.limit[index] - MEMORY.used[index]), CARDS[index].memory


def used(device: Any = None) -> int:
    MEMORY.purge()
    return MEMORY.used[index_of(device)]


def peak(device: Any = None) -> int:
    return MEMORY.peak[index_of(device)]


def reset_peak(device: Any = None) -> None:
    MEMORY.peak[index_of(device)] = used(device)


def random_state(device: Any = None) -> Any:
    require_no_capture("torch.cuda.get_rng_state")
    return torch.get_rng_state()


def lazy_init() -> None:
    """As torch.cuda starts: it warns, once, of every card that it has no code for."""
    if not _checked:
        _checked.append(True)
        torch.cuda._check_capability()


def _capturing() -> bool:
    return capture_on(current_stream()) is not None


def patch() -> None:
    """Replace what reaches for the driver."""
    cuda: Any = torch.cuda
    functions: dict[str, Any] = {
        "_lazy_init": lazy_init,
        "init": lazy_init,
        "_is_compiled": lambda: True,
        "is_available": lambda: True,
        "is_initialized": lambda: bool(_checked),
        "device_count": lambda: len(CARDS),
        "current_device": lambda: THREAD.card,
        "set_device": set_device,
        "device": DeviceContext,
        "device_of": DeviceOfContext,
        "get_device_name": lambda device=None: CARDS[index_of(device)].name,
        "get_device_capability": lambda device=None: CARDS[index_of(device)].capability,
        "get_device_properties": properties,
        "get_arch_list": lambda: list(ARCHES),
        "is_bf16_supported": lambda including_emulation=True: including_emulation or _has_bf16(),
        "mem_get_info": free_and_total,
        "memory_allocated": used,
        "memory_reserved": used,
        "max_memory_allocated": peak,
        "max_memory_reserved": peak,
        "reset_peak_memory_stats": reset_peak,
        "memory_stats": lambda device=None: collections.defaultdict(int),
        "empty_cache": MEMORY.purge,
        "synchronize": synchronize,
        "current_stream": current_stream,
        "default_stream": default_stream,
        "set_stream": set_stream,
        "Stream": Stream,
        "Event": Event,
        "stream": StreamContext,
        "StreamContext": StreamContext,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "is_current_stream_capturing": _capturing,
        "graph_pool_handle": lambda: (0, 0),
        "_sleep": lambda cycles: current_stream().tick(),
        "get_rng_state": random_state,
        "set_rng_state": lambda state, device=None: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }
    for name, value in functions.items():
        for module in (cuda, cuda.streams, cuda.graphs, cuda.memory):
            if module is cuda or (hasattr(module, name) and not isinstance(getattr(module, name), types.ModuleType)):
                setattr(module, name, value)
    torch.Generator = Generator  # pyright: ignore[reportAttributeAccessIssue]
    torch._C._cuda_getDriverVersion = lambda: 13020  # pyright: ignore[reportAttributeAccessIssue]
    torch._C._cuda_isCurrentStreamCapturing = _capturing  # pyright: ignore[reportAttributeAccessIssue]
    _patch_accelerator()
    _patch_autocast()
    _patch_distributed()


def _has_bf16() -> bool:
    return CARDS[THREAD.card].capability >= (8, 0)


def _patch_accelerator() -> None:
    accelerator: Any = getattr(torch, "accelerator", None)  # since torch 2.6
    if accelerator is not None:
        accelerator.current_stream, accelerator.set_stream = current_stream, set_stream
        accelerator.current_device_index, accelerator.device_count = lambda: THREAD.card, lambda: len(CARDS)
        accelerator.is_available, accelerator.synchronize = lambda: True, synchronize
        accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")


def _patch_autocast() -> None:
    """Autocast for "cuda" is the CPU's, whose tensors C++ sees."""
    begin = torch.amp.autocast_mode.autocast.__init__

    def init(self: Any, device_type: str, dtype: torch.dtype | None = None, *args: Any, **kwargs: Any) -> None:
        cuda = device_type == "cuda"
        begin(self, "cpu" if cuda else device_type, torch.float16 if cuda and dtype is None else dtype, *args, **kwargs)

    torch.amp.autocast_mode.autocast.__init__ = init
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        setattr(torch, name, _for_cpu(getattr(torch, name)))


def _for_cpu(ask: Callable[[str], Any]) -> Callable[..., Any]:
    return lambda device="cuda": ask("cpu" if device == "cuda" else device)


def _patch_distributed() -> None:
    """Gloo takes what lies in the CPU's memory; NCCL does not."""
    import torch.distributed

    torch.distributed.is_nccl_available = lambda: False  # pyright: ignore[reportPrivateImportUsage]


def patch_threads(mode: type[Any]) -> None:
    """Every thread that Python starts sees the pretended devices."""
    thread: Any = threading.Thread
    begin = thread._bootstrap_inner

    def bootstrap(self: Any) -> None:
        with mode():
            begin(self)

    thread._bootstrap_inner = bootstrap
