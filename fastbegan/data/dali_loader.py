"""Batches straight from picture files: NVIDIA DALI on the CPU, or with nvJPEG on the GPU."""

from __future__ import annotations

import importlib
import io
import re
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..device import one_core_each
from ..errors import UserError
from .decode import Decoding, crop_box, decode, read_bytes
from .files_loader import NONE_LEFT, NoneLeftError, Pictures, stacked
from .loader import Batching, StagedLoader
from .prepare import Catalogue

INSTALLED = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
_READERS = 4  # threads that read files
# JPEG, PNG, WebP, BMP, TIFF, PNM, JPEG 2000
_READ_BY_DALI = re.compile(
    rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|BM|II\*\0|MM\0\*|P[1-6]\s|\xff\x4f\xff\x51|\0\0\0\x0cjP  ", re.DOTALL
)
_MOST_FAILURES = 5  # failed batches in a row that end the run


_Box = tuple[int, int, int, int]
"""Left, top, right and bottom of what a crop keeps."""


class DaliLoader(StagedLoader):
    """Batches that DALI decodes: only the crop of each file, scaled with antialias, uint8 NHWC.

    `order.Order` gives DALI its files one by one, so all loaders and ranks read the same order, and a run resumes from
    its position. DALI itself converts nothing: files that carry a `decode.Note` (a colour profile, a rotation, 16 bits,
    alpha, palettes, CMYK) and formats that it does not read (AVIF, GIF, QOI, TGA) go through Pillow first.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        batching: Batching,
        decoding: Decoding,
        *,
        workers: int | None = None,
        prefetch: int = 2,
    ) -> None:
        """Start no pipeline yet.

        Args:
            catalogue: The good files of the source.
            batching: Size, order and device of the batches.
            decoding: As of the catalogue.
            workers: Threads of the pipeline that decode; None means 2.
            prefetch: Batches that are decoded ahead.

        Raises:
            UserError: The package of DALI is missing.
        """
        super().__init__(len(catalogue.entries), batching)
        if not INSTALLED:
            raise UserError(
                "loader dali needs NVIDIA DALI: pip install 'fastbegan[dali]' (CUDA 12: fastbegan[dali-cu12])"
            )
        self.pictures, self._shapes, self._decoding = (
            Pictures(catalogue, batching.stored, decoding),
            catalogue.seen,
            decoding,
        )
        self._workers, self._prefetch = 2 if workers is None else max(1, workers), prefetch
        self._readers = one_core_each(_READERS)
        self._pipeline: Any = None
        self._coming: deque[list[Future[tuple[np.ndarray, _Box]]]] = deque()
        self._next = self._failures = 0

    def pixels(self, ids: Tensor) -> Tensor:
        return stacked([self.pictures[number] for number in ids.tolist()])

    def _read(self, position: int, ids: Tensor, out: Tensor) -> Tensor:
        pipeline = self._pipeline
        if pipeline is None or position != self._next:
            pipeline = self._start(position)
        self._next = position + self.batching.step
        try:
            (images,) = pipeline.run()
        except RuntimeError as error:  # most likely one file was damaged since it was checked: Pillow skips it
            self._failures += 1
            if self._failures >= _MOST_FAILURES:
                raise
            warnings.warn(f"DALI: {str(error).splitlines()[0]}; this batch is decoded without it", stacklevel=2)
            self._pipeline = None
            return self.pixels(ids)
        self._failures = 0
        return torch.from_dlpack(images.as_tensor())

    def close(self) -> None:
        self._pipeline = None
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._readers = one_core_each(_READERS)  # without a thread until there is work
        self._coming.clear()

    def finish(self, images: Any, fn: Any, types: Any) -> Any:
        """Last stage of the pipeline, for subclasses; images stay uint8, since `normalize_images` scales them."""
        return images

    def _start(self, position: int) -> Any:
        """A pipeline whose first batch is the one at `position`."""
        dali: Any = importlib.import_module("nvidia.dali")
        fn, types = dali.fn, dali.types
        self.close()
        batching, batches = self.batching, self._encoded(position)
        gpu = batching.device.type == "cuda"
        options = {"batch_size": batching.batch_size, "num_threads": self._workers}
        options |= {"device_id": batching.device.index if gpu else None, "prefetch_queue_depth": self._prefetch}
        decoding = {"device": "mixed" if gpu else "cpu", "output_type": types.RGB, "jpeg_fancy_upsampling": True}
        pixels = {"axis_names": "WH", "normalized_anchor": False, "normalized_shape": False}

        @dali.pipeline_def(**options)
        def build() -> Any:
            encoded, start, shape = fn.external_source(source=batches, num_outputs=3, batch=True)
            images = fn.decoders.image_slice(encoded, start, shape, **decoding, **pixels)
            side = [batching.stored, batching.stored]
            images = fn.resize(images, size=side, interp_type=types.INTERP_LINEAR, antialias=True)
            return self.finish(images, fn, types)

        self._pipeline = pipeline = build()
        pipeline.build()
        return pipeline

    def _encoded(self, position: int) -> Iterator[tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]]:
        """The pipeline's input from `position` on, read ahead: encoded files, starts and shapes of their crops."""
        ahead = self._prefetch + 2
        while True:
            while len(self._coming) < ahead:
                ids = self._place(position)[0].tolist()
                self._coming.append([self._readers.submit(self._file, number) for number in ids])
                position += self.batching.step
            files = [file.result() for file in self._coming.popleft()]
            boxes = np.array([box for _, box in files], dtype=np.float32)
            starts, shapes = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
            yield [data for data, _ in files], list(starts), list(shapes)

    def _file(self, number: int) -> tuple[np.ndarray, _Box]:
        """Encoded bytes and crop box of file `number`; a file that went bad gives way to the next good one."""
        for shift in range(self.count):
            place = (number + shift) % self.count
            entry = self.pictures.entries[place]
            try:
                data = read_bytes(entry.path, entry.offset, entry.length)
                width, height, notes = self._shapes[place].tolist()
                if notes or not _READ_BY_DALI.match(data):
                    buffer = io.BytesIO()
                    Image.fromarray(decode(data, replace(self._decoding, crop="none")).pixels).save(buffer, "BMP")
                    data = buffer.getvalue()
                return np.frombuffer(data, np.uint8), crop_box((width, height), self._decoding.crop)
            except Exception as error:
                warnings.warn(
                    f"{entry.name} was good and is not any more ({error}); the next one takes its place", stacklevel=2
                )
        raise NoneLeftError(NONE_LEFT)
