"""Check, measure and train on a GPU, in ten minutes.

    make gpu                                                  # all parts
    python -m benchmarks.gpu --part check --part bench        # some parts
    python -m benchmarks.gpu --data packed --minutes 60       # CIFAR-10 packed by benchmarks/pack.py, 300 epochs
    python -m benchmarks.gpu --dry-run --out /tmp/dry         # tiny sizes on the CPU, to test the program itself

Results go to OUT/CARD/ (results/gpu/CARD/): gpu.json and gpu.md, rewritten after each item, and the files of each part.
Each part runs in a separate process with a time limit. Items that do not fit into it are listed as skipped.
"""

import argparse
import importlib
import importlib.util
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = {"check": 90, "bench": 150, "train": 340}  # seconds
NEEDED = ("torch", "torchvision", "timm", "numpy", "PIL", "pydantic", "yaml", "safetensors", "matplotlib", "sklearn")
NEEDED += ("rich", "typer", "tensorboard", "huggingface_hub", "filelock")


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable; default: all")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of parts written by benchmarks/pack.py")
    parser.add_argument("--minutes", type=float, default=10, help="time for everything; training gets the rest (10)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu", metavar="FOLDER", help="(results/gpu)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def budgets(minutes: float) -> dict[str, float]:
    """Seconds for each part: checks and measurements have fixed times, training gets the rest."""
    rest = 60 * minutes - sum(PARTS.values())
    return {part: seconds + (rest if part == "train" else 0) for part, seconds in PARTS.items()}


def main(words: list[str]) -> int:
    given = parse(words)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"make gpu: these Python packages are missing: {', '.join(missing)}", file=sys.stderr)
        return 2
    if importlib.util.find_spec("eit") is None:
        sys.path.insert(0, str(ROOT / "src"))
    if given.minutes * 60 < sum(PARTS.values()):
        print(f"make gpu: --minutes {given.minutes:g} is less than {sum(PARTS.values()) / 60:.1f}", file=sys.stderr)
        return 2
    if given.data is not None and not given.data.exists():
        print(f"make gpu: --data {given.data} is not there", file=sys.stderr)
        return 2
    import torch

    if not (given.dry_run or torch.cuda.is_available()):
        print("make gpu: torch sees no CUDA GPU here; --dry-run tries the program on the CPU", file=sys.stderr)
        return 2
    if given.child:
        from benchmarks.gpu.record import Session

        part = importlib.import_module(f"benchmarks.gpu.{given.child}")
        session = Session.open(given.child, budgets(given.minutes)[given.child], given.out, given.data, given.dry_run)
        part.run(session)
        return 1 if session.failed else 0
    status = 0
    for part in given.part or PARTS:
        status |= start(part, budgets(given.minutes)[part] * (10 if given.dry_run else 1), words)
    from benchmarks.gpu.record import card_folder

    print(f"results: {card_folder(given.out, given.dry_run)}/gpu.md")
    return status


def start(part: str, seconds: float, words: list[str]) -> int:
    """Run a part in a separate process. It may overrun its time a little, because some steps cannot be cut short."""
    began = time.monotonic()
    # CUDA reads this variable at the start. The checks need it; the measurements run without it.
    environment = os.environ | ({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if part == "check" else {})
    paths = [str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", *words, "--child", part]
    try:
        status = subprocess.run(command, env=environment, cwd=ROOT, timeout=seconds + 30).returncode
    except subprocess.TimeoutExpired:
        print(f"{part}: ended after {seconds + 30:.0f} s; what it wrote until then stays", file=sys.stderr)
        status = 1
    print(f"{part}: {time.monotonic() - began:.0f} s, {'done' if status == 0 else 'with faults'}: {shlex.join(words)}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
