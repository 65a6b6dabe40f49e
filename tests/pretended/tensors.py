"""What Python asks of a tensor: where it is, and to be somewhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .devices import DEVICES, THREAD, index_of
from .findings import FINDINGS, MIXED
from .memory import MEMORY, card_of, is_host, is_pinned, raw_bytes
from .streams import Stream, current_stream

_to, _cpu, _numpy, _tolist, _array = Tensor.to, Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__
_set_item, _new_tensor = Tensor.__setitem__, Tensor.new_tensor
_tensor, _as_tensor, _load = torch.tensor, torch.as_tensor, torch.load
_copy_storage = torch.UntypedStorage.__deepcopy__
_grouped = torch._C._group_tensors_by_device_and_dtype


def patch() -> None:
    """Replace the methods of torch.Tensor, and the functions of torch that make tensors on the host first."""
    attributes: dict[str, Callable[[int], object]] = {
        "device": lambda card: DEVICES[card],
        "is_cuda": lambda card: True,
        "is_cpu": lambda card: False,
    }
    for name, told in attributes.items():
        setattr(Tensor, name, _attribute(name, told))
    methods: dict[str, object] = {
        "get_device": lambda self: -1 if (card := card_of(self)) is None else card,
        "to": to,
        "cpu": cpu,
        "cuda": cuda,
        "numpy": numpy,
        "tolist": tolist,
        "__array__": as_array,
        "pin_memory": pin_memory,
        "is_pinned": lambda self, device=None: is_pinned(self),
        "record_stream": record_stream,
        "__setitem__": set_item,
        "new_tensor": new_tensor,
    }
    for name, method in methods.items():
        setattr(Tensor, name, method)
    torch.tensor, torch.as_tensor = _on_host_first(_tensor), _on_host_first(_as_tensor)
    torch.load = load
    torch.UntypedStorage.__deepcopy__ = copy_storage  # pyright: ignore[reportAttributeAccessIssue]
    torch._C._group_tensors_by_device_and_dtype = grouped


def _attribute(name: str, told: Callable[[int], object]) -> property:
    original = getattr(torch._C.TensorBase, name)

    def get(self: Tensor) -> object:
        card = card_of(self)
        return original.__get__(self) if card is None else told(card)

    return property(get)


def _destination(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Device, dtype and the rest of what `Tensor.to` was given."""
    options, given = dict(options), list(args)
    device, dtype, other = (options.pop(name, None) for name in ("device", "dtype", "other"))
    if given and isinstance(given[0], Tensor):
        other = given.pop(0)
    elif given and isinstance(given[0], torch.dtype):
        dtype = given.pop(0)
    elif given and not isinstance(given[0], bool):
        device = given.pop(0)
        if given and (given[0] is None or isinstance(given[0], torch.dtype)):
            dtype = given.pop(0)
    options.update(zip(("non_blocking", "copy"), given, strict=False))
    if other is not None:
        device, dtype = other.device, other.dtype
    return device, dtype, options


def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if torch.compiler.is_compiling() or type(self) not in (Tensor, torch.nn.Parameter) or not is_host(self):
        return _to(self, *args, **kwargs)
    device, dtype, rest = _destination(args, kwargs)
    if device is not None:
        device = DEVICES[index_of(device)] if isinstance(device, int) else torch.device(device)
        if device.type not in ("cpu", "cuda"):
            return _to(self, *args, **kwargs)
    card = card_of(self)
    if device is None or (index_of(device) if device.type == "cuda" else None) == card:
        if dtype is not None:
            rest["dtype"] = dtype
        return _to(self, **rest) if rest else self
    rest.pop("copy", None)
    if torch.is_grad_enabled() and self.requires_grad:
        return _Moved.apply(self, device, dtype, rest)  # pyright: ignore[reportReturnType]
    return _moved(self, device, dtype, rest)


def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None, rest: dict[str, Any]) -> Tensor:
    before, THREAD.moving = THREAD.moving, True
    try:
        return torch.ops.aten._to_copy(tensor, device=device, dtype=dtype, **rest)
    finally:
        THREAD.moving = before


