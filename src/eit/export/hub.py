"""Weights -> a folder as timm and Hugging Face have it, with a model card, and from there to the hub."""

import json
import math
import re
import tempfile
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlsplit

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import validate_repo_id
from timm.models import save_for_hf

from eit import __version__
from eit.data.datasets import DIGITS
from eit.errors import UserError, first_line, printable
from eit.files import write_file
from eit.models.complexity import complexity
from eit.models.eit import EIT
from eit.models.registry import FAMILIES, MODELS, TIMM
from eit.weights.card import Card
from eit.weights.formats import weights_bytes
from eit.weights.load import HUB, SHIPPED, load, read_card

CONFIG, WEIGHTS, README, CURVES = "config.json", "model.safetensors", "README.md", "curves.png"
BEST, FINAL = "best.safetensors", "final.safetensors"  # of a run folder
PATHS = (  # keys of a recipe
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
    """The weights as `timm.create_model("local-dir:FOLDER", pretrained=True)` and transformers read them.

    Written are config.json, model.safetensors (which `eit.load` reads too), README.md, and curves.png of a run folder.
    The recipe goes along without the folders of this machine.

    Args:
        checkpoint: a weights file, a run folder, or a name that ships.
        folder: made if need be; files of these names are replaced.
        name: title of the model card; default: that of the recipe, or the folder's.
        license: of the weights, by its identifier, such as apache-2.0; the card says where none is given.
        repo: USER/NAME where the folder will be, for the card's examples.

    Raises:
        UserError: no such checkpoint, one that does not say which model it is, or a folder with files of these names
            that were not written by this.
    """
    _check_folder(folder)
    model = load(checkpoint)
    card = model.card = without_paths(model.card)
    run = _run_of(Path(checkpoint))
    name = printable(str(name or (card.recipe or {}).get("name") or folder.resolve().name))
    repo = repo or f"USER/{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('.-') or 'NAME'}"
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


def _run_of(checkpoint: Path) -> Path | None:
    """The run folder that it is, or that its weights file is of."""
    if checkpoint.is_dir():
        return checkpoint
    of_run = checkpoint.name in (BEST, FINAL) and (checkpoint.parent / "recipe.yaml").exists()
    return checkpoint.parent if of_run else None


def _check_folder(folder: Path) -> None:
    """Raise a UserError where files of someone else would be replaced."""
    there = [name for name in (CONFIG, WEIGHTS, README) if (folder / name).exists()]
    if there:
        try:
            ours = read_card(folder / WEIGHTS) is not None
        except UserError:
            ours = False
        if not ours:
            raise UserError(f"{folder} has a {there[0]} that eit push did not write: give another folder")


def push(checkpoint: str, repo: str, name: str | None = None, license: str | None = None, private: bool = False) -> str:
    """Upload what `write_folder` writes to the Hugging Face repository `repo`, made if need be -> its address.

    Raises:
        UserError: in one line, what the hub or the network says.
    """
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise UserError(f"--repo {repo}: {first_line(error)}") from None
    if "/" not in repo:
        raise UserError(f"--repo {repo}: USER/NAME is expected")
    with tempfile.TemporaryDirectory() as staging:
        write_folder(checkpoint, Path(staging), name or repo.rpartition("/")[2], license, repo)
        hub_logging.set_verbosity_error()  # its retries; what it fails by is said below
        try:
            api = HfApi(library_name="eit", library_version=__version__)
            address = api.create_repo(repo, private=private or None, exist_ok=True)  # None: as the owner has it
            if private and not api.repo_info(repo).private:
                raise UserError(f"--repo {repo} --private: this repository is public already; nothing was uploaded")
            api.upload_folder(repo_id=repo, folder_path=staging, commit_message=f"Upload by eit {__version__}")
        except UserError:
            raise
        except Exception as error:  # of the hub, of its HTTP library, of the network
            raise UserError(f"--repo {repo}: {_line(error)}") from None
    return str(address)


def without_paths(card: Card) -> Card:
    """`card` with the last parts of the recipe's paths and addresses alone.

    Folders of one machine, and keys in an address, are nobody else's business. Names that are no paths stay.
    """
    if card.recipe is None:
        return card
    recipe = json.loads(json.dumps(card.recipe))
    for key in (*PATHS, "out"):
        section, _, name = key.rpartition(".")
        part = recipe.get(section) if section else recipe
        if isinstance(part, dict) and isinstance(value := part.get(name), str) and _is_path(value):
            part[name] = PurePath(urlsplit(value).path if "://" in value else value).name
    return card.model_copy(update=dict(recipe=recipe))


def _is_path(value: str) -> bool:
    return value not in (DIGITS, *SHIPPED) and not value.startswith((TIMM, HUB))


def model_card(
    model: Any, name: str, repo: str, license: str | None = None, run: Path | None = None, last: bool = False
) -> str:
    """README.md of the folder: what the model is, its figures, how it is used and trained, and its limits.

    `last`: of the last epoch, which was not chosen by its accuracy.
    """
    card: Card = model.card
    summary, environment = _read_json(run, "summary.json"), _read_json(run, "environment.json")
    cost = complexity(model, (card.in_chans, card.size, card.size))
    data = _data_name(card.data)
    metrics = _finite(card)
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
    colour = "RGB" if card.in_chans == 3 else "grey"
    lines = [
        "---",
        head.to_yaml(),
        "---",
        f"# {name}",
        "",
        _description(card),
        "",
        "| | |",
        "| --- | --- |",
        f"| parameters | {cost.params:,} |",
        f"| multiply-accumulates at {card.size}x{card.size} | {cost.macs / 1e9:.3f} G |",
        f"| input | {colour}, shorter side to {card.resize} ({card.interpolation}), centre {card.size}x{card.size} |",
        f"| normalisation | mean {_numbers(card.mean)}, std {_numbers(card.std)} |",
        f"| classes | {len(card.classes)}: {_few(card.classes)} |",
        f"| licence of the weights | {license or 'not stated by who trained them'} |",
        "",
        "## Figures",
        "",
        *_figures(card, summary, data),
        "",
        "## Use",
        "",
        *_usage(card, repo),
        "",
        "## Recipe",
        "",
        *_recipe(card.recipe or {}, environment),
        "",
        "## Limits",
        "",
        *_limits(model, summary, data, last),
        "",
    ]
    if run and (run / CURVES).is_file():
        lines += ["## Training", "", f"![Loss and accuracy over the epochs]({CURVES})", ""]
    return "\n".join(lines)


def _data_name(data: dict[str, Any]) -> str | None:
    """A data set of timm by its name; else the folder's, for what lies in it may be anyone's own."""
    name = data.get("dataset") if "/" in str(data.get("dataset")) else data.get("root")
    return printable(str(name)) if name else None


def _config(model: Any, license: str | None) -> dict[str, Any]:
    """config.json by timm, without what transformers would be told twice."""
    card: Card = model.card
    with tempfile.TemporaryDirectory() as staging:
        config = dict(label_names=card.classes)
        save_for_hf(model, staging, model_config=config, data_config=card.timm_cfg, safe_serialization=True)
        found: dict[str, Any] = json.loads((Path(staging) / CONFIG).read_text(encoding="utf-8"))
    found["model_args"].pop("num_classes", None)  # transformers passes the one above as well, and fails
    for key in ("license", "origin_url"):  # of weights that these are not
        found["pretrained_cfg"].pop(key, None)
    if license:
        found["pretrained_cfg"]["license"] = license
    return found


def _description(card: Card) -> str:
    if card.model.startswith(TIMM):
        return f"`{card.model.removeprefix(TIMM)}` of timm, trained with [eit](https://arxiv.org/abs/2203.07116)."
    family = card.arguments.get("family", "eit")
    parts = FAMILIES[family]
    own = all(card.arguments.get(key, parts[key]) == parts[key] for key in parts)
    what = dict(
        eit="EIT: a vision transformer without a pyramid and without position embedding, in whose layers a share of "
        "the channels, smaller with depth, goes through a depthwise convolution",
        eit_plus="EIT+: EIT (a vision transformer in whose layers a share of the channels, smaller with depth, goes "
        "through a depthwise convolution) with changes of this package that add no cost",
        lsra="LSRA: a vision transformer in whose layers half of the channels goes through a depthwise convolution. It "
        "is a reading: the paper's own configuration is not known",
        lite="LSRA after the Lite Transformer's code: a vision transformer in whose layers half of the channels goes "
        "through a gated branch with a depthwise convolution. It is a reading: the paper's own configuration is not "
        "known",
        vit="A plain vision transformer",
    )[family]
    if not own:
        short = dict(eit="EIT", eit_plus="EIT+", lsra="LSRA", lite="LSRA (`lite`)", vit="a plain vision transformer")
        what = f"A variant of {short[family]}"
    changed = ", ".join(f"`{k}={v}`" for k, v in card.arguments.items() if k != "family" and not k.endswith("_rate"))
    paper = "[Deep Transformers Thirst for Comprehensive-Frequency Data](https://arxiv.org/abs/2203.07116)"
    named = (name for name, made in MODELS.items() if made == (MODELS[card.model][0], family))
    return f"{what} ({paper}). `{next(named, card.model)}`" + (f" with {changed}." if changed else ".")


def _figures(card: Card, summary: dict[str, Any] | None, data: Any) -> list[str]:
    metrics = _finite(card)
    if not metrics:
        return ["These weights say nothing of their accuracy."]
    lines = ["| on the validation images | |", "| --- | --- |"]
    texts = dict(val_top1="top-1", val_top5="top-5")
    lines += [f"| {texts[k]} | {metrics[k]:.2f}% |" for k in texts if k in metrics]
    if "val_loss" in metrics:
        lines.append(f"| loss | {metrics['val_loss']:.4f} |")
    if "epoch" in metrics:
        lines.append(f"| after epoch | {int(metrics['epoch']) + 1} |")
    if summary:
        lines.append(f"| top-1 after the last of {summary['epochs']} epochs | {summary['last_top1']:.2f}% |")
    return [*lines, "", f"Data: {data or 'not named by the weights'}."]


def _usage(card: Card, repo: str) -> list[str]:
    mode = "RGB" if card.in_chans == 3 else "L"
    needs = "" if card.model.startswith(TIMM) else "import eit  # registers the architecture with timm\n"
    code = f"""```python
{needs}import timm, torch
from PIL import Image

model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()  # or local-dir:FOLDER
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
with torch.no_grad():
    logits = model(transform(Image.open("image.png").convert("{mode}"))[None])
print(model.pretrained_cfg["label_names"][logits.argmax()])
```
"""
    lines = [*code.splitlines(), "```bash", f"eit predict hf-hub:{repo} image.png", "```"]
    if card.in_chans == 3:
        pipeline = f"""
```python
{needs}from transformers import pipeline

print(pipeline("image-classification", "{repo}")("image.png"))
```"""
        lines += pipeline.splitlines()
    return lines


def _recipe(recipe: dict[str, Any], environment: dict[str, Any] | None) -> list[str]:
    if not recipe:
        return ["These weights were not trained by `eit train`, or do not say how."]
    again = " ".join(["eit train recipe.yaml", *(f"{key}=PATH" for key in PATHS if _is_cut(recipe, key))])
    lines = [f"`{again}` with this as recipe.yaml trains it again.", ""]
    lines += ["<details><summary>recipe.yaml</summary>", "", "```yaml"]
    lines += yaml.safe_dump(recipe, sort_keys=False, width=100).splitlines()
    lines += ["```", "", "</details>"]
    if environment:
        packages = environment.get("packages", {})
        told = ", ".join(f"{package} {packages[package]}" for package in ("torch", "timm") if package in packages)
        lines += ["", f"Trained with eit {environment.get('eit')}, {told}, on {environment.get('device')}."]
    return lines


def _is_cut(recipe: dict[str, Any], key: str) -> bool:
    """Whether a key of the recipe was a path, of which the last part is left."""
    section, _, name = key.rpartition(".")
    value = (recipe.get(section) or {}).get(name)
    return isinstance(value, str) and _is_path(value) and not name.endswith("_split")


def _limits(model: Any, summary: dict[str, Any] | None, data: Any, last: bool) -> list[str]:
    card: Card = model.card
    lines = [
        f"- It knows {len(card.classes)} classes and names one of them for any image, of whatever is on it.",
        f"- It was trained for images of {card.size}x{card.size} pixels"
        + (" and takes others; how well was not measured." if isinstance(model, EIT) else "."),
    ]
    if summary and last:
        lines.append("- The weights are those after the last epoch, of one run; no epoch was chosen by its accuracy.")
    elif summary:
        best = summary.get("best_epoch")
        lines.append(
            f"- The epoch ({(best or 0) + 1} of {summary['epochs']}) was chosen by the same validation images that the "
            "figures are of: expect less on new ones. They are of one run."
        )
    elif card.metrics:
        lines.append("- The figures are of validation images that may have helped to choose the weights.")
    if data:
        lines.append(f"- Of other data than {data}, and of bias in them, nothing is known.")
    if card.in_chans == 1:
        lines.append("- Images must be made grey first; transformers' pipeline, which makes them RGB, cannot be used.")
    return lines


def _finite(card: Card) -> dict[str, float]:
    return {name: value for name, value in (card.metrics or {}).items() if math.isfinite(value)}


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{v:g}" for v in values)


def _few(names: list[str]) -> str:
    """The first names, as a cell of a table takes them."""
    text = ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
    return re.sub(r"([\\|<*_`\[])", r"\\\1", printable(text))


def _read_json(run: Path | None, name: str) -> dict[str, Any] | None:
    """A file of the run folder, where it is there and whole."""
    try:
        found = json.loads((run / name).read_text(encoding="utf-8")) if run else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _line(error: Exception) -> str:
    """The first line of an error, and what the hub's server says, if it does."""
    line = first_line(error)
    said = getattr(error, "server_message", None)
    return f"{line} ({said})" if said and said not in line else line
