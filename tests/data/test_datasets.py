import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import eit
from eit.cli.data import check_text
from eit.config import Data, load_recipe
from eit.data import datasets
from eit.data.datasets import (
    _class_difference,
    _class_warnings,
    check,
    distinct_names,
    open_data,
    open_evaluation,
    open_unlabelled,
    split,
)
from eit.data.folders import read_folder
from eit.data.images import MAX_PIXELS, Images
from eit.errors import UserError
from eit.inference.evaluation_data import evaluation_config
from eit.inference.predict import predict
from tests.helpers.images import save_digits


def test_an_image_folder(folder):
    train, val = open_data(Data(root=str(folder)))
    assert train.classes == val.classes == ["digit0", "digit1", "digit2"]
    assert Counter(train.labels) == {0: 12, 1: 12, 2: 12}
    assert len(val) == 12
    assert train.names[0] == "digit0/000.png"
    assert train.read(0, 3).size == (16, 16)


def test_digits_have_a_fixed_stratified_fifth_for_validation():
    train, val = open_data(Data(root="sklearn:digits"))
    assert (len(train), len(val), len(train.classes)) == (1437, 360, 10)
    assert not set(train.names) & set(val.names)
    counts = Counter(val.labels)
    assert max(counts.values()) - min(counts.values()) <= 2
    assert open_data(Data(root="sklearn:digits"))[1].digest() == val.digest() != train.digest()


def test_a_part_of_train_is_held_out_by_class(folder):
    shutil.rmtree(folder / "val")
    train, val = open_data(Data(root=str(folder), val_fraction=0.25))
    assert Counter(val.labels) == {0: 3, 1: 3, 2: 3}
    assert len(train) == 27 and not set(train.names) & set(val.names)
    assert open_evaluation(Data(root=str(folder), val_fraction=0.25)).names == val.names


def test_what_is_evaluated(folder):
    assert len(open_evaluation(Data(root=str(folder)))) == 12
    assert len(open_evaluation(Data(root=str(folder / "train")))) == 36
    shutil.rmtree(folder / "val")
    with pytest.raises(UserError, match="has train/ but no val/"):
        open_evaluation(Data(root=str(folder)))


def no_train(root):
    (root / "train").rename(root / "training")


def no_val(root):
    shutil.rmtree(root / "val")


def empty_class(root):
    shutil.rmtree(root / "train" / "digit1")
    (root / "train" / "digit1").mkdir()


def no_classes(root):
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


def other_classes(root):
    (root / "val" / "digit2").rename(root / "val" / "zwei")


