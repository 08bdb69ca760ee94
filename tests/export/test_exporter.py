"""Exported files: equal to torch when they are written, and models like any other afterwards."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from PIL import Image

import eit
from eit.cli.export import export_text
from eit.config import data_config
from eit.data.images import decode, normalise
from eit.export.exporter import (
    Calibration,
    Export,
    Int8,
    Parity,
    check_request,
    compare,
    default_file,
    export,
    open_calibration,
    photos,
)
from eit.export.hub import without_paths
from eit.inference.exported_models import ExportedModel, batches
from eit.inference.predict import predict
from eit.models import ops
from eit.weights.card import Card
from eit.weights.formats import read_weights, save_weights
from eit.weights.load import load
from tests.helpers.commands import run_eit
from tests.helpers.images import save_digits

FILES = dict(onnx="digits.onnx", openvino="digits.xml", torch="digits.pt2")
WEIGHTS = "digits.safetensors"  # of `home`; exporting the included weights takes twice as long


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with images/ and weights in all three formats, written by the command."""
    folder = tmp_path_factory.mktemp("exported")
    save_digits(folder / "images", classes=10, train=0, val=3, size=8)
    for named in (folder / "images" / "val").iterdir():
        named.rename(named.with_name(named.name.removeprefix("digit")))
    done = run_eit("train", "digits", "model.depth=1", "train.epochs=12", "train.report=false", "out=own", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "own" / "final.safetensors").rename(folder / WEIGHTS)
    for form, file in FILES.items():
        done = run_eit("export", WEIGHTS, "--format", form, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "dynamic: batch, height, width" in done.stdout and "top-1 equal on 8 photos" in done.stdout
        assert f"next: python -m eit predict {file} IMAGE..." in done.stdout and not done.stderr
        assert (folder / file).is_file()
    return folder


def small(path, **arguments):
    """Untrained weights of a small model, on disk."""
    own = dict(kernel_size=3, stride=1, pool_size=4, embed_dim=16, depth=2, num_heads=2) | arguments
    size, resize = own.pop("size", 24), own.pop("resize", 28)
    card = Card(
        model=own.pop("model", "eit_mini"),
        arguments={k: v for k, v in own.items() if v is not None},
        classes=["ant", "bee", "cat"],
        mean=(0.5,) * own.get("in_chans", 3),
        std=(0.25,) * own.get("in_chans", 3),
        size=size,
        resize=resize,
        interpolation="bicubic",
    )
    torch.manual_seed(0)
    model = card.create_model()
    with torch.no_grad():
        for p in model.parameters():  # initial values are too even to tell classes apart
            p.add_((0.2 if card.model == "eit_mini" else 0.01) * torch.randn_like(p))
    save_weights(path, model.state_dict(), card)
    return path


@pytest.mark.project
@pytest.mark.parametrize("file", FILES.values())
def test_predictions_and_accuracy_are_those_of_the_weights(home, file):
    def found(name):
        lines = run_eit("predict", name, "images", "--top", "2", "--json", cwd=home).stdout.splitlines()
        return [json.loads(line) for line in lines]

    for one, expected in zip(found(file), found(WEIGHTS), strict=True):
        assert [x["label"] for x in one["labels"]] == [x["label"] for x in expected["labels"]]
        assert one["labels"][0]["probability"] == pytest.approx(expected["labels"][0]["probability"], abs=1e-5)
    own, weights = (
        json.loads(run_eit("eval", name, "--data", "images/val", "--json", cwd=home).stdout) for name in (file, WEIGHTS)
    )
    assert own["top1"] == weights["top1"] > 50 and own["images"] == 30
    assert own["loss"] == pytest.approx(weights["loss"], abs=1e-5)


@pytest.mark.project
@pytest.mark.parametrize("file", FILES.values())
def test_from_python_they_are_models_with_a_card(home, file):
    model = eit.load(home / file)
    assert isinstance(model, ExportedModel) == (file != "digits.pt2")
    own = eit.load(home / WEIGHTS)
    assert model.card == without_paths(own.card)
    image = next((home / "images").rglob("*.png"))
    (one,), (expected,) = predict(model, [image], top=3), predict(own, [image], top=3)
    assert [name for name, _ in one.labels] == [name for name, _ in expected.labels]


@pytest.mark.project
def test_other_runtimes_find_names_and_preprocessing_in_the_file(home):
    session = onnxruntime.InferenceSession(home / "digits.onnx")
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("images", ["batch", 3, "height", "width"])]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("logits", ["batch", 10])]
    card = json.loads(session.get_modelmeta().custom_metadata_map["eit"])
    assert card["classes"] == [str(i) for i in range(10)] and card["mean"] == [0.5] * 3 and card["size"] == 8
    assert "RGB images in 0..1, shorter side" in onnx.load(home / "digits.onnx").doc_string
    assert (
        json.loads(
            eit.inference.exported_models.openvino_core().read_model(home / "digits.xml").get_rt_info("eit").astype(str)
        )
        == card
    )
    extra = {"eit": ""}
    program = torch.export.load(home / "digits.pt2", extra_files=extra).module()
    assert json.loads(extra["eit"])["classes"] == card["classes"]
    x = torch.randn(3, 3, 12, 20)
    model = eit.load(home / WEIGHTS)
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x))


