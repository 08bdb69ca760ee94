"""Experiments as data: experiments/*.yaml list what is trained, what is measured, and what is claimed."""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from eit.config import Count, NotNegative, Recipe, Section, load_recipe, parse_overrides, parse_recipe, parse_yaml
from eit.errors import UserError, nearest
from eit.files import expand_path, read_text
from eit.plain_yaml import KeysOf

LAYER_METRICS = ("share", "share_with_dc", "diversity", "distance", "entropy", "class_token")  # one value per layer
COUNTED = ("params", "macs", "published_macs")  # metrics without a spread over seeds
RUN_METRICS = (*COUNTED, "last_top1", "best_top1", "last_top5", "seconds")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")  # a folder name, or a part of one
ORDER = ["small_data", "ablation", "pooling", "frequency", "diversity", "imagenet"]


Pair = Annotated[list[str], Field(min_length=2, max_length=2)]
Settings = Annotated[dict[str, Any], KeysOf(Recipe)]


class Level(Section):
    """One value of an axis: keys of the recipe; optionally another base recipe and a number of processes."""

    recipe: str | None = None
    processes: Count | None = None
    set: Settings = Field(default_factory=dict)


class Budget(Section):
    """How much is trained."""

    cost: str
    levels: dict[str, list[str]] = Field(default_factory=dict)
    """axis -> its levels in this budget; default: all of them"""
    set: Settings = Field(default_factory=dict)
    """recipe keys of every run"""
    adjust: dict[str, Settings] = Field(default_factory=dict)
    """level -> recipe keys of its runs, set after those of the level itself"""


class Measure(Section):
    """What is measured of each trained model besides its accuracy."""

    analysis: Count | None = None
    """number of validation images for high-frequency shares and head diversity, trained and at initial values"""
    sizes: tuple[Count, ...] = ()
    """image sizes in percent of the training size; top-1 is measured at each"""

    def has(self, metric: str) -> bool:
        """Whether `eit.reproduce.runs.Result.value` has the metric."""
        kind, _, rest = metric.partition(".")
        if kind in ("trained", "initial", "gain"):
            return bool(self.analysis) and rest in LAYER_METRICS
        if kind in ("size", "kept"):
            return rest in map(str, self.sizes)
        return metric in RUN_METRICS


class Claim(Section):
    """`metric` is higher at one level of `axis` than at another, or equal within a margin, or reaches given values."""

    says: str
    code: str
    """the file of this package that the claim is about, and the name in it"""
    paper: str = ""
    """the versions of the paper that make the claim; empty: ours"""
    primary: bool = False
    """one of at most six claims that are corrected together; the others are exploratory"""
    metric: str
    """see `eit.reproduce.runs.Result.value`"""
    axis: str
    rises: Pair | None = None
    """the lower and the higher level"""
    equal: Pair | None = None
    """two levels that differ by less than `within`"""
    reaches: dict[str, float] | None = None
    """level -> the value to reach"""
    within: NotNegative = 0.0
    """the margin of `equal`, or the allowed shortfall of `reaches`"""

    @model_validator(mode="after")
    def _has_one_kind(self) -> "Claim":
        if sum(kind is not None for kind in (self.rises, self.equal, self.reaches)) != 1:
            raise ValueError("a claim has one of rises, equal and reaches")
        if (self.equal and not self.within) or (self.rises and self.within):
            raise ValueError("equal needs within, its margin; rises does not take it")
        return self

    @property
    def levels(self) -> list[str]:
        """The levels that are compared, the lower one first."""
        return list(self.rises or self.equal or self.reaches or ())


