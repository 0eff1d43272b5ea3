"""Children that measure, and what becomes of a run when one of them is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_llm.bench.processes import MeasureFailed, Measurer


@pytest.mark.parametrize("line", ['{"event": "sam', "\\xff", "Illegal instruction"])
def test_a_child_that_is_killed_within_an_answer_ends_its_measurement_and_not_the_run(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = f"import sys\nprint('{{}}', flush=True)\nsys.stdin.readline()\nsys.stdout.buffer.write(b'{line}')\n"
    (tmp_path / "half_a_child.py").write_text(child + "print('out of memory', file=sys.stderr)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Measurer("engine tiny", "half_a_child", (), ()) as measurer:
        with pytest.raises(MeasureFailed, match=r"engine tiny broke off in an answer.*out of memory") as failed:
            measurer.ask("sampler")
    assert line.startswith("\\") or line in failed.value.message