@pytest.mark.project
@pytest.mark.parametrize("file", ["digits.onnx", "digits.xml"])
def test_any_batch_and_any_size(home, file):
    model, own = eit.load(home / file), eit.load(home / WEIGHTS)
    for shape in ((1, 8, 8), (5, 8, 8), (2, 31, 17), (1, 64, 6)):
        x = torch.randn(shape[0], 3, *shape[1:])
        with torch.no_grad():
            torch.testing.assert_close(model(x), own(x), atol=1e-4, rtol=1e-4)
    done = run_eit("eval", file, "--data", "images/val", "--size", 8, "--size", 12, "--json", cwd=home)
    assert [view["size"] for view in json.loads(done.stdout)["views"]] == [8, 12]
    done = run_eit("eval", file, "--data", "images/val", "--size", 1, cwd=home)
    assert done.returncode == 2 and "is too small" in done.stderr


@pytest.mark.project
@pytest.mark.parametrize(
    ("arguments", "fixed"),
    [
        (dict(family="lsra", in_chans=1), {}),
        (dict(family="lsra", cls_conv="identity"), {}),
        (dict(cls_conv="mean"), {}),
        (dict(family="eit_plus"), {}),
        (dict(family="lite"), {"openvino"}),
        (dict(schedule=(0, 16), representation_size=5, global_pool="avgmax"), {}),
        # interpolated as in torch by ONNX Runtime, otherwise by OpenVINO
        (dict(family="vit", patch_size=4), {"openvino"}),
        (
            dict(model="timm/resnet10t", **dict.fromkeys(("kernel_size", "stride", "pool_size"))),
            {"onnx", "openvino", "torch"},
        ),
    ],
    ids=["lsra", "identity", "mean", "plus", "lite", "schedule", "vit", "timm"],
)
@pytest.mark.parametrize(
    "form",
    ["onnx", *(pytest.param(form, marks=pytest.mark.slow) for form in ("openvino", "torch"))],  # from one program
)
def test_every_family(tmp_path, form, arguments, fixed):
    if "model" in arguments:
        arguments = arguments | dict.fromkeys(("embed_dim", "depth", "num_heads"))
    weights = small(tmp_path / "small.safetensors", **arguments)
    file = tmp_path / FILES[form].replace("digits", "small")
    done = export(load(weights), file, form)
    assert done.dynamic == (["batch"] if form in fixed else ["batch", "height", "width"])
    assert len(done.parity.sizes) == (1 if form in fixed else 2) and done.parity.max_error < 1e-3
    model = eit.load(file)
    x = photos(model.card.view, (24, 24))
    with torch.no_grad():
        torch.testing.assert_close(model(x), load(weights)(x), atol=1e-4, rtol=1e-3)
    if form == "torch":
        return
    assert model.fixed_size == (form in fixed)
    if form in fixed:
        with pytest.raises(eit.UserError, match="was exported for 24 pixels alone"):
            model.check_size(32)


