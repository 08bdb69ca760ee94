"""The `eit` command. Heavy imports stand inside the commands, so that `eit --version` is quick."""

import json
import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import eit
from eit.errors import UserError, few, is_out_of_memory, printable

if TYPE_CHECKING:
    from eit.analysis.figures import AnalyzedModel
    from eit.benchmark.bench import Measurement as Row
    from eit.benchmark.bench import Record
    from eit.config import Data
    from eit.data.images import Images
    from eit.data.timm_datasets import ImageStream
    from eit.export.exporter import Export
    from eit.inference.evaluate import Metrics
    from eit.plots import Panel
    from eit.training.trainer import Stopped
    from eit.weights.card import Card


class Commands(TyperGroup):
    """Exit status: 0 done, 2 the user's mistake, 130 or 143 stopped by a signal, 1 anything else."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _complain(error)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:  # `eit models | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except FloatingPointError as error:
            _complain(error)
            raise typer.Exit(1) from None
        except OSError as error:
            _complain(OSError(f"{error.filename}: {error.strerror}") if error.filename else error)
            raise typer.Exit(1) from None
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                line = "out of memory: give a smaller --batch-size or --size"
            elif "DataLoader worker" in str(error):
                hint = "it was killed, or memory or /dev/shm ran out: try fewer data.workers"
                line = f"a loader process died ({str(error).splitlines()[0].rstrip('. ')}); {hint}"
            elif type(error).__name__.startswith("Dist") or "gloo" in str(error):  # torch's DistError and below
                line = "another process of this run ended; it says why"
            else:
                raise
            _complain(RuntimeError(line))
            raise typer.Exit(1) from None


def _complain(error: Exception) -> None:
    """One line; where every rank has the same error, from rank 0."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"eit: {printable(str(error))}", file=sys.stderr)
    elif not getattr(error, "__notes__", []):
        print(f"eit [rank {rank}]: {printable(str(error))}", file=sys.stderr)


app = typer.Typer(
    cls=Commands,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="EIT: a vision transformer with a decreasing share of convolution (arXiv 2203.07116).",
)
data_app = typer.Typer(cls=Commands, rich_markup_mode=None, help="Check, look at, unpack or pack a data set.")
app.add_typer(data_app, name="data")
recipes_app = typer.Typer(cls=Commands, rich_markup_mode=None, invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")


def _recipe_names(incomplete: str) -> list[str]:
    """For the shell's completion."""
    from eit.config import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def _experiments(incomplete: str) -> list[str]:
    """For the shell's completion."""
    from eit.reproduce.experiment import experiment_names

    return [name for name in experiment_names() if name.startswith(incomplete)]


def _recipe_keys(incomplete: str) -> list[str]:
    """For the shell's completion: keys, whose values only the user knows."""
    from eit.config import recipe_keys

    return [f"{key}=" for key in recipe_keys() if key.startswith(incomplete)]


def _model_names(incomplete: str) -> list[str]:
    """For the shell's completion: names of the zoo, with a family before them; timm's once `timm/` is typed."""
    from eit.models.registry import FAMILIES, MODELS, TIMM, VARIANTS

    names = [*MODELS, *(f"{family}/{name}" for family in FAMILIES for name in VARIANTS), TIMM]
    if incomplete.startswith(TIMM):
        import timm

        names = [TIMM + name for name in timm.list_models()]
    return [name for name in names if name.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str, typer.Option(help="auto, cpu, mps, cuda or cuda:N.")]
MaxPixels = Annotated[int | None, typer.Option(min=1, help="Larger images are refused; default: as in training.")]
Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CKPT",
        help="A weights file, a run folder (its best.safetensors), digits, or hf-hub:USER/NAME.",
        show_default=False,
    ),
]
RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="One that ships, or PATH.yaml.", show_default=False, autocompletion=_recipe_names
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Such as train.epochs=100.", show_default=False, autocompletion=_recipe_keys
    ),
]


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"eit {eit.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="One that ships, or PATH.yaml; none lists them.", autocompletion=_recipe_names
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Train a recipe, or continue its stopped run.

    eit train cifar10 data.root=PATH name=mine train.epochs=100

    The run folder is runs/NAME, or out=FOLDER. Its recipe.yaml holds every key with its value; a copy of it, with
    another name, is a recipe of your own.
    """
    if recipe is None:
        _list_recipes(as_json)
        return
    from eit.config import load_recipe

    resolved = load_recipe(recipe, overrides or ())
    from eit import distributed
    from eit.memory import keep_freed
    from eit.training.trainer import Stopped
    from eit.training.trainer import train as run

    keep_freed()
    try:
        summary = run(resolved)
    except Stopped as stop:
        _stopped(stop)
    else:
        if distributed.is_main():
            folder = resolved.run_folder()
            _show(
                summary | dict(folder=str(folder)),
                as_json,
                f"top-1 {summary['last_top1']:.2f}% after the last of {summary['epochs']} epochs "
                f"(best {summary['best_top1']:.2f}% after epoch {summary['best_epoch'] + 1})\n"
                f"run folder {folder}\n"
                f"next: {_program()} eval {folder}    {_program()} predict {folder} IMAGE...",
            )


@app.command(name="eval")
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[str | None, typer.Option(help="Data set or folder of classes; default: the run's own.")] = None,
    dataset: Annotated[str | None, typer.Option(help="As data.dataset: wds/NAME, hfds/NAME ...")] = None,
    split: Annotated[str | None, typer.Option(help="As data.val_split: of a data set of timm.")] = None,
    sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--size", metavar="N", min=1, max=65536, help="Pixels of the input; repeatable; default: the weights' own."
        ),
    ] = None,
    crop_ratios: Annotated[
        list[float] | None,
        typer.Option(
            "--crop-ratio",
            metavar="RATIO",
            min=0.1,
            max=1,
            help="The centre crop's share of the resized image; repeatable.",
        ),
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Average over the image and its mirror image.")] = False,
    precision: Annotated[str, typer.Option(help="fp32, tf32, bf16, fp16 or auto.")] = "fp32",
    confusion: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the confusion matrix: .png, .pdf, .svg, or .csv.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per process at a time; default: 64, on a GPU up to 256.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Loader processes; default: one per core, at most 16.")
    ] = None,
    max_pixels: MaxPixels = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Top-1, top-5, loss, calibration and per-class accuracy.

    Percentages; every image counts once on any number of processes that torchrun starts. With several sizes or crop
    ratios, each size with each ratio.
    """
    matrix = _file_to_write(confusion, "--confusion", ".csv") if confusion else None
    if matrix and (views := len(set(sizes or [0])) * len(set(crop_ratios or [0]))) > 1:
        raise UserError(f"--confusion {confusion} is of one size and crop ratio; {views} combinations are asked for")
    from eit import distributed
    from eit.data.datasets import open_evaluation
    from eit.data.loaders import evaluation_batch_size, evaluation_loader
    from eit.inference.evaluate import evaluate as run
    from eit.inference.evaluate import make_views
    from eit.inference.runtimes import ExportedModel, load
    from eit.memory import keep_freed
    from eit.models.registry import check_size
    from eit.precision import PRECISIONS, resolve_precision

    if precision not in (known := ("auto", *PRECISIONS)):
        raise UserError(f"--precision {precision}: one of {', '.join(known)} is expected")

    keep_freed()
    on = distributed.start(_device_for(checkpoint, device))
    precision = resolve_precision(precision, on)
    model = load(checkpoint)
    if isinstance(model, ExportedModel) and precision != "fp32":
        raise UserError(f"--precision {precision}: {checkpoint} computes in the precision it was exported in")
    for size in sizes or ():
        if isinstance(model, ExportedModel):
            model.check_size(size)
        else:
            check_size(model, size, model.card.size, model.card.model)
    if split and not dataset:
        raise UserError(f"--split {split} is of a data set of timm: give --dataset too")
    where = _evaluation_data(model.card, data, dataset, split, max_pixels)
    images = _with_classes_of(model.card, open_evaluation(where))
    model = model.to(on)
    at_a_time = batch_size or evaluation_batch_size(64, len(images), on)
    results = []
    for (size, ratio), view in make_views(model.card.view, sizes or (), crop_ratios or ()).items():
        metrics = run(model, evaluation_loader(images, view, at_a_time, workers, on), precision, flip)
        results.append((dict(size=size, resize=view.resize, crop_ratio=ratio), metrics))
    if distributed.is_main():
        head = dict(checkpoint=checkpoint, data=where.root, precision=precision, flip=flip)
        shown = [
            view | {key: value for key, value in vars(metrics).items() if key != "confusion"}
            for view, metrics in results
        ]
        if as_json:
            print(json.dumps(shown[0] | head if len(shown) == 1 else head | dict(views=shown), indent=2))
        elif len(shown) == 1:
            print(_metrics_text(metrics))
        else:
            _views_table(shown)
        if matrix:
            _write_confusion(matrix, metrics.confusion, list(metrics.per_class))


