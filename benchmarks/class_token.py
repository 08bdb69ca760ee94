"""Measure what it saves to compute only the class token in the last layer: `python benchmarks/class_token.py`.

Three models with the same weights take turns: the naive implementation, ours with all tokens in every layer, and ours.
It writes benchmarks/results/class_token.json. About 15 minutes on 2 cores.
"""

import json
import statistics
from pathlib import Path

from eit.benchmark.bench import Arm, Options, about, interleave, make_step, open_model, speeds_relative_to
from eit.console import say

RESULT = Path(__file__).parent / "results" / "class_token.json"
MODELS = ("eit_mini", "eit_tiny", "eit_base", "eit_large")
STEPS = (("infer", 1), ("infer", 16), ("train", 8))


def main() -> None:
    options = Options(rounds=7, precisions=["fp32"])
    rows = []
    for name in MODELS:
        model = open_model(name, None)
        for mode, batch in STEPS:
            steps = {}
            for label in ("naive", "all tokens", "class token"):
                arm = Arm(label, "eager", "fp32", mode, batch, naive=label == "naive")
                watcher = model.norm.register_forward_hook(lambda *_: None) if label == "all tokens" else None
                steps[arm] = make_step(arm, model, None, options.device)  # of a copy, with its hook
                if watcher:
                    watcher.remove()
            seconds, _ = interleave(steps, options)
            naive, whole, ours = seconds.values()
            gains = speeds_relative_to(whole, ours)
            row = dict(
                model=name,
                mode=mode,
                batch=batch,
                images_per_s=batch / statistics.median(ours),
                gain=statistics.median(gains),
                min_gain=min(gains),
                max_gain=max(gains),
                gain_over_naive=statistics.median(speeds_relative_to(naive, ours)),
                seconds=dict(naive=naive, all_tokens=whole, class_token=ours),
            )
            rows.append(row)
            say(f"{name} {mode} {batch}: {row['gain']:.2f} ({min(gains):.2f} to {max(gains):.2f})")
    RESULT.write_text(json.dumps(about(options) | dict(rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
