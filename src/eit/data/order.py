"""Which image comes when: the order of an epoch, a function of the seed and the epoch alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eit.randomness import Stream, generator


@dataclass(frozen=True)
class Plan:
    """How an epoch is cut: into steps of `accumulate` micro-batches of `batch_size` images on each of `world` ranks."""

    images: int
    batch_size: int
    accumulate: int
    world: int
    repeats: int
    seed: int

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulate * self.world

    @property
    def steps(self) -> int:
        """Steps an epoch; the images that do not fill a last one are left out, other ones each epoch."""
        return self.images // self.global_batch

    def order(self, epoch: int) -> Tensor:
        """(steps, global_batch, 2): index and repeat of each sample, a function of seed and epoch alone.

        With repeated augmentation each image stands `repeats` times in a row, so that ranks share its copies, and an
        epoch is as long as without: it shows a part of the images (Hoffer et al. 2020, as in the DeiT code).
        """
        shuffled = torch.randperm(self.images, generator=generator(Stream.ORDER, self.seed, epoch))
        index = shuffled.repeat_interleave(self.repeats)
        repeat = torch.arange(self.repeats).repeat(self.images)
        used = self.steps * self.global_batch
        return torch.stack((index, repeat), dim=1)[:used].view(self.steps, self.global_batch, 2)

    def batches(self, epoch: int, first_step: int, rank: int) -> Tensor:
        """(micro-batches, batch_size, 2) of this rank, from `first_step` on; neighbours go to different ranks."""
        steps = self.order(epoch)[first_step:]
        return steps.view(-1, self.batch_size, self.world, 2)[:, :, rank]