@app.command()
def predict(
    checkpoint: Checkpoint,
    images: Annotated[
        list[str], typer.Argument(help="Image files, folders, or - for a list on stdin.", show_default=False)
    ],
    top: Annotated[int, typer.Option(min=1, help="Classes an image.")] = 5,
    max_pixels: MaxPixels = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line, one an image.")] = False,
) -> None:
    """The most likely classes of images."""
    from eit.distributed import start
    from eit.inference.predict import expand
    from eit.inference.predict import predict as run
    from eit.inference.runtimes import load

    listed = [line for name in images for line in (sys.stdin.read().splitlines() if name == "-" else [name]) if line]
    files = expand(listed)
    if not files:
        raise UserError("no images: the list on stdin is empty")
    model = load(checkpoint).to(start(_device_for(checkpoint, device)))
    unreadable = 0
    for found in run(model, files, top, max_pixels=max_pixels):
        if found.fault:
            unreadable += 1
            _complain(UserError(found.fault))
        elif as_json:
            print(json.dumps(dict(image=found.image, labels=[dict(label=n, probability=p) for n, p in found.labels])))
        else:
            labels = "  ".join(f"{name} {100 * p:.1f}%" for name, p in found.labels)
            print(printable(found.image) + "  " + printable(labels), flush=True)
    if unreadable:
        raise typer.Exit(2)


@app.command()
def export(
    checkpoint: Checkpoint,
    format: Annotated[str, typer.Option(help="onnx, openvino or torch (torch.export).")] = "onnx",
    out: Annotated[
        str | None, typer.Option(help="The file to write; default: beside the weights, with their name.")
    ] = None,
    int8: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Quantise; a folder of images, or a data set, to choose the ranges with."),
    ] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Of those of --int8, evenly spaced.")] = 256,
    data: Annotated[
        str | None, typer.Option(help="Labelled images to measure int8 with; default: the run's own validation.")
    ] = None,
    max_pixels: MaxPixels = None,
    as_json: Json = False,
) -> None:
    """Weights -> an ONNX, OpenVINO or torch.export file.

    eit export runs/pets --format onnx --int8 pets/train

    The file is compared with torch before it is kept; eit predict and eit eval take it as they take weights. Batch,
    height and width are dynamic; classes and preprocessing travel in the metadata.
    """
    from eit.data.datasets import open_evaluation
    from eit.export import exporter
    from eit.weights.load import load

    if data and not int8:
        raise UserError("--data is for --int8, whose accuracy is measured on it")
    file = Path(out).expanduser() if out else exporter.default_file(checkpoint, format)
    exporter.check_request(format, file, int8 is not None)
    model = load(checkpoint)
    calibration = None
    if int8:
        where = _evaluation_data(model.card, data, None, None, max_pixels)
        labelled = _with_classes_of(model.card, open_evaluation(where))
        chosen = exporter.calibration_images(int8, images, where.max_pixels, where.val_fraction)
        calibration = exporter.Calibration(chosen, labelled)
    done = exporter.export(model, file, format, calibration)
    _show(json.loads(json.dumps(asdict(done), default=str)), as_json, _export_text(done, model.card))


