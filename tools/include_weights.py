"""Include the best weights of a run under a name: `python tools/include_weights.py cifar10 results/analysis/eit`.

Writes src/eit/weights/eit_NAME.safetensors in float16, with the card of the run. The files of the run in results/ are
its record. `tools/include_digits.py` does this for `digits`, and measures them.
"""

import sys
from pathlib import Path

from eit.weights.formats import read_weights, save_weights
from eit.weights.load import FOR

WEIGHTS = Path(__file__).parents[1] / "src" / "eit" / "weights"


def main(name: str, run: str) -> None:
    state, card = read_weights(Path(run) / "best.safetensors")
    if name not in FOR or card is None:
        sys.exit(f"{name} is not one of {', '.join(FOR)}" if name not in FOR else f"{run} is not a run of this package")
    save_weights(WEIGHTS / f"eit_{name}.safetensors", {key: value.half() for key, value in state.items()}, card)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python tools/include_weights.py NAME RUN")
    main(*sys.argv[1:])