@pytest.mark.parametrize("form", ["onnx", "openvino", pytest.param("torch", marks=pytest.mark.project)])
def test_a_fixed_batch_takes_any_number_of_images(tmp_path, form):
    weights = small(tmp_path / "small.safetensors", depth=1)
    done = run_eit("export", weights, "--format", form, "--fixed", "3")
    assert done.returncode == 0, done.stderr
    file = tmp_path / FILES[form].replace("digits", "small-batch3")
    assert "fixed batch of 3\nheight and width are fixed at 24\n" in done.stdout and file.exists()
    model, own = eit.load(file), load(weights)
    if form == "torch":  # the weights alone are read
        program = torch.export.load(file).module()
        with torch.no_grad():
            torch.testing.assert_close(program(x := torch.randn(3, 3, 24, 24)), own(x))
        return
    assert model.fixed_size
    for images in (0, 1, 3, 4, 7):
        x = torch.randn(images, 3, 24, 24)
        if images:
            with torch.no_grad():
                torch.testing.assert_close(model(x), own(x), atol=1e-4, rtol=1e-4)
        else:
            with pytest.raises(eit.UserError, match="cannot be run on"):
                model(x)
    with pytest.raises(eit.UserError, match="was exported for 24 pixels alone"):
        model.check_size(32)


def test_a_huge_fixed_batch_is_refused(tmp_path):
    """One image would be filled up to it."""
    export(load(small(tmp_path / "small.safetensors", depth=1)), file := tmp_path / "small.onnx", "onnx", fixed=2)
    graph = onnx.load(file)
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 10**9
    onnx.save(graph, file)
    with pytest.raises(eit.UserError, match="takes batches of 1,000,000,000 images; more than 4,096"):
        eit.load(file)


