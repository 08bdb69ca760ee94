import pytest
import torch

import eit
from eit.config import load_recipe
from eit.data.images import decode, normalise
from eit.inference.predict import expand, predict
from eit.training.trainer import train
from tests.helpers.training import TINY


@pytest.fixture
def model(folder):
    recipe = load_recipe("cifar10", [*TINY, f"data.root={folder}", f"out={folder.parent / 'run'}"])
    train(recipe)
    return eit.load(recipe.run_folder())


def test_predictions_are_the_models_own_in_any_batch(model, folder):
    files = expand([str(folder / "val")])
    assert len(files) == 12
    for batch_size in (1, 5, 32):
        found = list(predict(model, files, top=2, batch_size=batch_size))
        assert [p.image for p in found] == files
        for p in found:
            view = model.card.view
            with torch.no_grad():
                pixels = view.pixels(decode(p.image))[None]
                probabilities = model(normalise(pixels, view.mean, view.std)).softmax(dim=1)[0]
            best = probabilities.argsort(descending=True)[:2].tolist()
            assert [name for name, _ in p.labels] == [model.card.classes[i] for i in best]
            assert p.labels[0][1] == pytest.approx(probabilities.max().item(), abs=1e-5)


def test_a_file_that_is_no_image_is_named_and_the_others_are_predicted(model, folder):
    files = expand([str(folder / "val" / "digit0")])
    (folder / "bad.png").write_bytes(b"nothing")
    found = list(predict(model, [*files, str(folder / "bad.png"), *files], batch_size=3))
    faults = [p.fault for p in found if p.fault]
    assert len(faults) == 1 and "bad.png: no image" in faults[0]
    assert [p.labels for p in found[:4]] == [p.labels for p in found[5:]]
    assert found[4].labels == []


def test_folders_and_files_are_expanded(folder):
    one = str(folder / "val" / "digit0" / "000.png")
    assert expand([one, str(folder / "val" / "digit1")])[0] == one
    with pytest.raises(eit.UserError, match="no such image: gone.png"):
        expand(["gone.png"])
    (folder / "empty").mkdir()
    with pytest.raises(eit.UserError, match="no images below"):
        expand([str(folder / "empty")])
