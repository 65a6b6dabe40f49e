"""Operators of torch.library that run below autograd: inside an autograd.Function, which has the derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""What each operator runs, by its name, for those who look inside."""


def library_op(like: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function the operator torch.ops.fastbegan.<its name>.

    torch.library.custom_op does the same with a Python wrapper for autograd, which costs three times as much host time
    a call.

    Args:
        like: The results' shapes and memory formats from the same arguments, for torch.compile.

    Returns:
        A decorator. The function's annotations give the schema; it changes no argument and returns new tensors.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = f"fastbegan::{function.__name__}"
        FUNCTIONS[name] = function
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "default", function)
        torch.library.register_fake(name, like)
        return getattr(torch.ops.fastbegan, function.__name__).default

    return register
