"""What trying a batch leaves behind: prints JSON of the bytes in use before and after, and of what fitted."""

from __future__ import annotations

import gc
import json

import torch

from fastbegan.config import ModelConfig, TrainConfig
from fastbegan.training.capacity import fits
from fastbegan_kernels import tuning

if __name__ == "__main__":
    device = torch.device("cuda", 0)
    model = ModelConfig(size=16, filters=8, hidden=8, latent=8, widths=(1, 2), repeats=1)
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    fitted = {batch: fits(model, TrainConfig(), device, None, batch) for batch in (2, 2, 512, 2)}
    left = torch.cuda.memory_allocated(device) - before
    print(json.dumps({"name": "memory", "left": left, "fitted": fitted, "chosen": len(tuning._chosen)}))