@app.command()
def push(
    checkpoint: Checkpoint,
    repo: Annotated[str | None, typer.Option(metavar="USER/NAME", help="A repository on the Hugging Face hub.")] = None,
    to: Annotated[str | None, typer.Option(metavar="FOLDER", help="A local folder instead; needs no network.")] = None,
    name: Annotated[str | None, typer.Option(help="Title of the model card.")] = None,
    license_: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="Of the weights, such as apache-2.0.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is not public.")] = False,
    as_json: Json = False,
) -> None:
    """Weights -> the Hugging Face hub, with a model card.

    eit push runs/pets --repo USER/pets --license apache-2.0

    timm, transformers and eit predict read them from there: hf-hub:USER/pets, or local-dir:FOLDER.
    """
    if (repo is None) == (to is None):
        raise UserError("give --repo USER/NAME, or --to FOLDER")
    if to is not None and private:
        raise UserError("--private is for --repo")
    from eit.export import hub

    if to is not None:
        files = hub.write_folder(checkpoint, _folder_to_write(to, "--to"), name, license_)
        text = f"{to}: {', '.join(file.name for file in files)}\n"
        text += f'next: timm.create_model("local-dir:{to}", pretrained=True), after import eit'
        _show(dict(folder=to, files=[str(file) for file in files]), as_json, text)
    elif repo is not None:
        address = hub.push(checkpoint, repo, name, license_, private)
        _show(dict(address=address), as_json, f"{address}\nnext: {_program()} predict hf-hub:{repo} IMAGE...")


