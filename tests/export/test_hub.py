"""Folders and repositories as timm and Hugging Face have them."""

import base64
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from markdown_it import MarkdownIt
from PIL import Image

import eit
from eit.data.images import decode, normalise
from eit.export.hub import GRADIO, model_card, without_paths
from eit.weights.formats import save_weights
from eit.weights.load import read_card
from tests.helpers.commands import run_eit
from tests.helpers.images import save_digits
from tests.helpers.shared import require
from tests.helpers.training import TINY
from tests.weights.test_load import card as make_card

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data/, a run that was trained on it, and pushed/, written from it."""
    folder = tmp_path_factory.mktemp("hub")
    save_digits(folder / "data")
    words = ["data.root=data", "name=mine", "augment.erasing=0.1", *TINY, f"out={folder / 'runs' / 'mine'}"]
    assert run_eit("train", "cifar10", *words, cwd=folder).returncode == 0
    done = run_eit("push", "runs/mine", "--to", "pushed", "--license", "mit", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "pushed: config.json, model.safetensors, README.md, curves.png\nnext: timm.create_model"
    )
    return folder


def front_matter(text):
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_model_card_is_made_of_the_run(home):
    summary = json.loads((home / "runs" / "mine" / "summary.json").read_text())
    environment = json.loads((home / "runs" / "mine" / "environment.json").read_text())
    head, body = front_matter((home / "pushed" / "README.md").read_text())
    assert (
        head["license"] == "mit" and head["library_name"] == "timm" and head["pipeline_tag"] == "image-classification"
    )
    (result,) = head["model-index"][0]["results"]
    assert result["dataset"]["name"] == "data" and result["metrics"][0]["value"] == round(summary["best_top1"], 2)
    assert head["model-index"][0]["name"] == "mine" and body.startswith("# mine\n")
    assert f"| top-1 | {summary['best_top1']:.2f}% |" in body and f"{summary['params']:,}" in body
    assert f"| after epoch | {summary['best_epoch'] + 1} |" in body
    assert f"top-1 after the last of 2 epochs | {summary['last_top1']:.2f}%" in body
    assert "| classes | 3: digit0, digit1, digit2 |" in body and "| licence of the weights | mit |" in body
    assert f"Trained with eit {eit.__version__}, torch {environment['packages']['torch']}" in body
    assert "was chosen by the same validation images" in body and "![Loss and accuracy" in body
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recipe["augment"]["erasing"] == 0.1 and recipe["data"]["root"] == "data" and recipe["out"] == "mine"


def test_no_folder_of_this_machine_is_published(home):
    for file in (home / "pushed").iterdir():
        assert str(home).encode() not in file.read_bytes(), file
    card = read_card("digits")
    paths = dict(
        out="/home/me/runs/x",
        data=dict(root="/home/me/pets", classes="/home/me/names.txt"),
        model=dict(pretrained="/home/me/w.pth"),
        loss=dict(teacher="/home/me/t", teacher_weights="/home/me/t.pth"),
    )

    def published(recipe):
        return without_paths(card.model_copy(update=dict(recipe=recipe))).recipe

    assert "/home" not in json.dumps(published(paths))
    assert paths["data"]["root"] == "/home/me/pets"  # the original is left alone
    shards = "https://me:pw@store.example/a/train-{0..9}.tar?sig=SECRET"
    found = published(dict(data=dict(root=shards, train_split=shards, val_split="validation")))
    assert found["data"] == dict(root="train-{0..9}.tar", train_split="train-{0..9}.tar", val_split="validation")
    names = dict(
        model=dict(pretrained="digits"), loss=dict(teacher="timm/regnety_160"), data=dict(root="sklearn:digits")
    )
    assert published(names) == names and published(dict(model=dict(pretrained="hf-hub:me/x")))["model"] == dict(
        pretrained="hf-hub:me/x"
    )


def test_the_card_says_which_paths_the_recipe_lacks(home):
    model = eit.load(home / "runs" / "mine")
    recipe = json.loads(json.dumps(model.card.recipe))
    recipe["model"]["pretrained"], recipe["loss"]["teacher"] = "/home/me/w.pth", "timm/resnet18"
    model.card = without_paths(model.card.model_copy(update=dict(recipe=recipe)))
    assert "`eit train recipe.yaml data.root=PATH model.pretrained=PATH`" in model_card(model, "x", "me/x")
    model.card.metrics["val_loss"] = model.card.metrics["val_top5"] = math.nan
    text = model_card(model, "x", "me/x")
    assert "nan" not in text and "| top-1 |" in text


def test_a_variant_is_not_described_as_its_family(home):
    model = eit.load(home / "runs" / "mine")
    assert "EIT: a vision transformer without a pyramid" in model_card(model, "x", "me/x")
    arguments = model.card.arguments | dict(pos_embed="learned")
    model.card = model.card.model_copy(update=dict(arguments=arguments))
    text = model_card(model, "x", "me/x")
    assert "A variant of EIT (" in text and "`pos_embed=learned`" in text and "without position" not in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(family="eit_plus"), ["EIT+: EIT (a vision transformer", "`eit_plus_mini` with `embed_dim=16`"]),
        (
            dict(family="lsra"),
            ["LSRA: ", "one interpretation: the paper's own configuration is not known", "`eit_mini` w"],
        ),
        (dict(family="lite"), ["LSRA after the Lite Transformer's code: ", "one interpretation: the paper's own"]),
        (dict(family="lsra", cls_conv="identity"), ["A variant of LSRA (", "`cls_conv=identity`"]),
        (dict(conv_branch="gated"), ["A variant of EIT (", "`conv_branch=gated`"]),
    ],
)
def test_each_family_is_described(arguments, says):
    card = make_card(arguments=dict(embed_dim=16, depth=2, num_heads=2) | arguments)
    model = card.create_model()
    model.card = card
    text = model_card(model, "x", "me/x")
    assert all(line in text for line in says), text[:1500]


def test_files_of_someone_else_stay(home, tmp_path):
    (tmp_path / "README.md").write_text("my project")
    done = run_eit("push", home / "runs" / "mine", "--to", tmp_path)
    assert done.returncode == 2 and "has a README.md that eit push did not write" in done.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["README.md"] and (
        tmp_path / "README.md"
    ).read_text() == "my project"
    assert (
        run_eit("push", "runs/mine", "--to", "pushed", "--license", "mit", cwd=home).returncode == 0
    )  # its own, again


@pytest.mark.project
def test_private_means_private(home, hub):
    handler, env = hub
    done = run_eit("push", "runs/mine", "--repo", "me/pets", "--private", cwd=home, env=env)
    assert done.returncode == 2 and "is public already; nothing was uploaded" in done.stderr and not handler.files
    (created,) = (json.loads(body) for path, body in handler.requests if path == "/api/repos/create")
    assert created["visibility"] == "private"


def test_weights_that_no_run_made_have_a_card_too(tmp_path):
    arguments = dict(embed_dim=16, depth=2, num_heads=2, in_chans=1, family="vit")
    look = dict(mean=(0.5,), std=(0.5,), size=32, resize=36, interpolation="bilinear")
    card = make_card(arguments=arguments, classes=["a", "b"], **look)
    save_weights(tmp_path / "w.safetensors", card.create_model().state_dict(), card)
    done = run_eit("push", "w.safetensors", "--to", "out/deep", "--name", "Two letters", "--json", cwd=tmp_path)
    assert [Path(f).name for f in json.loads(done.stdout)["files"]] == ["config.json", "model.safetensors", "README.md"]
    head, body = front_matter((tmp_path / "out" / "deep" / "README.md").read_text())
    assert "license" not in head and "model-index" not in head and body.startswith("# Two letters\n")
    assert "licence of the weights | not stated" in body and "record no accuracy" in body
    assert "A plain vision transformer" in body and "must be made grey first" in body
    config = json.loads((tmp_path / "out" / "deep" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [1, 32, 32] and "license" not in config["pretrained_cfg"]


def test_any_name_makes_a_card_that_is_read_as_it_was_meant(tmp_path):
    names = ["a|b", "---", "new\nline", '"quoted": [1]', "<b>bold</b>", "naïve ünïcode"]
    card = read_card("digits")
    card = card.model_copy(update=dict(classes=names + card.classes[6:], recipe=None))
    save_weights(tmp_path / "w.safetensors", eit.load("digits").state_dict(), card)
    name = "Title: #1 | 'odd'\n---"
    assert run_eit("push", "w.safetensors", "--to", "a b/ç", "--name", name, cwd=tmp_path).returncode == 0
    head, body = front_matter((tmp_path / "a b" / "ç" / "README.md").read_text())
    assert head["model-index"][0]["name"] == name.replace("\n", " ")
    (row,) = [line for line in body.splitlines() if line.startswith("| classes")]
    assert row.replace("\\|", "").count("|") == 3 and "\\<b>" in row
    assert 'create_model("hf-hub:USER/Title-1-odd", pretrained' in body
    model = timm.create_model(f"local-dir:{tmp_path / 'a b' / 'ç'}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == card.classes


def test_text_of_others_breaks_neither_yaml_nor_markdown(tmp_path):
    """A parser of Markdown finds each text as given: none is markup, ends a cell or a code block, or is a title."""
    evil = "<script>x</script> | `a` *b* [c](d) &lt; # ~~e~~ $f$ _g_ \\"
    model = eit.load("digits")
    recipe = {"name": "a\n---\n```\n~~~~\n# Broken\n</details>", "````": ["```"], "data": {"dataset": f"hfds/{evil}"}}
    names = [evil, "b", *model.card.classes[2:]]
    model.card = model.card.model_copy(update=dict(classes=names, recipe=recipe))
    (tmp_path / "environment.json").write_text(json.dumps(dict(eit=evil, device=evil, packages=dict(torch=evil))))
    text = model_card(model, evil, "me/x", license=evil, run=tmp_path)
    head, body = front_matter(text)
    assert head["license"] == head["model-index"][0]["name"] == evil
    assert head["model-index"][0]["results"][0]["dataset"]["name"] == f"hfds/{evil}"
    tokens = MarkdownIt("gfm-like", dict(linkify=False)).parse(body)
    titles = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open"]
    sections = ["Figures", "Use", "Recipe", "Limits"]
    assert [plain(title) for title in titles] == [evil, *sections]
    rows = [plain(token) for token in tokens if token.type == "inline" and evil in plain(token)]
    assert len(rows) == 6  # title, class names, licence, data, environment, limits
    assert rows[1:4] == [f"10: {evil}, b, 2, 3, 4, 5, 6, 7, 8, 9", evil, f"Data: hfds/{evil}."]
    (block,) = [token for token in tokens if token.type == "fence" and token.info == "yaml"]
    assert yaml.safe_load(block.content) == recipe
    html = [token.content for token in tokens if token.type == "html_block"]
    assert html == ["<details><summary>recipe.yaml</summary>\n", "</details>\n"]


def plain(token):
    """The text of a parsed line, in which nothing may be markup but code and the links of the package."""
    allowed = {"text", "text_special", "code_inline", "link_open", "link_close", "softbreak"}
    assert {child.type for child in token.children} <= allowed
    return "".join(child.content or "\n" * (child.type == "softbreak") for child in token.children)


def image_and_logits(home):
    file = next((home / "data" / "val").rglob("*.png"))
    Image.open(file).resize((41, 30)).save(home / "odd.png")
    model = eit.load(home / "runs" / "mine")
    view = model.card.view
    with torch.no_grad():
        x = normalise(view.pixels(decode(str(home / "odd.png")))[None], view.mean, view.std)
        return home / "odd.png", x, model(x)


@pytest.mark.project
def test_timm_loads_the_folder_in_a_fresh_process_and_sees_the_same_pixels(home):
    file, x, logits = image_and_logits(home)
    torch.save((x, logits), home / "expected.pt")
    usage = (home / "pushed" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = (
        usage.replace("hf-hub:USER/mine", "local-dir:pushed").replace("image.png", file.name)
        + "x, expected = torch.load('expected.pt')\n"
        + f"image = Image.open('{file.name}').convert('RGB')\n"
        + "torch.testing.assert_close(transform(image)[None], x)\n"
        + "torch.testing.assert_close(logits, expected)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == eit.load(home / "pushed").card.classes[int(logits.argmax())]


@pytest.mark.project
def test_transformers_loads_the_folder_and_its_pipeline_names_the_classes(home):
    file, x, logits = image_and_logits(home)
    torch.save((x, logits), home / "expected.pt")
    code = f"""
