import copy
import doctest
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

import eit
from eit.config import load_recipe
from eit.data.images import Images, decode, normalise
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


# -- What Python callers give


@pytest.fixture(scope="module")
def digits():
    return eit.load("digits")


def picture(mode="RGB", size=(12, 9)):
    return Image.effect_noise(size, 80).convert(mode)


def forms(image, file):
    """One image in all forms."""
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    return [
        str(file),
        Path(file),
        image,
        array,
        tensor,
        [str(file)],
        (Path(file),),
        [image],
        [array],
        tensor[None],
        array[None],
    ]


def test_one_image_in_any_form_is_one_prediction(digits, tmp_path):
    image = picture()
    image.save(tmp_path / "x.png")
    wanted = eit.predict(digits, [tmp_path / "x.png"])
    (wanted,) = wanted
    for given in forms(image, tmp_path / "x.png"):
        (found,) = eit.predict(digits, given)
        assert found.labels == wanted.labels and found.fault is None, type(given)
    assert [p.labels for p in eit.predict("digits", tmp_path)] == [wanted.labels]  # a folder, and weights by name
    assert [p.image for p in eit.predict(digits, iter([image, tmp_path / "x.png"]))] == [
        "image 0",
        str(tmp_path / "x.png"),
    ]
    grey, alpha = picture("L"), picture("RGBA")
    for pixels in (
        grey,
        np.asarray(grey),
        np.asarray(grey)[..., None],
        torch.from_numpy(np.asarray(grey).copy())[None],
        alpha,
        np.asarray(alpha),
    ):
        assert len(next(eit.predict(digits, pixels)).labels) == 5
    assert list(eit.predict(digits, [])) == []


@pytest.mark.parametrize(
    "given",
    [
        3,
        None,
        b"x.png",
        {"x.png": 1},
        [3],
        [b"x.png"],
        [["x.png"]],
        np.full((4, 4, 3), 255.0),  # floats are in 0..1
        np.full((4, 4), np.nan),
        np.zeros((4, 4), bool),
        np.zeros((4, 4), np.uint16),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3, 5, 5), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        torch.full((3, 4, 4), -0.1),  # normalised
        torch.zeros(5, 5, 3, dtype=torch.uint8),
        torch.zeros(4, dtype=torch.uint8),
        torch.zeros(3, 4, 4, dtype=torch.uint8, device="meta"),
        torch.zeros(3, 4, 4, dtype=torch.uint8).to_sparse(),
        ["gone.png"],
        "gone.png",
    ],
    ids=lambda given: f"{type(given).__name__} {getattr(given, 'shape', '')}",
)
def test_what_is_no_image_is_refused_at_once(digits, given):
    with pytest.raises(eit.UserError) as error:
        eit.predict(digits, given)  # not only when the first prediction is asked for
    assert "\n" not in str(error.value)


def test_an_open_file_and_a_model_without_a_card_are_refused_at_once(digits, tmp_path):
    picture().save(tmp_path / "x.png")
    with open(tmp_path / "x.png", "rb") as file:
        for given in (file, [file]):
            with pytest.raises(eit.UserError, match="files, folders, PIL images"):
                eit.predict(digits, given)
    for model in (torch.nn.Linear(1, 1), None, 3):
        with pytest.raises(eit.UserError, match="takes a model of eit.load"):
            eit.predict(model, tmp_path / "x.png")
    with pytest.raises(eit.UserError, match="top=0"):
        eit.predict(digits, tmp_path / "x.png", top=0)


class Modal(torch.nn.Module):
    """A model whose outputs depend on its mode, in a part of it."""

    def __init__(self, card):
        super().__init__()
        self.card, self.norm, self.drop = card, torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(x)).flatten(1)[:, : len(self.card.classes)]


