"""Write weights as a folder that timm and transformers read, or as a Space with a page, and upload them to the hub."""

import json
import math
import re
import shutil
from importlib import metadata, resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from timm.models import save_for_hf

from eit import __version__
from eit.data.datasets import DIGITS
from eit.errors import UserError, few, first_line, printable
from eit.files import read_json, temporary_folder, write_file
from eit.hub_access import prepare_hub
from eit.models.complexity import complexity
from eit.models.eit import EIT
from eit.models.registry import FAMILIES, MODELS, TIMM
from eit.weights.card import Card
from eit.weights.formats import weights_bytes
from eit.weights.load import HUB, INCLUDED, load, read_card

CONFIG, WEIGHTS, README, CURVES = "config.json", "model.safetensors", "README.md", "curves.png"
BEST, FINAL = "best.safetensors", "final.safetensors"  # in a run folder
GRADIO = "6.31.0"  # of a Space; the one that constraints.txt pins
PYTHON = "3.12"  # of a Space, whose default is older than this package needs
PATHS = (  # recipe keys
    "data.root",
    "data.train_split",
    "data.val_split",
    "data.classes",
    "model.pretrained",
    "loss.teacher",
    "loss.teacher_weights",
)


def write_folder(
    checkpoint: str,
    folder: Path,
    name: str | None = None,
    license: str | None = None,
    repo: str | None = None,
) -> list[Path]:
    """Write weights as `timm.create_model("local-dir:FOLDER", pretrained=True)` and transformers read them.

    The files are config.json, model.safetensors (`eit.load` reads it too), README.md, and curves.png of a run folder.
    The recipe is included without this machine's folders.

    Args:
        checkpoint: a weights file, a run folder, or the name of included weights.
        folder: created if it does not exist; files of these names are replaced.
        name: title of the model card; default: the recipe's name, or the folder's.
        license: identifier of the weights' licence, such as apache-2.0; without it the card says that none is stated.
        repo: USER/NAME of the hub's repository, for the card's examples.

    Raises:
        UserError: no such checkpoint, one that does not name its model, or a folder with files of these names that
            this function did not write.
    """
    _check_folder(folder)
    model, name = _to_publish(checkpoint, folder, name)
    card: Card = model.card
    run = _run_of(Path(checkpoint).expanduser())
    repo = repo or f"USER/{_file_name(name) or 'NAME'}"
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, bytes | str] = {
        CONFIG: json.dumps(_config(model, license), indent=2) + "\n",
        WEIGHTS: weights_bytes(model.state_dict(), card),
        README: model_card(model, name, repo, license, run, last=Path(checkpoint).name == FINAL),
    }
    if run and (run / CURVES).is_file():
        contents[CURVES] = (run / CURVES).read_bytes()
    for file, content in contents.items():
        write_file(folder / file, content)
    return [folder / file for file in contents]


def _to_publish(checkpoint: str, folder: Path, name: str | None) -> tuple[Any, str]:
    """The model, whose card names no folder of this machine, and the title of its page."""
    model = load(checkpoint)
    model.card = without_paths(model.card)
    return model, printable(str(name or (model.card.recipe or {}).get("name") or folder.resolve().name))


