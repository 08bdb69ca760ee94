import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

import eit
from eit import distributed
from eit.config import Data
from eit.data.datasets import open_data
from eit.data.images import Preprocessing, normalise
from eit.data.loaders import EvaluationLoader
from eit.data.workers import Batch
from eit.inference.evaluate import Metrics, evaluate, make_views

VIEW = Preprocessing(16, 16, "bicubic", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def val(folder):
    return open_data(Data(root=str(folder)))[1]


def linear(classes):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, classes))


@pytest.mark.parametrize("batch_size", [1, 5, 12, 64])
def test_figures_agree_with_a_loop_for_any_batch_size(val, batch_size):
    val.classes = [*val.classes, *"abcd"]  # 7 classes: top-5 is not all
    model = linear(7)
    metrics = evaluate(model, EvaluationLoader(val, VIEW, batch_size, 0, torch.device("cpu")))
    correct1 = correct5 = loss = 0
    for i, label in enumerate(val.labels):
        logits = model(normalise(VIEW.pixels(val.read(i, 3))[None], VIEW.mean, VIEW.std))[0]
        ranked = logits.argsort(descending=True).tolist()
        correct1 += ranked[0] == label
        correct5 += label in ranked[:5]
        loss += F.cross_entropy(logits, torch.tensor(label)).item()
    assert (metrics.images, metrics.correct1, metrics.correct5) == (12, correct1, correct5)
    assert metrics.top1 == pytest.approx(100 * correct1 / 12) and metrics.top5 == pytest.approx(100 * correct5 / 12)
    assert metrics.loss == pytest.approx(loss / 12, rel=1e-5)
    assert sum(c["images"] for c in metrics.per_class.values()) == 12
    right = sum(c["top1"] * c["images"] / 100 for c in metrics.per_class.values() if c["images"])
    assert right == pytest.approx(correct1)
    assert metrics.per_class["a"]["images"] == 0 and metrics.per_class["a"]["top1"] is None


def test_top5_of_three_classes_is_everything(val):
    metrics = evaluate(linear(3), EvaluationLoader(val, VIEW, 4, 0, torch.device("cpu")))
    assert metrics.top5 == 100


