"""Each rule holds beyond its thresholds and not before, and the documents have the same rules."""

import re
from pathlib import Path

import pytest

from eit.config import load_recipe
from eit.inference.evaluate import Metrics, Mistake
from eit.report.advice import RULES, Facts, advise

ROOT = Path(__file__).parents[2]
PLAIN = ["augment.mixup=0", "augment.cutmix=0", "augment.smoothing=0"]


def metrics(pairs, confidence=None, sure=0, images=None):
    """Metrics of (truth, prediction) -> images, with one bin of a mean confidence in percent."""
    classes = 1 + max(max(pair) for pair in pairs)
    total = sum(pairs.values())
    right = sum(n for (t, p), n in pairs.items() if t == p)
    top1 = 100 * right / total
    per_class = {}
    for i in range(classes):
        own = sum(n for (t, _), n in pairs.items() if t == i)
        per_class[f"class{i}"] = dict(
            images=own, top1=100 * pairs.get((i, i), 0) / own if own else None, precision=None, f1=None
        )
    calibration = [
        dict(low=0, high=100, images=total, confidence=top1 if confidence is None else confidence, top1=top1)
    ]
    mistakes = [Mistake(0.96, 0, 1, 0, None)] * sure + [Mistake(0.5, 0, 1, 0, None)]
    return Metrics(
        images=total,
        top1=top1,
        top5=100,
        loss=1,
        ece=0,
        correct1=right,
        correct5=total,
        per_class=per_class,
        pairs=pairs,
        calibration=calibration,
        mistakes=mistakes,
    )


def facts(top1=(90.0,) * 10, train_loss=0.3, val_loss=(0.35,), train=1000, val=1000, words=(), **more):
    """A run about which no rule has anything to say, but for what is given."""
    recipe = load_recipe("cifar10", [*PLAIN, "train.warmup_epochs=1", "model.pretrained=digits", *words])
    losses = [val_loss[min(i, len(val_loss) - 1)] for i in range(len(top1))]
    log = [dict(epoch=i, val_top1=t, val_loss=losses[i], train_loss=train_loss) for i, t in enumerate(top1)]
    counts = [dict(zip(("a", "b", "c"), [n] * 3, strict=True)) if isinstance(n, int) else n for n in (train, val)]
    return Facts(recipe, log, *counts, **more)


def rules(given):
    return [one.rule for one in advise(given)]


def test_a_good_run_gets_no_advice():
    assert rules(facts()) == []
    assert advise(Facts(load_recipe("digits"), [])) == []


MIXED = {(0, 0): 90, (0, 1): 10, (1, 1): 100}
NINE_TENTHS = {(0, 0): 900, (0, 1): 100}


