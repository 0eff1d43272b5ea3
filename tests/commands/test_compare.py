"""`edge-llm bench compare`: 0 the same, 3 a regression over the limit, 2 what cannot be compared."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from edge_llm.bench.record import encode
from edge_llm.commands.compare import compare
from edge_llm.report.compare import Comparison
from tests.report.conftest import a_record

FAST = [100.0, 101.0, 102.0, 103.0, 104.0]
SLOW = [80.0, 81.0, 82.0, 83.0, 84.0]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    for name, samples in (("a.json", FAST), ("b.json", SLOW)):
        (tmp_path / name).write_bytes(encode(a_record(samples={"decode_tokens_per_s": samples})))
    return str(tmp_path / "a.json"), str(tmp_path / "b.json")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(compare, arguments)


def test_a_regression_over_the_limit_exits_with_3_and_names_it(pair: tuple[str, str]) -> None:
    done = run(*pair, "--fail-over", "5%")
    assert done.exit_code == 3
    assert "regression: decode_tokens_per_s: worse by 19" in done.stderr
    assert "WORSE" in done.stdout


def test_the_same_the_other_way_round_is_better(pair: tuple[str, str]) -> None:
    done = run(*reversed(pair), "--fail-over", "5%")
    assert done.exit_code == 0
    assert "better" in done.stdout
    assert "Nothing is significantly worse by more than 5.0%" in done.stdout


@pytest.mark.parametrize("limit", ["0.3", "30%"])
def test_a_regression_below_the_limit_passes(pair: tuple[str, str], limit: str) -> None:
    assert run(*pair, "--fail-over", limit).exit_code == 0


def test_without_a_limit_nothing_fails(pair: tuple[str, str]) -> None:
    done = run(*pair)
    assert done.exit_code == 0
    assert "WORSE" in done.stdout


def test_json_is_a_comparison(pair: tuple[str, str]) -> None:
    done = run(*pair, "--json", "--fail-over", "5%")
    assert done.exit_code == 3
    assert msgspec.json.decode(done.stdout, type=Comparison).samples[0].verdict == "worse"


@pytest.mark.parametrize("limit", ["five", "5", "-1%", "100%", "nan"])
def test_what_is_no_limit_is_a_usage_error(pair: tuple[str, str], limit: str) -> None:
    done = run(*pair, f"--fail-over={limit}")
    assert done.exit_code == 2
    assert "5%" in done.stderr


def test_other_kinds_files_that_are_no_records_and_missing_ones_exit_with_2(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "c.json").write_bytes(encode(a_record(kind="faults")))
    (tmp_path / "d.json").write_text("[]")
    for other in ("c.json", "d.json", "e.json"):
        assert run(pair[0], str(tmp_path / other)).exit_code == 2


def of_two(tmp_path: Path, **samples: list[float]) -> list[str]:
    """Records of these samples."""
    for name, values in samples.items():
        (tmp_path / f"{name}.json").write_bytes(encode(a_record(samples={"decode_tokens_per_s": values})))
    return [str(tmp_path / f"{name}.json") for name in samples]


def test_two_repetitions_give_a_ratio_and_no_verdict_and_a_limit_is_not_kept_for_that(tmp_path: Path) -> None:
    files = of_two(tmp_path, a=[100.0, 101.0], b=[25.0, 25.2])
    done = run(*files, "--fail-over", "5%")
    assert done.exit_code == 2
    assert "NOT TESTED" in done.stderr
    assert "NOTHING COULD BE TESTED" in done.stdout
    assert re.search(r"decode_tokens_per_s .* 0\.250 .* not testable \(worse\)", done.stdout)
    assert run(*files).exit_code == 0, "without a limit it is a look"
    assert not msgspec.json.decode(run(*files, "--json").stdout, type=Comparison).is_tested


def test_figures_that_are_equal_are_counted_and_shown_when_asked_for(pair: tuple[str, str]) -> None:
    assert "1 of 1 figures are equal in both: --all shows them." in run(*pair).stdout
    assert "decode_ratio" not in run(*pair).stdout
    assert "decode_ratio" in run(*pair, "--all").stdout
    assert run(*pair, "--all", "--changed").exit_code == 2


def test_a_record_beside_itself_is_said_to_be_that(pair: tuple[str, str]) -> None:
    assert "A AND B ARE THE SAME RUN" in run(pair[0], pair[0]).stdout
