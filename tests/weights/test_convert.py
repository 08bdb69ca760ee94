"""What is guessed about weights is marked, and can be given; `eit convert` in this process."""

import json
from functools import partial

import pytest
import safetensors
import safetensors.torch
import timm
import torch
import typer.testing
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

import eit
from eit.cli.app import app
from eit.config import load_recipe
from eit.training.setup import make_view
from eit.weights.card import Card, assumed, parse_card
from eit.weights.convert import infer_card, preprocessing_of_timm
from eit.weights.formats import read_weights, save_weights
from eit.weights.load import load, read_card
from tests.weights.test_load import SMALL, card

ARGUMENTS = {k: v for k, v in SMALL.items() if k != "img_size"}
NAMED = ["--model", "eit_mini", *(f"{k}={v}" for k, v in ARGUMENTS.items())]
ALL = ("classes", "mean", "std", "resize", "interpolation", "size")


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A state dict of three classes, of somebody's loop."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(eit.create_model("eit_mini", num_classes=3, **SMALL).state_dict(), "theirs.pth")


def convert(*words, source="theirs.pth", named=NAMED, status=0):
    done = typer.testing.CliRunner().invoke(app, ["convert", source, "out.safetensors", *named, *map(str, words)])
    assert done.exit_code == status, done.output
    if status:
        assert done.exception is None or isinstance(done.exception, SystemExit)
        return " ".join(done.output.split())
    return read_card("out.safetensors"), " ".join(done.output.split())


def test_what_is_guessed_is_marked_and_said(theirs, capsys):
    made, said = convert()
    assert set(made.guessed) == set(ALL) and made.classes == ["0", "1", "2"]
    assert "assumed, as theirs.pth does not say it: classes 0, 1, 2, mean (0.485" in said
    assert "give --classes, --mean, --std, --crop-ratio, --interpolation, --size" in said
    load("out.safetensors")
    assert "assumed: classes 0, 1, 2" in " ".join(capsys.readouterr().err.split())


def test_what_is_given_is_known(theirs, tmp_path, capsys):
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\nowl\r\n\r\n")
    made, said = convert(
        *("--size", 16, "--classes", "names.txt", "--mean", "0.5", "--std", "0.2,0.3, 0.4"),
        *("--crop-ratio", 0.8, "--interpolation", "bilinear"),
    )
    assert made.guessed == () and "assumed" not in said
    assert (made.mean, made.std) == ((0.5,) * 3, (0.2, 0.3, 0.4))
    assert (made.classes, made.resize, made.interpolation) == (["cat", "dog", "owl"], 20, "bilinear")
    assert load("out.safetensors").card == made and not capsys.readouterr().err
    made, _ = convert("--mean", "[0.1,0.2,0.3]", "--size", 16)
    assert made.mean == (0.1, 0.2, 0.3) and set(made.guessed) == {"classes", "std", "resize", "interpolation"}


def test_weights_that_describe_themselves_can_be_corrected(theirs):
    save_weights(eit.weights.load.Path("mine.safetensors"), load_state(), card())
    made, _ = convert("--mean", "0.25", source="mine.safetensors", named=[])
    assert made == card(mean=(0.25,) * 3)
    assert "leave out --model" in convert("--size", 8, source="mine.safetensors", named=[], status=2)


def load_state():
    return read_weights(eit.weights.load.Path("theirs.pth"))[0]


@pytest.mark.parametrize(
    ("name", "mean", "resize"),
    [
        ("timm/vit_tiny_patch16_224", (0.5,) * 3, 248),
        ("timm/vit_tiny_patch16_224.augreg_in21k", (0.5,) * 3, 248),
        ("timm/deit_tiny_patch16_224", (0.485, 0.456, 0.406), 248),
        ("timm/resnet50.tv_in1k", (0.485, 0.456, 0.406), 256),
    ],
)
def test_the_preprocessing_of_a_model_of_timm_is_taken(name, mean, resize):
    found = preprocessing_of_timm(name, 224)
    assert (tuple(found["mean"]), found["resize"]) == (mean, resize)
    cfg = timm.get_pretrained_cfg(name.removeprefix("timm/"))
    assert found["interpolation"] == cfg.interpolation and found["std"] == cfg.std


