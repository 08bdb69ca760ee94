"""Are the faster operators of `eit.models.ops` faster on this processor? Each is timed against PyTorch's."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from eit.benchmark.bench import MODES, Arm, Options, about, interleave, make_step, open_model, speeds_relative_to
from eit.errors import UserError
from eit.models import ops
from eit.models.eit import EIT
from eit.operators import OPERATORS, chosen

SLOWER = 0.98  # a gain below this is a loss; between this and 1, noise
FASTER = 1.02


@dataclass(frozen=True)
class Gain:
    """Speed of a step with `operators` in place of PyTorch's, relative to PyTorch's: (median, lowest, highest)."""

    operators: list[str]
    infer: tuple[float, float, float]
    train: tuple[float, float, float]

    @property
    def pays(self) -> bool:
        """Whether it is faster in one mode and not slower in the other."""
        found = self.infer[0], self.train[0]
        return min(found) >= SLOWER and max(found) >= FASTER


@dataclass(frozen=True)
class SelfCheck:
    """Gains of each operator alone, and of all that pay alone, used together; and the operators to use."""

    gains: list[Gain]
    choice: list[str]
    in_use: list[str]
    about: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        rows = [asdict(gain) | dict(pays=gain.pays) for gain in self.gains]
        return dict(gains=rows, choice=self.choice, in_use=self.in_use) | self.about


def self_check(name: str, options: Options) -> SelfCheck:
    """Time the model `name` with each operator, on the CPU, in fp32.

    An operator is chosen if the model is faster with it alone. If it is not faster with all of these together, none is.

    Raises:
        UserError: not on the CPU, or no model of this package.
    """
    if options.device.type != "cpu":
        raise UserError("--self-check compares operators of the CPU: give --device cpu")
    options = replace(options, precisions=["fp32"])
    model = open_model(name, options.size)
    if not isinstance(model, EIT):
        raise UserError(f"--self-check: {name} has none of the operators of this package; give eit_mini")
    gains = measure(model, [[operator] for operator in OPERATORS], options)
    choice = [gain.operators[0] for gain in gains if gain.pays]
    if len(choice) > 1:
        gains += measure(model, [choice], options)
        if not gains[-1].pays:
            choice = []
    return SelfCheck(gains, choice, sorted(chosen()), about(options))


def measure(model: Any, sets: Sequence[Sequence[str]], options: Options) -> list[Gain]:
    """The gain of each set of operators, in one interleaved run for each mode."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for mode in MODES:
        steps = {}
        for operators in ([], *sets):
            arm = Arm(" ".join(operators), "eager", "fp32", mode, options.batch_size)
            steps[arm] = _with(operators, make_step(arm, model, None, options.device))
        for step in steps.values():
            step()
        first, *others = interleave(steps, options)[0].values()
        found[mode] = [_spread(speeds_relative_to(first, values)) for values in others]
    return [Gain(list(s), infer, train) for s, infer, train in zip(sets, *found.values(), strict=True)]


def _with(operators: Sequence[str], step: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        before, ops.FASTER_ON_CPU = ops.FASTER_ON_CPU, set(operators)
        try:
            return step()
        finally:
            ops.FASTER_ON_CPU = before

    return run


def _spread(values: list[float]) -> tuple[float, float, float]:
    return median(values), min(values), max(values)
