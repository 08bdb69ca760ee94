"""Two simple methods on the images of a run, which a trained network should beat."""

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eit.config import Recipe
from eit.data.datasets import open_pair
from eit.data.images import Images, UnreadableImage, normalise
from eit.errors import UserError
from eit.training.setup import build_model, make_view

THUMBNAIL = 8  # pixels
MOST = 5_000  # training images that are used
BATCH = 32


def measure_baselines(recipe: Recipe) -> dict[str, float]:
    """Method -> top-1 in percent on the validation images, after learning from at most 5,000 training images.

    Logistic regression sees the colours of thumbnails. The nearest neighbour compares the features that the weights of
    `model.pretrained` have before their head; it is left out if there are none.

    Raises:
        UserError: the images are a stream.
    """
    train, val, _ = open_pair(recipe.data)
    if not isinstance(train, Images) or not isinstance(val, Images):
        raise UserError("--baseline needs images that can be read in any order, not a stream")
    train = train.evenly(MOST)
    view = make_view(recipe)
    (train_pixels, train_small, labels), (val_pixels, val_small, truth) = (_read(part, view) for part in (train, val))
    results = {f"logistic regression on {THUMBNAIL}x{THUMBNAIL} thumbnails": _logistic(train_small, labels, val_small)}
    if recipe.model.pretrained:
        model = build_model(recipe, len(train.classes)).eval()
        features = [_features(model, pixels, view) for pixels in (train_pixels, val_pixels)]
        nearest = (features[1] @ features[0].T).argmax(dim=1)
        results["nearest neighbour on pooled features"] = labels[nearest].numpy()
    return {name: 100 * float(np.mean(predicted == truth.numpy())) for name, predicted in results.items()}


def _read(images: Images, view: Any) -> tuple[list[Tensor], np.ndarray[Any, Any], Tensor]:
    """Pixels as the model sees them, thumbnails as rows of numbers, and labels, of the images that can be read."""
    pixels, small, labels = [], [], []
    for index, label in enumerate(images.labels):
        with suppress(UnreadableImage):
            image = images.read(index, view.channels)
            pixels.append(view.pixels(image))
            thumbnail = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
            small.append(np.asarray(thumbnail, dtype=np.float32).ravel() / 255)
            labels.append(label)
    return pixels, np.array(small), torch.tensor(labels)


def _logistic(train: np.ndarray[Any, Any], labels: Tensor, val: np.ndarray[Any, Any]) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train, labels.numpy()).predict(val)


@torch.no_grad()
def _features(model: Any, pixels: list[Tensor], view: Any) -> Tensor:
    """(images, channels); each row is a vector of length 1."""
    parts = []
    for start in range(0, len(pixels), BATCH):
        x = normalise(torch.stack(pixels[start : start + BATCH]), view.mean, view.std)
        parts.append(model.forward_head(model.forward_features(x), pre_logits=True))
    return torch.nn.functional.normalize(torch.cat(parts).flatten(1), dim=1)
