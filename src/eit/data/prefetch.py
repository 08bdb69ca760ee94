"""Batches that workers made -> batches on the device, on a side stream of CUDA."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from eit.config import Augment
from eit.data.augment import erase_boxes, noise_fields
from eit.data.images import Normaliser, Preprocessing
from eit.data.workers import Batch, HostBatch


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; nothing waits for the copy if its source is pinned memory, which lives until it is done.

    Pageable memory may be freed before: MPS would read whatever is there then.
    """
    return tensor.to(device, non_blocking=device.type == "cuda" and tensor.is_pinned())


class Prefetcher:
    """Copies and normalises batches, with random erasing; on CUDA while the GPU still computes the step before."""

    def __init__(self, view: Preprocessing, augment: Augment, seed: int, device: torch.device) -> None:
        self.view, self.seed, self.device = view, seed, device
        self.erasing = augment.erasing > 0
        self.normalise = Normaliser(view, device)
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, host_batches: Iterable[HostBatch], epoch: int) -> Iterator[Batch]:
        shape = (self.view.size, self.view.size, self.view.channels)
        noise = noise_fields(shape, self.seed, epoch, self.device) if self.erasing else torch.empty(0)
        if self.side is None:
            for host_batch in host_batches:
                yield self._finish(host_batch, noise)
            return
        main = torch.cuda.current_stream(self.device)
        self.side.wait_stream(main)  # which made the noise and the constants of normalising
        for host_batch in host_batches:
            with torch.cuda.stream(self.side):
                batch = self._finish(host_batch, noise)
            main.wait_stream(self.side)
            for tensor in (batch.images, batch.labels):
                tensor.record_stream(main)  # its memory goes to no later batch before the step has read it
            yield batch

    def _finish(self, batch: HostBatch, noise: Tensor) -> Batch:
        pixels, labels, _, boxes = batch
        x = self.normalise(to_device(pixels, self.device))
        if self.erasing:
            x = erase_boxes(x, to_device(boxes, self.device), noise)
        return Batch(x, to_device(labels, self.device), len(labels))