@app.command()
def analyze(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Weights files, run folders, digits; eit_mini, lsra/eit_mini; timm/NAME, torchvision/NAME. A quoted "
            "pattern ('runs/eit*') is several runs as one curve.",
            show_default=False,
        ),
    ],
    data: Annotated[str, typer.Option(help="Images: a folder of any depth, or a data set.", show_default=False)],
    out: Annotated[str, typer.Option(help="The folder to write report.html, figures/ and csv/ into.")] = "analysis",
    images: Annotated[int, typer.Option("--images", min=1, help="At most so many, evenly spaced.")] = 1000,
    pictures: Annotated[int, typer.Option(min=0, max=8, help="Images that are shown one by one.")] = 4,
    bands: Annotated[bool, typer.Option("--bands", help="Accuracy under noise of frequency bands as well.")] = False,
    filters: Annotated[
        bool, typer.Option("--filters", help="Accuracy with each layer's tokens low-passed and high-passed as well.")
    ] = False,
    rollout: Annotated[bool, typer.Option("--rollout", help="Show attention rollout as well.")] = False,
    grad_cam: Annotated[bool, typer.Option("--grad-cam", help="Show Grad-CAM as well (extra: analysis).")] = False,
    initial: Annotated[
        bool, typer.Option("--initial/--no-initial", help="Each trained model beside its initial values.")
    ] = True,
    rho: Annotated[float, typer.Option(help="Frequencies above are high; 1 is the Nyquist frequency.")] = 0.5,
    renormalize: Annotated[
        bool,
        typer.Option("--renormalize/--no-renormalize", help="Leave attention to the class token out of distances."),
    ] = True,
    size: Annotated[int | None, typer.Option(min=1, max=4096, help="Pixels; default: each model's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 16,
    workers: Annotated[int | None, typer.Option(min=0, help="Loader processes.")] = None,
    max_pixels: MaxPixels = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Frequencies, attention and class token of models.

    eit analyze runs/eit runs/lsra runs/vit timm/vit_tiny_patch16_224 --data photos --out report
    eit analyze 'runs/eit*' 'runs/vit*' --data photos

    A quoted pattern is a group: its runs are one curve, the mean, with a band of one standard deviation over the runs.
    Groups are compared by the differences of runs that were trained with the same seed.
    """
    from rich.markup import escape

    from eit.analysis.compare import Options, compare
    from eit.analysis.findings import TOKEN_TABLE, faults, summary, token_table
    from eit.analysis.report import write
    from eit.analysis.subjects import check_names, choose_images
    from eit.data.images import MAX_PIXELS
    from eit.distributed import start, world_size

    on = start(device)
    if world_size() > 1:
        raise UserError("eit analyze runs in one process: leave torchrun out")
    folder = _folder_to_write(out, "--out")
    check_names(names)
    labelled = "--bands" if bands else "--filters" if filters else False
    chosen = choose_images(data, images, labelled, max_pixels or MAX_PIXELS, without=folder / "figures")
    options = Options(size, initial, rho, renormalize, bands, filters, pictures, rollout, grad_cam, batch_size, workers)
    compared = compare(names, chosen, on, options, _with_classes_of)
    page = write(folder, compared, data, shlex.join(["eit", *sys.argv[1:]]))
    wrong = faults(compared.measured)
    if as_json:
        print(json.dumps(dict(report=str(page), faults=wrong, models=summary(compared.measured)), indent=2))
        return
    _table(*_analysis_table(compared.measured))
    print(
        "Means of the layers. share: energy of high frequencies; noise: that of white noise on as many tokens.\n"
        "diversity: standard deviation of the heads' attention distances; relative: to uniform attention."
    )
    head, rows = token_table(compared.measured)
    _table(head, [[escape(cell) for cell in row] for row in rows])
    print(TOKEN_TABLE)
    for line in wrong:
        print(printable(line))
    print(printable(f"{page}: figures and numbers of {len(chosen):,} image{'s' if len(chosen) > 1 else ''}"))


@app.command()
def bench(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="eit_mini, lsra/eit_mini; timm/NAME; weights files, run folders, digits.",
            show_default=False,
            autocompletion=_model_names,
        ),
    ],
    modes: Annotated[
        list[str] | None, typer.Option("--mode", help="infer or train; repeatable; default: both.")
    ] = None,
    precisions: Annotated[
        list[str] | None,
        typer.Option("--precision", help="fp32, tf32, bf16 or fp16; repeatable; default: fp32 and bf16."),
    ] = None,
    runtimes: Annotated[
        list[str] | None,
        typer.Option("--runtime", help="eager, compile, onnxruntime or openvino; repeatable; default: those at hand."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images a step; inference of a single one is measured too.")
    ] = 16,
    size: Annotated[int | None, typer.Option(min=1, max=4096, help="Pixels; default: each model's own.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU; default: torch's choice.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="In which all is measured once, in turns.")] = 5,
    naive: Annotated[
        bool, typer.Option("--naive", help="A plain implementation as the baseline (source checkouts).")
    ] = False,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Peak memory of a step as well.")] = True,
    keep: Annotated[
        bool, typer.Option("--keep-freed", help="Keep freed memory for the next step, as eit train does (Linux).")
    ] = False,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Draw a bar chart: .png, .pdf or .svg.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Speed, and share of the machine's matrix-multiply peak.

    eit bench eit_mini timm/deit_tiny_patch16_224 --runtime eager --runtime compile

    Inference (one image, and a batch) and training steps on random images; medians of rounds in which every
    combination is measured once, with spread.
    """
    picture = _file_to_write(out, "--out") if out else None
    if threads is not None and threads > (cores := os.cpu_count() or 1):
        raise UserError(f"--threads {threads}: this machine has {cores} cores")
    from eit.benchmark import bench
    from eit.distributed import start, world_size
    from eit.memory import keep_freed
    from eit.plots import bars
    from eit.precision import PRECISIONS as precision_names

    given: dict[str, tuple[list[str] | None, tuple[str, ...]]] = dict(
        mode=(modes, bench.MODES),
        precision=(precisions, precision_names),
        runtime=(runtimes, bench.RUNTIMES),
    )
    for option, (values, known) in given.items():
        for value in values or ():
            if value not in known:
                raise UserError(f"--{option} {value} is not one of {', '.join(known)}")
    if keep:
        keep_freed()
    on = start(device)
    if world_size() > 1:
        raise UserError("eit bench runs in one process: leave torchrun out")
    wanted = {option: list(dict.fromkeys(values)) for option, (values, _) in given.items() if values}
    options = bench.Options(
        batch_size,
        size,
        threads,
        wanted.get("mode", bench.MODES),
        [name for name in precision_names if name in wanted.get("precision", bench.DEFAULT_PRECISIONS)],
        wanted.get("runtime"),
        rounds,
        naive,
        memory,
        on,
    )
    record = bench.bench(names, options)
    if picture:
        bars(_bench_bars(record), picture)
    if as_json:
        print(json.dumps(record.as_json(), indent=2))
        return
    _bench_tables(record)


@app.command()
def reproduce(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="An experiment that ships, or PATH.yaml.", autocompletion=_experiments),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="What each shows, costs, and what would refute it.")] = False,
    budget: Annotated[str | None, typer.Option(help="How much is trained, see --list; default: short.")] = None,
    results: Annotated[str, typer.Option(help="The folder of the runs: RESULTS/NAME/BUDGET/RUN.")] = "results",
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="NAME=PATH", help="Where a data set is; repeatable.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="TEXT", help="Runs with this in their name; repeatable.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print the runs as commands of eit train, and end.")] = False,
    images_per_s: Annotated[
        float | None, typer.Option(min=0.001, help="With --plan: of all processes together, to say how long it takes.")
    ] = None,
    tables: Annotated[bool, typer.Option("--tables", help="Train nothing: tables from what is there.")] = False,
    again: Annotated[
        str | None, typer.Option(metavar="RUN", help="Train a finished run a second time, and compare.")
    ] = None,
    curve: Annotated[
        str | None, typer.Option(metavar="RUN_FOLDER", help="imagenet: its epochs beside the published ones.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="With --again: its run folder; default: runs/again/RUN.")] = None,
    as_json: Json = False,
) -> None:
    """The paper's claims, trained and weighed.

    eit reproduce small_data --budget smoke

    Finished runs are kept, a stopped one is continued. Tables, a figure and verdicts are built from RESULTS alone, and
    written to RESULTS/NAME/BUDGET.
    """
    from eit.reproduce import experiment as experiment_files

    options: dict[str, Any] = dict(budget=budget, data=data, only=only, plan=plan, images_per_s=images_per_s)
    options |= dict(tables=tables, again=again, curve=curve, out=out, results=None if results == "results" else results)
    used = [f"--{option.replace('_', '-')}" for option, value in options.items() if value not in (None, False)]
    if listed or name is None:
        if extra := [*used, name] if name else used:
            raise UserError(f"{'--list takes no' if listed else 'NAME is missing for'} {', '.join(extra)}")
        _list_experiments(as_json)
        return
    for option, given, needs in (("--images-per-s", images_per_s, plan), ("--out", out, again)):
        if given is not None and not needs:
            raise UserError(f"{option} is of {'--plan' if option == '--images-per-s' else '--again'}")
    if sum((plan, tables, again is not None, curve is not None)) > 1:
        raise UserError("--plan, --tables, --again and --curve exclude each other")
    if only and (tables or again is not None):
        raise UserError("--only is of the runs to train, and of --plan")
    if images_per_s is not None and not math.isfinite(images_per_s):
        raise UserError(f"--images-per-s {images_per_s} is no rate")
    experiment = experiment_files.load(name)
    if curve is not None:
        if name != "imagenet" or used != ["--curve"]:
            others = ", ".join(option for option in used if option != "--curve") or name
            raise UserError(f"--curve is of imagenet, and takes no other option ({others})")
        from eit.reproduce.published import compare

        found = compare(Path(curve))
        _show(asdict(found), as_json, str(found))
        return
    if budget is None:
        budget = "short" if "short" in experiment.runs.budgets else next(iter(experiment.runs.budgets))
    cells = experiment.cells(budget)
    roots = _roots(data or (), [cell.data for cell in cells])
    chosen = [cell for cell in cells if not only or any(text in cell.name for text in only)]
    if not chosen:
        raise UserError(f"--only {' '.join(only or ())}: no run of {name} has it; such as {cells[0].name}")
    folder = Path(results)
    if plan:
        from eit.reproduce.commands import commands, plan_text

        rows = commands(chosen, folder, roots, images_per_s)
        _show(dict(runs=[asdict(row) for row in rows]), as_json, plan_text(rows))
        return

    from eit import distributed
    from eit.memory import keep_freed
    from eit.reproduce import runs
    from eit.reproduce.runs import read_results
    from eit.reproduce.tables import build, verdicts
    from eit.training.trainer import Stopped

    keep_freed()
    distributed.start()
    try:
        if again is not None:
            cell = next((cell for cell in cells if cell.name == again), None)
            if cell is None:
                raise UserError(f"--again {again}: {name} has no such run, such as {cells[0].name}")
            second = runs.again(cell, experiment, folder, roots, Path(out or f"runs/again/{again}"))
            if distributed.is_main():
                _show(asdict(second) | dict(agrees=second.agrees), as_json, str(second))
            raise typer.Exit(0 if second.agrees else 1)
        diverged: list[str] = []
        if not tables:
            diverged = runs.run(chosen, experiment.runs.measure, folder, roots)
    except Stopped as stop:
        _stopped(stop)
    finished = read_results(experiment, budget, folder)
    if not finished and not diverged:
        raise UserError(f"{folder / experiment.runs.name / budget} has no finished run")
    if distributed.is_main():
        page = build(experiment, budget, folder)
        _show(verdicts(experiment, budget, folder), as_json, f"{page.read_text()}\n{page}")
        if diverged:
            what = "was not finite; the lines above say where, and the same command tries again"
            _complain(FloatingPointError(f"{len(diverged)} of {len(chosen)} runs: {few(diverged)}: the loss {what}"))
    if diverged:
        raise typer.Exit(1)


@app.command()
def models(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw published top-1 against parameters, of many families.")
    ] = None,
) -> None:
    """The zoo: sizes, costs and published results."""
    if plot is not None:
        if as_json or markdown:
            raise UserError("--plot draws a picture: --json and --markdown do not apply")
        from eit.models.registry import published_results
        from eit.plots import results

        points = [point for point in published_results() if point.params_m <= 100]
        results(points, _file_to_write(plot, "--plot"))
        print(f"{plot}: {len(points)} published models of {len({p.family for p in points})} families, up to 100 M")
        print("parameters; ImageNet-1K alone, 224x224, no teacher. The sources stand in published.csv of the package.")
        return
    from eit.models.complexity import complexity
    from eit.models.registry import AUTHORS_CODE, MODELS, VARIANTS, create_model

    rows: list[dict[str, Any]] = []
    for name, (variant, _) in MODELS.items():
        model = create_model(name)
        size = dict(tokens=model.grid_size[0] * model.grid_size[1], **asdict(complexity(model)))
        own = asdict(variant)
        if name not in VARIANTS:
            own |= dict.fromkeys(key for key in own if key.startswith("published") or key == "weights")
        rows.append(dict(name=name, **size, **own, weights_ship=False))
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    cells = [
        (
            r["name"],
            f"{r['params']:,}",
            f"{r['macs'] / 1e9:.3f} G",
            f"{r['published_macs'] / 1e9:.3f} G",
            str(r["tokens"]),
            *("-" if r[key] is None else f"{r[key]}%" for key in ("published_top1", "published_top5")),
        )
        for r in rows
    ]
    head = ("model", "parameters", "MACs", "paper's FLOPs", "tokens", "top-1", "top-5")
    if markdown:
        print("\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)))
        return
    _table(head, cells)
    print(
        "MACs: multiply-accumulates of one 224x224 image; beside them what the paper counts as FLOPs (no attention\n"
        "products, but norms and pooling). top-1, top-5: ImageNet-1K as published, not measured here; eit_plus\n"
        "has no published results.\n"
        f"The authors' weights do not ship with this package. They are at {AUTHORS_CODE}/tree/main/model;\n"
        "eit predict and eit eval take their .pth files, eit convert makes safetensors of them."
    )


@recipes_app.callback()
def recipes(context: typer.Context, as_json: Json = False) -> None:
    """The recipes that ship, with what they cost and should reach."""
    if context.invoked_subcommand is None:
        _list_recipes(as_json)


@recipes_app.command()
def show(
    recipe: RecipeName,
    overrides: Overrides = None,
) -> None:
    """A recipe with every key, its value and a line on what it is. The output is a recipe too."""
    from eit.config import load_recipe

    print(load_recipe(recipe, overrides or ()).explained())


def _list_recipes(as_json: bool) -> None:
    from eit.config import recipe_header, recipe_names

    if as_json:
        print(json.dumps([dict(name=name, header=recipe_header(name)) for name in recipe_names()], indent=2))
        return
    for name in recipe_names():
        print(name)
        for line in recipe_header(name).splitlines():
            print(f"    {line}")
    print("train one with: eit train NAME [key=value ...]")


def _stopped(stop: "Stopped") -> NoReturn:
    """The end of a run that a signal stopped, and that is saved."""
    from eit.distributed import is_main

    if is_main():
        _complain(stop)
    # torchrun would start again what did not end well, and this did
    raise typer.Exit(0 if "TORCHELASTIC_RUN_ID" in os.environ else 128 + stop.signum) from None


def _list_experiments(as_json: bool) -> None:
    from eit.reproduce import experiment as experiment_files

    experiments = [experiment_files.load(name) for name in experiment_files.experiment_names()]
    if as_json:
        keys = ("name", "shows", "refuted")
        rows = [
            {key: getattr(e, key) for key in keys} | dict(budgets={n: b.cost for n, b in e.runs.budgets.items()})
            for e in experiments
        ]
        print(json.dumps(rows, indent=2))
        return
    for e in experiments:
        print(f"{e.name}\n    shows: {e.shows}\n    refuted if: {e.refuted}")
        if e.of:
            print(f"    of the runs of {e.of}, with their budgets")
        else:
            for budget in e.budgets:
                print(f"    --budget {budget}: {len(e.cells(budget))} runs; {e.budgets[budget].cost}")
    print("run one with: eit reproduce NAME --budget BUDGET")


def _roots(words: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """NAME=PATH words."""
    roots: dict[str, str] = {}
    for word in words:
        if "=" not in word or not all(word.partition("=")[::2]):
            raise UserError(f"--data {word} is not NAME=PATH, such as --data {known[0]}=PATH")
        key, _, path = word.partition("=")
        if roots.setdefault(key, path) != path:
            raise UserError(f"--data {key}=... is given twice")
    if unknown := set(roots) - set(known):
        raise UserError(f"--data {min(unknown)}=...: its data sets are {', '.join(dict.fromkeys(known))}")
    return roots


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="Of the authors' code or of timm.", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="OUT", help="A .safetensors file to write.", show_default=False)],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGUMENT=VALUE", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="The model's name, where its shapes do not tell.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Pixels of the model's input; default: 224.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="A file with a class name a line, in the order of the logits.")
    ] = None,
) -> None:
    """Other weights -> a self-describing safetensors file.

    Nothing in IN is executed. Where its shapes do not tell the model, name it with its arguments, here timm's ViT-Ti:

    eit convert IN OUT --model eit_mini family=vit embed_dim=192 depth=12 num_heads=3
    """
    from eit.config import model_arguments, parse_overrides
    from eit.weights.convert import recognise
    from eit.weights.formats import read_weights, save_weights
    from eit.weights.load import find_weights

    if not target.endswith(".safetensors"):
        raise UserError(f"{target}: the file to write ends in .safetensors")
    file = find_weights(source)
    state, card = read_weights(file)
    if card is None:
        card = recognise(state, file, model, model_arguments(parse_overrides(arguments or [])), size or 224)
    elif model or arguments or size:
        raise UserError(f"{file} says itself that it is {card.model}: --model, --size and arguments do not apply")
    if classes:
        try:
            names = Path(classes).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {classes}: {error}") from None
        if len(names) != len(card.classes):
            raise UserError(f"{classes} has {len(names)} names, the model {len(card.classes)} classes")
        card = card.model_copy(update=dict(classes=names))
    try:
        save_weights(Path(target), state, card)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    changed = "".join(f" {name}={value}" for name, value in card.arguments.items())
    parameters = sum(v.numel() for v in state.values())
    print(f"{target}: {card.model}{changed}, {len(card.classes)} classes, {parameters:,} parameters")
    print(f"images are normalised with mean {card.mean} and std {card.std}, at {card.size} pixels")


