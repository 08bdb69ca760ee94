"""Which of the faster operators of `eit.models.ops` this processor runs: as measured, or as the user chose.

They were measured on AMD's processors (docs/performance.md). Any other one runs PyTorch's operators, until
`eit bench --self-check --save` has measured there.
"""

import json
import os
import platform
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

from eit.files import write_file

OPERATORS = ("linear", "stem", "max_pool", "attention")
MEASURED = {
    ("AuthenticAMD", "AVX512"): frozenset(OPERATORS),
    # linear gains 2 to 5% in eit_mini, and costs a sixth of a training step of the digits recipe
    ("AuthenticAMD", "AVX2"): frozenset({"stem", "max_pool", "attention"}),
}


@cache
def chosen() -> frozenset[str]:
    """The operators that run on this processor instead of PyTorch's."""
    if not torch.backends.mkldnn.is_available():  # they rely on it
        return frozenset()
    saved = read_choice()
    if saved is not None:
        return saved
    return MEASURED.get((cpu().get("vendor_id", ""), torch.backends.cpu.get_cpu_capability()), frozenset())


def choice_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "eit" / "operators.json"


def read_choice() -> frozenset[str] | None:
    """The choice that was saved on this processor with this version of torch; None if there is none."""
    try:
        saved = json.loads(choice_file().read_bytes())
        if saved["processor"] != processor():
            return None
        if not set(saved["operators"]) <= set(OPERATORS):
            raise ValueError("operators")
        return frozenset(saved["operators"])
    except OSError:  # most often there is none
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        warnings.warn(f"{choice_file()} is damaged and not used: run eit bench --self-check --save again", stacklevel=2)
        return None


def save_choice(operators: Iterable[str]) -> Path:
    """Keep the choice for this processor with this version of torch."""
    file = choice_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, json.dumps(dict(processor=processor(), operators=sorted(operators)), indent=1) + "\n")
    return file


def processor() -> dict[str, str]:
    """The processor and the version of torch for which a choice is valid."""
    capability = torch.backends.cpu.get_cpu_capability()
    return dict(cpu=cpu()["model name"], capability=capability, torch=torch.__version__)


@cache
def cpu() -> dict[str, str]:
    """Properties of the first core on Linux; on other systems only its name."""
    found = {"model name": platform.processor() or platform.machine()}
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return found
    return found | {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())
    }
