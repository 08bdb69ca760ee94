"""Fine-tune weights of this package with Lightning, on images/train/CLASS/... and images/val/CLASS/...

    $ python examples/lightning_module.py images tuned     # here 160 scanned digits of four classes
    ...
    top-1 96.67% of 60 images; next: eit predict tuned IMAGE...

It starts from the digits that ship; `--weights` takes a run folder or a file. Needs lightning.
"""

import argparse
from functools import partial
from pathlib import Path

import lightning
import torch
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import eit
from eit.data.images import decode
from eit.weights.formats import save_weights


class FineTune(lightning.LightningModule):
    def __init__(self, model: torch.nn.Module, epochs: int) -> None:
        super().__init__()
        self.model, self.epochs = model, epochs

    def training_step(self, batch, index):
        images, labels = batch
        return cross_entropy(self.model(images), labels)

    def validation_step(self, batch, index):
        images, labels = batch
        right = (self.model(images).argmax(dim=1) == labels).float().mean()
        self.log("val_top1", 100 * right, prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self):
        optimizer = create_optimizer_v2(self.model, opt="adamw", lr=3e-3, weight_decay=0.05, layer_decay=0.75)
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_scale"]  # timm's own schedulers do so, other ones do not
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", default="digits")
    parser.add_argument("--epochs", type=int, default=5)
    given = parser.parse_args()

    lightning.seed_everything(0)
    model = eit.load(given.weights).train()  # Lightning leaves a model in the mode in which it comes
    look = partial(create_transform, **resolve_data_config(model=model))  # size and colours as the weights know them
    augmented = look(is_training=True, scale=(0.6, 1), hflip=0)  # a mirrored digit is none
    read = partial(decode, channels=model.card.in_chans)
    train = ImageFolder(given.images / "train", augmented, loader=read)
    val = ImageFolder(given.images / "val", look(), loader=read)
    assert train.classes == val.classes, f"train/ has the classes {train.classes}, val/ has {val.classes}"
    model.reset_classifier(len(train.classes))

    trainer = lightning.Trainer(max_epochs=given.epochs, devices=1, logger=False, enable_checkpointing=False)
    loaders = DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=64)
    trainer.fit(FineTune(model, given.epochs), *loaders)
    reached = trainer.callback_metrics["val_top1"].item()

    card = model.card.model_copy(update=dict(classes=train.classes, recipe=None, metrics=dict(val_top1=reached)))
    given.out.mkdir(parents=True, exist_ok=True)
    save_weights(given.out / "final.safetensors", model.state_dict(), card)
    print(f"top-1 {reached:.2f}% of {len(val)} images; next: eit predict {given.out} IMAGE...")


if __name__ == "__main__":
    main()