@data_app.command()
def check(
    path: Annotated[str, typer.Argument(help="A folder with train/ and val/, or sklearn:digits.", show_default=False)],
    val_fraction: Annotated[
        float | None, typer.Option(min=0, max=1, help="As data.val_fraction, without val/.")
    ] = None,
    max_pixels: MaxPixels = None,
    as_json: Json = False,
) -> None:
    """Read every image; status 1 where training would fail."""
    from eit.data.datasets import check as run
    from eit.data.images import MAX_PIXELS

    report = run(path, max_pixels or MAX_PIXELS, val_fraction)
    _show(report, as_json, _check_text(report))
    if not report["ok"]:
        raise typer.Exit(1)


@data_app.command(name="show")
def show_data(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[str, typer.Option(help="The picture to write: .png, .pdf or .svg.")] = "grid.png",
    images: Annotated[int, typer.Option(min=1, max=400, help="Of training and of validation.")] = 24,
    epoch: Annotated[int, typer.Option(min=0, help="Whose first batch is shown.")] = 0,
) -> None:
    """Draw what the model will see: the first training batch, augmented and mixed, and validation images."""
    from eit.config import load_recipe
    from eit.plots import grid
    from eit.training.preview import tiles

    file = _file_to_write(out, "--out")
    trained, validated = tiles(load_recipe(recipe, overrides or ()), images, epoch)
    grid([(f"training, first step of epoch {epoch + 1}", trained), ("validation", validated)], file)
    print(f"{out}: {len(trained)} training and {len(validated)} validation images")


