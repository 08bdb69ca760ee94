"""`eit recipes`."""

import pytest

from tests.cli.conftest import assert_mistake
from tests.helpers.commands import run_eit


def test_a_recipe_is_shown_resolved(tmp_path):
    text = run_eit("recipes", "show", "digits", "train.epochs=9", "model.family=vit").stdout
    assert "\n  epochs: 9 " in text and "# passes over the training images" in text and "\n  family: vit " in text
    (tmp_path / "mine.yaml").write_text(text)
    assert run_eit("recipes", "show", "mine.yaml", cwd=tmp_path).stdout == text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "digit"], ["unknown recipe 'digit'", "did you mean 'digits'?"]),
        (["digits"], ["recipes digits", "type python -m eit recipes show digits"]),
        (["--json", "show", "digits"], ["--json", "show", "leave"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, words, said):
    assert_mistake(tmp_path, ["recipes", *words], said)
