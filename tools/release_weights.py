"""Prepare trained weights for a release: `python tools/release_weights.py OUT [RESULTS]`.

For each experiment, budget, data set and model of this package in RESULTS (results/), it takes the run with the median
last-epoch top-1 of its seeds. OUT/NAME/ has config.json, model.safetensors and a model card for timm and Hugging Face,
OUT/NAME.zip is that folder, and OUT/SHA256SUMS has the checksums. Runs without weights, as in the results/ of the
repository, are named and left out.
"""

import hashlib
import shutil
import sys
from pathlib import Path

from eit import list_models
from eit.errors import UserError
from eit.export.hub import write_folder
from eit.reproduce import experiment as experiments
from eit.reproduce.runs import Result, read_results

LICENSE = "apache-2.0"


def chosen(results: Path) -> dict[str, Result]:
    """Name -> the run to release."""
    found: dict[str, Result] = {}
    for name in experiments.experiment_names():
        experiment = experiments.load(name)
        for budget in {} if experiment.of else experiment.budgets:
            by_levels: dict[str, list[Result]] = {}
            for result in read_results(experiment, budget, results):
                if result.cell.values["model"]["name"] not in list_models():
                    continue
                levels = [level for axis, level in result.cell.levels.items() if axis != "seed"]
                by_levels.setdefault("-".join([name.replace("_", "-"), budget, *levels]), []).append(result)
            for title, runs in by_levels.items():
                runs.sort(key=lambda run: run.summary["last_top1"])
                found[title.replace("_", "-")] = runs[len(runs) // 2]
    return found


def main(out: str, results: str = "results") -> None:
    target, sums = Path(out), []
    for name, result in chosen(Path(results)).items():
        weights = result.cell.folder(Path(results)) / "final.safetensors"
        if not weights.exists():
            own = f"eit reproduce run {result.cell.experiment} --budget {result.cell.budget} --results FOLDER"
            print(f"{name}: no {weights}; {own} trains it, then give FOLDER here")
            continue
        write_folder(str(weights), target / name, name, LICENSE)
        archive = Path(shutil.make_archive(str(target / name), "zip", target, name))
        sums.append(f"{hashlib.sha256(archive.read_bytes()).hexdigest()}  {archive.name}")
        print(f"{archive}: top-1 {result.summary['last_top1']:.2f}%, {archive.stat().st_size / 1e6:.1f} MB")
    if not sums:
        sys.exit(f"no weights in {results}")
    (target / "SHA256SUMS").write_text("\n".join(sums) + "\n")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python tools/release_weights.py OUT [RESULTS]")
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