@data_app.command()
def prepare(
    name: Annotated[str, typer.Argument(metavar="imagenet", help="The data set.", show_default=False)],
    source: Annotated[str, typer.Argument(help="The folder of the ILSVRC2012 archives.", show_default=False)],
    target: Annotated[str, typer.Argument(help="The folder to write train/ and val/ into.", show_default=False)],
    as_json: Json = False,
) -> None:
    """The ILSVRC2012 archives, as downloaded -> class folders.

    Wanted are ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz. The same command goes
    on where it was stopped; every class is counted against the devkit.
    """
    from eit.data.prepare_imagenet import prepare_imagenet

    if name != "imagenet":
        raise UserError(f"{name} cannot be prepared: imagenet can; other data sets are read as they unpack")
    done = prepare_imagenet(Path(source).expanduser(), Path(target).expanduser())
    text = f"{done['folder']}: {done['train']:,} training and {done['val']:,} validation images of {done['classes']}"
    _show(done, as_json, f"{text} classes")


@data_app.command()
def shard(
    path: Annotated[str, typer.Argument(help="A data set, as data.root.", show_default=False)],
    out: Annotated[str, typer.Argument(help="A new folder for the shards.", show_default=False)],
    count: Annotated[int, typer.Option(min=1, help="Training shards; a multiple of all loader processes.")] = 64,
    val_count: Annotated[int, typer.Option(min=1, help="Validation shards.")] = 16,
    val_fraction: Annotated[
        float | None, typer.Option(min=0, max=1, help="As data.val_fraction, without val/.")
    ] = None,
    as_json: Json = False,
) -> None:
    """A data set -> webdataset shards.

    As data.root they give the batches of the data set itself; data.dataset=wds/NAME reads them in turn, as they come
    from an object store.
    """
    from eit.config import data_config
    from eit.data.datasets import open_data
    from eit.data.shards import write_shards

    train_images, val_images = open_data(data_config(root=path, val_fraction=val_fraction))
    done = write_shards(train_images, val_images, Path(out).expanduser(), count, val_count)
    _show(done, as_json, f"{out}: {done['shards']} shards of {done['train']:,} + {done['val']:,} images")


def _file_to_write(name: str, option: str, also: str | None = None) -> Path:
    """A picture, or what ends in `also`, that has a folder; checked before anything is computed."""
    from eit.plots import PICTURES

    file, known = Path(name).expanduser(), ", ".join(PICTURES)
    if file.suffix.lower() not in (*PICTURES, also):
        expected = f"a name that ends in {known} or {also} is expected" if also else f"a picture ends in {known}"
        raise UserError(f"{option} {name}: {expected}")
    if not file.parent.is_dir():
        raise UserError(f"{option} {name}: there is no folder {file.parent}")
    return file


def _folder_to_write(name: str, option: str) -> Path:
    """A folder that is there or can be made: checked before anything is computed, made once there is a result."""
    folder = Path(name).expanduser()
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{option} {name} cannot be written: {there} is {'read-only' if there.is_dir() else 'a file'}")
    return folder


def _program() -> str:
    """How the user called this command."""
    called = Path(sys.argv[0])
    return "python -m eit" if called.name == "__main__.py" else called.name if shutil.which("eit") else str(called)


def _device_for(checkpoint: str, device: str) -> str:
    """`device`, but the CPU for an exported file."""
    from eit.inference.runtimes import is_exported

    if not is_exported(checkpoint):
        return device
    if device not in ("auto", "cpu"):
        raise UserError(f"--device {device}: {checkpoint} runs on the CPU")
    return "cpu"