def _file_name(title: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", title).strip(".-")


def _run_of(checkpoint: Path) -> Path | None:
    """The run folder that was given, or that holds the weights file."""
    if checkpoint.is_dir():
        return checkpoint
    of_run = checkpoint.name in (BEST, FINAL) and (checkpoint.parent / "recipe.yaml").exists()
    return checkpoint.parent if of_run else None


def _check_folder(folder: Path) -> None:
    """Raise a UserError if a file that this module did not write would be replaced."""
    there = [name for name in (CONFIG, WEIGHTS, README) if (folder / name).exists()]
    if there:
        try:
            ours = read_card(folder / WEIGHTS) is not None
        except UserError:
            ours = False
        if not ours:
            raise UserError(f"{folder} has a {there[0]} that eit push did not write: give another folder")


APP = """\
# A Space of Hugging Face, written by eit push --space: the page of eit demo with the weights of this folder.
import os
from pathlib import Path

from eit.demo.page import serve

if __name__ == "__main__":
    os.chdir(Path(__file__).parent)
    everyone = "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"
    host = os.environ.get("GRADIO_SERVER_NAME") or everyone
    serve({models}, host, int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
"""


def write_space(checkpoint: str, folder: Path, name: str | None = None, license: str | None = None) -> list[Path]:
    """Write a folder that a Hugging Face Space runs as it is: the page of `eit demo` with these weights.

    The files are app.py, requirements.txt, README.md with the Space's header, the weights, and this package, so that
    the Space needs nothing that is not on the package index.

    Args:
        checkpoint: a weights file, a run folder, or the name of included weights.
        folder: created if it does not exist; one that this function wrote is replaced.
        name: title of the Space; default: the recipe's name, or the folder's.
        license: identifier of the licence, such as apache-2.0.

    Raises:
        UserError: no such checkpoint, or a folder with other files.
    """
    app, ours = folder / "app.py", APP.partition("\n")[0].encode()
    there = [part for part in (app.name, "requirements.txt", README, WEIGHTS, "eit") if (folder / part).exists()]
    if there and not (app.is_file() and app.read_bytes().startswith(ours)):
        raise UserError(f"{folder} has a {there[0]} that eit push --space did not write: give another folder")
    model, title = _to_publish(checkpoint, folder, name)
    card: Card = model.card
    head = dict(title=title, emoji="\N{LEFT-POINTING MAGNIFYING GLASS}", colorFrom="blue", colorTo="indigo")
    head |= dict(sdk="gradio", sdk_version=GRADIO, python_version=PYTHON, app_file=app.name)
    head |= dict(license=license) if license else {}
    text = (
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n# {escape_markdown(title)}\n\n"
        f"What a vision transformer predicts for a picture ({escape_markdown(few(card.classes, 10))}), and what its\n"
        f"layers compute. Written by eit {__version__}.\n"
    )
    package = metadata.distribution("eit")
    needed = [line for line in package.requires or () if ";" not in line]  # the others are of extras
    contents: dict[str, bytes | str] = {
        app.name: APP.format(models={title: WEIGHTS}),
        "requirements.txt": "\n".join([*needed, f"gradio=={GRADIO}", ""]),
        README: text,
        WEIGHTS: weights_bytes(model.state_dict(), card),
        # What `pip` would have written: the package looks up its version
        f"eit-{__version__}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: eit\nVersion: {__version__}\n",
        f"eit-{__version__}.dist-info/LICENSE": package.read_text("licenses/LICENSE") or "Apache-2.0\n",
    }
    shutil.rmtree(folder / "eit", ignore_errors=True)
    leave = shutil.ignore_patterns("__pycache__", "*.pyc", "*.safetensors")
    shutil.copytree(Path(__file__).parents[1], folder / "eit", ignore=leave)
    for file, content in contents.items():
        (folder / file).parent.mkdir(exist_ok=True)
        write_file(folder / file, content)
    return [folder / file for file in [*contents, "eit"]]


def push(checkpoint: str, repo: str, name: str | None = None, license: str | None = None, private: bool = False) -> str:
    """Upload what `write_folder` writes to the Hugging Face repository `repo`, and return its address.

    The repository is created if it does not exist.

    Raises:
        UserError: the error of the hub or the network, in one line.
    """
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise UserError(f"--repo {repo}: {first_line(error)}") from None
    if "/" not in repo:
        raise UserError(f"--repo {repo}: USER/NAME is expected")
    with temporary_folder() as staging:
        write_folder(checkpoint, staging, name or repo.rpartition("/")[2], license, repo)
        prepare_hub()
        try:
            api = HfApi(library_name="eit", library_version=__version__)
            address = api.create_repo(repo, private=private or None, exist_ok=True)  # None: the owner's default
            if private and not api.repo_info(repo).private:
                raise UserError(f"--repo {repo} --private: this repository is public already; nothing was uploaded")
            api.upload_folder(repo_id=repo, folder_path=staging, commit_message=f"Upload by eit {__version__}")
        except UserError:
            raise
        except OfflineModeIsEnabled:
            raise UserError(f"--repo {repo}: the hub cannot be reached; --to FOLDER writes a local folder") from None
        except Exception as error:  # from the hub, its HTTP library or the network
            raise UserError(f"--repo {repo}: {_line(error)}") from None
    return str(address)


def without_paths(card: Card) -> Card:
    """`card` with only the last part of each path and address in its recipe: no folder or access key is published.

    Names that are not paths stay.
    """
    if card.recipe is None:
        return card
    recipe = json.loads(json.dumps(card.recipe))
    for section, part in [("", recipe), *((name, part) for name, part in recipe.items() if isinstance(part, dict))]:
        for name, value in part.items():
            key = f"{section}.{name}".strip(".")
            if isinstance(value, str) and (_is_path(value) if key in (*PATHS, "out") else _shows_folders(value)):
                part[name] = re.split(r"[/\\]", (urlsplit(value).path if "://" in value else value).rstrip("/\\"))[-1]
    return card.model_copy(update=dict(recipe=recipe))


def _shows_folders(value: str) -> bool:
    """Whether the value of any key is an absolute path or an address: /home/me/x, ~/x, hfds//home/me/x, C:\\x."""
    if any(map(str.isspace, value)) and not value.startswith(("/", "~")):
        return False  # a text
    return value.startswith(("/", "~")) or "//" in value or re.match(r"[A-Za-z]:\\", value) is not None


def _is_path(value: str) -> bool:
    return value not in (DIGITS, *INCLUDED) and not value.startswith((TIMM, HUB))


def model_card(
    model: Any, name: str, repo: str, license: str | None = None, run: Path | None = None, last: bool = False
) -> str:
    """README.md of the folder, from model_card.md.j2: the model, its figures, use, recipe and limits.

    `last`: the weights are of the last epoch, which was not chosen by its accuracy.
    """
    card: Card = model.card
    data, metrics, recipe = _data_name(card.data), _finite(card), card.recipe or {}
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=str(data or "unknown"),
            dataset_name=str(data or "unknown"),
            dataset_split="validation",
            metric_type="accuracy",
            metric_name=label,
            metric_value=round(metrics[key], 2),
        )
        for key, label in (("val_top1", "top-1"), ("val_top5", "top-5"))
        if key in metrics
    ]
    head = ModelCardData(
        license=license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers", "eit"],
        model_name=name,
        eval_results=results or None,
    )
    recipe_yaml = yaml.dump(recipe, Dumper=_TextInOneLine, sort_keys=False, width=10**6) if recipe else ""
    text = ModelCard.from_template(
        head,
        template_str=resources.files("eit.export").joinpath("model_card.md.j2").read_text(encoding="utf-8"),
        md=escape_markdown,
        few=few,
        numbers=lambda values: ", ".join(f"{value:g}" for value in values),
        name=name,
        repo=repo,
        license=license,
        card=card,
        cost=complexity(model, (card.in_chans, card.size, card.size)),
        data=data,
        metrics=metrics,
        summary=_read_json(run, "summary.json"),
        environment=_read_json(run, "environment.json"),
        recipe=recipe_yaml,
        fence=max(["``", *re.findall("`+", recipe_yaml)], key=len) + "`",  # longer than any in the recipe
        cut_paths=[key for key in PATHS if _is_cut(recipe, key)],
        is_last=last,
        takes_other_sizes=isinstance(model, EIT),
        curves=CURVES if run and (run / CURVES).is_file() else None,
        **_architecture(card),
    )
    return f"{text}\n"