def test_the_mode_of_a_model_changes_nothing_and_is_put_back(digits):
    model, image = Modal(digits.card), picture()
    before = image.tobytes()
    wanted = next(eit.predict(model.eval(), image)).labels
    model.train()
    model.norm.eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert next(eit.predict(model, image)).labels == wanted
    assert (model.training, model.norm.training, model.drop.training) == (True, False, True)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and image.tobytes() == before
    model.norm = torch.nn.Identity().train()
    model.forward = None
    with pytest.raises(TypeError):
        next(eit.predict(model, image))
    assert model.training  # after an error too


def test_outputs_that_are_not_finite_are_a_fault_of_that_image(digits):
    model = Modal(digits.card)
    for bad in (float("nan"), float("inf"), -float("inf")):
        model.forward = lambda x, bad=bad: torch.where(x[:, 0, 0, :1] > 0, bad, torch.zeros(len(x), 10))
        white, black = (np.full((8, 8, 3), value, np.uint8) for value in (255, 0))
        first, second, third = eit.predict(model, [black, white, black])
        assert second.labels == [] and second.fault == "image 1: the model's outputs are NaN or infinite"
        assert first.labels == third.labels and len(first.labels) == 5 and first.fault is None


def test_a_damaged_image_in_memory_is_a_fault(digits, tmp_path):
    picture(size=(300, 300)).save(tmp_path / "x.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "x.png").read_bytes()[:5000])
    found = list(eit.predict(digits, [Image.open(tmp_path / "cut.png"), tmp_path / "gone.png", tmp_path / "x.png"]))
    assert [bool(p.fault) for p in found] == [True, True, False]
    assert found[0].fault.startswith("image 0: ") and "gone.png: No such file" in found[1].fault


def test_weights_that_ask_for_large_inputs_get_small_batches(digits, monkeypatch):
    sizes = []
    model = Modal(digits.card.model_copy(update=dict(size=64, resize=64)))
    model.forward = lambda x: sizes.append(len(x)) or torch.zeros(len(x), 10)
    monkeypatch.setattr("eit.inference.predict.BATCH_PIXELS", 3 * 64**2)
    assert len(list(eit.predict(model, [picture()] * 7))) == 7 and sizes == [3, 3, 1]


@pytest.mark.parametrize("name", ["top", "batch_size", "max_pixels"])
@pytest.mark.parametrize("number", [0, -1, 1.5, True, "5", [3]])
def test_numbers_of_another_type_are_refused_at_once(digits, name, number):
    with pytest.raises(eit.UserError, match=f"^{name}=.*: give a whole number, at least 1$"):
        eit.predict(digits, picture(), **{name: number})


def test_whole_numbers_of_numpy_are_numbers(digits):
    (found,) = eit.predict(digits, picture(), top=np.int64(2), batch_size=np.uint8(1), max_pixels=np.int32(108))
    assert len(found.labels) == 2


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, "meta"])
def test_weights_that_images_do_not_fit_are_refused_at_once(digits, kind):
    model = copy.deepcopy(digits).to(kind)
    for call in (eit.predict, eit.evaluate):
        with pytest.raises(eit.UserError, match="cls_token of the model is .*: give a model of eit.load"):
            call(model, picture() if call is eit.predict else Rows())


class Rows:
    """Looks like a loader."""

    own_blocks = range(1)
    images = Images(["a", "b"], [], [], [])


@pytest.mark.parametrize(
    "image",
    [Image.new("RGB", (0, 5)), Image.new("L", (5, 0)), np.broadcast_to(np.uint8(0), (10**5, 10**5, 3)), picture()],
    ids=["no columns", "no rows", "larger than memory", "more than max_pixels"],
)
def test_images_of_too_few_or_too_many_pixels_are_faults(digits, image):
    found, other = eit.predict(digits, [image, picture(size=(3, 3))], max_pixels=100)
    assert "pixels; 1 to 100 are read (max_pixels)" in found.fault and other.labels


