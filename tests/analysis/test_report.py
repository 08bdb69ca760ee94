"""`eit analyze` from the command line to the page in a browser."""

import csv
import json
import re
import shutil

import pytest
import torch
from PIL import Image

import eit
from eit.analysis import report
from eit.analysis.analyzed_model import AnalyzedModel
from eit.analysis.compare import Comparison, Options, compare
from eit.analysis.figures import figures
from eit.analysis.findings import sentences
from eit.analysis.image_maps import compute_maps, shown_image
from eit.analysis.inputs import LoadedModel, check_names, choose_images, load_models
from eit.analysis.measure import analyze
from eit.config import load_recipe
from eit.data.datasets import readable_images
from eit.data.images import Preprocessing
from eit.errors import UserError
from eit.training.trainer import train
from eit.weights.load import find_weights, load
from tests.helpers.browser import contrasts, focused_by_tab, luminance, opened, rgba, start_chromium
from tests.helpers.commands import run_eit
from tests.helpers.images import save_digits
from tests.helpers.training import TINY

CPU = torch.device("cpu")

FILES = {"amplitude", "class_token", "diversity", "filter", "frequency", "heads", "images", "models"}
FILES |= {"smoothing", "spectrum", "sweep", "transfer"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(load_recipe("cifar10", [*TINY, f"data.root={data}", f"out={folder}"]))
    return folder


def read(folder, name):
    with open(folder / "csv" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def measured(label="one", state="trained", seed=0, images=3, colour="#0072b2", **arguments):
    torch.manual_seed(seed)
    arguments = dict(embed_dim=24, depth=3, num_heads=4, num_classes=5) | arguments
    model = eit.EIT(32, 3, 1, 4, **arguments).eval()
    x = torch.randn(images, 3, 32, 32)
    loaded = LoadedModel(
        label, state, None, Preprocessing(32, 32, "bicubic", (0.5,) * 3, (0.5,) * 3), f"runs/{label}", "ab" * 32
    )
    one = AnalyzedModel(loaded, analyze(model, x), colour, "o")
    if state == "trained":
        one.image_maps, _ = compute_maps(model, x[:2])
        one.shown_images = [shown_image(f"{i}.jpg", torch.rand(3, 32, 32)) for i in range(len(one.image_maps))]
    return one


def write(folder, ones, data="photos", command="eit analyze"):
    return report.write(folder, Comparison(ones, [], ["1.jpg", "2.jpg", "3.jpg"]), data, command)


# -- The command ------------------------------------------------------------------------------------------------------


@pytest.mark.project
def test_the_command_writes_page_figures_and_numbers(run, data, tmp_path):
    words = (
        "analyze",
        run,
        "lsra/eit_mini",
        "--data",
        data,
        "--out",
        tmp_path / "out",
        "--size",
        "36",
        "--images",
        "5",
    )
    done = run_eit(*words, "--bands", "--rollout", "--pictures", "2")
    assert done.returncode == 0, done.stderr
    assert (
        re.search(r"tiny +3x3|tiny +9x9", done.stdout) and "lsra/eit_mini" in done.stdout and "5 images" in done.stdout
    )
    out = tmp_path / "out"
    assert {file.stem for file in (out / "csv").iterdir()} == FILES | {"robustness"}
    assert {(row["model"], row["state"]) for row in read(out, "models")} == {
        ("tiny", "trained"),
        ("tiny", "initial"),
        ("lsra/eit_mini", "untrained"),
    }
    page = (out / "report.html").read_text()
    for name in ("share", "parts", "amplitude", "spectra", "distances", "diversity", "attention", "robustness"):
        assert f'id="{name}"' in page
        assert (out / "figures" / f"{name}.svg").is_file()
        with Image.open(out / "figures" / f"{name}.png") as picture:
            assert picture.width == pytest.approx(2100, abs=2) and picture.info["dpi"][0] == pytest.approx(300, abs=1)
    assert page.count("rollout</span>") == 4 and page.count("its spectrum</span>") == 2


def test_the_numbers_as_json_are_those_of_the_tables(run, data, tmp_path, no_figures):
    done = run_eit("analyze", run, "--data", data, "--out", tmp_path, "--json", "--no-initial", "--pictures", "0")
    assert done.returncode == 0, done.stderr
    (model,) = json.loads(done.stdout)["models"]
    rows = [row for row in read(tmp_path, "frequency") if row["where"] == "block"]
    assert [float(row["share"]) for row in rows] == model["share"]
    assert [float(row["std_px"]) for row in read(tmp_path, "diversity")] == model["diversity_px"]
    assert model["images"] == 12 and len(read(tmp_path, "heads")) == 4  # 2 layers of 2 heads


@pytest.mark.parametrize(
    "words, line",
    [
        (["nothing"], "no weights at nothing"),
        (["digitz"], "did you mean 'digits'"),
        (["timm/vit_tinny_patch16_224"], "did you mean"),
        (["torchvision/vit_b_61"], "did you mean 'vit_b_16'"),
        (["eit_mini", "--data", "nowhere"], "--data nowhere: no such folder or data set"),
        (["eit_mini", "--data", "digits"], "--data digits: no such folder or data set; did you mean sklearn:digits?"),
        (["eit_mini", "--data", "empty", "--bands"], "--bands needs labelled images: empty"),
        (["eit_mini", "--data", "empty"], "no images below empty"),
        (["eit_mini", "--size", "5"], "--size 5 is too small for eit_mini"),
        (["eit_mini", "--size", "12"], "no layer of EIT has a grid of more than one token for images of 12x12"),
        (["eit_mini", "--rho", "2"], "rho=2.0: give a frequency between 0 and sqrt(2)"),
        (["eit_mini", "--out", "file.txt"], "--out file.txt cannot be written: "),
        (["eit_mini", "--pictures", "9"], "should be less than or equal to 8"),
        (["torchvision/resnet18", "--size", "64"], "it cannot be measured"),
    ],
)
def test_bad_input_gets_one_line(words, line, data, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    given = [*words] if "--data" in words else [*words, "--data", data]
    done = run_eit("analyze", *given, cwd=tmp_path)
    errors = [
        found for found in done.stderr.splitlines() if found.startswith("eit: ") and "analysed untrained" not in found
    ]
    assert done.returncode == 2 and len(errors) == 1 and line in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def test_models_without_distances_are_reported_with_a_line(data, tmp_path, no_figures):
    words = ("analyze", "timm/test_resnet", "--data", data, "--size", "64", "--out", tmp_path, "--images", "2")
    done = run_eit(*words, env=dict(HF_HUB_OFFLINE="1"))
    assert done.returncode == 0, done.stderr
    assert "no attention distances of layers 1 to 5: ResNet does not call" in done.stderr
    assert "test_resnet" in done.stdout and "analysed untrained" in done.stderr
    page = (tmp_path / "report.html").read_text()
    assert "What cannot be measured" in page and 'id="share"' in page and 'id="distances"' not in page
    assert not (tmp_path / "csv" / "heads.csv").exists()


# -- Models and images ------------------------------------------------------------------------------------------------


def test_the_initial_values_are_those_that_the_run_began_with(data, tmp_path):
    """A run that learns nothing keeps them."""
    still = ["optim.lr=1e-30", "optim.min_lr=0", "optim.warmup_lr=0", "optim.weight_decay=0", "seed=3"]
    train(load_recipe("cifar10", [*TINY, *still, f"data.root={data}", f"out={tmp_path / 'still'}"]))
    trained, initial = load_models([str(tmp_path / "still")])
    assert (trained.state, initial.state) == ("trained", "initial") and "seed 3" in initial.source
    for name, value in trained.model.state_dict().items():
        assert torch.allclose(value, initial.model.state_dict()[name], atol=1e-20), name


def test_labels_are_short_and_differ(run):
    names = ["digits", "eit_mini", "vit/eit_mini", str(run), str(run / "final.safetensors"), "digits"]
    labels = [loaded.label for loaded in load_models(names, initial=False)]
    assert len(set(labels)) == 6 and labels[2] == "vit/eit_mini" and labels[5].endswith("digits (2)")


def test_families_of_the_zoo_are_analysed_at_initial_values():
    lsra, vit = load_models(["lsra/eit_mini", "vit/eit_mini"])
    assert lsra.model.attn_channels == [120] * 5 and vit.model.attn_channels == [250] * 5
    assert lsra.state == "untrained" and "untrained" in lsra.provenance
    assert lsra.view.size == 224 and lsra.view.resize == 256
    check_names(["digits", "eit_mini", "timm/resnet18", "torchvision/vit_b_16"])


def test_the_views_of_other_libraries_are_theirs():
    (loaded,) = load_models(["timm/vit_tiny_patch16_224"])
    assert (loaded.view.size, loaded.view.resize, loaded.view.mean[0]) == (224, 248, 0.5)
    with pytest.raises(UserError, match="accepts only 224 pixels"):
        list(load_models(["timm/vit_tiny_patch16_224"], size=64))


def test_images_are_those_of_validation_or_all_below_a_folder(data):
    assert len(choose_images(str(data), 1000, labelled=False)) == 12
    below = choose_images(str(data / "train"), 1000, labelled=False)
    assert len(below) == 36 and below.classes == ["unknown"]
    assert choose_images(str(data / "train"), 1000, labelled=True).classes == ["digit0", "digit1", "digit2"]
    few = choose_images(str(data / "train"), 4, labelled=True)
    assert few.labels == [0, 0, 1, 2]  # evenly spaced


def test_models_of_two_sizes_stand_side_by_side(run, data):
    """`digits` takes 32 pixels, the run 16."""
    images = choose_images(str(data), 5, labelled=False)
    compared = compare(["digits", str(run)], images, torch.device("cpu"), Options())
    found = compared.measured
    assert [one.analysis.image_size[0] for one in found] == [32, 32, 16, 16]
    assert [one.shown_images[0].image.shape for one in found if one.shown_images] == [
        (32, 32, 3),
        (16, 16, 3),
    ]  # its own input
    assert len(found[0].image_maps) == 4 and not found[1].image_maps and len(compared.images) == 5
    assert found[0].colour == found[1].colour != found[2].colour
    assert load(run).card.classes == ["digit0", "digit1", "digit2"]


# -- The page ---------------------------------------------------------------------------------------------------------


def test_an_earlier_report_is_replaced_and_other_files_stay(tmp_path, no_figures):
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "robustness.csv").write_text("old")
    (tmp_path / "figures").mkdir()
    mine = [tmp_path / name for name in ("mine.txt", "csv/mine.csv", "figures/plot.png", "figures/diagram.svg")]
    for file in mine:
        file.write_text("mine")
    write(tmp_path, [measured()])
    assert all(file.read_text() == "mine" for file in mine) and not (tmp_path / ".unfinished").exists()
    assert {file.stem for file in (tmp_path / "csv").iterdir()} == FILES | {"mine"}


@pytest.mark.project
def test_an_interruption_leaves_the_earlier_report_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "figures", lambda measured: figures(measured)[:2])
    write(tmp_path, [measured()])
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report, "_page", stop)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, [measured("two", seed=1)])
    assert len(before) > 5 and all(file.read_bytes() == content for file, content in before.items())
    write(tmp_path, [measured("two", seed=1)])
    assert not (tmp_path / ".unfinished").exists() and read(tmp_path, "models")[0]["model"] == "two"


