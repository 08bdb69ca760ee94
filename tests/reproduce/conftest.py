"""Two models with two seeds on the digits, trained once for all tests of a session."""

import pytest

from tests.helpers.commands import run_eit

# Two models, two seeds, on the digits
TINY = """
shows: that it runs
refuted: it does not
recipe: digits
axes:
  data: {digits: {}}
  model:
    eit: {}
    vit: {set: {model: {family: vit}}}
  seed: [0, 1]
budgets:
  tiny:
    cost: seconds
    set:
      model: {embed_dim: 16, depth: 2, num_heads: 2, drop_path_rate: 0}
      data: {workers: 0}
      train: {epochs: 1, warmup_epochs: 0}
measure: {analysis: 20, sizes: [150]}
claims:
  dearer: {says: EIT is dearer, code: "models/complexity.py, complexity", metric: macs, axis: model, rises: [vit, eit]}
"""


@pytest.fixture(scope="session")
def ran(tmp_path_factory):
    """A folder with tiny.yaml and its results."""
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "tiny.yaml").write_text(TINY)
    done = run_eit("reproduce", "run", "tiny.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("run ") >= 4 and "results/tiny/tiny/README.md" in done.stdout
    return folder