def test_images_are_divided_among_the_streams_of_openvino(tmp_path, monkeypatch):
    export(model := load(small(tmp_path / "small.safetensors", depth=1)), file := tmp_path / "small.xml", "openvino")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    exported = eit.load(file)
    for images in (1, 2, 5, 8):
        x = torch.randn(images, 3, 24, 24)
        with torch.no_grad():
            torch.testing.assert_close(exported(x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("form", "strides"), [("onnx", 2), ("openvino", 1)])
def test_openvino_has_the_stem_without_strides(tmp_path, form, strides):
    model = load(small(tmp_path / "small.safetensors", depth=1, kernel_size=4, stride=2))
    export(model, file := tmp_path / FILES[form].replace("digits", "small"), form)
    if form == "onnx":
        stem = next(node for node in onnx.load(file).graph.node if node.op_type == "Conv")
        assert {a.name: list(a.ints) for a in stem.attribute if a.ints}["strides"] == [strides] * 2
    else:
        assert re.search(r'type="Convolution".*?strides="(\d), \1"', file.read_text(), re.DOTALL)[1] == str(strides)
    assert not ops.FOLD_STRIDES_ON


@pytest.mark.parametrize(
    ("images", "size", "found"),
    [(4, None, [[0, 1, 2, 3]]), (4, 2, [[0, 1], [2, 3]]), (3, 2, [[0, 1], [2, 0]]), (1, 3, [[0, 0, 0]]), (0, 2, [[]])],
)
def test_the_last_batch_is_filled_up(images, size, found):
    assert [part.tolist() for part in batches(np.arange(images), size)] == found


def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    import eit.export.exporter

    def broken(graph, file, card, own=eit.export.exporter._convert):
        run = own(graph, file, card)
        return lambda x: run(x) + 0.01

    monkeypatch.setattr(eit.export.exporter, "_convert", broken)
    model = load(small(tmp_path / "small.safetensors", depth=1))
    (folder := tmp_path / "exported").mkdir()
    (folder / "small.onnx").write_text("the old one")
    with pytest.raises(FloatingPointError, match="not kept: at 24x24 its logits differ from torch's by up to 0.01"):
        export(model, folder / "small.onnx", "onnx")
    assert [f.name for f in folder.iterdir()] == ["small.onnx"]
    assert (folder / "small.onnx").read_text() == "the old one"


def test_top1_may_differ_in_ties_alone():
    model = load("digits")

    def near_tie(x):
        """Its second class is 1e-6 behind the first."""
        logits = model(x)
        first, second = logits.topk(2, dim=1).indices.T
        rows = torch.arange(len(x))
        logits[rows, second] = logits[rows, first] - 1e-6
        return logits

    near_tie.card, near_tie.patch_embed = model.card, model.patch_embed

    def exchanged(x, by):
        logits = near_tie(x)
        second = logits.topk(2, dim=1).indices[:, 1]
        logits[torch.arange(len(x)), second] += by
        return logits

    found = compare(near_tie, lambda x: exchanged(x, 1e-5), any_size=False)
    assert (found.sizes, found.images, found.ties) == ([(32, 32)], 8, 8)
    assert found.max_error == pytest.approx(1e-5, rel=0.2)
    assert compare(model, model, any_size=True).sizes == [(32, 32), (41, 52)]
    with pytest.raises(FloatingPointError, match="by up to 0.01, and top-1 in 8 of 8 photos"):
        compare(near_tie, lambda x: exchanged(x, 0.01), any_size=False)
    with pytest.raises(FloatingPointError, match="nan"):
        compare(model, lambda x: model(x) * np.nan, any_size=False)

    def faint(x):
        return model(x) * 1e-4

    faint.card = model.card
    with pytest.raises(FloatingPointError, match="not kept"):  # however small the logits are
        compare(faint, lambda x: torch.zeros(len(x), 10), any_size=False)
    assert len(set(model(photos(model.card.view, (32, 32))).argmax(1).tolist())) > 1  # alike, they would prove little


@pytest.mark.project
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_int8_is_smaller_and_its_accuracy_is_measured(home, form):
    file = f"int8{Path(FILES[form]).suffix}"
    words = ["--format", form, "--int8", "sklearn:digits", "--images", "64", "--out", file]
    done = run_eit("export", "digits", *words, "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    found = report["int8"]
    assert found["images"] == 360 and found["calibrated_on"] == 64
    assert found["fp32_top1"] == pytest.approx(98.61, abs=0.01) and 95 < found["top1"] <= 100
    assert report["bytes"] < 0.7 * found["fp32_bytes"]
    own = json.loads(run_eit("eval", file, "--data", "sklearn:digits", "--json", cwd=home).stdout)
    assert own["top1"] == pytest.approx(found["top1"])
    assert (
        ("QuantizeLinear" in str(onnx.load(home / file).graph.node))
        if form == "onnx"
        else ('type="FakeQuantize"' in (home / file).read_text())
    )
    parity = Parity(**report["parity"])
    text = export_text(Export(**report | dict(parity=parity, int8=Int8(**found))), load("digits").card)
    assert f"int8: top-1 {found['top1']:.2f}%, fp32 98.61%, on 360 images" in text
    assert "before int8: " in text and "top-1 equal on 8 photos at 32x32 and 41x52" in text


def test_int8_ranges_come_from_the_training_images_or_a_plain_folder(tmp_path):
    from eit.export.exporter import calibration_images

    data = save_digits(tmp_path / "data", train=7, val=2)
    config = data_config(root=str(data), max_pixels=10**6)
    assert all("/train/" in name for name in calibration_images(str(data), 100, config).sources)
    assert len(calibration_images(str(data / "val"), 100, config)) == 6
    assert len(calibration_images(str(data), 5, config)) == 5


def test_the_file_lies_beside_the_weights(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("w.v2.safetensors", "run/best.safetensors"):
        (tmp_path / name).touch()
    assert default_file(str(tmp_path / "w.v2.safetensors"), "openvino") == tmp_path / "w.v2.xml"
    assert default_file(str(tmp_path / "run"), "onnx") == tmp_path / "run" / "best.onnx"
    assert default_file("digits", "torch") == Path("digits.pt2")
    assert default_file("hf-hub:me/pets@v1.0", "onnx") == Path("pets.onnx")
    assert default_file(str(tmp_path / "run"), "onnx", int8=True) == tmp_path / "run" / "best-int8.onnx"
    assert default_file(str(tmp_path / "w.v2.safetensors"), "openvino", int8=True) == tmp_path / "w.v2-int8.xml"
    assert default_file("digits", "onnx", int8=True) == Path("digits-int8.onnx")
    assert default_file("digits", "onnx", int8=True, fixed=8) == Path("digits-int8-batch8.onnx")


@pytest.mark.project
@pytest.mark.parametrize("file", FILES.values())
def test_no_folder_of_this_machine_is_in_a_file(home, file):
    folders = {str(home), *(str(Path(module.__file__).parents[1]) for module in (eit, torch))}
    for part in home.glob(f"{Path(file).stem}.*"):
        assert not [folder for folder in folders if folder.encode() in part.read_bytes()], part


@pytest.mark.parametrize("root", ["/home/me/pets", "~/pets", "../../me/pets", r"C:\Users\me\pets"])
def test_the_recipe_in_a_file_names_no_folders(tmp_path, root):
    model = load(small(tmp_path / "w.safetensors"))
    model.card = model.card.model_copy(update=dict(recipe=dict(name="x", data=dict(root=root), out=root)))
    export(model, tmp_path / "w.pt2", "torch")
    _, card = read_weights(tmp_path / "w.pt2")
    assert card.recipe == dict(name="x", data=dict(root="pets"), out="pets")
    assert model.card.recipe["data"]["root"] == root  # that of the caller stays


@pytest.mark.parametrize("model", ["digits", None, torch.nn.Linear(1, 1)])
def test_export_takes_models_with_a_card(tmp_path, model):
    with pytest.raises(eit.UserError, match="export takes a model of eit.load"):
        export(model, tmp_path / "x.pt2", "torch")


def test_a_model_in_training_mode_is_exported_as_in_evaluation_and_stays_in_its_mode(tmp_path):
    model = load(small(tmp_path / "w.safetensors", drop_rate=0.5)).train()
    export(model, tmp_path / "w.pt2", "torch")
    assert model.training and not load(tmp_path / "w.pt2").training


# -- int8 is kept if its accuracy is measured and as good


class Calibrated:
    """`export` to int8 without quantising: the accuracies that it would measure."""

    def __init__(self, monkeypatch, fp32_top1, top1):
        found = Int8(100, top1, fp32_top1, 1000, 10)
        monkeypatch.setattr(
            "eit.export.exporter._quantise", lambda graph, file, images, view, fixed: file.write_bytes(b"")
        )
        monkeypatch.setattr(
            "eit.export.exporter._convert", lambda graph, file, card: file.write_bytes(b"x") and load("digits")
        )
        monkeypatch.setattr("eit.export.exporter._measure_int8", lambda *_: found)
        monkeypatch.setattr("eit.export.exporter._write_onnx", lambda *_: None)
        monkeypatch.setattr("eit.export.exporter._program", lambda *_: None)

    def export(self, file, **options):
        return export(load("digits"), file, "onnx", Calibration(None, None), **options)


@pytest.mark.parametrize(("before", "after"), [(75, 50), (75, 72.9), (99, 0)])
def test_int8_that_costs_more_than_two_points_is_not_kept_unless_told(tmp_path, monkeypatch, before, after):
    run = Calibrated(monkeypatch, before, after)
    with pytest.raises(
        eit.UserError, match=rf"int8 is not kept: top-1 falls from {before:.2f}% to {after:.2f}%.*max-drop"
    ):
        run.export(tmp_path / "x-int8.onnx")
    assert not list(tmp_path.iterdir())
    assert run.export(tmp_path / "x-int8.onnx", max_drop=100).int8.top1 == after


@pytest.mark.parametrize(("before", "after"), [(75, 73), (75, 75), (75, 80)])
def test_int8_that_costs_at_most_two_points_is_kept(tmp_path, monkeypatch, before, after):
    assert Calibrated(monkeypatch, before, after).export(tmp_path / "x-int8.onnx").file.exists()


@pytest.mark.parametrize("name", ["x.onnx", "x.xml"])
def test_int8_is_never_written_over_a_file_that_is_not(tmp_path, name):
    form = dict(onnx="onnx", xml="openvino")[name.partition(".")[2]]
    (tmp_path / name).write_bytes(b"fp32")
    with pytest.raises(eit.UserError, match="is not in int8, and would be lost"):
        check_request(form, tmp_path / name, int8=True)
    check_request(form, tmp_path / name, int8=False)
    (tmp_path / name).write_bytes(b"..QuantizeLinear.." if form == "onnx" else b'type="FakeQuantize"')
    check_request(form, tmp_path / name, int8=True)


def names_of(images):
    return {str(Path(source)) for source in images.sources}


def test_no_image_both_sets_a_range_and_measures(tmp_path):
    data = save_digits(tmp_path / "data", train=7, val=4)
    for part in ("train", "val"):
        for folder in (data / part).iterdir():
            folder.rename(folder.with_name(folder.name.removeprefix("digit")))
    digits = load("digits").card
    own, elsewhere = (
        digits.model_copy(update=dict(recipe=dict(data=dict(root=root)))) for root in (str(data), "/gone")
    )
    cases = [  # card, path of --int8, --data, calibration images, labelled images
        (own, data / "train", None, 21, 12),  # by default the run's own validation images
        (own, data, None, 21, 12),
        (own, data / "val", None, 6, 6),  # which set ranges here: one half each
        (elsewhere, data, None, 21, 12),  # the run's data are on another machine
        (elsewhere, data / "train", None, 10, 11),  # a folder of classes alone
        (elsewhere, data / "train", data / "val", 21, 12),
    ]
    for card, path, labelled, calibrating, measuring in cases:
        found = open_calibration(card, str(path), 256, labelled and str(labelled))
        assert (len(found.images), len(found.labelled)) == (calibrating, measuring), (path, labelled)
        assert not names_of(found.images) & names_of(found.labelled)
    found = open_calibration(elsewhere, str(data / "train"), 5)
    assert (len(found.images), len(found.labelled)) == (5, 16)


def test_int8_without_labelled_images_says_what_to_give(tmp_path):
    (tmp_path / "plain").mkdir()
    for i in range(3):
        Image.effect_noise((9, 9), 60).save(tmp_path / "plain" / f"{i}.png")
    card = load("digits").card.model_copy(update=dict(recipe=None))
    with pytest.raises(eit.UserError, match="--int8 needs labelled images, to measure its accuracy: give --data PATH"):
        open_calibration(card, str(tmp_path / "plain"), 256)


def test_an_unreadable_calibration_image_is_left_out(tmp_path, capsys):
    data = save_digits(tmp_path / "data", train=7, val=4)
    (data / "train" / "digit0" / "bad.png").write_bytes(b"nothing")
    (data / "train" / "digit1" / "zero.png").touch()
    card = load("digits").card.model_copy(update=dict(classes=["digit0", "digit1", "digit2"]))
    found = open_calibration(card, str(data), 256, str(data))
    assert len(found.images) == 21
    said = capsys.readouterr().err
    assert said.count("left out: ") == 2 and "bad.png" in said


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["digits", "--format", "tflite"], "'--format': 'tflite' is not one of 'onnx', 'openvino', 'torch'"),
        (["digits", "--out", "x.xml"], "ends in .onnx for --format onnx"),
        (["digits", "--out", "no/x.onnx"], "there is no folder no"),
        (["digits", "--format", "torch", "--int8", "images"], "--int8 is for --format onnx and openvino"),
        (["digits", "--int8", "nowhere"], "--int8 nowhere: no such folder, image or data set"),
        (["digits", "--data", "images"], "--data images is for --int8"),
        (["digits.onnx", "--out", "y.onnx"], "is an exported model"),
        (["digits", "--out", "folder.onnx"], "--out folder.onnx: it is a folder"),
        (["digits", "--format", "openvino", "--out", "other.xml"], "other.bin next to it belongs to another file"),
        (["nope"], "no weights at nope"),
    ],
)
def test_bad_requests_are_one_line(tmp_path, words, line):
    (tmp_path / "folder.onnx").mkdir()
    for name in ("other.bin", "digits.onnx"):
        (tmp_path / name).touch()
    save_digits(tmp_path / "images", classes=2, train=0, val=1, size=8)
    done = run_eit("export", *words, cwd=tmp_path)
    assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.fixture(scope="module")
