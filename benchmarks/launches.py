"""Count the operators that a training step launches and how often the host waits for the device, without a GPU.

    python benchmarks/launches.py [RECIPE [key=value ...]]     # default: cifar10

`eit train` runs on torch's device `meta`, which computes nothing. Each operator that is not a view counts as a launch.
Each read of a value from the device counts as a wait. Copies to the device are counted separately, because nothing
waits for copies from pinned memory. Tensors made by `torch.tensor(..., device=)` are not counted. The images are
synthetic. Only the last of `STEPS` steps is counted, when set-up is over. CUDA has fused operators where `meta` has
several (attention, dropout, norms of a list), so compare the counts, but do not use them as totals.
"""

import argparse
import json
import tempfile
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import eit.training.trainer
from eit import distributed
from eit.config import load_recipe

META = torch.device("meta")
STEPS = 4


class Watch(TorchDispatchMode):
    """Records each operator on the device `meta` in the list `ops`."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        given = [tensor for arg in args for tensor in (arg if isinstance(arg, list | tuple) else [arg])]
        on_meta = any(isinstance(t, torch.Tensor) and t.device == META for t in given)
        if name == "_local_scalar_dense" and on_meta:
            self.ops.append("wait")
            return 1.0
        if name == "_to_copy" and on_meta and str(kwargs.get("device", META)) == "cpu":
            self.ops.append("wait")
            return torch.zeros(args[0].shape)
        out = func(*args, **kwargs)
        results = out if isinstance(out, list | tuple) else [out]
        made = any(isinstance(t, torch.Tensor) and t.device == META for t in results)
        if name in ("_to_copy", "copy_") and made and not all(t.device == META for t in given if torch.is_tensor(t)):
            self.ops.append("copy")
        elif (on_meta or made) and not is_view(func):
            self.ops.append(name)
        return out


def is_view(func: Any) -> bool:
    """Whether an operator computes nothing: its result is a view, or uninitialised memory."""
    aliases = [result.alias_info for result in func._schema.returns]
    view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
    return view or func._schema.name in ("aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::new_empty")


def count(recipe: str = "cifar10", *words: str) -> dict[str, Any]:
    """Launches, waits and copies of one step of `eit train RECIPE WORDS...`."""
    watch = Watch()
    marks: list[int] = []
    generator = torch.Generator
    nothing = SimpleNamespace(top1=1.0, top5=1.0, loss=1.0)
    set_seed = eit.training.trainer.set_seed

    def step_begins(*counters: int) -> None:  # a step calls this first, for each micro-batch
        if counters[3] == 0:
            marks.append(len(watch.ops))
        set_seed(*counters)

    with tempfile.TemporaryDirectory() as folder, ExitStack() as patched:
        root = Path(folder, "images")
        told = [f"data.root={root}", f"out={folder}/run", "data.batch_size=8", "train.epochs=2"]
        told += ["train.warmup_epochs=1", f"train.max_steps={STEPS}", "train.device=cpu", "data.workers=0"]
        read = load_recipe(recipe, [*told, *words])
        size, images = read.data.image_size, STEPS * read.data.batch_size * read.train.accumulate
        for split in ("train", "val"):
            for label in ("a", "b"):
                (root / split / label).mkdir(parents=True)
                for i in range(images // 2):
                    pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(root / split / label / f"{i}.png")
        replaced: dict[Any, Any] = {
            "eit.distributed.start": lambda device="auto": META,
            "eit.training.trainer.autocast": lambda *_: nullcontext(),
            "eit.training.trainer.evaluate": lambda *_, **__: nothing,
            "eit.training.trainer.set_seed": step_begins,
            "eit.training.checkpoint.BackgroundWriter.submit": lambda *_: None,
            "eit.training.trainer.save_weights": lambda *_: None,
            "torch.Generator": lambda device="cpu": generator(),  # ModelEmaV3 makes one on the model's device
            "torch.optim.optimizer._get_fused_kernels_supported_devices": lambda: ["meta", "cpu"],
        }
        for name, value in replaced.items():
            patched.enter_context(patch(name, value))
        with watch:
            distributed.start()
            eit.training.trainer.train(read)
    step = Counter(watch.ops[marks[-2] : marks[-1]])
    waits, copies = step.pop("wait", 0), step.pop("copy", 0)
    return dict(recipe=recipe, words=words, launches=step.total(), waits=waits, copies=copies, operators=dict(step))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", default=["cifar10"], metavar="RECIPE [key=value ...]")
    print(json.dumps(count(*parser.parse_args().words), indent=2))
