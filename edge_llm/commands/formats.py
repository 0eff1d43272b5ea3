"""`--requantize`: formats of weights, as an option of several benches.

Owns that a format nobody knows is a wrong use, said before a model is fetched or loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

from edge_llm.errors import CatalogueError


def check_formats(kinds: Sequence[str]) -> None:
    """Raises UsageError with the known ones."""
    from edge_llm.catalogue.gguf import file_type

    for kind in kinds:
        try:
            file_type(kind)
        except CatalogueError as error:
            raise click.UsageError(f"--requantize: {error.message}") from error
