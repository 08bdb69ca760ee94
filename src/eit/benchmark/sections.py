"""A record of the benchmark as titled sections, one for each mode and batch, for tables and charts."""

from statistics import median

from eit.benchmark.bench import Measurement, Record
from eit.plots import Bar, Panel


def sections(record: Record) -> dict[str, list[Measurement]]:
    """Title -> rows of each section."""
    found: dict[str, list[Measurement]] = {}
    for row in record.rows:
        what = "training step" if row.arm.mode == "train" else "inference"
        found.setdefault(f"{what}, batch {row.arm.batch}", []).append(row)
    return found


def is_latency(row: Measurement) -> bool:
    """Whether a row is shown in milliseconds instead of images/s."""
    return row.arm.mode == "infer" and row.arm.batch == 1


def speeds(row: Measurement) -> list[float]:
    """Milliseconds or images/s, see `is_latency`; one value per round."""
    return [1000 * s if is_latency(row) else row.arm.batch / s for s in row.seconds]


def rounded(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 1000 else f"{speed:.1f}"


def panels(record: Record) -> list[Panel]:
    """What `eit.plots.bars` draws: one panel per section, one bar per row."""
    found = []
    for title, rows in sections(record).items():
        bars = []
        for row in rows:
            values = speeds(row)
            note = f"{rounded(median(values))}   {median(row.ratios):.2f}x   {100 * row.share:.0f}% of peak"
            low = row.arm.precision == "bf16"
            name = f"{row.arm.runtime} {row.arm.precision}"
            bars.append(Bar(row.arm.label, name, median(values), min(values), max(values), note, low))
        found.append(Panel(f"{title}: {'ms, lower is better' if is_latency(rows[0]) else 'images/s'}", bars))
    return found
