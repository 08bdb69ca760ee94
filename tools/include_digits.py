"""Include the weights of a finished run of digits_in_the_wild: `python tools/include_digits.py RUN`.

Writes eit_digits.safetensors (float16, with its accuracies in its metadata) and the sample images into src/eit/weights,
and recipe, log, environment, summary, accuracy.json and accuracy.png into results/digits_in_the_wild. The weights are
those after the last epoch. They are measured on the digits of tests/helpers/drawn_digits.py and on the scans that
scikit-learn's training images leave out.
"""

import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

import eit
from eit.weights.formats import read_weights, save_weights

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.helpers.drawn_digits import LOOKS, PLACES, draw_digits  # noqa: E402

WEIGHTS, RESULTS = ROOT / "src" / "eit" / "weights", ROOT / "results" / "digits_in_the_wild"
GROUPS = ["all", *LOOKS, *PLACES]  # in this order, then fonts or styles
SAMPLES = {("7", "7 hooked and barred", "coloured ink"), ("3", "Humor Sans", "photograph")}


def measure(weights: Path) -> dict[str, Any]:
    """Percentages of digits that are right: in all, and by font or style of strokes, by place, and by look."""
    model, right = eit.load(weights), defaultdict(list)
    drawn = list(draw_digits())
    for digit, found in zip(drawn, model.predict([digit.image for digit in drawn], top=1, batch_size=64), strict=True):
        for group in ("all", digit.style, digit.place, digit.look):
            right[digit.kind, group].append(found.labels[0][0] == digit.label)
    accuracy: dict[str, Any] = dict(scans=dict(images=360, all=round(eit.evaluate(model, "sklearn:digits").top1, 2)))
    for kind, group in sorted(right, key=lambda key: GROUPS.index(key[1]) if key[1] in GROUPS else len(GROUPS)):
        values = right[kind, group]
        accuracy.setdefault(kind, dict(images=0))["images"] += len(values) * (group == "all")
        accuracy[kind][group] = round(100 * sum(values) / len(values), 2)
    return accuracy


def draw(accuracy: dict[str, Any], file: Path) -> None:
    """One row per font, style, place and look."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 8), layout="constrained")
    for axis, kind, colour in zip(axes, ("fonts", "strokes"), ("#4477aa", "#aa3377"), strict=True):
        rows = [(name, value) for name, value in accuracy[kind].items() if name != "images"][::-1]
        axis.barh([name for name, _ in rows], [value for _, value in rows], color=colour)
        axis.axvline(95, color="black", linewidth=0.8, linestyle="--")
        axis.set(xlim=(90, 100.2), xlabel="top-1, %", title=f"{accuracy[kind]['images']:,} digits from {kind}")
        axis.tick_params(axis="y", labelsize=8)
    figure.savefig(file, dpi=80)


def main(run: str) -> None:
    state, card = read_weights(Path(run) / "final.safetensors")
    if card is None:
        sys.exit(f"{run} is not a run folder of this package")
    included, half = WEIGHTS / "eit_digits.safetensors", {name: value.half() for name, value in state.items()}
    save_weights(included, half, card)
    accuracy = measure(included)
    found = {f"{kind}_top1": accuracy[kind]["all"] for kind in ("scans", "fonts", "strokes")}
    save_weights(included, half, card.model_copy(update=dict(metrics=(card.metrics or {}) | found)))
    RESULTS.mkdir(exist_ok=True)
    for name in ("recipe.yaml", "log.jsonl", "environment.json", "summary.json"):
        shutil.copy(Path(run) / name, RESULTS)
    (RESULTS / "accuracy.json").write_text(json.dumps(accuracy, indent=2) + "\n")
    draw(accuracy, RESULTS / "accuracy.png")
    (WEIGHTS / "samples").mkdir(exist_ok=True)
    for digit in draw_digits(places=["65% on the left"]):
        if (digit.label, digit.style, digit.look) in SAMPLES:
            suffix = "jpg" if digit.look == "photograph" else "png"
            digit.image.save(WEIGHTS / "samples" / f"digits-{digit.label}.{suffix}", quality=90)
    print(json.dumps({kind: accuracy[kind]["all"] for kind in accuracy}))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/include_digits.py RUN")
    main(sys.argv[1])
