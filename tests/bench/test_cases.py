"""Lines of finished cases: at once, whole, nobody else's, and readable after whatever ended the run."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import msgspec
import pytest

from edge_llm.bench.cases import SUFFIX, BadCases, CaseLine, CaseLog, lines_of, read
from edge_llm.bench.record import ModelFacts, load, schema, write
from edge_llm.bench.run import CUT_OFF, Run

MODEL = ModelFacts("tiny-q4_0", "a.gguf", "f" * 64, 10, "Q4_0")


def a_run(folder: Path | None, kind: str = "serve") -> Run:
    return Run(kind, ["test"], {"rate": 2}, folder=folder, models=[MODEL])


def only_lines(folder: Path) -> Path:
    (path,) = folder.glob(f"*{SUFFIX}")
    return path


def test_a_line_is_in_the_file_when_the_case_is_given_not_at_the_end(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    for number in range(3):
        run.case({"case": "request", "number": number})
        assert [line["number"] for line in lines_of(only_lines(tmp_path).read_bytes(), "x")] == list(range(number + 1))


def test_lines_and_record_have_one_stem_and_the_record_knows_its_lines(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    run.case({"case": "request", "ttft_s": 0.25})
    run.case({"ttft_s": 0.5})
    path = write(run.record({}, is_complete=True), tmp_path)
    record = load(path)
    assert record.cases is not None
    assert record.cases.file == path.name.removesuffix(".json") + SUFFIX
    assert (record.cases.lines, record.cases.lost) == (2, 0)
    lines = list(read(tmp_path, record.cases))
    assert [(line["case"], line["ttft_s"]) for line in lines] == [("request", 0.25), ("serve", 0.5)]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([path.name, record.cases.file])


def test_lines_that_somebody_changed_are_not_the_records(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    run.case({"ttft_s": 0.25})
    record = load(write(run.record({}, is_complete=True), tmp_path))
    assert record.cases is not None
    with only_lines(tmp_path).open("ab") as file:
        file.write(b'{"case": "added later"}\n')
    with pytest.raises(BadCases, match="digest differs"):
        list(read(tmp_path, record.cases))
    with pytest.raises(BadCases, match="not kept"):
        list(read(tmp_path, msgspec.structs.replace(record.cases, file="../secret.jsonl")))


def test_without_a_folder_lines_are_kept_in_memory(tmp_path: Path) -> None:
    run = a_run(None)
    run.case({"case": "one", "value": 1})
    assert [(line["case"], line["value"]) for line in run.cases] == [("one", 1)]
    cases = run.record({}, is_complete=True).cases
    assert cases is not None
    assert (cases.file, cases.lines) == (None, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_cases_leaves_a_record_only(tmp_path: Path) -> None:
    record = a_run(tmp_path).record({}, is_complete=True)
    assert record.cases is None
    assert [entry.name for entry in tmp_path.iterdir()] == []


def test_runs_of_the_same_second_share_no_file(tmp_path: Path) -> None:
    started_at = datetime.fromisoformat("2026-11-28T10:00:00+00:00")
    runs = [Run("serve", ["test"], {}, folder=tmp_path, started_at=started_at) for _ in range(4)]
    for number, run in enumerate(runs):
        run.case({"number": number})
    paths = [write(run.record({}, is_complete=True), tmp_path) for run in runs]
    assert len(set(paths)) == 4
    for number, path in enumerate(paths):
        cases = load(path).cases
        assert cases is not None
        assert [line["number"] for line in read(tmp_path, cases)] == [number]


def test_threads_that_finish_together_do_not_mix_their_lines(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    run.case({"number": -1})
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: run.case({"number": number, "text": "x" * 5000}), range(200)))
    cases = run.record({}, is_complete=True).cases
    assert cases is not None
    assert sorted(line["number"] for line in read(tmp_path, cases)) == list(range(-1, 200))


def test_no_path_of_this_machine_and_no_broken_number_is_in_a_line(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    run.case({"model": f"{tmp_path}/models/x.gguf", "nan": float("nan"), "path": Path("/srv/secret/place/y.gguf")})
    text = only_lines(tmp_path).read_text()
    assert str(tmp_path) not in text
    assert "secret" not in text
    line = json.loads(text)
    assert (line["model"], line["nan"], line["path"]) == ("x.gguf", None, "y.gguf")


def test_a_run_that_is_killed_leaves_a_record_that_says_so_and_its_lines(tmp_path: Path) -> None:
    """As after a power cut: nobody can finish anything."""
    code = f"""
        import os, signal
        from pathlib import Path
        from edge_llm.bench.run import Run
        run = Run("serve", ["edge-llm", "bench", "serve"], {{"rate": 2}}, folder=Path({str(tmp_path)!r}))
        run.workload["name"] = "chat"
        for number in range(5):
            run.case({{"case": "request", "number": number}})
        run._beginning.join()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL
    (path,) = tmp_path.glob("*.json")
    record = load(path)
    assert (record.is_complete, record.config, record.workload) == (False, {"rate": 2}, {"name": "chat"})
    assert CUT_OFF in record.notes
    assert record.cases is not None
    assert [line["number"] for line in read(tmp_path, record.cases)] == list(range(5))