class _TextInOneLine(yaml.SafeDumper):
    """Text of several lines with its line ends escaped, so that none of it begins a line of the page."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_TextInOneLine.add_representer(str, _represent_text)


def escape_markdown(text: object) -> str:
    """`text` in one line that Markdown shows as it is, in a cell of a table too."""
    return re.sub(r"([\\`*_\[\]<|&~$#])", r"\\\1", printable(str(text)))


def _data_name(data: dict[str, Any]) -> str | None:
    """The name of a data set of timm, otherwise that of the folder, whose content may be anything."""
    name = data.get("dataset") if "/" in str(data.get("dataset")) else data.get("root")
    return printable(str(name)) if name else None


def _config(model: Any, license: str | None) -> dict[str, Any]:
    """config.json as timm writes it, without the argument that transformers would pass twice."""
    card: Card = model.card
    with temporary_folder() as staging:
        config = {} if "classes" in card.guessed else dict(label_names=card.classes)
        save_for_hf(model, staging, model_config=config, data_config=card.timm_cfg, safe_serialization=True)
        found: dict[str, Any] = json.loads((staging / CONFIG).read_text(encoding="utf-8"))
    found["model_args"].pop("num_classes", None)  # transformers passes the outer one as well, and fails
    for key in ("license", "origin_url"):  # of the published weights, which these are not
        found["pretrained_cfg"].pop(key, None)
    if license:
        found["pretrained_cfg"]["license"] = license
    return found


def _architecture(card: Card) -> dict[str, Any]:
    """What the model card's template says of the architecture."""
    if card.model.startswith(TIMM):
        return dict(timm_name=card.model.removeprefix(TIMM))
    family = card.arguments.get("family", "eit")
    preset = FAMILIES[family]
    names = (name for name, made in MODELS.items() if made == (MODELS[card.model][0], family))
    return dict(
        model_name=next(names, card.model),
        family=family,
        is_preset=all(card.arguments.get(key, value) == value for key, value in preset.items()),
        changed={k: v for k, v in card.arguments.items() if k != "family" and not k.endswith("_rate")},
    )


def _is_cut(recipe: dict[str, Any], key: str) -> bool:
    """Whether `without_paths` shortened this key of the recipe."""
    section, _, name = key.rpartition(".")
    value = recipe.get(section, {}).get(name)
    return isinstance(value, str) and _is_path(value) and not name.endswith("_split")


def _finite(card: Card) -> dict[str, float]:
    return {name: value for name, value in (card.metrics or {}).items() if math.isfinite(value)}


def _read_json(run: Path | None, name: str) -> dict[str, Any] | None:
    """The content of a JSON file of the run folder; None if it is missing or damaged."""
    try:
        found = read_json(run / name) if run else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _line(error: Exception) -> str:
    """The first line of an error, and the message of the hub's server if there is one."""
    line = first_line(error)
    said = getattr(error, "server_message", None)
    return f"{line} ({said})" if said and said not in line else line