def test_floats_in_0_to_1_are_the_same_image(digits):
    """As torchvision's ToTensor and scikit-image give them."""
    image = picture()
    wanted = next(eit.predict(digits, image)).labels
    tensor = TF.to_tensor(image)
    for given in (tensor, tensor.double(), tensor.numpy().transpose(1, 2, 0), np.asarray(image) / 255, tensor[None]):
        assert next(eit.predict(digits, given)).labels == wanted
    assert torch.equal(digits.transform(tensor), digits.transform(image))
    assert next(eit.predict(digits, tensor.half())).labels == wanted  # 11 bits are enough for 8
    assert len(next(eit.predict(digits, tensor.bfloat16())).labels) == 5
    with pytest.raises(eit.UserError, match="image 1 has float pixels from -1 to 1: give them in 0..1, not normalised"):
        eit.predict(digits, [tensor, torch.linspace(-1, 1, 48).view(3, 4, 4)])


# -- What models of eit.load have more


def test_a_loaded_model_predicts_and_its_transform_gives_the_pixels_of_predict(digits, tmp_path, monkeypatch):
    image = picture(size=(70, 40))
    image.save(tmp_path / "x.png")
    (found,) = digits.predict(tmp_path / "x.png", top=2)
    assert found.labels == next(eit.predict(digits, image, top=2)).labels and len(found.labels) == 2
    seen = []
    forward = digits.forward
    monkeypatch.setattr(digits, "forward", lambda x: seen.append(x) or forward(x))
    for given in (image, image.convert("L"), np.asarray(image), tmp_path / "x.png", str(tmp_path / "x.png")):
        next(digits.predict(given))
        pixels = digits.transform(given)
        assert pixels.shape == (3, 32, 32) and torch.equal(pixels[None], seen.pop())
    for given in (tmp_path, [image], 3, tmp_path / "gone.png", np.zeros((2, 3, 40, 40), np.uint8)):
        with pytest.raises(eit.UserError):
            digits.transform(given)
    assert repr(digits.transform).startswith("Transform(shorter side 32 (bicubic), centre 32x32")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # timm asks for it all the same
def test_a_loaded_model_can_be_copied_saved_and_scripted(digits):
    image = picture()
    wanted = next(digits.predict(image)).labels
    twin = copy.deepcopy(digits)
    with torch.no_grad():
        twin.head.bias[3] += 100
    assert next(twin.predict(image)).labels[0][0] == "3"  # its own weights, not those of the first
    buffer = io.BytesIO()
    torch.save(digits, buffer)
    buffer.seek(0)
    assert next(torch.load(buffer, weights_only=False).predict(image)).labels == wanted
    assert torch.equal(pickle.loads(pickle.dumps(digits.transform))(image), digits.transform(image))
    assert list(digits.state_dict()) == list(eit.create_model("eit_mini", **digits.card.arguments).state_dict())
    x = digits.transform(image)[None]
    torch.testing.assert_close(torch.jit.script(digits)(x), digits(x))


def test_what_is_printed_is_short(digits):
    predictions = digits.predict([picture()] * 7, top=2)
    assert len(predictions) == 7
    first = repr(predictions).splitlines()
    assert len(first) == 6 and first[-1] == "... and 2 more" and first[0].startswith("<image 0: ") and "%" in first[0]
    assert repr(predictions).splitlines() == first and len(predictions) == 7  # looking takes nothing away
    one = next(predictions)
    assert one.image == "image 0" and str(one) == repr(one)[1:-1] and len(predictions) == 6
    assert [p.image for p in predictions] == [f"image {i}" for i in range(1, 7)]
    assert (repr(predictions), len(predictions)) == ("<no predictions are left>", 0)
    bad = eit.inference.predict.Prediction("x.png", [], "x.png: no image")
    assert str(bad) == "x.png: no image"
    assert len(repr(digits.card)) < 120 and "10 classes (0, 1, 2 and 7 more), 3x32x32" in repr(digits.card)
    assert str(digits.card) == repr(digits.card)
    assert digits.predict.__doc__.startswith("The most likely classes")


@pytest.mark.parametrize("name", [name for name in eit.__all__ if name != "__version__"])
def test_each_public_name_has_an_example(name):
    """tests/project/test_docs.py runs them."""
    assert doctest.DocTestParser().get_examples(getattr(eit, name).__doc__ or ""), name
