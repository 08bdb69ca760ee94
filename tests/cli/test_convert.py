"""`eit convert`; what it writes is in tests/weights/test_load.py."""

import pytest

from tests.cli.conftest import assert_mistake, failed


def test_included_weights_need_no_name(tmp_path):
    error = failed(2, "convert", "digits", "x.safetensors", "--size", 8, cwd=tmp_path)
    assert "already names its model" in error and "--size" in error


def test_class_names_must_fit_the_model(tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\n")
    error = failed(2, "convert", "digits", "x.safetensors", "--classes", "names.txt", cwd=tmp_path)
    assert "--classes names.txt" in error and "2 names" in error and "10 classes" in error
    assert "gone.txt" in failed(2, "convert", "digits", "x.safetensors", "--classes", "gone.txt", cwd=tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone.pth", "x.safetensors"], ["no weights at gone.pth"]),
        (["gone.pth", "x.bin"], ["x.bin", "ends in .safetensors"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, words, said):
    assert_mistake(tmp_path, ["convert", *words], said)