def _evaluation_data(
    card: "Card", data: str | None, dataset: str | None, split: str | None, max_pixels: int | None
) -> "Data":
    """Where the images are. Of what weights say, a folder alone is believed: addresses of data sets run commands."""
    from eit.config import data_config

    own = card.data
    if dataset and "/" not in dataset:
        raise UserError(
            f"--dataset {dataset}: a name of timm is expected, such as wds/NAME; a folder is --data {dataset}"
        )
    given = dict(root=data, dataset=dataset, val_split=split)
    if not (data or dataset):
        if "/" in str(own.get("dataset") or ""):
            name, root = own["dataset"], own.get("root") or "ROOT"
            raise UserError(f"these weights are of data.dataset={name}: say so, --dataset {name} --data {root}")
        given |= dict(root=own.get("root"), dataset=own.get("dataset"))
        if not own.get("root"):
            raise UserError("--data PATH is needed: these weights do not name a data set")
    given["val_fraction"] = own.get("val_fraction")
    return data_config(max_pixels=max_pixels or card.max_pixels, **{k: v for k, v in given.items() if v is not None})


def _with_classes_of(card: "Card", images: "Images | ImageStream") -> "Images | ImageStream":
    """`images` with the model's class numbers: by name, or by order where converted weights have names of their own."""
    from dataclasses import replace

    from eit.console import say
    from eit.data.timm_datasets import ImageStream

    unknown = [name for name in images.classes if name not in card.classes]
    if isinstance(images, ImageStream):
        if images.classes == card.classes:
            return images
        if not unknown:
            raise UserError("the data have the model's classes in another order or number, and come in turn")
    elif not unknown:
        number = {name: i for i, name in enumerate(card.classes)}
        return replace(images, classes=card.classes, labels=[number[images.classes[y]] for y in images.labels])
    if card.recipe is None and len(images.classes) == len(card.classes):
        say("class names differ from the model's; matched by order")
        return images
    raise UserError(
        f"the data have classes that the model does not know: {', '.join(unknown[:5])} "
        f"(its {len(card.classes)} are {', '.join(card.classes[:5])}{' ...' if len(card.classes) > 5 else ''})"
    )


def _write_confusion(file: Path, counts: list[list[int]], classes: list[str]) -> None:
    """`counts` as a picture, or as a table that names the classes."""
    import csv
    import io

    from eit import plots
    from eit.files import write_file

    try:
        if file.suffix.lower() != ".csv":
            plots.confusion(counts, classes, file)
            return
        text = io.StringIO()
        rows = ([name, *row] for name, row in zip(classes, counts, strict=True))
        csv.writer(text).writerows([["truth \\ prediction", *classes], *rows])
        write_file(file, text.getvalue().encode(errors="surrogateescape"))  # names as the file system has them
    except OSError as error:
        raise UserError(f"--confusion {file} cannot be written: {error.strerror}") from None


def _metrics_text(metrics: "Metrics") -> str:
    from rich.cells import cell_len

    from eit.plots import shorten

    lines = [
        f"top-1 {metrics.top1:.2f}%  ({metrics.correct1} of {metrics.images})",
        f"top-5 {metrics.top5:.2f}%  ({metrics.correct5} of {metrics.images})",
        f"loss  {metrics.loss:.4f}",
        f"ECE   {metrics.ece:.2f}%  (calibration: how far confidence is from accuracy)",
    ]
    if len(metrics.per_class) <= 5:
        del lines[1]  # every class is among the first five
    known = [(shorten(name, 40), c) for name, c in metrics.per_class.items() if c["images"]]
    known.sort(key=lambda found: found[1]["top1"] or 0)
    few = len(known) <= 20
    lines.append("per class, the weakest first" if few else f"the 10 weakest of {len(known)} classes (--json has all)")
    shown = known if few else known[:10]
    width = max(5, *(cell_len(name) for name, _ in shown))
    lines.append(f"  {'class':{width}}  images  top-1 (recall)  precision       f1")
    for name, c in shown:
        top1, precision, f1 = ("-" if c[key] is None else f"{c[key]:.2f}%" for key in ("top1", "precision", "f1"))
        pad = " " * (width - cell_len(name))
        lines.append(f"  {name}{pad}  {c['images']:6}  {top1:>14}  {precision:>9}  {f1:>7}")
    return "\n".join(lines)


def _export_text(done: "Export", card: "Card") -> str:
    parity = done.parity
    sizes = " and ".join(f"{height}x{width}" for height, width in parity.sizes)
    top1 = f"top-1 equal on {parity.images} photos"
    if parity.ties:
        shown = parity.images * len(parity.sizes)
        top1 = f"top-1 equal on {shown - parity.ties} of {shown} photos, in a tie on the others,"
    lines = [
        f"{done.file}: {card.model}, {len(card.classes)} classes, {done.bytes / 1e6:.2f} MB; "
        f"dynamic: {', '.join(done.dynamic)}",
        f"{done.runtime} and torch agree: {top1} at {sizes}, logits within {parity.max_error:.1e}",
    ]
    if "height" not in done.dynamic:
        lines.insert(1, f"height and width are fixed at {card.size}")
    if int8 := done.int8:
        lines[-1] = f"before int8: {lines[-1]}"
        lines.append(
            f"int8: top-1 {int8.top1:.2f}%, fp32 {int8.fp32_top1:.2f}%, on {int8.images:,} images; "
            f"{int8.fp32_bytes / 1e6:.2f} MB without; ranges from {int8.calibrated_on} images"
        )
    return "\n".join([*lines, f"next: {_program()} predict {done.file} IMAGE..."])


def _views_table(views: Sequence[dict[str, Any]]) -> None:
    columns = {
        "size": lambda v: str(v["size"]),
        "crop": lambda v: f"{v['crop_ratio']:.3f}",
        "top-1": lambda v: f"{v['top1']:.2f}%",
        "top-5": lambda v: f"{v['top5']:.2f}%",
        "loss": lambda v: f"{v['loss']:.4f}",
        "ECE": lambda v: f"{v['ece']:.2f}%",
    }
    if len(views[0]["per_class"]) <= 5:
        del columns["top-5"]  # every class is among the first five
    _table(list(columns), [[text(view) for text in columns.values()] for view in views])


