"""What to try next: rules with thresholds, each of which states the figures that it follows from.

docs/evaluation.md has the same table (`RULES`), which a test compares.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

from eit.config import Recipe
from eit.errors import few, shorten
from eit.inference.evaluate import Metrics
from eit.training.run_folder import best_line


@dataclass
class Facts:
    """What is known of a run. Counts are by class; `metrics` are of `best.safetensors`, None if there are no images."""

    recipe: Recipe
    log: Sequence[dict[str, Any]]
    train_counts: dict[str, int] = field(default_factory=dict)
    val_counts: dict[str, int] = field(default_factory=dict)
    metrics: Metrics | None = None

    def series(self, key: str) -> list[float]:
        """A column of the log, without epochs that do not have it."""
        return [float(line[key]) for line in self.log if line.get(key) is not None]

    @property
    def best(self) -> float:
        return max(self.series("val_top1"), default=math.nan)

    @property
    def error(self) -> float:
        """Standard error of the best top-1 in points, by the number of validation images; 0 if that is unknown."""
        images = sum(self.val_counts.values())
        share = min(max(self.best / 100, 1 / (images + 1)), images / (images + 1)) if images else 0.0
        return 100 * math.sqrt(share * (1 - share) / images) if images else 0.0

    @property
    def losses_compare(self) -> bool:
        """Whether training loss is the same measure as validation loss, but for augmented images."""
        augment, loss = self.recipe.augment, self.recipe.loss
        changed = augment.mixup or augment.cutmix or augment.smoothing or loss.teacher or loss.class_weights
        return not changed and loss.name == "cross_entropy"


class Advice(NamedTuple):
    rule: str
    finding: str  # the figures
    advice: str


class Rule(NamedTuple):
    name: str
    condition: str  # in words, with its thresholds
    find: Callable[[Facts], str | None]  # the finding, if it holds
    advice: str


def advise(facts: Facts) -> list[Advice]:
    """The advice of every rule that holds, in the order of the table."""
    if not facts.series("val_top1"):
        return []
    found = [(rule, rule.find(facts)) for rule in RULES]
    return [Advice(rule.name, finding, rule.advice) for rule, finding in found if finding]


# -- The conditions ---------------------------------------------------------------------------------------------------


def _not_better_than_guessing(facts: Facts) -> str | None:
    total = sum(facts.val_counts.values())
    if not total:
        return None
    name, most = max(facts.val_counts.items(), key=lambda item: item[1])
    guess = 100 * most / total
    if facts.best > guess + 2 * facts.error:
        return None
    return (
        f"The best top-1 is {facts.best:.1f}%. The answer “{_short(name)}” for every image is right for {guess:.1f}%."
    )


def _loss_rises(facts: Facts) -> str | None:
    losses = facts.series("val_loss")
    if not losses:
        return None
    lowest = min(losses)
    if losses[-1] <= 1.1 * lowest or losses[-1] - lowest < 0.02:
        return None
    epoch = losses.index(lowest) + 1
    return f"The validation loss was lowest after epoch {epoch} ({lowest:.3f}) and rose to {losses[-1]:.3f} at the end."


def _train_far_below_val(facts: Facts) -> str | None:
    train, val = facts.series("train_loss"), facts.series("val_loss")
    if not (train and val and facts.losses_compare) or train[-1] >= 0.5 * val[-1] or val[-1] - train[-1] < 0.1:
        return None
    return f"At the end the training loss ({train[-1]:.3f}) is less than half of the validation loss ({val[-1]:.3f})."


def _still_rising(facts: Facts) -> str | None:
    top1 = facts.series("val_top1")
    part = len(top1) // 5
    if not part:
        return None
    gain = fmean(top1[-part:]) - fmean(top1[-2 * part : -part])
    if gain < max(1.0, 2 * facts.error):
        return None
    fifth = f"the last {part} epochs" if part > 1 else "the last epoch"
    return f"Top-1 was still rising: its mean over {fifth} is {gain:.1f} points above that of the {part} before."


def _both_losses_high(facts: Facts) -> str | None:
    train, val, classes = facts.series("train_loss"), facts.series("val_loss"), len(facts.val_counts)
    if not (train and val and facts.losses_compare) or classes < 2 or min(train[-1], val[-1]) < 0.5 * math.log(classes):
        return None
    return (
        f"The losses at the end are high: {train[-1]:.2f} in training and {val[-1]:.2f} in validation. Equal "
        f"probabilities for all {classes} classes give {math.log(classes):.2f}."
    )


def _unsteady(facts: Facts) -> str | None:
    top1 = facts.series("val_top1")
    first = math.ceil(facts.recipe.train.warmup_epochs)
    falls = [(top1[i - 1] - top1[i], i + 1) for i in range(max(first, 1), len(top1))]
    fall, epoch = max(falls, default=(0.0, 0))
    return (
        f"Top-1 fell by {fall:.1f} points in epoch {epoch}, after the warm-up."
        if fall > max(10.0, 4 * facts.error)
        else None
    )


def _end_below_best(facts: Facts) -> str | None:
    top1 = facts.series("val_top1")
    if facts.best - top1[-1] <= max(1.0, 2 * facts.error):
        return None
    epoch = best_line(facts.log, facts.recipe)["epoch"] + 1
    return f"Top-1 was {facts.best:.1f}% after epoch {epoch} and {top1[-1]:.1f}% at the end."


def _few_training_images(facts: Facts) -> str | None:
    counts = sorted((count, name) for name, count in facts.train_counts.items() if count < 20)
    names = [f"{_short(name)} ({count})" for count, name in counts]
    return f"{_classes(names)} fewer than 20 training images: {few(names, 5)}." if names else None


def _out_of_balance(facts: Facts) -> str | None:
    counts = {name: count for name, count in facts.train_counts.items() if count}
    if len(counts) < 2 or facts.recipe.loss.class_weights is not None:
        return None
    low, high = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[high] <= 5 * counts[low]:
        return None
    return f"“{_short(high)}” has {counts[high]:,} training images, “{_short(low)}” {counts[low]:,}."


def _few_validation_images(facts: Facts) -> str | None:
    images = sum(facts.val_counts.values())
    if not images or 2 * facts.error < 3:
        return None
    return f"With {images:,} validation images, top-1 is known to about ±{2 * facts.error:.0f} points."


def _confused_pair(facts: Facts) -> str | None:
    metrics = facts.metrics
    if metrics is None:
        return None
    names = list(metrics.per_class)
    wrong = [(n, t, p) for (t, p), n in metrics.pairs.items() if t != p]
    pairs = [(n, t, p) for n, t, p in wrong if n >= 5 and n >= 0.15 * (metrics.per_class[names[t]]["images"] or 0)]
    if not pairs:
        return None
    n, t, p = max(pairs, key=lambda pair: pair[0])
    total = metrics.per_class[names[t]]["images"]
    return f"“{_short(names[t])}” is taken for “{_short(names[p])}” in {n} of {total} images."


def _weak_class(facts: Facts) -> str | None:
    if facts.metrics is None:
        return None
    weak = [
        (c["top1"], name)
        for name, c in facts.metrics.per_class.items()
        if c["top1"] is not None and (c["images"] or 0) >= 10 and c["top1"] < facts.metrics.top1 - 20
    ]
    names = [f"{_short(name)} ({top1:.0f}%)" for top1, name in sorted(weak, key=lambda pair: pair[0] or 0)]
    return f"{_classes(names)} a recall of 20 points or more below top-1: {few(names, 5)}." if names else None


def _gap(facts: Facts) -> float:
    """Mean confidence minus top-1, in points; 0 if it is within two standard errors."""
    if facts.metrics is None:
        return 0.0
    bins, images = facts.metrics.calibration, facts.metrics.images
    gap = sum(b["images"] * (b["confidence"] - b["top1"]) for b in bins) / images
    share = facts.metrics.top1 / 100
    return gap if abs(gap) > 200 * math.sqrt(share * (1 - share) / images) else 0.0


def _overconfident(facts: Facts) -> str | None:
    gap = _gap(facts)
    return f"The mean confidence is {gap:.1f} points above top-1." if gap > 5 else None


def _underconfident(facts: Facts) -> str | None:
    gap = _gap(facts)
    return f"The mean confidence is {-gap:.1f} points below top-1." if gap < -5 else None


def _sure_mistakes(facts: Facts) -> str | None:
    if facts.metrics is None:
        return None
    sure = sum(mistake.confidence >= 0.95 for mistake in facts.metrics.mistakes)
    more = " or more" if sure == len(facts.metrics.mistakes) else ""
    return f"{sure}{more} mistakes have a confidence of 95% or more." if sure >= 5 else None


def _from_random_values(facts: Facts) -> str | None:
    images = sum(facts.train_counts.values())
    if not images or images >= 5000 or facts.recipe.model.pretrained or facts.best >= 95:
        return None
    return f"The run started from random values, with {images:,} training images."


def _classes(names: Sequence[str]) -> str:
    return "1 class has" if len(names) == 1 else f"{len(names)} classes have"


def _short(name: str) -> str:
    return shorten(name, 40)


RULES = (
    Rule(
        "no better than guessing",
        "best top-1 at most 2 standard errors above the share of the largest validation class",
        _not_better_than_guessing,
        "Look at images and labels (eit data check), then try a lower or higher optim.lr.",
    ),
    Rule(
        "still rising",
        "mean top-1 of the last fifth of the epochs at least 1 point, and 2 standard errors, above the fifth before",
        _still_rising,
        "Try more epochs (train.epochs).",
    ),
    Rule(
        "validation loss rises",
        "last validation loss more than 1.1 times, and 0.02 above, the lowest",
        _loss_rises,
        "This is a sign of overfitting: try more augmentation (augment.), augment.smoothing=0.1, more images or fewer "
        "epochs.",
    ),
    Rule(
        "training loss far below validation loss",
        "last training loss less than 0.5 times, and 0.1 below, the last validation loss; not with mixup, cutmix, "
        "smoothing, class weights, bce or a teacher",
        _train_far_below_val,
        "The model fits its training images better than others: try more augmentation (augment.), "
        "model.drop_path_rate=0.1, a higher optim.weight_decay, more images or fewer epochs.",
    ),
    Rule(
        "both losses high",
        "last training and validation loss at least 0.5 times log(classes); not with mixup and the others above",
        _both_losses_high,
        "The model does not fit its training images: try more epochs, another optim.lr, a larger model or less "
        "augmentation.",
    ),
    Rule(
        "unsteady",
        "top-1 falls by more than 10 points, and 4 standard errors, in one epoch after the warm-up",
        _unsteady,
        "Try a lower optim.lr, a longer train.warmup_epochs or optim.clip_grad=1.",
    ),
    Rule(
        "end below the best",
        "last top-1 more than 1 point, and 2 standard errors, below the best",
        _end_below_best,
        "Use best.safetensors, as eit predict does. Try fewer epochs, more augmentation or a lower optim.lr.",
    ),
    Rule(
        "few images in a class",
        "a class with fewer than 20 training images",
        _few_training_images,
        "Add images of these classes.",
    ),
    Rule(
        "out of balance",
        "the largest class has more than 5 times the training images of the smallest; not with loss.class_weights",
        _out_of_balance,
        "Try loss.class_weights=balanced, or add images of the small classes.",
    ),
    Rule(
        "two classes confused",
        "at least 5 images, and 15% of a class, predicted as one other class",
        _confused_pair,
        "Look at these images: are the labels right, and can you tell the classes apart? Then add images that show the "
        "difference.",
    ),
    Rule(
        "weak class",
        "recall 20 points below top-1, in a class of at least 10 validation images",
        _weak_class,
        "Look at the mistakes and labels there, and add images.",
    ),
    Rule(
        "sure mistakes",
        "at least 5 mistakes with a confidence of 95% or more",
        _sure_mistakes,
        "Look at their pictures: are the labels right?",
    ),
    Rule(
        "overconfident",
        "mean confidence more than 5 points, and 2 standard errors, above top-1",
        _overconfident,
        "Do not read its probabilities as frequencies. Try augment.smoothing=0.1, augment.mixup=0.2 or fewer epochs.",
    ),
    Rule(
        "underconfident",
        "mean confidence more than 5 points, and 2 standard errors, below top-1",
        _underconfident,
        "Do not read its probabilities as frequencies. Try less augment.smoothing and augment.mixup, if on, or more "
        "epochs.",
    ),
    Rule(
        "few validation images",
        "2 standard errors of the best top-1 are 3 points or more",
        _few_validation_images,
        "Smaller differences between runs say nothing: hold out more images (data.val_fraction), or compare seeds.",
    ),
    Rule(
        "from random values on few images",
        "fewer than 5,000 training images, no model.pretrained, best top-1 below 95%",
        _from_random_values,
        "Pretrained weights often help here: model.pretrained=FILE model.reset_head=true.",
    ),
)