@pytest.mark.parametrize(
    ("rule", "beyond", "within"),
    [
        ("no better than guessing", dict(top1=[34.0] * 10), dict(top1=[40.0] * 10)),
        (
            "no better than guessing",
            dict(top1=[91.0] * 9, val=dict(a=900, b=100)),
            dict(top1=[93.0] * 9, val=dict(a=900, b=100)),
        ),
        ("still rising", dict(top1=[50, 60, 70, 80, 90]), dict(top1=[50, 60, 70, 89.2, 90])),
        (
            "still rising",
            dict(top1=[80] * 8 + [86] * 2),
            dict(top1=[80] * 8 + [86] * 2, val=40),
        ),  # 6 points are noise there
        ("validation loss rises", dict(val_loss=(0.4, 0.3, 0.34)), dict(val_loss=(0.4, 0.3, 0.329))),
        ("validation loss rises", dict(val_loss=(0.1, 0.13)), dict(val_loss=(0.1, 0.115))),
        ("training loss far below validation loss", dict(train_loss=0.1), dict(train_loss=0.18)),
        (
            "training loss far below validation loss",
            dict(train_loss=0.1),
            dict(train_loss=0.1, words=["augment.mixup=0.2"]),
        ),
        ("training loss far below validation loss", dict(train_loss=0.1), dict(train_loss=0.01, val_loss=(0.1,))),
        ("both losses high", dict(train_loss=0.56, val_loss=(0.6,)), dict(train_loss=0.54, val_loss=(0.6,))),
        ("both losses high", dict(train_loss=0.9, val_loss=(0.6,)), dict(train_loss=0.9, val_loss=(0.5,))),
        ("unsteady", dict(top1=[50, 80, 69, 85, 90, 90, 90]), dict(top1=[50, 80, 71, 85, 90, 90, 90])),
        ("unsteady", dict(top1=[80, 60, 85, 90]), dict(top1=[80, 60, 85, 90], words=["train.warmup_epochs=2"])),
        ("end below the best", dict(top1=[90, 90, 92.1, 90]), dict(top1=[90, 90, 91, 90])),
        ("few images in a class", dict(train=dict(a=1000, b=19)), dict(train=dict(a=90, b=20))),
        ("out of balance", dict(train=dict(a=501, b=100)), dict(train=dict(a=500, b=100))),
        (
            "out of balance",
            dict(train=dict(a=900, b=100)),
            dict(train=dict(a=900, b=100), words=["loss.class_weights=balanced"]),
        ),
        ("few validation images", dict(val=100), dict(val=200)),
        (
            "two classes confused",
            dict(metrics=metrics({(0, 0): 85, (0, 1): 15, (1, 1): 100})),
            dict(metrics=metrics(MIXED)),
        ),
        (
            "two classes confused",
            dict(metrics=metrics({(0, 0): 5, (0, 1): 5, (1, 1): 9})),
            dict(metrics=metrics({(0, 0): 4, (0, 1): 4, (1, 1): 9})),
        ),
        (
            "weak class",
            dict(metrics=metrics({(0, 0): 6, (0, 1): 4, (1, 1): 99})),
            dict(metrics=metrics({(0, 0): 8, (0, 1): 2, (1, 1): 99})),
        ),
        (
            "weak class",
            dict(metrics=metrics({(0, 0): 6, (0, 1): 4, (1, 1): 99})),
            dict(metrics=metrics({(0, 0): 5, (0, 1): 4, (1, 1): 99})),
        ),
        ("sure mistakes", dict(metrics=metrics(MIXED, sure=5)), dict(metrics=metrics(MIXED, sure=4))),
        (
            "overconfident",
            dict(metrics=metrics(NINE_TENTHS, confidence=96)),
            dict(metrics=metrics(NINE_TENTHS, confidence=94)),
        ),
        ("underconfident", dict(metrics=metrics(MIXED, confidence=89)), dict(metrics=metrics(MIXED, confidence=91))),
        (
            "overconfident",
            dict(metrics=metrics(NINE_TENTHS, confidence=97)),
            dict(metrics=metrics({(0, 0): 9, (0, 1): 1}, confidence=97)),
        ),
        (
            "from random values on few images",
            dict(words=["model.pretrained=null"]),
            dict(words=["model.pretrained=null"], top1=[95.0] * 9),
        ),
        (
            "from random values on few images",
            dict(words=["model.pretrained=null"]),
            dict(words=["model.pretrained=null"], train=2000),
        ),
    ],
)
def test_a_rule_holds_beyond_its_thresholds_alone(rule, beyond, within):
    assert rule in {one.name for one in RULES}
    assert rule in rules(facts(**beyond)) and rule not in rules(facts(**within))


def test_each_rule_is_tried():
    tried = test_a_rule_holds_beyond_its_thresholds_alone.pytestmark[0].args[1]
    assert {row[0] for row in tried} == {rule.name for rule in RULES}


def test_a_finding_has_the_figures():
    (one,) = advise(facts(train=dict(a=1000, b=19, c=7), words=["loss.class_weights=balanced"]))
    assert one.finding == "2 classes have fewer than 20 training images: c (7), b (19)."
    (one,) = advise(facts(val_loss=(0.4, 0.3, 0.35), top1=[90.0] * 3))
    assert "after epoch 2 (0.300) and rose to 0.350" in one.finding


@pytest.mark.parametrize("column", ["train_loss", "val_loss", "val_top1"])
def test_logs_without_a_column_are_read(column):
    given = facts(top1=[50, 60, 70, 80, 90], train_loss=0.01)
    for line in given.log[1:4]:
        line[column] = None
    advise(given)
    for line in given.log:
        line[column] = None
    advise(given)


def test_the_documents_have_the_same_rules():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    assert [(rule.name, rule.condition, rule.advice) for rule in RULES] == [
        row for row in rows if row[0] in {rule.name for rule in RULES}
    ]