def test_like_a_model_of_timm(theirs):
    made, said = convert("--like", "timm/vit_tiny_patch16_224", "--size", 16, "--std", 0.4)
    assert (made.mean, made.std, made.resize) == ((0.5,) * 3, (0.4,) * 3, 17)
    assert made.guessed == ("classes",) and said.endswith("give --classes")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mean", "0.5,0.5"], "--mean 0.5,0.5: the model has 3 channels"),
        (["--mean", "grey"], "--mean grey: give one number"),
        (["--std", "nan"], "--std nan"),
        (["--std", "0"], "std.0=0.0: Input should be greater than 0"),
        (["--crop-ratio", "1.5"], "--crop-ratio"),
        (["--interpolation", "lanczos"], "lanczos"),
        (["--like", "vit_tiny_patch16_224"], "give timm/NAME"),
        (["--like", "timm/vit_tinny"], "timm has no model 'vit_tinny'"),
        (["--like", "timm/vit_tiny_patch16_224.mine"], "--like timm/vit_tiny_patch16_224.mine"),
        (["in_chans=4"], "takes images of 4 channels"),
        (["in_chans=2"], "takes images of 2 channels"),
    ],
)
def test_bad_values_are_one_line(theirs, words, said):
    assert said in convert(*words, status=2)


@pytest.mark.parametrize("channels", [2, 4, 13])
def test_images_of_other_channels_are_refused_in_one_line(tmp_path, channels):
    state = eit.create_model("eit_mini", num_classes=3, in_chans=channels, **SMALL).state_dict()
    for named in (None, "eit_mini"):
        with pytest.raises(eit.UserError, match=f"takes images of {channels} channels"):
            infer_card(state, tmp_path / "w.pth", named, ARGUMENTS, 16)


def test_grey_weights_are_recognised(tmp_path):
    state = eit.create_model("eit_mini", num_classes=3, in_chans=1, **SMALL).state_dict()
    made = infer_card(state, tmp_path / "w.pth", "eit_mini", ARGUMENTS, 16)
    assert made.arguments["in_chans"] == 1 and made.mean == (0.5,)


# -- Files of earlier versions


def header(**changes):
    made = card(**changes).model_dump(mode="json")
    del made["guessed"]
    return made


def test_a_file_that_was_converted_before_guesses_were_marked_is_read_with_its_guesses():
    invented = header(**assumed(3, 3, 16))
    assert set(parse_card(invented, "x").guessed) == set(ALL) - {"size"}
    named = invented | dict(classes=["cat", "dog", "owl"])
    assert set(parse_card(named, "x").guessed) == {"mean", "std", "resize", "interpolation"}
    assert parse_card(invented | dict(mean=[0.1] * 3), "x").guessed == ()  # that version had no option for it
    trained = invented | dict(recipe=dict(name="pets"))
    assert parse_card(trained, "x").guessed == ()


def test_weights_of_a_run_are_written_as_before(tmp_path):
    """No field more, so that earlier versions read them."""
    made = card(recipe=dict(name="pets"))
    save_weights(tmp_path / "w.safetensors", made.create_model().state_dict(), made)
    with safetensors.safe_open(tmp_path / "w.safetensors", framework="pt") as f:
        assert "guessed" not in json.loads(f.metadata()["eit"])


def test_an_unknown_guess_is_damage():
    with pytest.raises(eit.UserError, match="damaged"):
        parse_card(header() | dict(guessed=["everything"]), "x")