class _Moved(torch.autograd.Function):
    """The gradient goes back to where the tensor was; autograd's own would leave it, seeing one device only."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device, dtype: Any, rest: dict[str, Any]) -> Tensor:
        ctx.device, ctx.dtype = tensor.device, tensor.dtype
        return _moved(tensor, device, dtype, rest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return to(gradients[0], ctx.device, ctx.dtype), None, None, None


def cpu(self: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    return _cpu(self, memory_format=memory_format) if card_of(self) is None else to(self, "cpu")


def cuda(self: Tensor, device: Any = None, non_blocking: bool = False, memory_format: Any = None) -> Tensor:
    return to(self, DEVICES[index_of(device)], non_blocking=non_blocking)


def numpy(self: Tensor, *, force: bool = False) -> Any:
    card = card_of(self)
    if card is None:
        return _numpy(self, force=force)
    if not force:
        raise TypeError(
            f"can't convert cuda:{card} device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )
    return _numpy(cpu(self.detach()))


def tolist(self: Tensor) -> Any:
    return _tolist(self if card_of(self) is None else cpu(self.detach()))


def as_array(self: Tensor, *args: Any, **kwargs: Any) -> Any:
    if card_of(self) is not None:
        numpy(self)  # raises
    return _array(self, *args, **kwargs)


def pin_memory(self: Tensor, device: Any = None) -> Tensor:
    if card_of(self) is not None:
        raise RuntimeError("cannot pin a tensor of a card: only dense CPU tensors can be pinned")
    return torch.empty_like(self, device="cpu", pin_memory=True).copy_(self)


def record_stream(self: Tensor, stream: Stream) -> None:
    if (record := MEMORY.of(self)) is not None:
        record.recorded.add(stream)


def set_item(self: Tensor, index: Any, value: Any) -> None:
    before, THREAD.scalar = THREAD.scalar, isinstance(value, (int, float, bool, complex))
    try:
        _set_item(self, index, value)
    finally:
        THREAD.scalar = before


def new_tensor(self: Tensor, data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
    return to(_new_tensor(self, data, **kwargs), self.device if device is None else device)


def _on_host_first(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(data: Any, *args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> Tensor:
        own = {"requires_grad": True} if requires_grad else {}
        if device is None or torch.device(device).type != "cuda":
            return make(data, *args, **({} if device is None else {"device": device}), **own, **kwargs)
        found = to(make(data, *args, **kwargs), device)
        return found.requires_grad_() if requires_grad else found

    return made


def load(file: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
    """torch.load: what is asked for on a card is loaded on the host, then copied."""
    plain = not isinstance(map_location, (str, int, torch.device)) or torch.device(map_location).type != "cuda"
    place: Any = map_location if plain else "cpu"
    found = _load(file, place, *args, **kwargs)
    return found if plain else _all_to(found, torch.device(map_location))


def _all_to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return to(value, device)
    if isinstance(value, dict):
        return type(value)((name, _all_to(one, device)) for name, one in value.items())
    return type(value)(_all_to(one, device) for one in value) if type(value) in (list, tuple) else value


def copy_storage(self: Any, memo: dict[int, Any]) -> Any:
    found = _copy_storage(self, memo)
    record = MEMORY.records.get(self._cdata)
    if record is not None and record.card is not None:
        MEMORY.add(raw_bytes(found), record.card, current_stream(record.card))
    return found


def grouped(lists: Any, with_indices: bool = False) -> Any:
    """Groups of tensors as optimizers ask for them: by the devices that they are told to be on."""
    found = {}
    for (device, dtype), value in _grouped(lists, with_indices).items():
        cards = {card_of(tensor) for one in value[0] for tensor in one if tensor is not None}
        if len(cards) > 1:
            FINDINGS.note(MIXED, "a list of tensors on several devices")
        card = next(iter(cards), None)
        found[device if card is None else DEVICES[card], dtype] = value
    return found
