"""Which files below a folder are images, and which of its folders are parts of a data set."""

import shutil
import unicodedata

import pytest
from PIL import Image

from eit.analysis.inputs import choose_images
from eit.config import Data
from eit.data.datasets import check, open_data, open_evaluation, open_unlabelled
from eit.data.folders import describe_left_out, find_parts, is_class_folder, list_images, read_folder
from eit.data.images import MAX_PIXELS
from eit.errors import UserError
from eit.export.exporter import calibration_images
from eit.inference.predict import expand

ENTRIES = [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git", "#recycle", "lost+found", "$RECYCLE.BIN"]


def picture(file, colour=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(file, None if file.suffix.lower() in (".png", ".jpg") else "PNG")


def classes_of(root, *parts, names=("cat", "dog"), count=2):
    for part in parts:
        for name in names:
            for i in range(count):
                picture(root / part / name / f"{i}.png", i)
    return root


@pytest.mark.parametrize("entry", ENTRIES)
def test_hidden_and_system_folders_are_left_out_at_every_depth_and_counted(tmp_path, entry):
    classes_of(tmp_path, ".")
    for above in (tmp_path, tmp_path / "cat", tmp_path / "cat" / "deep" / "er"):
        picture(above / entry / "more.png")
    picture(tmp_path / "cat" / "deep" / "ok.PNG")
    files, left_out = list_images(tmp_path / "cat")
    assert [file.rpartition("/")[2] for file in files] == ["0.png", "1.png", "ok.PNG"]
    assert sum(left_out.values()) == 2 and describe_left_out("x", left_out).startswith("left out of x: 2 ")
    images = read_folder(tmp_path)
    assert len(images) == 5 and images.classes == ["cat", "dog"]


@pytest.mark.parametrize(
    "name", ["._0.png", ".hidden.jpg", "Thumbs.db", "desktop.ini", "notes.txt", "x.heic", "scan.eps"]
)
def test_files_that_are_left_out_are_counted_by_kind(tmp_path, name):
    classes_of(tmp_path, ".")
    (tmp_path / "dog" / name).write_bytes(b"x")
    images = read_folder(tmp_path)
    assert len(images) == 4 and sum(images.left_out.values()) == 1
    picture(tmp_path / "stray.png")
    assert read_folder(tmp_path).left_out["images outside of class folders"] == 1


@pytest.mark.parametrize(
    "name", ["a.jfif", "a.JPE", "a.GIF", "a.avif", "a.Tif", "a.jp2", "a.tga", "a.mpo", "a.ico", "a.qoi"]
)
def test_every_extension_of_pillow_is_an_image_in_any_case(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    assert len(list_images(tmp_path).files) == 1


def test_everybody_sees_the_same_images(tmp_path, capsys):
    root = classes_of(tmp_path / "data", "train", "val", count=5)
    for part in ("train", "val"):
        for hidden in ("@eaDir/0.png", ".x/0.png", "._0.png"):
            picture(root / part / "cat" / hidden)
        picture(root / part / "dog" / "more.JFIF")
    train, val = open_data(Data(root=str(root)))
    said = capsys.readouterr().err
    assert said.count("left out of") == 2 and "2 hidden, 1 system" in said
    assert len(train) == len(val) == len(open_evaluation(Data(root=str(root)))) == 11
    assert capsys.readouterr().err.count("left out of") == 1
    report = check(str(root), MAX_PIXELS)
    assert report["ok"] and report["splits"]["val"]["left_out"] == {"hidden": 2, "system": 1}
    assert sum("left out of" in note for note in report["notes"]) == 2
    assert sorted(expand([str(root / "val")])) == sorted(val.sources)
    assert len(choose_images(str(root), 99, False)) == len(choose_images(str(root / "val"), 99, "--bands")) == 11
    assert calibration_images(str(root), 99, Data()).sources == train.sources
    assert capsys.readouterr().err.count("left out of") == 4


def test_links_are_followed_and_lead_nowhere_twice(tmp_path):
    root = classes_of(tmp_path / "data", ".")
    elsewhere = classes_of(tmp_path / "more", ".", names=("a",), count=3) / "a"
    (root / "cat" / "linked").symlink_to(elsewhere)
    (root / "cat" / "again").symlink_to(elsewhere)
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "self.png").symlink_to("self.png")
    (elsewhere / "back").symlink_to(root / "cat")
    (root / "everything").symlink_to(root)  # as a class, it would hold all others
    images = read_folder(root)
    assert images.classes == ["cat", "dog"] and images.labels.count(0) == 2 + 3 + 1  # with the link to itself
    assert images.left_out["linked more than once"] == 4


def test_links_that_double_at_each_level_end(tmp_path):
    for level in range(30):
        for name in "ab":
            (tmp_path / str(level)).mkdir(exist_ok=True)
            (tmp_path / str(level) / name).symlink_to(tmp_path / str(level + 1))
    picture(tmp_path / "30" / "x.png")
    assert len(list_images(tmp_path / "0").files) == 1


@pytest.mark.parametrize("name", ["café", "Zürich", "가나"])
def test_two_forms_of_a_name_in_unicode_are_one_class(tmp_path, name):
    composed, decomposed = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    classes_of(tmp_path, "train", names=(composed, "dog"))
    classes_of(tmp_path, "val", names=(decomposed, "dog"))
    train, val = open_data(Data(root=str(tmp_path)))
    assert train.classes == val.classes == sorted([composed, "dog"])
    picture(tmp_path / "train" / decomposed / "more.png")
    assert read_folder(tmp_path / "train").labels.count(train.classes.index(composed)) == 3


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val", "test"])
def test_the_names_of_a_part_with_validation_images(tmp_path, val, capsys):
    classes_of(tmp_path, "train", val, count=3)
    train, images = open_data(Data(root=str(tmp_path)))
    assert (len(train), len(images)) == (6, 6) and images.sources[0].startswith(str(tmp_path / val))
    assert ("test/ has the validation images" in capsys.readouterr().err) == (val == "test")
    assert open_evaluation(Data(root=str(tmp_path))).sources == images.sources


def test_test_images_stay_apart_if_there_are_others_to_validate_on(tmp_path, capsys):
    classes_of(tmp_path, "train", "test", count=4)
    assert len(open_data(Data(root=str(tmp_path), val_fraction=0.25))[1]) == 2
    assert "test is not used in training" in capsys.readouterr().err
    classes_of(tmp_path, "valid", count=3)
    assert len(open_data(Data(root=str(tmp_path)))[1]) == 6


@pytest.mark.parametrize(
    "names", [("bus", "car", "train"), ("train", "val", "test"), ("valid", "x"), ("Test", "Train")]
)
def test_class_folders_may_have_the_name_of_a_part(tmp_path, names):
    classes_of(tmp_path, "train", "val", names=names, count=3)
    for folder in (tmp_path / "train", tmp_path / "val", tmp_path):
        assert open_evaluation(Data(root=str(folder))).classes == sorted(names)
        assert is_class_folder(folder) == (folder != tmp_path)
    assert len(open_unlabelled(Data(root=str(tmp_path / "train")), "train")) == 3 * len(names)
    assert len(calibration_images(str(tmp_path / "val"), 99, Data())) == 3 * len(names)
    nested = tmp_path / "val" / names[-1] / "more"
    picture(nested / "0.png")  # a folder in one of the classes
    assert is_class_folder(tmp_path / "val") and not is_class_folder(tmp_path)


def test_parts_next_to_other_folders_are_still_parts(tmp_path):
    classes_of(tmp_path, "train", "val")
    picture(tmp_path / "samples" / "0.png")
    assert set(find_parts(tmp_path)) == {"train", "val"} and not is_class_folder(tmp_path)
    shutil.rmtree(tmp_path / "val")
    assert len(open_data(Data(root=str(tmp_path), val_fraction=0.5))[0]) == 2
    assert len(open_evaluation(Data(root=str(tmp_path), val_fraction=0.5))) == 2


def test_unlabelled_test_images_are_no_part(tmp_path):
    classes_of(tmp_path, "train", count=4)
    picture(tmp_path / "test" / "0.png")
    with pytest.raises(UserError, match=r"has no val/ folder: set data\.val_fraction=0\.1"):
        open_data(Data(root=str(tmp_path)))
    assert len(open_data(Data(root=str(tmp_path), val_fraction=0.25))[1]) == 2


def test_class_folders_without_train_are_told_where_to_go(tmp_path):
    classes_of(tmp_path, ".")
    with pytest.raises(UserError, match=r"has no train/ folder .*; move its class folders into .*train"):
        open_data(Data(root=str(tmp_path)))


def test_a_class_of_unread_files_says_what_they_are(tmp_path):
    classes_of(tmp_path, ".")
    for i in range(3):
        (tmp_path / "fox" / f"{i}.heic").parent.mkdir(exist_ok=True)
        (tmp_path / "fox" / f"{i}.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no images in class fox; left out of .*: 3 \.heic"):
        read_folder(tmp_path)
    with pytest.raises(UserError, match="no images below .*fox"):
        expand([str(tmp_path / "fox")])


@pytest.mark.parametrize("other", ["cat ", "Cat", "CAT", "ﬁsh"])
def test_classes_that_look_alike_are_pointed_out(tmp_path, capsys, other):
    classes_of(tmp_path, "train", "val", names=("cat", "fish", other))
    assert len(open_data(Data(root=str(tmp_path)))[0].classes) == 3
    assert "look alike: is it one class?" in capsys.readouterr().err
    assert any("look alike" in line for line in check(str(tmp_path), MAX_PIXELS)["warnings"])


@pytest.mark.parametrize("extra", ["valid", "Train", "more", "validation"])
def test_folders_with_images_that_are_not_used_are_named(tmp_path, capsys, extra):
    classes_of(tmp_path, "train", "val", extra)
    (tmp_path / "notes").mkdir()
    open_data(Data(root=str(tmp_path)))
    assert f"folders of {tmp_path} that have images and are not used: {extra}/" in capsys.readouterr().err
    assert check(str(tmp_path), MAX_PIXELS)["notes"] == [
        f"folders of {tmp_path} that have images and are not used: {extra}/"
    ]


@pytest.mark.parametrize("name", ["val", "valid", "test"])
def test_validation_images_that_are_the_training_images_are_pointed_out(tmp_path, capsys, name):
    classes_of(tmp_path, "train")
    (tmp_path / name).symlink_to("train")
    open_data(Data(root=str(tmp_path)))
    assert "is the same folder as" in capsys.readouterr().err
