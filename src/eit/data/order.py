"""Which image comes when. The order of an epoch is a function of the seed and the epoch alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eit.randomness import Stream, generator


@dataclass(frozen=True)
class SampleOrder:
    """The order of an epoch, in steps of `accumulate` micro-batches of `batch_size` images on each of `world` ranks."""

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
        """Steps per epoch. Images that do not fill a last step are left out; each epoch leaves out others."""
        return self.images // self.global_batch

    def samples(self, epoch: int) -> Tensor:
        """(steps, global_batch, 2): index and repeat of each sample, a function of seed and epoch alone.

        With repeated augmentation each image stands `repeats` times in a row, so that ranks share its copies. An epoch
        is as long as without, so it shows only a part of the images (Hoffer et al. 2020, as in the DeiT code).
        """
        shuffled = torch.randperm(self.images, generator=generator(Stream.ORDER, self.seed, epoch))
        index = shuffled.repeat_interleave(self.repeats)
        repeat = torch.arange(self.repeats).repeat(self.images)
        used = self.steps * self.global_batch
        return torch.stack((index, repeat), dim=1)[:used].view(self.steps, self.global_batch, 2)

    def batches(self, epoch: int, first_step: int, rank: int) -> Tensor:
        """(micro-batches, batch_size, 2) of this rank, from `first_step` on; neighbours go to different ranks."""
        steps = self.samples(epoch)[first_step:]
        return steps.view(-1, self.batch_size, self.world, 2)[:, :, rank]
