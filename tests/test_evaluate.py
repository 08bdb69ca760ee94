import pytest
import torch
import torch.nn.functional as F

from eit.config import Data
from eit.data import open_data
from eit.evaluate import evaluate
from eit.images import View, normalise
from eit.loader import EvaluationLoader

VIEW = View(16, 16, "bicubic", (0.5,) * 3, (0.5,) * 3)


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
    assert metrics.per_class["a"] == dict(images=0, top1=None)


def test_top5_of_three_classes_is_everything(val):
    metrics = evaluate(linear(3), EvaluationLoader(val, VIEW, 4, 0, torch.device("cpu")))
    assert metrics.top5 == 100