def _analysis_table(measured: Sequence["AnalyzedModel"]) -> tuple[Sequence[str], list[list[str]]]:
    """A row a model, with means over its layers."""
    from rich.markup import escape

    from eit.analysis.findings import mean_diversity

    head = ("model", "tokens", "share", "with DC", "noise", "diversity", "relative")
    rows = []
    for one in measured:
        layers, heads = one.analysis.layers_at("block"), one.analysis.attention
        rows.append(
            [
                escape(one.name),
                "x".join(map(str, one.analysis.grid)),
                f"{100 * fmean(layer.share for layer in layers):.1f}%",
                f"{100 * fmean(layer.share_with_dc for layer in layers):.1f}%",
                f"{100 * layers[0].noise_share:.1f}%",
                f"{fmean(layer.std for layer in heads):.2f} px" if heads else "-",
                f"{mean_diversity(one):.1f}%" if heads else "-",
            ]
        )
    return head, rows


def _bench_sections(record: "Record") -> dict[str, list["Row"]]:
    """The rows of each table, by its title."""
    sections: dict[str, list[Row]] = {}
    for row in record.rows:
        what = "training step" if row.arm.mode == "train" else "inference"
        sections.setdefault(f"{what}, batch {row.arm.batch}", []).append(row)
    return sections


def _is_latency(row: "Row") -> bool:
    return row.arm.mode == "infer" and row.arm.batch == 1


def _speeds(row: "Row") -> list[float]:
    """Milliseconds where a row is about latency, else images/s, one a round."""
    return [1000 * s if _is_latency(row) else row.arm.batch / s for s in row.seconds]


def _bench_tables(record: "Record") -> None:
    """A table for each mode and batch, and what is to be known of them."""
    from rich.markup import escape

    from eit.console import out

    for title, rows in _bench_sections(record).items():
        out.print(f"\n{title}")
        with_memory = any(row.memory is not None for row in rows)
        head = [
            "model",
            "runtime",
            "precision",
            "ms" if _is_latency(rows[0]) else "images/s",
            "spread",
            "ratio",
            "of peak",
        ]
        cells = []
        for row in rows:
            speeds = _speeds(row)
            cells.append(
                [
                    escape(printable(row.arm.label)),
                    row.arm.runtime,
                    row.arm.precision,
                    _rounded(median(speeds)),
                    f"{_rounded(min(speeds))} to {_rounded(max(speeds))}",
                    f"{median(row.ratios):.2f}",
                    f"{100 * row.share:.0f}%",
                    *(["-" if row.memory is None else f"{row.memory / 2**20:,.0f}"] if with_memory else []),
                ]
            )
        _table([*head, "MiB"] if with_memory else head, cells)
    print(_bench_footer(record))


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _bench_footer(record: "Record") -> str:
    about = record.about
    rounds = f"{about['rounds']} round{'s' if about['rounds'] > 1 else ''}"
    lines = [f"{about['device']}, {about['threads']} threads; medians and spread of {rounds}"]
    for precision, routes in record.peaks.items():
        ways = sorted(((median(rates), name) for name, rates in routes.items()), reverse=True)
        others = "".join(f"; {name} {rate / 1e9:,.0f}" for rate, name in ways[1:])
        lines.append(f"matrix multiply peak, {precision}: {ways[0][0] / 1e9:,.0f} GFLOP/s by {ways[0][1]}{others}")
    base = record.baseline
    lines.append(f"ratio: speed by that of {base}; of peak: MACs x 2 x batch / time / peak of the precision")
    if any(row.memory is not None for row in record.rows):
        lines.append("MiB: peak memory of a step beyond the model and its images")
    lines += [f"not measured: {reason}" for reason in record.left_out]
    return "\n".join(map(printable, lines))


def _bench_bars(record: "Record") -> list["Panel"]:
    from eit.plots import Bar, Panel

    panels = []
    for title, rows in _bench_sections(record).items():
        found = []
        for row in rows:
            speeds = _speeds(row)
            note = f"{_rounded(median(speeds))}   {median(row.ratios):.2f}x   {100 * row.share:.0f}% of peak"
            low = row.arm.precision == "bf16"
            name = f"{row.arm.runtime} {row.arm.precision}"
            found.append(Bar(row.arm.label, name, median(speeds), min(speeds), max(speeds), note, low))
        panels.append(Panel(f"{title}: {'ms, less is better' if _is_latency(rows[0]) else 'images/s'}", found))
    return panels


def _check_text(report: dict[str, Any]) -> str:
    lines = []
    for name, part in report["splits"].items():
        counts = part["classes"].values()
        lines.append(
            f"{name}: {part['images']:,} images of {len(counts)} classes, {min(counts)} to {max(counts)} a class"
        )
        lines.append("  sizes: " + ", ".join(f"{s['width']}x{s['height']} ({s['images']:,})" for s in part["sizes"]))
        lines += [f"  unreadable: {fault}" for fault in part["unreadable"][:20]]
        if len(part["unreadable"]) > 20:
            lines.append(f"  and {len(part['unreadable']) - 20} more unreadable (--json has all)")
    lines += [f"problem: {problem}" for problem in report["problems"]]
    return "\n".join([*lines, "ready to train" if report["ok"] else "not ready to train"])


def _show(result: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(result, indent=2) if as_json else "\n".join(map(printable, text.split("\n"))))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from eit.console import out

    table = Table(*head, box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    if not out.is_terminal:  # in a file nothing is cut
        table.width = out.measure(table, options=out.options.update(max_width=1000)).maximum
    out.print(table, crop=False)


def main() -> None:
    # Until training has its own handler, Ctrl-C ends at once: an exception in the middle of an import would be lost.
    signal.signal(signal.SIGINT, _interrupted)
    try:
        status = app(standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # not one of the parser's
            sys.excepthook(type(error), error, error.__traceback__)
            _leave(1)
        context = getattr(error, "ctx", None)
        hint = f"; see {context.command_path} -h" if context else ""
        if "No such command" in error.format_message() and sys.argv[1:2] == ["recipes"]:
            hint = f"; a recipe is shown by: recipes show {sys.argv[-1]}"
        if "No such option" in error.format_message() and "train" in sys.argv[1:2]:
            hint = "; settings are key=value, such as train.epochs=2"
        _complain(UserError(error.format_message().rstrip(".") + hint))
        status = 2
    _leave(status or 0)


def _leave(status: int) -> NoReturn:
    """End the process: where it failed beside others, at once, for NCCL would wait for them, and torchrun for it."""
    distributed = sys.modules.get("eit.distributed")
    if distributed is not None and distributed.is_group():
        if status:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        distributed.stop()
    sys.exit(status)


def _interrupted(*_: object) -> None:
    os.write(2, b"eit: interrupted\n")
    os._exit(130)
