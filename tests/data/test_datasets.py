import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from eit.config import Data
from eit.data.datasets import check, open_data, open_evaluation
from eit.data.images import MAX_PIXELS
from eit.errors import UserError
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


def test_the_digest_sees_names_and_labels(folder):
    before = open_data(Data(root=str(folder)))[0].digest()
    (folder / "train" / "digit0" / "000.png").rename(folder / "train" / "digit1" / "zzz.png")
    assert open_data(Data(root=str(folder)))[0].digest() != before
