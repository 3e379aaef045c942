"""Tables in Markdown, for the pages that benchmarks write."""

from collections.abc import Sequence

from benchmarks.results import Target


def table(heads: Sequence[str], lines: object) -> str:
    """Markdown."""
    body = [f"| {' | '.join(cells)} |" for cells in lines]  # type: ignore[attr-defined]
    return "\n".join([f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *body])


def shown(target: Target) -> list[str]:
    """A target as the cells of a table: name, target, measured, met, shortfall."""

    def number(value: float) -> str:
        if target.unit == "%":
            return f"{value:.0%}"
        if target.unit in ("nats", "errors"):
            return f"{value:.3f} {target.unit}"
        if target.unit in ("x", "GB"):
            return f"{value:.2f} {target.unit}"
        return f"{value:,.{0 if value >= 100 else 1}f} {target.unit}"

    met = {True: "yes", False: "NO", None: "not measured"}[target.met]
    measured = "" if target.measured is None else number(target.measured)
    return [target.name, f"{'≤' if target.at_most else '≥'} {number(target.bound)}", measured, met, target.shortfall]