def one_class(root):
    for part in ("train", "val"):
        for name in ("digit1", "digit2"):
            shutil.rmtree(root / part / name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_train, "has no train/ folder"),
        (no_val, "has no val/ folder: set data.val_fraction=0.1"),
        (empty_class, "no images in class digit1"),
        (no_classes, "has no class folders"),
        (other_classes, "different classes; only in train/: digit2; only in val/: zwei"),
        (one_class, "has one class, 'digit0': at least two are needed"),
    ],
)
def test_a_wrong_folder_is_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError) as error:
        open_data(Data(root=str(folder)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    report = check(str(folder), MAX_PIXELS)
    assert not report["ok"] and message.split(";")[0] in " ".join(report["problems"])
    if damage is no_val:
        assert check(str(folder), MAX_PIXELS, val_fraction=0.25)["ok"]


def test_a_missing_root_is_one_line():
    with pytest.raises(UserError, match="data.root is not set"):
        open_data(Data())
    with pytest.raises(UserError, match="/nowhere is not a folder"):
        open_data(Data(root="/nowhere"))


def test_too_few_images_to_hold_out(tmp_path):
    save_digits(tmp_path, train=1)
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(UserError, match="cannot hold out a part of each class"):
        open_data(Data(root=str(tmp_path), val_fraction=0.1))


def test_check_reports_counts_sizes_and_what_is_unreadable(folder):
    Image.fromarray(np.zeros((10, 20), np.uint8)).save(folder / "train" / "digit0" / "wide.png")
    report = check(str(folder), MAX_PIXELS)
    assert report["ok"]
    train = report["splits"]["train"]
    assert train["images"] == 37
    assert train["classes"] == {"digit0": 13, "digit1": 12, "digit2": 12}
    assert train["sizes"][0] == dict(width=16, height=16, images=36)
    assert (train["smallest"], train["largest"]) == (10, 20)

    (folder / "val" / "digit0" / "bad.png").write_bytes(b"nothing")
    report = check(str(folder), MAX_PIXELS)
    assert not report["ok"]
    assert "bad.png" in report["splits"]["val"]["unreadable"][0]
    assert "unreadable images in val/" in report["problems"][0]


def test_a_class_without_validation_images_is_not_ready(tmp_path, capsys):
    root = save_digits(tmp_path / "data", train=20)
    shutil.rmtree(root / "val")
    report = check(str(root), MAX_PIXELS, val_fraction=0.1)
    assert report["ok"] and not report["warnings"] and check_text(report).endswith("\nready to train")
    for i in range(1, 20):
        (root / "train" / "digit0" / f"{i:03d}.png").unlink()
    report = check(str(root), MAX_PIXELS, val_fraction=0.1)
    warning = "1 class has no validation images: digit0"
    assert report["ok"] and warning in report["warnings"]
    assert check_text(report).endswith(f"warning: {warning}\ncan be trained on, but see the warnings")
    open_data(Data(root=str(root), val_fraction=0.1))
    assert warning in capsys.readouterr().err


@pytest.mark.parametrize(("part", "kind"), [("val", "validation"), ("train", "training")])
def test_a_class_that_only_seems_to_have_images_is_not_ready(tmp_path, part, kind):
    root = save_digits(tmp_path / "data")
    for file in (root / part / "digit1").iterdir():
        file.write_bytes(b"x")
    report = check(str(root), MAX_PIXELS)
    assert f"no image of digit1 in {part}/ can be read" in report["warnings"]
    assert "ready to train" not in check_text(report).splitlines()
    images = read_folder(root / part)
    kept = images.subset(i for i, label in enumerate(images.labels) if label != 1)
    pair = (kept, images) if part == "train" else (images, kept)
    assert _class_warnings(*pair) == [f"1 class has no {kind} images: digit1"]


@pytest.mark.parametrize(
    ("kind", "highest", "warned"),
    [("uint16", 4000, "[0,4095]"), ("uint16", 900, "[0,1023]"), ("uint16", 60000, ""), ("uint8", 200, "")],
)
def test_check_reports_the_range_that_it_saw(folder, kind, highest, warned):
    values = np.linspace(0, highest, 64).reshape(8, 8).astype(kind)
    Image.fromarray(values).save(folder / "train" / "digit0" / "wide.png")
    report = check(str(folder), MAX_PIXELS)
    name = "16 bits" if kind == "uint16" else "8 bits"
    seen = report["splits"]["train"]["pixels"][name]
    assert (seen["lowest"], seen["highest"]) == (0, highest if kind == "uint16" else 255)
    assert (warned in "".join(report["warnings"])) if warned else not report["warnings"]
    if warned:
        given = (0.0, float(warned[3:-1]))
        assert not check(str(folder), MAX_PIXELS, pixel_range=given)["warnings"]
        assert "16 bits: 0 to" in check_text(report) and "can be trained on, but see the warnings" in check_text(report)


def test_check_reports_the_range_of_images_that_need_one(folder):
    Image.fromarray(np.full((8, 8), 0.25, np.float32)).save(folder / "val" / "digit0" / "f.tif")
    report = check(str(folder), MAX_PIXELS)
    assert not report["ok"] and "set data.pixel_range=" in report["problems"][0]
    assert report["splits"]["val"]["pixels"]["float"] == dict(images=1, lowest=0.25, highest=0.25)
    assert check(str(folder), MAX_PIXELS, pixel_range=(0, 1))["ok"]


def test_the_range_holds_in_training_evaluation_and_prediction(folder):
    config = Data(root=str(folder), pixel_range=(0, 4095))
    file = folder / "val" / "digit0" / "f.tif"
    Image.fromarray(np.full((8, 8), 2048, np.float32)).save(file)
    for images in (open_data(config)[1], open_evaluation(config), open_unlabelled(config, "val")):
        index = next(i for i, source in enumerate(images.sources) if source == str(file))
        assert images.read(index, 1).getpixel((0, 0)) == 128
    model = eit.load("digits")
    assert next(predict(model, [file])).fault
    model.card.recipe["data"]["pixel_range"] = [0, 4095]
    assert model.card.pixel_range == (0, 4095) == evaluation_config(model.card, str(folder)).pixel_range
    assert not next(predict(model, [file])).fault


@pytest.mark.parametrize("words", ["[4095,0]", "[1,1]", "[0]", "wide"])
def test_a_range_that_is_none_is_one_line(words):
    with pytest.raises(UserError, match=r"data\.pixel_range"):
        load_recipe("digits", [f"data.pixel_range={words}"])


# -- Copies and balance


def copy(folder, source, *targets):
    for target in targets:
        shutil.copy(folder / source, folder / target)


def test_check_warns_of_copies_within_a_part(folder):
    assert not check(str(folder), MAX_PIXELS)["warnings"]
    copy(folder, "train/digit0/000.png", "train/digit0/copy.png", "train/digit1/copy.png")
    with Image.open(folder / "train/digit2/000.png") as image:
        image.save(folder / "train/digit2/same.bmp")  # other bytes, the same pixels
    warnings = check(str(folder), MAX_PIXELS)["warnings"]
    assert warnings[0].startswith(
        "3 images have the same pixels as another one in train/: digit0/copy.png = digit0/000.png"
    )
    assert warnings[1].endswith("one of another class in train/: digit1/copy.png = digit0/000.png")
    assert len(warnings) == 2


@pytest.mark.parametrize("count", [1, 2, 5])
def test_check_warns_of_images_that_are_trained_and_validated_on(folder, count):
    for i in range(count):
        copy(folder, f"train/digit1/00{i}.png", f"val/digit1/copy{i}.png")
    (warning,) = check(str(folder), MAX_PIXELS)["warnings"]
    begin = "1 validation image is a training image too" if count == 1 else f"{count} validation images are training"
    assert warning.startswith(begin) and "digit1/copy0.png = digit1/000.png" in warning
    assert ("and 2 more" in warning) == (count == 5)


@pytest.mark.parametrize(("left", "warned"), [(12, False), (4, False), (3, True), (1, True)])
def test_check_warns_of_classes_that_are_out_of_balance(folder, left, warned):
    for file in sorted((folder / "train/digit1").iterdir())[left:]:
        file.unlink()
    warnings = check(str(folder), MAX_PIXELS)["warnings"]
    assert bool(warnings) == warned
    if warned:
        assert warnings[0].startswith(f"classes are out of balance: digit0 has 12 training images, digit1 {left}")


def test_check_says_when_only_a_sample_is_compared(folder, monkeypatch):
    monkeypatch.setattr(datasets, "COMPARED", 10)
    report = check(str(folder), MAX_PIXELS)
    assert "copies were looked for among 9 of 36 images in train/" in report["notes"]
    monkeypatch.setattr(datasets, "COMPARED", 36)
    assert not [note for note in check(str(folder), MAX_PIXELS)["notes"] if "copies" in note]


# -- Class folders directly inside


@pytest.mark.parametrize("share", [0.2, 0.5, "auto"])
def test_class_folders_directly_inside_are_split(folder, share):
    root = folder / "train"
    train, val = open_data(Data(root=str(root), val_fraction=share))
    assert len(train) + len(val) == 36 and not set(train.names) & set(val.names)
    assert val.held_out == (0.2 if share == "auto" else share)
    assert open_evaluation(Data(root=str(root), val_fraction=share)).names == val.names


def test_check_takes_class_folders_directly_inside(folder):
    report = check(str(folder / "train"), MAX_PIXELS)
    assert report["ok"] and {name: part["images"] for name, part in report["splits"].items()} == dict(train=28, val=8)
    assert report["notes"][0].endswith("as eit finetune does; other recipes need a val/ folder")
    assert not check(str(folder / "train" / "digit0"), MAX_PIXELS)["ok"]


@pytest.mark.parametrize("names", [("training", "testing"), ("Training", "held_out"), ("a", "b")])
def test_parts_under_other_names_are_not_taken_for_classes(folder, names):
    for old, new in zip(("train", "val"), names, strict=True):
        (folder / old).rename(folder / new)
    with pytest.raises(UserError, match="hold the same class folders: call them train and val"):
        open_data(Data(root=str(folder), val_fraction="auto"))


def test_a_part_that_is_alone_is_not_taken_for_a_class(folder):
    no_train(folder)
    with pytest.raises(UserError, match="has no train/ folder"):
        open_data(Data(root=str(folder), val_fraction="auto"))


def test_class_folders_without_a_share_are_told_how_to_split(folder):
    with pytest.raises(UserError, match=r"move its class folders into .*, or hold out a share of each: data.val_frac"):
        open_data(Data(root=str(folder / "train")))


@pytest.mark.parametrize(
    ("counts", "held"), [((5, 1), (1, 0)), ((2, 2, 2), (1, 1, 1)), ((30, 2, 1), (6, 1, 0)), ((3, 9), (1, 2))]
)
def test_each_class_of_two_images_has_one_in_each_part(counts, held):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    names = [str(i) for i in range(len(labels))]
    images = Images([str(i) for i in range(len(counts))], labels, names, names)
    train, val = split(images, 0.2)
    assert [val.labels.count(label) for label in range(len(counts))] == list(held)
    assert all(train.labels.count(label) for label in range(len(counts)))
    assert sorted(train.names + val.names, key=int) == names and split(images, 0.2)[1].names == val.names


def test_auto_takes_test_images_before_it_splits(folder):
    (folder / "val").rename(folder / "test")
    assert len(open_data(Data(root=str(folder), val_fraction="auto"))[1]) == 12
    shutil.rmtree(folder / "test")
    assert len(open_data(Data(root=str(folder), val_fraction="auto"))[1]) == 8


def test_equal_names_are_told_apart_by_position():
    assert distinct_names(["crane", "dog", "crane"]) == ["crane (0)", "dog", "crane (2)"]
    assert "more than one class is called crane" in _class_difference(
        ["crane", "crane", "dog"], ["crane", "dog", "crane"]
    )
    assert "another order" in _class_difference(["a", "b"], ["b", "a"])


def test_the_digest_sees_names_and_labels(folder):
    before = open_data(Data(root=str(folder)))[0].digest()
    (folder / "train" / "digit0" / "000.png").rename(folder / "train" / "digit1" / "zzz.png")
    assert open_data(Data(root=str(folder)))[0].digest() != before