class Experiment(Section):
    name: str
    shows: str
    refuted: str
    of: str | None = None
    """another experiment, whose runs are used"""
    control: str | None = None
    """the level that Dunnett's test compares the others with"""
    recipe: str = "cifar10"
    axes: dict[str, dict[str, Level]] = Field(default_factory=dict)
    budgets: dict[str, Budget] = Field(default_factory=dict)
    measure: Measure = Measure()
    claims: dict[str, Claim] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_consistent(self) -> "Experiment":
        names = [self.name, *self.budgets, *(level for levels in self.axes.values() for level in levels)]
        if wrong := [name for name in names if not NAME.fullmatch(name)]:
            raise ValueError(f"{wrong[0]!r} is not a name: use letters, digits and _ . + -")
        set_by = [*(budget.set for budget in self.budgets.values()), *(level.set for level in self.levels)]
        if any("out" in values for values in set_by):
            raise ValueError("out cannot be set: --results names the folder of the runs")
        if bare := [axis for axis, levels in self.axes.items() if not levels]:
            raise ValueError(f"axes.{bare[0]} has no levels")
        for budget in self.budgets.values():
            for axis, levels in budget.levels.items():
                if not levels:
                    raise ValueError(f"a budget has no levels of {axis}")
                if unknown := set(levels) - set(self.axes.get(axis, ())):
                    raise ValueError(f"a budget names {axis}={min(unknown)}, which is not a level of the axes")
            if unknown := set(budget.adjust) - {level for levels in self.axes.values() for level in levels}:
                raise ValueError(f"a budget adjusts {min(unknown)}, which is not a level of the axes")
        return self

    @property
    def levels(self) -> list[Level]:
        """The levels of all axes."""
        return [level for levels in self.axes.values() for level in levels.values()]

    @property
    def runs(self) -> "Experiment":
        """The experiment whose runs are used: this one, or the one in `of`."""
        return read(self.of) if self.of else self

    def check(self) -> None:
        """Raise a ValueError if there are no runs, or if a claim needs a level or a metric that they do not have."""
        if self.of and not self.claims:
            raise ValueError("claims are needed, because `of` names another experiment's runs")
        runs = self.runs
        if runs.of or not runs.axes or not runs.budgets:
            raise ValueError("axes and budgets are needed, or `of`: the name of an experiment that has them")
        for budget in runs.budgets:
            cells = [cell.name for cell in runs.cells(budget)]
            if twice := [cell for cell in cells if cells.count(cell) > 1]:
                raise ValueError(f"two runs of the budget {budget} are called {twice[0]}")
        for name, claim in self.claims.items():
            if claim.axis not in runs.axes:
                raise ValueError(f"claims.{name}.axis={claim.axis}: the axes are {', '.join(runs.axes)}")
            if unknown := set(claim.levels) - set(runs.axes[claim.axis]):
                raise ValueError(f"claims.{name}: {claim.axis} has no {min(unknown)}")
            if not runs.measure.has(claim.metric):
                raise ValueError(f"claims.{name}.metric={claim.metric} is not measured")
            if self.control is not None and self.control not in runs.axes[claim.axis]:
                raise ValueError(f"control={self.control}: {claim.axis} has no such level")

    @property
    def default_budget(self) -> str:
        """`short`, or the first budget if there is no `short`."""
        budgets = self.runs.budgets
        return "short" if "short" in budgets else next(iter(budgets))

    def budget(self, name: str) -> Budget:
        """The budget `name`; raises a UserError if there is none."""
        budgets = self.runs.budgets
        if name not in budgets:
            raise UserError(f"--budget {name}: the budgets of {self.name} are {', '.join(budgets)}")
        return budgets[name]

    def cells(self, budget: str) -> list["Cell"]:
        """The runs of a budget, in the order in which they are trained."""
        runs, chosen = self.runs, self.budget(budget)
        axes = [chosen.levels.get(axis, list(levels)) for axis, levels in runs.axes.items()]
        cells, bases = [], {}
        for names in itertools.product(*axes):
            levels = [runs.axes[axis][name] for axis, name in zip(runs.axes, names, strict=True)]
            recipe = next((level.recipe for level in levels if level.recipe), runs.recipe)
            if recipe not in bases:
                bases[recipe] = load_recipe(recipe).model_dump()
            values = bases[recipe]
            processes = next((level.processes for level in levels if level.processes), 1)
            for more in (chosen.set, *(level.set for level in levels), *(chosen.adjust.get(n, {}) for n in names)):
                values = merged(values, more)
            cells.append(Cell(runs.name, budget, dict(zip(runs.axes, names, strict=True)), recipe, values, processes))
        return cells


