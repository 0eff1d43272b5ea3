"""`--requantize` of every bench: a format that nobody knows is said before anything is fetched or started."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from edge_llm.cli import cli


@pytest.mark.parametrize("command", ["accuracy", "cluster", "goodput"])
def test_an_unknown_format_is_a_wrong_use_with_the_known_ones(command: str) -> None:
    done = CliRunner().invoke(cli, ["bench", command, "--requantize", "Q9"])
    assert done.exit_code == 2
    assert "unknown quantization 'Q9'" in done.output
    assert "Q4_0" in done.output
