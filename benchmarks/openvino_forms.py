"""Measure three forms of OpenVINO files: `python benchmarks/openvino_forms.py`.

Files with the same weights take turns: with the stem of PyTorch and with the stem without strides, run by one stream
and by one stream per thread, with any batch and with a fixed one; and ONNX Runtime. It writes
benchmarks/results/openvino_forms.json. About 4 minutes on 2 cores.
"""

import json
import statistics
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from eit.benchmark.bench import Arm, Options, about, interleave, open_model, speeds_relative_to
from eit.console import say
from eit.export import exporter
from eit.inference.exported_models import open_onnx, open_openvino

RESULT = Path(__file__).parent / "results" / "openvino_forms.json"
MODELS = ("eit_mini",)
BATCHES = (1, 16)


def write(model: object, file: Path, stem: bool, fixed: int | None) -> Path:
    with nullcontext() if stem else patch.object(exporter, "fold_strides", nullcontext):
        exporter.export(model, file, "onnx" if file.suffix == ".onnx" else "openvino", fixed=fixed)
    return file


def main() -> None:
    options = Options(rounds=9, precisions=["fp32"])
    rows = []
    for name in MODELS:
        model = open_model(name, None)
        with tempfile.TemporaryDirectory() as folder:
            plain = write(model, Path(folder) / "plain.xml", False, None)
            stem = write(model, Path(folder) / "stem.xml", True, None)
            onnx = open_onnx(write(model, Path(folder) / "plain.onnx", False, None))
            for batch in BATCHES:
                fixed = write(model, Path(folder) / f"fixed-{batch}.xml", True, batch)
                x = torch.randn(batch, 3, model.card.size, model.card.size)
                forms = {
                    "one stream": step(open_openvino(plain), x, False),
                    "streams": step(open_openvino(plain), x, True),
                    "streams, stem": step(open_openvino(stem), x, True),
                    "streams, stem, fixed": step(open_openvino(fixed), x, True),
                    "ONNX Runtime": step(onnx, x, True),
                }
                steps = {Arm(label, "openvino", "fp32", "infer", batch): run for label, run in forms.items()}
                for run in steps.values():
                    run()
                seconds, _ = interleave(steps, options)
                by_label = {arm.model: values for arm, values in seconds.items()}
                first = by_label["one stream"]
                for label, values in by_label.items():
                    gains = speeds_relative_to(first, values)
                    rows.append(
                        dict(
                            model=name,
                            batch=batch,
                            form=label,
                            images_per_s=batch / statistics.median(values),
                            gain=statistics.median(gains),
                            min_gain=min(gains),
                            max_gain=max(gains),
                            seconds=values,
                        )
                    )
                    say(f"{name} {batch} {label}: {rows[-1]['images_per_s']:.1f}/s, {rows[-1]['gain']:.2f}")
    RESULT.write_text(json.dumps(about(options) | dict(rows=rows), indent=1) + "\n")


def step(model: Callable[[Tensor], Tensor], x: Tensor, streams: bool) -> Callable[[], object]:
    def run() -> object:
        if streams:
            return model(x)
        with patch("eit.inference.exported_models.batches", lambda x, size: [x]):
            return model(x)

    return run


if __name__ == "__main__":
    main()
