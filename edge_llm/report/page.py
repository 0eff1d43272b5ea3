"""A report as one HTML page: nothing is fetched, nothing runs; light, dark or paper as its reader has it. Pure.

Owns filling page.html (jinja2, everything escaped but the drawings, which escape themselves). Refuses to know records.
"""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from edge_llm.report.document import Report


def page(report: Report) -> str:
    return _template().render(report=report)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("edge_llm.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")
