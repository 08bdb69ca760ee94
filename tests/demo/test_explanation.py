"""What the page says of a picture is what predict and analyze say of it; what it cannot read is one line."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eit
from eit.data.images import to_mode
from eit.demo.examples import DIGIT_CLASSES, write_examples
from eit.demo.explanation import explain, to_html
from eit.demo.page import MOST_BYTES, Refused, _answer, _is_local, read_picture
from eit.errors import UserError
from eit.inference.exported_models import ExportedModel
from tests.weights.test_load import card as make_card

SMALL = dict(embed_dim=16, depth=3, num_heads=4)


def model(seed=0, **changes):
    """A small model with a card, as eit.load gives it."""
    torch.manual_seed(seed)
    card = make_card(**changes)
    made = card.create_model().eval()
    made.card = card
    return made


def picture(seed=0, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), "u1"))


MODELS = {
    "digits": lambda: eit.load("digits"),
    "eit": lambda: model(arguments=SMALL, size=32),
    "lsra": lambda: model(arguments=SMALL | dict(family="lsra"), size=32),
    "vit": lambda: model(arguments=SMALL | dict(family="vit"), size=32),
    "timm": lambda: model(model="timm/test_vit", arguments={}, size=160),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_it_says_what_predict_and_analyze_say(name):
    made, image = MODELS[name](), picture()
    found = explain(made, to_mode(image, made.card.in_chans))
    made.norm.register_forward_hook(lambda *_: None)  # so that predict computes all tokens, as the explanation does
    (predicted,) = eit.predict(made, image)
    assert found.labels == predicted.labels and not found.missing
    analysis = eit.analyze(made, made.card.view.pixels(image)[None].float())  # its shapes
    assert [layer.number for layer in found.layers] == list(range(analysis.depth + 1))
    assert [layer.frequency.grid for layer in found.layers[1:]] == [f.grid for f in analysis.layers_at("block")]
    for layer, attention in zip(found.layers[1:], analysis.attention, strict=True):
        assert layer.heads.shape == (len(attention.distance), *attention.grid)
        assert (layer.heads >= 0).all() and (layer.heads.flatten(1).sum(dim=1) <= 1 + 1e-5).all()


@torch.no_grad()
def test_frequencies_are_those_of_analyze():
    made, image = MODELS["eit"](), picture(3)
    view = made.card.view
    pixels = (view.pixels(image)[None].float() / 255 - torch.tensor(view.mean).view(-1, 1, 1)) / torch.tensor(
        view.std
    ).view(-1, 1, 1)
    analysis = eit.analyze(made, pixels)
    expected = [f.share for f in (*analysis.layers_at("stem"), *analysis.layers_at("block"))]
    assert [layer.frequency.share for layer in explain(made, image).layers] == pytest.approx(expected, abs=1e-6)


def test_the_mode_of_the_model_changes_nothing_and_is_kept():
    made, image = model(arguments=SMALL | dict(drop_rate=0.5, drop_path_rate=0.5), size=32), picture()
    before = explain(made, image).labels
    made.train()
    assert explain(made, image).labels == before and made.training and made.blocks[0].training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.modules())


def exported(logits):
    card = make_card()
    return ExportedModel(Path("x.onnx"), card, lambda x: np.full((len(x), len(card.classes)), logits, "f4"), True)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: exported(1.0), "the layers of an exported file"),
        (lambda: model(model="timm/test_resnet", arguments={}, size=64), "attention"),
        (lambda: model(model="timm/test_mambaout", arguments={}, size=64), "attention"),
        (lambda: model(model="timm/test_efficientnet", arguments={}, size=64), "attention"),
    ],
)
def test_what_cannot_be_shown_is_said_and_the_classes_are_there(made, said):
    made = made()
    found = explain(made, picture())
    assert len(found.labels) == len(made.card.classes) == 3 and found.missing and said in found.missing[0]
    assert found.missing[0].replace("'", "&#39;") in to_html(found)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_are_one_line(value):
    with pytest.raises(UserError, match="NaN or infinite"):
        explain(exported(value), picture())
    made = MODELS["eit"]()
    with torch.no_grad():
        made.head.weight.fill_(value)
    with pytest.raises(UserError, match="NaN or infinite"):
        explain(made, picture())


def test_the_page_of_each_layer_names_its_parts_for_those_who_do_not_see_them():
    made = MODELS["eit"]()
    text = to_html(explain(made, picture()))
    assert text.count("<details") == 4 and text.count("<details open") == 1
    assert text.count('aria-label="Attention of the class token in layer 2, head') == 4
    assert len(re.findall(r'role="img" aria-label="Spectrum of (?:stem|layer \d)', text)) == 4
    assert 'alt="The picture as the model sees it, 32x32 pixels"' in text
    assert not re.search(r"https?://|<script|javascript:", text)


# -- Pictures that are sent -------------------------------------------------------------------------------------------


@pytest.fixture
def sent(tmp_path):
    """What a browser sends for a file with this content, which was uploaded."""
    folder = tmp_path / "uploads"
    folder.mkdir()

    def send(content, name="photo.png"):
        file = folder / "0123"
        if isinstance(content, Image.Image):
            content.save(file, "PNG")
        else:
            file.write_bytes(content)
        return dict(path=str(file), orig_name=name, url="http://127.0.0.1:1/x", meta={"_type": "gradio.FileData"})

    send.folder = folder
    return send


CARD = make_card()


@pytest.mark.parametrize(
    "made", [picture(), Image.new("L", (9, 70)), Image.new("RGBA", (5, 5)), Image.new("I;16", (8, 8))]
)
def test_pictures_are_read_by_the_decoder_of_the_package(sent, made):
    assert read_picture(sent(made), CARD, sent.folder, None).mode == "RGB"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "photo.png: "),
        (b"no image", "photo.png: no image, or of a format that is not read"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "photo.png: "),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "photo.png: no image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "photo.png: no image"),
        (Image.new("1", (4000, 3000)), "photo.png has more than 1,000,000 pixels"),
    ],
)
def test_broken_and_huge_pictures_are_refused_in_one_line(sent, content, said):
    with pytest.raises(Refused) as refused:
        read_picture(sent(content), CARD, sent.folder, 1_000_000)
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)
    assert str(sent.folder) not in str(refused.value)


def test_a_file_of_too_many_bytes_is_refused(sent):
    value = sent(b"")
    with open(value["path"], "wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(Refused, match="has more than 20 MiB"):
        read_picture(value, CARD, sent.folder, None)


def test_other_files_are_not_read(sent, tmp_path):
    picture().save(tmp_path / "private.png")
    (sent.folder / "link").symlink_to(tmp_path / "private.png")
    (sent.folder / "subfolder").mkdir()
    values = [
        "/etc/passwd",
        dict(path="/etc/passwd"),
        dict(path=str(tmp_path / "private.png")),
        dict(path=str(sent.folder / ".." / "private.png")),
        dict(path=str(sent.folder / "link")),
        dict(path=str(sent.folder / "subfolder")),
        dict(path=str(sent.folder / "missing.png")),
        dict(path="https://example.com/x.png"),
        dict(path=None, url="data:image/png;base64,AAAA"),
        dict(path=["x"]),
        [1],
        3,
    ]
    for value in values:
        with pytest.raises(Refused):
            read_picture(value, CARD, sent.folder, None)


@pytest.mark.parametrize("name", ["<script>x</script>", "a\nb\x1b[31m", "x" * 500, "\u202egnp.exe", None, 7, ""])
def test_hostile_names_stay_one_short_line(sent, name):
    with pytest.raises(Refused) as refused:
        read_picture(sent(b"no image", name), CARD, sent.folder, None)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 130


@pytest.mark.parametrize(
    "classes",
    [["<script>alert(1)</script>", "b", "c"], ["cat", "cat", "cat"], ["x" * 500, "y" * 500, "a\nb\x1b[31m\u202e"]],
)
def test_any_class_names_are_short_printable_and_all_there(sent, classes):
    shown, layers = _answer(model(classes=classes), sent(picture()), sent.folder, None)
    assert len(shown) == 3 and sum(shown.values()) == pytest.approx(1)
    assert all(name.isprintable() and len(name) < 70 for name in shown) and "alert" not in layers


# -- Examples and addresses -------------------------------------------------------------------------------------------


def test_examples_are_the_runs_own_images_only_on_a_page_of_ones_own(tmp_path):
    made, data = MODELS["eit"](), tmp_path / "data"
    for name in made.card.classes:
        (data / "val" / name).mkdir(parents=True)
        picture(size=(10, 10)).save(data / "val" / name / "1.png")
    (data / "val" / made.card.classes[0] / "2.png").write_bytes(b"broken")
    made.card = made.card.model_copy(update=dict(recipe=dict(data=dict(root=str(data)))))
    title, files = write_examples(made, tmp_path, own=True)
    assert title == "Validation images of the run" and files
    assert all(max(Image.open(file).size) >= 64 for file in files)
    assert write_examples(made, tmp_path, own=False)[0] == "Photos of scikit-learn"


@pytest.mark.parametrize(
    ("classes", "root", "title", "count"),
    [
        (DIGIT_CLASSES, "/nowhere", "Scanned digits, of scikit-learn", 6),
        (["cat", "dog"], "/nowhere", "Photos of scikit-learn", 2),
        (["cat", "dog"], None, "Photos of scikit-learn", 2),
    ],
)
def test_examples_of_a_run_whose_data_are_elsewhere(tmp_path, classes, root, title, count):
    made = model(classes=classes, recipe=root and dict(data=dict(root=root)))
    found, files = write_examples(made, tmp_path, own=True)
    assert found == title and len(files) == count and all(file.is_file() for file in files)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("127.5.5.5", True),
        ("0.0.0.0", False),
        ("192.168.1.2", False),
        ("me", False),
    ],
)
def test_an_address_is_local_or_it_is_not(host, local):
    assert _is_local(host) == local