def test_the_whole_record_takes_the_place_of_the_one_from_the_beginning(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    run.case({"number": 1})
    run.add("ttft_s", 0.5)
    write(run.record({"p50": 0.5}, is_complete=True), tmp_path)
    (path,) = tmp_path.glob("*.json")
    record = load(path)
    assert (record.is_complete, record.figures, record.notes) == (True, {"p50": 0.5}, [])
    assert record.cases is not None
    assert record.cases.lines == 1


def test_a_last_line_that_was_cut_off_is_left_out_and_a_broken_one_is_named() -> None:
    whole = b'{"case":"a"}\n{"case":"b"}\n'
    assert [line["case"] for line in lines_of(whole + b'{"case":"c', "x")] == ["a", "b"]
    assert list(lines_of(b"", "x")) == []
    with pytest.raises(BadCases, match=r"line 2 of x\.jsonl"):
        list(lines_of(b'{"case":"a"}\nnonsense\n{"case":"b"}\n', "x.jsonl"))


def test_a_folder_that_can_no_longer_be_written_costs_the_file_not_the_run(tmp_path: Path) -> None:
    run = a_run(tmp_path / "results")
    (tmp_path / "results").rmdir()
    (tmp_path / "results").write_text("a file")
    run.case({"number": 1})
    record = run.record({}, is_complete=True)
    assert record.cases is not None
    assert (record.cases.file, record.cases.lines) == (None, 1)
    assert [failure.what for failure in record.failures] == ["cases"]


def test_a_disk_that_is_full_costs_lines_that_are_counted_and_leaves_the_others_whole(tmp_path: Path) -> None:
    """In a process of its own: the limit is for all its files."""
    code = f"""
        import resource, signal
        from pathlib import Path
        from edge_llm.bench.cases import CaseLog
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        log = CaseLog(Path({str(tmp_path)!r}), "full", "abcdef")
        resource.setrlimit(resource.RLIMIT_FSIZE, (250, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        for number in range(5):
            log.add({{"case": "x", "text": "y" * 80}})
        facts = log.facts()
        print(facts.lines, facts.lost, log.trouble)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True)
    lines, lost, why = done.stdout.split(maxsplit=2)
    assert (int(lines), int(lost)) == (2, 3)
    assert "not written" in why or os.strerror(errno.EFBIG) in why
    assert len(list(lines_of((tmp_path / f"full{SUFFIX}").read_bytes(), "x"))) == 2


def test_every_line_is_what_the_published_schema_says(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    run.case({"case": "request", "times_s": [0.1, 0.2]})
    line = msgspec.json.decode(only_lines(tmp_path).read_bytes(), type=CaseLine)
    assert line.case == "request"
    assert line.at.tzinfo is not None
    named = schema("case")["$defs"]["CaseLine"]
    assert set(named["properties"]) == {"case", "at"} == set(named["required"])


def test_a_log_may_be_closed_twice(tmp_path: Path) -> None:
    log = CaseLog(tmp_path, "x", "abcdef")
    log.add({"case": "one"})
    log.close()
    log.close()
    assert only_lines(tmp_path).read_text().count("\n") == 1


def test_what_a_step_measured_is_one_case(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    run.add("decode_tokens_per_s", 9.0)
    with run.one_case("ours, one sequence", repetition=1):
        run.add("decode_tokens_per_s", 10.0)
        run.add("prefill_tokens_per_s", 200.0)
    (line,) = lines_of(only_lines(tmp_path).read_bytes(), "x")
    assert (line["case"], line["repetition"]) == ("ours, one sequence", 1)
    assert line["samples"] == {"decode_tokens_per_s": [10.0], "prefill_tokens_per_s": [200.0]}
    assert line["took_s"] >= 0
    assert "error" not in line


def test_a_step_that_fails_is_a_case_with_its_reason_and_fails() -> None:
    run = a_run(None)
    with pytest.raises(OSError, match="gone"), run.one_case("llama-bench"):
        run.add("x", 1.0)
        raise OSError("gone")
    assert [(line["case"], line["error"], line["samples"]) for line in run.cases] == [
        ("llama-bench", "gone", {"x": [1.0]})
    ]


def test_a_step_that_is_interrupted_was_not_finished() -> None:
    run = a_run(None)
    with pytest.raises(KeyboardInterrupt), run.one_case("llama-bench"):
        raise KeyboardInterrupt
    assert run.cases == []