import eit, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
from PIL import Image

model = AutoModelForImageClassification.from_pretrained("pushed").eval()
processor = AutoImageProcessor.from_pretrained("pushed")
x, expected = torch.load("expected.pt")
pixels = processor(Image.open({file.name!r}).convert("RGB"), return_tensors="pt")["pixel_values"]
torch.testing.assert_close(pixels, x)
with torch.no_grad():
    torch.testing.assert_close(model(pixels).logits, expected)
print([model.config.id2label[i] for i in range(3)])
print([found["label"] for found in pipeline("image-classification", "pushed")({file.name!r})])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    classes = eit.load(home / "pushed").card.classes
    ranked = [classes[i] for i in logits[0].argsort(descending=True)]
    assert done.stdout.splitlines() == [str(classes), str(ranked)]


def test_this_package_loads_the_folder_as_well(home):
    model, own = eit.load(home / "pushed"), eit.load(home / "runs" / "mine")
    assert model.card.classes == own.card.classes and model.card.metrics == own.card.metrics
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), own.parameters(), strict=True))
    done = run_eit("eval", "pushed", "--data", "data", "--json", cwd=home)
    assert json.loads(done.stdout)["top1"] == pytest.approx(own.card.metrics["val_top1"])


def test_a_model_of_timm(tmp_path):
    card = make_card(model="timm/resnet10t", arguments={}, size=32, resize=32)
    model = card.create_model().eval()
    save_weights(tmp_path / "w.safetensors", model.state_dict(), card)
    assert run_eit("push", "w.safetensors", "--to", "r", cwd=tmp_path).returncode == 0
    loaded = timm.create_model(f"local-dir:{tmp_path / 'r'}", pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))
    assert "import eit" not in (tmp_path / "r" / "README.md").read_text()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as an upload and a download need."""

    files: dict[str, bytes]
    requests: list

    def answer(self, status=200, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content, status=200):
        self.answer(status, json.dumps(content).encode(), Content_Type="application/json")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.requests.append((self.path, body))
        if self.headers["Authorization"] != "Bearer hf_right":
            self.answer_json(dict(error="Invalid username or password."), 401)
        elif self.path == "/api/validate-yaml":
            self.answer_json(dict(errors=[], warnings=[]))
        elif self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"me/{wanted['name']}"
            self.answer_json(dict(url=f"http://{self.headers['Host']}/{name}", name=name, id=name))
        elif self.path.endswith("/preupload/main"):
            files = [dict(path=f["path"], uploadMode="regular", shouldIgnore=False) for f in json.loads(body)["files"]]
            self.answer_json(dict(files=files, commitOid="0" * 40))
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/me/pets/commit/{'1' * 40}"
            self.answer_json(dict(commitUrl=url, commitOid="1" * 40, pullRequestUrl=None, success=True))
        else:
            self.answer_json(dict(error="what is that?"), 404)

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        if self.headers["Authorization"] != "Bearer hf_right":
            self.answer_json(dict(error="Invalid username or password."), 401)
        elif "/resolve/" in self.path and name in self.files:
            head = dict(ETag=f'"{hash(self.files[name])}"', X_Repo_Commit="1" * 40)
            self.answer(200, self.files[name], Content_Type="application/octet-stream", **head)
        elif "/resolve/" in self.path:
            self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit="1" * 40)
        else:
            self.answer_json(dict(error="not here", id="me/pets", sha="1" * 40, siblings=[], private=False), 200)

    do_HEAD = do_GET

    def log_message(self, *words):
        pass


@pytest.fixture
def hub(tmp_path):
    """A local server as the hub, and the environment of someone who is logged in there."""
    handler = type("OwnHub", (Hub,), dict(files={}, requests=[]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    env = dict(HF_ENDPOINT=address, HF_HUB_OFFLINE="0", HF_TOKEN="hf_right", HF_HOME=str(tmp_path / "hf"))
    env["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")  # `run_eit` starts Python anew: these are read on import
    yield handler, env
    server.shutdown()


@pytest.mark.project
def test_pushed_to_the_hub_and_back(home, hub, tmp_path):
    handler, env = hub
    weights = (home / "pushed" / "model.safetensors").read_bytes()
    done = run_eit("push", "runs/mine", "--repo", "me/pets", cwd=home, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].endswith("/me/pets") and "predict hf-hub:me/pets IMAGE" in done.stdout
    assert sorted(handler.files) == ["README.md", "config.json", "curves.png", "model.safetensors"]
    pushed, own = (safetensors.torch.load(content) for content in (handler.files["model.safetensors"], weights))
    assert pushed.keys() == own.keys() and all(torch.equal(pushed[name], own[name]) for name in own)
    assert b"hf-hub:me/pets" in handler.files["README.md"] and b"USER" not in handler.files["README.md"]
    assert b"# pets" in handler.files["README.md"]
    (created,) = (json.loads(body) for path, body in handler.requests if path == "/api/repos/create")
    assert created["name"] == "pets" and "visibility" not in created  # as its owner has it
    image_and_logits(home)
    done = run_eit("predict", "hf-hub:me/pets", "odd.png", "--json", cwd=home, env=env)
    assert done.returncode == 0, done.stderr
    own = run_eit("predict", "runs/mine", "odd.png", "--json", cwd=home).stdout
    assert json.loads(done.stdout) == json.loads(own)
    code = "import eit, timm; print(timm.create_model('hf-hub:me/pets', pretrained=True).num_classes)"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=home, env=os.environ | env, capture_output=True, text=True)
    assert done.stdout.strip() == "3", done.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["push", "runs/mine"], "give one of --repo USER/NAME, --to FOLDER and --space"),
        (
            ["push", "runs/mine", "--to", "x", "--repo", "me/x"],
            "give one of --repo USER/NAME, --to FOLDER and --space",
        ),
        (["push", "runs/mine", "--to", "x", "--private"], "--private is for --repo"),
        (["push", "runs/mine", "--to", "odd.png"], "--to odd.png cannot be written: odd.png is a file"),
        (["push", "runs/none", "--to", "x"], "no weights at runs/none"),
        (["push", "runs/mine", "--repo", "a b"], "--repo a b: Repo id must use"),
        (["push", "runs/mine", "--repo", "pets"], "--repo pets: USER/NAME is expected"),
        (["push", "runs/mine", "--repo", "me/x"], "--repo me/x: the hub cannot be reached"),
        (["predict", "hf-hub:me/x", "odd.png"], "hf-hub:me/x cannot be fetched: "),
        (["export", "hf-hub:me/x"], "hf-hub:me/x cannot be fetched: "),
        (["analyze", "hf-hub:me/x", "--data", "data"], "hf-hub:me/x cannot be fetched: "),
        (["train", "cifar10", "data.root=data", "model.pretrained=hf-hub:me/x"], "hf-hub:me/x cannot be fetched: "),
    ],
)
def test_what_goes_wrong_is_one_line(home, words, line):
    image_and_logits(home)
    done = run_eit(*words, cwd=home, env=dict(HF_HUB_OFFLINE="1"))
    assert done.returncode == 2 and done.stderr.startswith(f"eit: {line}"), done.stderr
    assert done.stderr.count("\n") == 1 and not (home / "x").exists()


@pytest.mark.project
def test_who_is_not_logged_in_is_told_in_one_line(home, hub):
    _, env = hub
    done = run_eit("push", "runs/mine", "--repo", "me/pets", cwd=home, env=env | dict(HF_TOKEN="hf_wrong"))
    assert (
        done.returncode == 2 and done.stderr.startswith("eit: --repo me/pets: ") and "Invalid username" in done.stderr
    )
    assert done.stderr.count("\n") == 1, done.stderr


def test_guesses_are_published_as_guesses(tmp_path):
    made = make_card(guessed=("classes", "mean", "std"))
    save_weights(tmp_path / "w.safetensors", made.create_model().state_dict(), made)
    assert run_eit("push", tmp_path / "w.safetensors", "--to", tmp_path / "hub").returncode == 0
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert "label_names" not in config and read_card(tmp_path / "hub").guessed == made.guessed
    readme = (tmp_path / "hub" / "README.md").read_text()
    assert "| assumed, not known | classes cat, dog, owl, mean (0.5, 0.5, 0.5)" in readme
    assert "print(int(logits.argmax()))" in readme


# -- A Space


@pytest.fixture(scope="module")
def space(home):
    done = run_eit("push", "runs/mine", "--space", "my space", "--license", "mit", "--name", "'A' {b}: c", cwd=home)
    assert done.returncode == 0, done.stderr
    assert "next: python 'my space/app.py'    hf upload USER/NAME 'my space' . --repo-type space" in done.stdout
    return home / "my space"


def test_a_space_has_what_the_hub_asks_for(space, home):
    head, body = front_matter((space / "README.md").read_text())
    assert head["title"] == "'A' {b}: c" and head["sdk"] == "gradio" and head["license"] == "mit"
    assert (space / head["app_file"]).is_file() and "digit0, digit1, digit2" in body
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"gradio=={head['sdk_version']}" in pins and f"gradio=={GRADIO}" in pins
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11" and head["python_version"] == "3.12"
    needed = (space / "requirements.txt").read_text().splitlines()
    assert {re.match(r"[\w-]+", line)[0] for line in needed} == {
        re.match(r"[\w-]+", line)[0] for line in [*project["dependencies"], "gradio"]
    }
    assert not list(space.rglob("__pycache__")) and (space / "eit" / "demo" / "page.css").is_file()
    assert len(list(space.rglob("*.safetensors"))) == 1
    for file in space.rglob("*"):
        assert not file.is_file() or str(home).encode() not in file.read_bytes(), file


def test_a_space_is_written_over_but_nothing_else_is(space, home, tmp_path):
    (space / ".git").mkdir()
    assert run_eit("push", "runs/mine", "--space", "my space", cwd=home).returncode == 0
    assert (space / ".git").is_dir() and front_matter((space / "README.md").read_text())[0]["title"] == "mine"
    for number, (name, content) in enumerate((("app.py", "mine"), ("README.md", "# x"), ("eit/x.py", ""))):
        file = tmp_path / str(number) / name
        file.parent.mkdir(parents=True)
        file.write_text(content)
        done = run_eit("push", "digits", "--space", tmp_path / str(number))
        assert done.returncode == 2 and "that eit push --space did not write" in done.stderr
        assert file.read_text() == content and len(list((tmp_path / str(number)).rglob("*.*"))) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "none was given"),
        (["--to", "x", "--space", "y"], "--to, --space were given"),
        (["--repo", "me/x", "--to", "x", "--space", "y"], "--repo, --to, --space were given"),
        (["--space", "y", "--private"], "--private is for --repo; leave it out with --space y"),
    ],
)
def test_one_target_of_a_push_is_given(tmp_path, words, said):
    done = run_eit("push", "digits", *words, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and not any(tmp_path.iterdir())


@pytest.mark.project
def test_a_space_predicts_offline(space, home):
    """app.py in a new Python, whose only source of this package is the folder."""
    require(find_spec("gradio") is not None, "gradio is not installed: pip install 'eit[demo]'")
    from gradio_client import Client, handle_file

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= dict(GRADIO_SERVER_PORT=str(port), OMP_NUM_THREADS="1", http_proxy="http://127.0.0.1:9")
    process = subprocess.Popen(
        [sys.executable, space / "app.py"], env=environment, cwd=home, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline().startswith(f"http://127.0.0.1:{port}/")
        (image, *_) = sorted((home / "data" / "val").rglob("*.png"))
        status, label, layers = Client(f"http://127.0.0.1:{port}", verbose=False).predict(
            handle_file(image), api_name="/predict"
        )
        (predicted,) = eit.predict(space, image)
        assert status == "" and [(c["label"], c["confidence"]) for c in label["confidences"]] == predicted.labels
        assert "layer 2" in layers
    finally:
        process.terminate()
        assert process.wait(30) == 143