class Rows:
    """A loader whose images are logits: rows of (N, classes), in padded blocks of 7, shared out among ranks."""

    device = torch.device("cpu")

    def __init__(self, logits, labels, classes=None):
        self.logits, self.labels = logits, labels
        self.images = SimpleNamespace(classes=classes or [f"c{i}" for i in range(logits.shape[1])])
        self.blocks = -(-len(labels) // 7)

    @property
    def own_blocks(self):
        return range(distributed.rank(), self.blocks, distributed.world_size())

    def __iter__(self):
        for block in self.own_blocks:
            index = torch.arange(block * 7, block * 7 + 7).clamp(max=len(self.labels) - 1)
            valid = min(7, len(self.labels) - block * 7)
            yield Batch(self.logits[index], self.labels[index], valid)


def random_rows(images=701, classes=9):
    """Rows without a class 8, and with a class 7 that is never predicted."""
    torch.manual_seed(0)
    labels = torch.randint(0, classes - 1, (images,))
    logits = 2 * torch.randn(images, classes) + 2 * F.one_hot(labels, classes)
    logits[:, 7] = -9
    return Rows(logits, labels)


def test_confusions_and_classes_agree_with_sklearn():
    rows = random_rows()
    metrics = evaluate(torch.nn.Identity(), rows)
    truth, predicted = rows.labels.numpy(), rows.logits.argmax(dim=1).numpy()
    assert metrics.confusion == confusion_matrix(truth, predicted, labels=range(9)).tolist()
    expected = precision_recall_fscore_support(truth, predicted, labels=range(9), zero_division=np.nan)
    for i, found in enumerate(metrics.per_class.values()):
        own = [np.nan if found[key] is None else found[key] / 100 for key in ("precision", "top1", "f1")]
        assert own == pytest.approx([expected[k][i] for k in range(3)], nan_ok=True)
        assert found["images"] == expected[3][i]
    assert metrics.per_class["c7"]["precision"] is None and metrics.per_class["c7"]["f1"] == 0
    assert metrics.per_class["c8"]["top1"] is None
    json.dumps(asdict(metrics) | dict(pairs=[]), allow_nan=False)


def test_calibration_error_agrees_with_a_loop():
    rows = random_rows()
    bins = {}
    for logits, label in zip(rows.logits.double(), rows.labels.tolist(), strict=True):
        p, i = logits.softmax(dim=0).max(dim=0)
        at = next(b for b in range(15) if b / 15 < p <= (b + 1) / 15)
        bins.setdefault(at, []).append((p.item(), i.item() == label))
    gaps = [len(b) / 701 * abs(np.mean([hit for _, hit in b]) - np.mean([p for p, _ in b])) for b in bins.values()]
    assert len(bins) > 8 and sum(gaps) > 0.01
    assert evaluate(torch.nn.Identity(), rows).ece == pytest.approx(100 * sum(gaps))


@pytest.mark.parametrize(("confidence", "right", "ece"), [(0.75, 30, 0), (0.9, 20, 40), (0.6, 40, 40), (1, 0, 100)])
def test_calibration_error_of_a_model_that_is_as_sure_each_time(confidence, right, ece):
    logits = torch.tensor([[confidence, 1 - confidence]]).double().log().clamp(min=-1000).expand(40, 2)
    labels = (torch.arange(40) >= right).long()
    metrics = evaluate(torch.nn.Identity(), Rows(logits, labels))
    assert metrics.ece == pytest.approx(ece, abs=1e-5) and metrics.top1 == 100 * right / 40


def test_errors_of_neighbouring_bins_do_not_cancel():
    """10 images at 90%, all right, beside 10 at 95%, half of them right."""
    logits = torch.tensor([[0.9, 0.1]] * 10 + [[0.95, 0.05]] * 10).double().log()
    labels = torch.tensor([0] * 15 + [1] * 5)
    assert evaluate(torch.nn.Identity(), Rows(logits, labels)).ece == pytest.approx((10 + 45) / 2, abs=1e-5)


def test_classes_of_the_same_name_are_kept_apart():
    metrics = evaluate(torch.nn.Identity(), Rows(torch.eye(3), torch.arange(3), ["crane", "dog", "crane"]))
    assert list(metrics.per_class) == ["crane (0)", "dog", "crane (2)"]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_find_together_what_one_finds_alone(monkeypatch, world):
    alone = evaluate(torch.nn.Identity(), random_rows())
    monkeypatch.setattr(distributed, "world_size", lambda: world)

    def on(rank, sum_over_ranks, gather):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "sum_over_ranks", sum_over_ranks)
        monkeypatch.setattr(distributed, "gather", gather)
        return evaluate(torch.nn.Identity(), random_rows())

    counts = [[] for _ in range(world)]  # what each rank contributes
    sums = [[] for _ in range(world)]
    shares = [
        on(
            rank,
            lambda t, rank=rank: (counts[rank].append(t.clone()), t)[1],
            lambda own, rank=rank: (sums.__setitem__(rank, own), [own])[1],
        )
        for rank in range(world)
    ]
    assert sum(share.images for share in shares) == alone.images == 701 and shares[0] != alone
    for rank in range(world):
        totals = (sum(tensors) for tensors in zip(*counts, strict=True))
        assert on(rank, lambda t, totals=totals: next(totals), lambda own: sums) == alone


# -- Flips and views


def test_flips_change_nothing_for_a_model_that_sees_no_left_and_right(val):
    class Symmetric(torch.nn.Module):
        def forward(self, x):
            return layer((x + x.flip(-1)).flatten(1))

    torch.manual_seed(0)
    layer = torch.nn.Linear(3 * 16 * 16, 3)
    loader = EvaluationLoader(val, VIEW, 5, 0, torch.device("cpu"))
    plain, flipped = (evaluate(Symmetric(), loader, flip=flip) for flip in (False, True))
    assert flipped.confusion == plain.confusion
    assert (flipped.loss, flipped.ece) == pytest.approx((plain.loss, plain.ece))


