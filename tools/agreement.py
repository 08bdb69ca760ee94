"""How often the students of results/distillation agree with their teacher, the weights of results/digits/seed-0.

`python tools/agreement.py` needs the runs' final.safetensors, which results/ does not keep; it writes agreement.json
there: the percentage of the images that no student was trained on.
"""

import json
from pathlib import Path

import torch

import eit
from eit.config import Data
from eit.data.datasets import DIGITS, open_data
from eit.data.loaders import evaluation_loader

ROOT = Path(__file__).parents[1] / "results" / "distillation"


@torch.no_grad()
def predictions(path: str | Path) -> torch.Tensor:
    model = eit.load(path)
    _, val = open_data(Data(root=DIGITS, val_fraction=0.8))
    loader = evaluation_loader(val, model.card.view, 64, 0, torch.device("cpu"))
    return torch.cat([model(batch.images).argmax(dim=1)[: batch.valid] for _, batch in loader])


teacher = predictions(ROOT.parent / "digits" / "seed-0")
found: dict[str, list[float]] = {}
for run in sorted(ROOT.glob("*-seed-*")):
    same = predictions(run / "final.safetensors") == teacher
    found.setdefault(run.name.partition("-")[0], []).append(round(100 * same.float().mean().item(), 2))
(ROOT / "agreement.json").write_text(json.dumps(found, indent=2) + "\n")
print(json.dumps(found))
