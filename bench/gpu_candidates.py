"""What is timed: every form of an op, on which inputs, and whether it is right there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.gpu_cases import DEVICE, DRY, Case
from bench.gpu_numerics import Draw
from fastbegan_kernels import (
    conv2d_elu,
    conv_stage,
    equilibrium_update,
    fold,
    l1_reconstruction_loss,
    l1_reconstruction_loss_with_gradients,
    normalize_images,
    problems,
    tuning,
    upsample_conv2d_elu,
)
from fastbegan_kernels.fold import fold_upsample
from fastbegan_kernels.fused import launch
from fastbegan_kernels.problems import Problem, dtype_named