def unusable(home):
    """`home` with files that are cut, foreign, or do not say what they should."""
    for name in ("digits.onnx", "digits.xml", "digits.pt2"):
        (home / name.replace("digits", "cut")).write_bytes((home / name).read_bytes()[:2000])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 8, 8]) for name in "xy"]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", ports[:1], ports[1:]), ir_version=10)
    model.opset_import[0].version = 18
    onnx.save(model, home / "foreign.onnx")
    openvino.save_model(openvino.convert_model(home / "foreign.onnx"), home / "foreign.xml")
    onnx.helper.set_model_props(model, {"eit": "{"})
    onnx.save(model, home / "card.onnx")
    onnx.helper.set_model_props(model, {"eit": "[" * 100_000})
    onnx.save(model, home / "nested.onnx")
    card = load("digits").card
    onnx.helper.set_model_props(model, {"eit": card.model_copy(update=dict(recipe=dict(data="x"))).model_dump_json()})
    onnx.save(model, home / "recipe.onnx")
    onnx.helper.set_model_props(model, {"eit": card.model_dump_json()})
    onnx.save(model, home / "other.onnx")
    model = onnx.load(home / "digits.onnx")
    onnx.helper.set_model_props(model, {"eit": card.model_copy(update=dict(classes=["a", "b"])).model_dump_json()})
    onnx.save(model, home / "fewer.onnx")
    return home


