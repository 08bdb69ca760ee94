"""Which class of the data is which logit: by name if names are known, else by position, with a line."""

import pytest

import eit
from eit.config import Data
from eit.data.datasets import DIGITS
from eit.data.images import Images
from eit.data.timm_datasets import ImageStream
from eit.errors import UserError
from eit.inference.evaluation_data import evaluation_config, match_classes
from eit.weights.load import read_card
from tests.weights.test_load import card

GUESSED = ("classes", "mean")


def images_of(classes):
    labels = list(range(len(classes)))
    return Images(list(classes), labels, list(map(str, labels)), list(map(str, labels)))


@pytest.mark.parametrize(
    "folders",
    [
        ["0", "1", "10", "11", "2"],
        ["a", "b", "c", "d", "e"],
        ["n01440764", "n01443537", "n01484850", "n01491361", "n01494475"],
        ["4", "3", "2", "1", "0"],
    ],
)
def test_guessed_names_are_matched_by_position_with_a_line(folders, capsys):
    guessed = card(classes=["0", "1", "2", "3", "4"], guessed=GUESSED)
    found = match_classes(guessed, images_of(folders))
    assert found.labels == [0, 1, 2, 3, 4] and found.classes == folders
    said = " ".join(capsys.readouterr().err.split())
    assert "matched by position" in said and "eit convert IN OUT --classes FILE" in said
    assert f"the first logit is {folders[0]!r}, the last {folders[-1]!r}" in said


def test_guessed_names_that_are_the_folders_need_no_line(capsys):
    guessed = card(classes=["0", "1", "2"], guessed=GUESSED)
    assert match_classes(guessed, images_of("012")).labels == [0, 1, 2] and not capsys.readouterr().err


@pytest.mark.parametrize("folders", [["0", "1"], ["0", "1", "2", "3"], ["a"]])
def test_another_number_of_classes_than_unnamed_logits_is_refused(folders):
    with pytest.raises(eit.UserError, match=r"do not name their 3 classes, .* eit convert IN OUT --classes FILE"):
        match_classes(card(classes=["0", "1", "2"], guessed=GUESSED), images_of(folders))


@pytest.mark.parametrize("recipe", [None, dict(name="pets")])
def test_known_names_are_matched_by_name(recipe):
    known = card(recipe=recipe)  # cat, dog, owl
    assert match_classes(known, images_of(["dog", "owl"])).labels == [1, 2]
    assert match_classes(known, images_of(["owl", "cat", "dog"])).labels == [2, 0, 1]
    with pytest.raises(eit.UserError, match="the model does not know: eel") as error:
        match_classes(known, images_of(["cat", "dog", "eel"]))
    assert ("--classes" in str(error.value)) == (recipe is None)  # the way out for converted weights


def test_a_name_of_two_classes_is_matched_by_position_alone():
    twice = ["crane", "dog", "crane"]
    assert match_classes(card(classes=twice), images_of(twice)).labels == [0, 1, 2]
    for classes, folders in ((twice, ["crane", "dog"]), (["crane", "dog", "owl"], twice), (twice, ["dog", "crane"])):
        with pytest.raises(eit.UserError, match="crane is the name of several classes"):
            match_classes(card(classes=classes), images_of(folders))
    assert match_classes(card(classes=twice), images_of(["dog"])).labels == [1]  # not needed for this one


def test_a_stream_is_matched_by_position_or_refused(capsys):
    def stream(*classes):
        return ImageStream(list(classes), 3, Data(), "val", 0)

    assert match_classes(card(), stream("cat", "dog", "owl")) == stream("cat", "dog", "owl")
    assert match_classes(card(guessed=GUESSED), stream("x", "y", "z")) == stream("x", "y", "z")
    assert "matched by position" in capsys.readouterr().err
    with pytest.raises(eit.UserError, match="cannot be renumbered"):
        match_classes(card(), stream("dog", "cat", "owl"))


@pytest.mark.parametrize("root", ["gone", "/nowhere/pets", "~/nothing-here"])
def test_a_data_set_that_is_on_another_machine_asks_for_data(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(eit.UserError, match=f"{root}, is not here: give --data PATH"):
        evaluation_config(card(recipe=dict(data=dict(root=root))))
    assert evaluation_config(card(recipe=dict(data=dict(root=root))), "pets").root == "pets"


def test_the_included_digits_are_evaluated_on_scans_if_their_own_folder_is_not_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = read_card("digits")
    assert evaluation_config(own).root == DIGITS and "were not trained on" in capsys.readouterr().err
    (tmp_path / "digits_in_the_wild").mkdir()
    assert evaluation_config(own).root == "digits_in_the_wild" and not capsys.readouterr().err
    other = own.model_copy(update=dict(recipe=own.recipe | dict(data=own.recipe["data"] | dict(root="gone"))))
    with pytest.raises(UserError, match="gone, is not here: give --data PATH"):
        evaluation_config(other)