MARKUP = '<script>alert("x")</script>&$names'


@pytest.fixture(scope="module")
def ones():
    """A model, its initial values, and another one whose name holds markup."""
    found = [measured(), measured(state="initial", seed=1), measured(MARKUP, schedule="lsra")]
    found[1].loaded.source, found[1].loaded.sha256 = "initial values of seed 7", ""
    found[2].shown_images = [shown_image(MARKUP, torch.rand(3, 32, 32)) for _ in found[2].shown_images]
    return found


@pytest.fixture(scope="module")
def page(ones, tmp_path_factory):
    """The page about them, of data and a command that hold markup too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "save_for_print", lambda figure, folder: None)
        return write(tmp_path_factory.mktemp("report"), ones, f"photos {MARKUP}", MARKUP).read_text()


def test_names_that_hold_markup_are_shown_as_they_are(page):
    assert "<script" not in page and "&lt;script&gt;alert" in page and "$names" in page


def test_the_page_needs_nothing_else(page):
    addresses = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', page)
    assert addresses and all(a.startswith(("data:", "#")) or b.startswith("#") for a, b in addresses)
    assert "<script" not in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_every_figure_says_what_it_shows_of_how_many_images_and_names_the_models_at_hand(page, ones):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, re.DOTALL)
    assert len(captions) == len(figures(ones)) + 1 >= 8
    assert all("3 images" in caption and 'href="#models"' in caption for caption in captions)
    judged = [caption for caption in captions if "contradicted if" in caption]
    assert len(judged) >= 6 and not re.search(r"EIT|LSRA|ViT", " ".join(judged))
    named = [caption for caption in judged if "of one " in caption and "&lt;script&gt;" in caption]
    assert len(named) >= 6  # others are about parts of each model: convolved and attention channels


@pytest.mark.parametrize("shown", [["eit"], ["flat"], ["eit", "eit (initial)"]])
def test_captions_without_two_sides_contradict_nothing(shown):
    ones = {"eit": measured("eit"), "flat": measured("flat", schedule="vit")}
    ones["eit (initial)"] = measured("eit", "initial", seed=1)
    captions = [figure.caption for figure in figures([ones[name] for name in shown])]
    assert not any("contradicted if the line of" in caption or "{" in caption for caption in captions)


def test_the_source_of_each_model_is_told_once(page):
    assert page.count("runs/one (trained, sha256 abababababab)") == 1 and page.count("of photos") == 1


def test_each_pair_is_told_once():
    """Models whose convolution decreases are compared with each other too."""
    ones = [measured("a"), measured("b", seed=1), measured("flat", schedule="vit", seed=2)]
    shares = [line for line in sentences(ones) if line.startswith("High frequencies, share:")]
    pairs = [re.search(r": (\w+) has more than (\w+) in", line).groups() for line in shares]
    assert pairs == [("a", "b"), ("a", "flat"), ("b", "flat")]


def test_where_initial_values_come_from_stands_in_the_page(page):
    assert "initial values of seed 7" in page


def test_the_words_of_a_comparison_are_its_numbers():
    ones = [measured("eit"), measured("eit", "initial", seed=1), measured("flat", schedule="vit", seed=2)]
    words = " ".join(sentences(ones))
    pairs = list(zip(ones[0].analysis.layers_at("block"), ones[2].analysis.layers_at("block"), strict=True))
    more = sum(a.share - b.share > 2 * (a.share_se**2 + b.share_se**2) ** 0.5 for a, b in pairs)
    assert f"share: eit has more than flat in {more} of 3 layers" in words
    wider = [
        a.std / a.uniform > b.std / b.uniform
        for a, b in zip(ones[0].analysis.attention, ones[2].analysis.attention, strict=True)
    ]
    assert f"eit is above in {sum(wider)} of 3 layers" in words and "two standard errors of both means" in words
    assert sentences(ones[::-1])[:4] == sentences(ones)[:4]  # in whatever order they are given
    assert "Training changes the share of eit by" in words
    assert sentences([measured(state="untrained")]) == []


@pytest.mark.parametrize("gap, more", [(0.019, 0), (0.021, 3)])
def test_a_difference_counts_beyond_two_standard_errors(gap, more):
    one, other = measured("eit"), measured("flat", schedule="vit")
    for a, b in zip(one.analysis.layers_at("block"), other.analysis.layers_at("block"), strict=True):
        a.share, a.share_se, b.share, b.share_se = 0.5 + gap, 0.01, 0.5, 0.0001
    words = f"High frequencies, share: eit has more than flat in {more} of 3 layers and less in 0."
    assert words in sentences([one, other])


def test_words_where_models_cannot_be_compared():
    mixed = measured("mixed", schedule=(0, 12, 24))  # no attention in its first layer
    words = " ".join(sentences([mixed, measured("flat", schedule="vit")]))
    assert "mixed is above in" in words and "of 2 layers" in words
    words = sentences([measured("deep", depth=4), measured("flat", schedule="vit")])
    assert len(words) == 1 and "deep (4 layers) is not compared" in words[0] and "flat (3)" in words[0]
    single = [measured("a", images=1), measured("b", images=1, schedule="vit")]
    assert "a and b are not compared: one image has no standard error" in " ".join(sentences(single))


@pytest.mark.project
def test_names_with_control_characters_are_drawn_and_printed_as_boxes(tmp_path):
    from xml.etree import ElementTree

    shutil.copy(find_weights("digits"), tmp_path / "a\x1b[31mb.safetensors")
    done = run_eit("analyze", "a\x1b[31mb.safetensors", "--data", "sklearn:digits", "--images", "2", cwd=tmp_path)
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr and "Warning" not in done.stderr
    assert "\x1b" not in (tmp_path / "analysis" / "report.html").read_text()
    for file in (tmp_path / "analysis" / "figures").glob("*.svg"):
        ElementTree.parse(file)


def test_one_model_that_cannot_be_measured_does_not_cost_the_others(data, tmp_path, no_figures):
    words = ("analyze", "torchvision/resnet18", "digits", "--bands", "--grad-cam", "--data", data, "--out", tmp_path)
    done = run_eit(*words, "--no-initial")
    assert done.returncode == 0, done.stderr
    assert "resnet18 (untrained): ResNet has neither transformer blocks" in done.stderr
    assert "digits: no accuracy under noise: the data have classes that the model does not know" in done.stderr
    page = (tmp_path / "report.html").read_text()
    assert "ResNet has neither" in page and "Grad-CAM</span>" in page and not (tmp_path / "csv/robustness.csv").exists()


@pytest.mark.project
def test_a_report_inside_its_own_images_does_not_feed_on_itself(data, tmp_path, monkeypatch):
    shutil.copytree(data / "val", tmp_path / "photos")
    words = ("analyze", "digits", "--data", "photos", "--out", "photos", "--json", "--no-initial")
    done = run_eit(*words, cwd=tmp_path)
    assert json.loads(done.stdout)["models"][0]["images"] == 12
    assert len(list((tmp_path / "photos" / "figures").glob("*.png"))) > 8
    monkeypatch.setattr(report, "figures", lambda measured: [])
    done = run_eit(*words, cwd=tmp_path)
    assert json.loads(done.stdout)["models"][0]["images"] == 12


@pytest.fixture(scope="module")
def browser():
    with start_chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def four_models(tmp_path_factory):
    """The page of a report about four models."""
    ones = [measured(), measured(state="initial", seed=1), measured("two", seed=2), measured("three", seed=3)]
    return write(tmp_path_factory.mktemp("four"), ones)


@pytest.mark.project
@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (360, "dark"),
        (1200, "light"),
        pytest.param(360, "light", marks=pytest.mark.slow),
        pytest.param(1200, "dark", marks=pytest.mark.slow),
    ],
)
def test_a_browser_shows_it(browser, four_models, scheme, width):
    """On a phone and a desk: nothing asked of the network, no error, every figure in sight, no sideways scrolling."""
    with opened(browser, four_models, scheme, width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        drawn = page.locator("figure .panel svg, figure img")
        assert drawn.count() > 20
        for i in range(drawn.count()):
            box = drawn.nth(i).bounding_box()
            assert drawn.nth(i).is_visible() and box["width"] > 50 and box["height"] > 50
        assert page.locator(".panel svg").first.bounding_box()["width"] > (300 if width == 360 else 400)
        found = contrasts(page)
        assert len(found) > 100 and found[0][0] >= 4.5, found[:3]
        paper = rgba(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert (luminance(paper) > 0.5) == (scheme == "light")
        sizes = page.evaluate(
            "[...document.querySelectorAll('.panel svg text')].map("
            "e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a || 99)"  # turned text has a = 0
        )
        assert min(sizes) >= 10  # pixels
        reached = focused_by_tab(page)
        tables = {"frequencies and heads", "class token, attention and tokens"}
        assert tables <= {name for _, name, _ in reached} and all(is_visible for *_, is_visible in reached)
        for table in tables:
            scrolls = page.get_by_label(table).evaluate("e => e.scrollWidth > e.clientWidth")
            assert scrolls == (width == 360)


# -- Images that cannot be read


def test_an_unreadable_image_ends_no_analysis(tmp_path, capsys):
    for i in range(3):
        Image.effect_noise((9, 9), 60).save(tmp_path / f"{i}.png")
    for i, content in enumerate((b"", b"text", b"\x89PNG\r\n\x1a\n", b"%!PS")):
        (tmp_path / f"1.bad{i}.png").write_bytes(content)
    compared = compare(["digits"], choose_images(str(tmp_path), 10, False), CPU, Options(initial=False, workers=0))
    assert [name.rpartition("/")[2] for name in compared.images] == ["0.png", "1.png", "2.png"]
    assert compared.measured[0].analysis.images == 3 and len(compared.measured[0].image_maps) == 3
    assert capsys.readouterr().err.count("left out: ") == 4


def test_images_none_of_which_can_be_read_are_an_error(tmp_path, capsys):
    for i in range(14):
        (tmp_path / f"{i:02d}.png").touch()
    with pytest.raises(UserError, match=r"none of 14 images can be read; the first: .*00\.png"):
        readable_images(choose_images(str(tmp_path), 20, False))
    Image.new("L", (9, 9)).save(tmp_path / "good.png")
    assert len(readable_images(choose_images(str(tmp_path), 20, False))) == 1
    said = capsys.readouterr().err
    assert said.count("left out: ") == 11 and "4 more unreadable images" in said


@pytest.mark.parametrize("images", [3, None, "photos", {"a": 1}, b"x", [3], ["x"]])
def test_analyze_refuses_other_types(images):
    with pytest.raises(UserError):
        analyze(load("digits"), images)
    with pytest.raises(UserError, match="takes a model"):
        analyze("digits", torch.zeros(1, 3, 8, 8))
