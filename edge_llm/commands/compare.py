"""`edge-llm bench compare A B`: two records of one kind side by side, and whether the second one is worse."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import click

from edge_llm.commands.measuring import THRESHOLD_FAILED, json_option

_UNTESTED: Final = 2


class Share(click.ParamType[float]):
    """`5%` or `0.05`."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            found = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
        except ValueError:
            found = -1.0
        if not 0 <= found < 1:
            self.fail(f"{value!r} is no share: write 5% or 0.05", param, ctx)
        return found


@click.command()
@click.argument("a", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("b", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--fail-over", type=Share(), help="Exit with 3 when B is significantly worse by more than this: 5%.")
@click.option("--alpha", type=click.FloatRange(1e-6, 0.5), default=0.05, show_default=True, help="Level of the tests.")
@click.option("--changed", "only_changed", is_flag=True, help="Leave out what did not change or was not tested.")
@click.option("--all", "shows_all", is_flag=True, help="Show figures that are equal in both, too.")
@json_option
def compare(
    a: Path, b: Path, fail_over: float | None, alpha: float, only_changed: bool, shows_all: bool, as_json: bool
) -> None:
    """Records A (before) and B (after): each figure with its ratio, samples tested against chance.

    Exits with 3 over the limit of --fail-over, with 2 when A and B cannot be compared, or when there is a limit and
    nothing could be tested: too few values are no verdict. Output is Markdown.
    """
    import msgspec

    from edge_llm.bench.record import BadRecord, load
    from edge_llm.report.compare import NotComparable
    from edge_llm.report.compare import compare as compared
    from edge_llm.report.verdict import written

    if only_changed and shows_all:
        raise click.UsageError("--changed leaves out what --all shows: give one of them")
    try:
        found = compared(load(a), load(b), (a.name, b.name), fail_over, alpha)
    except (BadRecord, NotComparable) as error:
        raise click.UsageError(error.message) from error
    except OSError as error:
        raise click.UsageError(f"{error.filename} cannot be read: {error.strerror}") from error
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
    else:
        click.echo(written(found, only_changed=only_changed, shows_all=shows_all), nl=False)
    if fail_over is not None and found.regressions:
        for line in found.regressions:
            click.echo(f"regression: {line}", err=True)
        sys.exit(THRESHOLD_FAILED)
    if fail_over is not None and not found.is_tested:
        click.echo(
            f"NOT TESTED: nothing here has enough values to tell whether B is worse by more than {fail_over:.1%}: "
            "measure both again with more repetitions or requests",
            err=True,
        )
        sys.exit(_UNTESTED)