def test_flips_average_probabilities(val):
    loader, model = EvaluationLoader(val, VIEW, 5, 0, torch.device("cpu")), linear(3)
    counts, loss = np.zeros((3, 3), int), []
    for i, label in enumerate(val.labels):
        x = normalise(VIEW.pixels(val.read(i, 3))[None], VIEW.mean, VIEW.std)
        p = (model(x).softmax(dim=1) + model(x.flip(3)).softmax(dim=1))[0] / 2
        counts[label, p.argmax()] += 1
        loss.append(-p[label].log().item())
    metrics = evaluate(model, loader, flip=True)
    assert metrics.confusion == counts.tolist() and metrics.loss == pytest.approx(np.mean(loss), rel=1e-5)
    assert metrics.loss != pytest.approx(evaluate(model, loader).loss, rel=1e-3)


def test_views_are_all_sizes_with_all_crop_ratios():
    view = Preprocessing(224, 256, "bicubic", (0.5,), (0.5,))
    assert make_views(view) == {(224, 0.875): view}
    sizes = {key: (v.size, v.resize) for key, v in make_views(view, [224, 288]).items()}
    assert sizes == {(224, 0.875): (224, 256), (288, 0.875): (288, 329)}
    sizes = {key: (v.size, v.resize) for key, v in make_views(view, [224, 288], [0.9, 1]).items()}
    assert sizes == {(224, 0.9): (224, 248), (224, 1): (224, 224), (288, 0.9): (288, 320), (288, 1): (288, 288)}
    assert [v.resize for v in make_views(view, [], [0.7]).values()] == [320]


# -- Bounds, modes and types


def test_many_classes_take_memory_by_image_not_by_class():
    """A table of 21,843 classes squared would have 3.8 GB; 500,000 classes do not fit anywhere."""
    classes = 500_000
    labels = torch.tensor([3, 499_999, 7])
    logits = torch.zeros(3, classes)
    logits[0, 3], logits[1, 3], logits[2, 499_998] = 9, 9, 9
    metrics = evaluate(torch.nn.Identity(), Rows(logits, labels))
    assert metrics.pairs == {(3, 3): 1, (7, 499_998): 1, (499_999, 3): 1} and metrics.correct1 == 1
    assert metrics.per_class["c3"] == dict(images=1, top1=100, precision=50, f1=pytest.approx(200 / 3))
    with pytest.raises(eit.UserError, match="at most 4,096 classes, and there are 500,000"):
        assert metrics.confusion


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_outputs_that_are_not_finite_are_an_error(bad):
    rows = random_rows(20)
    rows.logits[13] = bad if bad > 0 else rows.logits[13]
    rows.logits[13, rows.labels[13]] = bad
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        evaluate(torch.nn.Identity(), rows)


def test_the_mode_of_a_model_changes_no_figure_and_is_put_back():
    rows = random_rows(50)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(9), torch.nn.Dropout(0.5))
    wanted = evaluate(model.eval(), rows)
    model.train()
    model[1].eval()
    assert evaluate(model, rows) == wanted
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert model[0].num_batches_tracked == 0


def test_a_folder_is_evaluated_by_its_name(folder):
    model = eit.load("digits")
    for i in range(3):
        (folder / "val" / f"digit{i}").rename(folder / "val" / str(i))
    assert evaluate(model, folder / "val") == evaluate(model, str(folder / "val"))
    found = evaluate(model, folder / "val")
    assert isinstance(found, Metrics) and evaluate("digits", folder / "val") == found  # weights by their name too
    assert repr(found).startswith(f"<12 images: top-1 {found.top1:.2f}%, top-5 ") and len(repr(found)) < 100


@pytest.mark.parametrize(
    ("model", "loader", "said"),
    [
        (torch.nn.Identity(), [torch.zeros(1)], "a loader of evaluation_loader"),
        (torch.nn.Identity(), 3, "a loader of evaluation_loader"),
        (torch.nn.Identity(), "pets", "needs a model of eit.load"),
        (None, random_rows(), "takes a model"),
        ("gone", random_rows(), "no weights at gone"),
        (torch.nn.Linear(9, 4), random_rows(), "gives outputs .*, 4., but the data have 9 classes"),
        (torch.nn.Unflatten(1, (3, 3)), random_rows(), "3, 3"),
        (torch.nn.Identity(), Rows(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64)), "no images"),
    ],
)
def test_wrong_types_are_refused(model, loader, said):
    with pytest.raises(eit.UserError, match=said):
        evaluate(model, loader)