# -- Folders of timm


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (SMALL, None),
        (SMALL | dict(family="lsra", cls_conv="mean"), ["cat", "dog", "owl"]),
        (SMALL | dict(family="vit", patch_size=4, in_chans=1), {"0": "cat", "1": "dog", "2": "owl"}),
    ],
)
def test_a_folder_of_save_for_hf_is_weights(tmp_path, arguments, names, safe):
    torch.manual_seed(0)
    model = eit.create_model("eit_mini", num_classes=3, **arguments).eval()
    look = dict(
        mean=(0.1,) * model.in_chans, std=(0.3,) * model.in_chans, crop_pct=0.8, input_size=(model.in_chans, 16, 16)
    )
    config = dict(label_names=names) if names else {}
    timm.models.save_for_hf(model, tmp_path / "hf", model_config=config, data_config=look, safe_serialization=safe)
    again = load(tmp_path / "hf")
    x = torch.randn(2, model.in_chans, 16, 16)
    assert torch.equal(again(x), model(x))
    assert (again.card.mean, again.card.size, again.card.resize) == ((0.1,) * model.in_chans, 16, 20)
    assert again.card.classes == (["cat", "dog", "owl"] if names else ["0", "1", "2"])
    assert again.card.guessed == (() if names else ("classes",))


def test_a_repository_of_the_hub_that_timm_wrote_is_weights(tmp_path, monkeypatch):
    """With a pickle instead of safetensors; without a network the first try ends it."""
    asked = []

    class Missing(EntryNotFoundError):
        def __init__(self, kind="no such file"):
            Exception.__init__(self, kind)

    class Offline(LocalEntryNotFoundError):
        def __init__(self):
            Exception.__init__(self, "offline")

    def download(repo, name, revision, failure=Missing):
        asked.append(name)
        if not (tmp_path / "hf" / name).exists():
            raise failure()
        return str(tmp_path / "hf" / name)

    monkeypatch.setattr("eit.weights.load.hf_hub_download", download)
    timm.models.save_for_hf(eit.create_model("eit_mini", num_classes=3, **SMALL), tmp_path / "hf")
    assert load("hf-hub:me/pets").card.guessed == ("classes",)
    assert asked == ["model.safetensors", "pytorch_model.bin", "config.json"]
    (tmp_path / "hf" / "pytorch_model.bin").unlink()
    for failure, count in ((Missing, 2), (Offline, 1), (TimeoutError, 1)):
        asked.clear()
        monkeypatch.setattr("eit.weights.load.hf_hub_download", partial(download, failure=failure))
        with pytest.raises(eit.UserError, match="hf-hub:me/pets cannot be fetched"):
            load("hf-hub:me/pets")
        assert len(asked) == count


def test_a_folder_of_another_model_of_timm_is_weights(tmp_path):
    model = timm.create_model("resnet10t", num_classes=3)
    timm.models.save_for_hf(model, tmp_path / "hf", safe_serialization=True)
    again = load(tmp_path / "hf")
    assert again.card.model == "timm/resnet10t" and again.card.mean == (0.485, 0.456, 0.406)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(x), model.eval()(x))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"architecture": "eit_mini"}', "[" * 100_000, '{"architecture": 1, "pretrained_cfg": 2}']
)
def test_a_damaged_configuration_is_one_line(tmp_path, text):
    torch.save(eit.create_model("eit_mini", num_classes=3, **SMALL).state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(eit.UserError, match=r"config\.json is not of timm\.models\.save_for_hf") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_of_a_model_of_timm_are_converted_by_its_name(theirs):
    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), "r.pth")
    made, _ = convert("--like", "timm/resnet10t", source="r.pth", named=["--model", "timm/resnet10t"])
    assert made.model == "timm/resnet10t" and set(made.guessed) == {"classes", "size"}
    assert "for a model of timm give --model timm/NAME" in convert(source="r.pth", named=[], status=2)


# -- What untrusted weights may ask for


@pytest.mark.parametrize(
    "changes", [dict(size=4097), dict(resize=65536), dict(size=2**40), dict(recipe=dict(data="x"))]
)
def test_sizes_beyond_the_limits_are_refused(changes):
    with pytest.raises(eit.UserError, match="damaged"):
        parse_card(header() | changes, "x")