@dataclass(frozen=True)
class Cell:
    """One run of an experiment."""

    experiment: str
    budget: str
    levels: dict[str, str]  # of each axis
    base: str  # name of the base recipe
    values: dict[str, Any]  # of all keys of the recipe
    processes: int = 1  # that the batch size is for

    @property
    def name(self) -> str:
        """The name of the run folder: cifar10-eit-seed-0."""
        return "-".join(f"{axis}-{level}" if level.isdigit() else level for axis, level in self.levels.items())

    def folder(self, results: Path) -> Path:
        """The run folder."""
        return results / self.experiment / self.budget / self.name

    def recipe(self, results: Path, roots: Mapping[str, str], processes: int | None = None) -> Recipe:
        """The recipe of the run, with `out` set and `data.root` from `roots` (data set -> folder), if it is there.

        On another number of processes, the batch per process is changed so that the global batch stays the same.

        Raises:
            UserError: as `eit.config.parse_recipe`, or the global batch cannot be divided among the processes.
        """
        recipe = parse_recipe(merged(self.values, dict(out=str(self.folder(results)))))
        world = processes or self.processes
        images, micros = recipe.data.batch_size, recipe.train.accumulate * self.processes
        if micros % world == 0:
            micros //= world
        elif images * micros % world == 0:
            images, micros = images * micros // world, 1
        else:
            raise UserError(f"{self.name}: the global batch {images * micros} is not a multiple of {world} processes")
        data = dict(batch_size=images) | (dict(root=roots[self.data]) if self.data in roots else {})
        return recipe.model_copy(
            update=dict(
                data=recipe.data.model_copy(update=data),
                train=recipe.train.model_copy(update=dict(accumulate=micros)),
            )
        )

    @property
    def global_batch(self) -> int:
        """Images per step of all processes."""
        recipe = self.recipe(Path(), {})
        return recipe.data.batch_size * recipe.train.accumulate * self.processes

    @property
    def data(self) -> str:
        """The name of its data set."""
        return self.levels.get("data") or self.values["name"]


def merged(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`values` updated by `more`, section by section."""
    result = dict(values)
    for key, value in more.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def experiment_names() -> list[str]:
    """Names of the included experiments."""
    names = {p.name.removesuffix(".yaml") for p in resources.files("eit.reproduce.experiments").iterdir()}
    return [name for name in ORDER if name in names] + sorted(names.difference(ORDER))


def load(name: str) -> Experiment:
    """An included experiment, or PATH.yaml.

    Raises:
        UserError: an unknown name, or a file that is not a valid experiment.
    """
    experiment = read(name)
    try:
        experiment.check()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{name} is not a valid experiment: {error}") from None
    return experiment


def read(name: str) -> Experiment:
    """As `load`, without the checks that need the runs, which may belong to another experiment."""
    if name in experiment_names():
        text = resources.files("eit.reproduce.experiments").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    elif name.endswith((".yaml", ".yml")):
        text = read_text(expand_path(name), "experiment")
    else:
        known = ", ".join(experiment_names())
        raise UserError(
            f"unknown experiment {name!r}{nearest(name, experiment_names())} (known: {known}, or a PATH.yaml)"
        )
    values = parse_yaml(text, name, Experiment, "an experiment: axes:, budgets: and claims:")
    axes = values.get("axes")
    for axis, levels in axes.items() if isinstance(axes, dict) else ():
        if isinstance(levels, list):  # of a key of the recipe: seed: [0, 1, 2]
            values["axes"][axis] = {str(level): dict(set=parse_overrides([f"{axis}={level}"])) for level in levels}
    try:
        experiment = Experiment.model_validate(dict(name=Path(name).stem) | values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{name} is not a valid experiment: {f'{where}: ' if where else ''}{message}") from None
    if experiment.name != name and experiment.name in experiment_names():
        raise UserError(f"{name}: {experiment.name} is the name of an included experiment: give yours another name")
    return experiment


def level_names(cells: Iterable[Cell], axis: str) -> list[str]:
    """The levels of an axis, in order."""
    return list(dict.fromkeys(cell.levels[axis] for cell in cells))