@pytest.mark.project
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["eval", "digits.onnx", "--data", "images/val", "--device", "cuda"], "digits.onnx runs on the CPU"),
        (["eval", "digits.xml", "--data", "images/val", "--precision", "bf16"], "--precision bf16"),
        (["predict", "none.onnx", "images"], "no exported model at none.onnx"),
        (["predict", "cut.onnx", "images"], "cut.onnx is not a readable ONNX file"),
        (["predict", "cut.xml", "images"], "cut.xml is not a readable OpenVINO model"),
        (["predict", "cut.pt2", "images"], "cut.pt2 is not a program that eit export wrote"),
        (["predict", "foreign.onnx", "images"], "foreign.onnx was not written by eit export: it lacks the metadata"),
        (["predict", "foreign.xml", "images"], "foreign.xml was not written by eit export: it lacks the metadata"),
        (["predict", "card.onnx", "images"], "card.onnx: its metadata 'eit' is damaged"),
        (["predict", "nested.onnx", "images"], "nested.onnx: its metadata 'eit' is damaged"),
        (["predict", "recipe.onnx", "images"], "recipe.onnx: its description of the model is damaged"),
        (["predict", "other.onnx", "images"], "other.onnx has inputs and outputs x, y instead of images and logits"),
        (["predict", "fewer.onnx", "images"], "its card says ['batch', 3, 'height', 'width'] and ['batch', 2]"),
        (["train", "digits", "model.pretrained=digits.onnx", "out=run"], "digits.onnx is an exported model"),
    ],
)
def test_files_that_cannot_be_run_are_one_line(unusable, words, line):
    done = run_eit(*words, cwd=unusable)
    assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("error", [RuntimeError("a\nlast line"), MemoryError(), ValueError("x"), KeyError("logits")])