@pytest.mark.parametrize("section", ["model", "data", "augment", "loss", "optim", "train"])
@pytest.mark.parametrize("value", ["text", 3, ["a"], None])
def test_a_section_of_a_recipe_that_is_none_is_damage(section, value):
    with pytest.raises(eit.UserError, match="damaged"):
        parse_card(header() | dict(recipe={section: value}), "x")


def test_weights_lower_the_limit_on_pixels_and_never_raise_it():
    limits = {n: Card(**header() | dict(recipe=dict(data=dict(max_pixels=n)))).max_pixels for n in (5, 10**7, 10**12)}
    assert limits == {5: 5, 10**7: 10**7, 10**12: eit.data.images.MAX_PIXELS}


@pytest.mark.parametrize(
    "keys", [["data.image_size=5000"], ["data.image_size=4096", "data.crop_ratio=0.3"], ["data.image_size=100000"]]
)
def test_a_recipe_cannot_make_weights_that_would_be_refused(keys):
    with pytest.raises(eit.UserError, match="images have at most 4096 pixels"):
        make_view(load_recipe("cifar10", keys))


CONFIG = dict(architecture="eit_mini", num_classes=3, model_args=ARGUMENTS, label_names=["a", "b", "c"])
LOOK = dict(mean=[0.5] * 3, std=[0.5] * 3, input_size=[3, 16, 16], crop_pct=0.8, interpolation="bicubic")


def hf_folder(folder, look=LOOK, **changes):
    model = eit.create_model("eit_mini", num_classes=3, **SMALL)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    text = json.dumps(CONFIG | dict(pretrained_cfg=look) | changes)
    (folder / "config.json").write_text("\ufeff" + text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("crop_mode", ["squash", "border", "center", None])
def test_a_crop_that_is_not_from_the_centre_is_a_guess(tmp_path, crop_mode):
    made = load(hf_folder(tmp_path, LOOK | dict(crop_mode=crop_mode))).card
    assert made.guessed == (() if crop_mode in ("center", None) else ("resize",)) and made.mean == (0.5,) * 3


@pytest.mark.parametrize(
    "look, changes, message",
    [
        (LOOK | dict(input_size=[3, 16, 32]), {}, "images of 32x16 pixels: square ones are read"),
        (LOOK | dict(mean=[123.675, 116.28, 103.53]), {}, r"are not of pixels in 0\.\.1"),
        (LOOK | dict(input_size=[3, 10**9, 10**9]), {}, "size=1000000000: Input should be less than or equal to 4096"),
        (LOOK, dict(label_names=["a"]), "1 label_names for 3 classes"),
        (LOOK, dict(label_names="abc"), "label_names is of the type str"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_line(tmp_path, look, changes, message):
    with pytest.raises(eit.UserError, match=message) as error:
        load(hf_folder(tmp_path, look, **changes))
    assert "\n" not in str(error.value)


def test_a_configuration_of_transformers_says_nothing_of_the_model(tmp_path):
    model = eit.create_model("eit_mini", num_classes=3)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(architectures=["Mine"], model_type="mine")))
    assert load(tmp_path).card.guessed == ALL


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda state: state | {"more": torch.ones(1)},
            "taken for eit_mini, it does not fit the model: more is unknown",
        ),
        (lambda state: {k: v for k, v in state.items() if k != "norm.bias"}, "norm.bias is missing"),
        (
            lambda state: {f"a.{k}": v for k, v in state.items()} | {"b.x": torch.ones(1)},
            "To save the one under a: torch",
        ),
    ],
)
def test_weights_that_nearly_fit_say_what_differs(tmp_path, change, message):
    torch.save(change(eit.create_model("eit_mini", num_classes=3).state_dict()), tmp_path / "w.pth")
    with pytest.raises(eit.UserError, match=message):
        load(tmp_path / "w.pth")


@pytest.mark.parametrize("words", [("--mean", "123.675,116.28,103.53"), ("--std", "58.4"), ("--mean", "-0.1")])
def test_numbers_of_pixels_in_0_to_255_are_refused(theirs, words):
    convert("--size", 16, *words, status=2)


def test_a_size_beyond_the_limit_is_one_line(theirs):
    convert("--size", 5000, status=2)