def test_a_runtime_that_fails_is_one_line(tmp_path, error):
    def run(x):
        raise error

    model = ExportedModel(tmp_path / "x.onnx", load("digits").card, run, fixed_size=False)
    with pytest.raises(eit.UserError, match=r"x\.onnx cannot be run on \(1, 3, 32, 32\): ") as caught:
        next(predict(model, Image.new("L", (8, 8))))
    assert "\n" not in str(caught.value) and str(caught.value)[-2:] != ": "


@pytest.mark.project
@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime", "openvino"])
def test_a_missing_runtime_names_the_extra(home, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        eit.UserError, match=f"^--format openvino needs {missing}, which .* pip install 'eit\\[export\\]'$"
    ):
        export(load("digits"), home / "z.xml", "openvino")
    if run := dict(onnxruntime="digits.onnx", openvino="digits.xml").get(missing):
        with pytest.raises(eit.UserError, match=f"^running .*{run} needs {missing}, which is not installed"):
            eit.load(home / run)


@pytest.mark.project
def test_the_weights_of_a_program_are_read_without_running_it(home, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.export, "load", None)
    monkeypatch.setattr(torch, "load", None)
    state, card = read_weights(home / "digits.pt2")
    own, own_card = read_weights(home / WEIGHTS)
    assert card == without_paths(own_card) and all(torch.equal(state[name], own[name]) for name in own)
    content = bytearray((home / "digits.pt2").read_bytes())
    at = content.find(own["head.weight"].numpy().tobytes())
    assert at > 0
    content[at] ^= 1
    (tmp_path / "flipped.pt2").write_bytes(content)
    with pytest.raises(eit.UserError, match=r"flipped.pt2 is not a program .* Bad CRC-32"):
        eit.load(tmp_path / "flipped.pt2")


@pytest.mark.project
def test_a_damaged_program_is_one_line_whatever_is_wrong(home, tmp_path):
    content = (home / "digits.pt2").read_bytes()
    rng = np.random.default_rng(0)
    tail = content.rfind(b"PK\x01\x02", 0, content.find(b"PK\x01\x02") + 1)
    refused = 0
    for i in range(200):
        damaged = bytearray(content)
        first = tail if i % 2 else 0  # half of them in the directory
        for at in rng.integers(first, len(content), 8):
            damaged[at] = rng.integers(256)
        file = tmp_path / "damaged.pt2"
        file.write_bytes(damaged[: rng.integers(first, len(content)) if i % 10 == 0 else None])
        try:
            read_weights(file)
        except eit.UserError:
            refused += 1
    assert refused > 150


@pytest.mark.project
def test_the_page_shows_the_preprocessing_of_this_package(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    (file := Path("runs/pets/best.onnx")).parent.mkdir(parents=True)
    for channels, size, resize in ((1, 24, 24), (3, 24, 28), (3, 20, 33)):
        weights = small(tmp_path / "w.safetensors", in_chans=channels, size=size, resize=resize, depth=1)
        if size == 24:
            export(load(weights), file, "onnx")
        else:  # the same program with another card
            model = onnx.load(file)
            onnx.helper.set_model_props(model, {"eit": load(weights).card.model_dump_json()})
            onnx.save(model, file)
        for width, height in ((64, 32), (31, 57), (24, 24)):
            Image.effect_noise((width, height), 80).convert("RGB").save("cat.jpg")
            found = {}
            exec(code, found)
            view = load(weights).card.view
            expected = normalise(view.pixels(decode("cat.jpg", channels))[None], view.mean, view.std)
            torch.testing.assert_close(torch.from_numpy(found["pixels"]).permute(2, 0, 1)[None].float(), expected)
