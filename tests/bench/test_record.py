"""Records: complete or absent, readable forever, free of this machine's paths."""

from __future__ import annotations

import json
import subprocess
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from edge_llm.bench.record import (
    SCHEMA_VERSION,
    SCHEMAS,
    BadRecord,
    EngineBuild,
    Failure,
    ModelFacts,
    Node,
    Process,
    Record,
    Source,
    encode,
    file_name,
    load,
    parse,
    read_source,
    run_id,
    schema,
    statistics_of,
    without_paths,
    write,
)
from edge_llm.bench.run import WHY_CHARS, Run
from edge_llm.bench.stats import summary

STARTED = datetime(2026, 11, 23, 10, 15, 2, tzinfo=UTC)
REPOSITORY = Path(__file__).parents[2]


def a_record(**changes: object) -> Record:
    record = Record(
        schema_version=SCHEMA_VERSION,
        run_id=run_id(STARTED, 12345),
        kind="engine",
        is_complete=True,
        started_at=STARTED,
        finished_at=STARTED + timedelta(seconds=90),
        tool_version="0.1",
        command=["edge-llm", "bench", "engine"],
        config={"core": 1, "model_path": "/somewhere/models/a.gguf"},
        source=Source("0" * 40, False),
        models=[ModelFacts("tiny-q4_0", "a.gguf", "f" * 64, 10, "Q4_0")],
        engines=[EngineBuild("ours", {"system_info": "CPU : AVX2 = 1 | LLAMAFILE = 0"})],
        nodes=[Node("local", "a cpu", "x86_64", 2, (0, 1), 1 << 30, "6.1", 4096)],
        processes=[Process("ours", (1,), 9.0, 8.5, 100, 110, 120)],
        figures={"decode_ratio": 1.01},
        samples={"decode": [1.0, 1.02]},
        statistics=statistics_of({"decode": summary([1.0, 1.02])}),
        failures=[Failure("batch8", "llama-batched-bench is not there")],
    )
    return msgspec.structs.replace(record, **changes)


def test_a_written_record_reads_back_equal_but_for_its_paths(tmp_path: Path) -> None:
    record = a_record()
    path = write(record, tmp_path / "bench_results")
    assert path.name == "20261123T101502Z-engine-tiny-q4_0.json"
    assert load(path) == msgspec.structs.replace(record, config={"core": 1, "model_path": "a.gguf"})
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_two_runs_in_one_second_make_two_files(tmp_path: Path) -> None:
    first = write(a_record(), tmp_path)
    second = write(a_record(run_id=run_id(STARTED, 777)), tmp_path)
    assert first != second
    assert load(first).run_id != load(second).run_id


def test_runs_that_end_at_the_same_moment_overwrite_nothing(tmp_path: Path) -> None:
    """Not even when their ids end alike."""
    records = [a_record(run_id=run_id(STARTED, number << 24)) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda record: write(record, tmp_path), records))
    assert [load(path).run_id for path in paths] == [record.run_id for record in records]
    assert sorted(tmp_path.iterdir()) == sorted(paths), "and nothing else is left"


def test_a_page_that_a_server_sent_as_its_error_is_kept_in_short() -> None:
    run = Run("engine", ["test"], {})
    run.fail("one", "x" * 100_000)
    run.fail("other", "short")
    assert [len(failure.why) for failure in run.failures] == [WHY_CHARS + len(" ..."), 5]


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    record = a_record(
        command=["edge-llm", "bench", "engine", f"--models={tmp_path}/x/my.gguf", "-o", f"{Path.home()}/out"],
        failures=[Failure("load", f"cannot read {Path.cwd()}/models/a b.gguf and /root/secret/place/b.gguf")],
    )
    text = encode(record).decode()
    for secret in (str(tmp_path), str(Path.home()) + "/", str(Path.cwd()), "/root", "secret", "place"):
        assert secret not in text
    assert "my.gguf" in text
    assert "b.gguf" in text


def test_urls_units_and_fractions_are_no_paths() -> None:
    for text in ("12 tokens/s", "x86_64/0a1b", "http://127.0.0.1:8080/v1/chat", "1/2/3", "GET /readyz", "a / b"):
        assert without_paths(text) == text


def test_model_names_cannot_leave_the_results_folder() -> None:
    record = a_record(models=[ModelFacts("../../etc/pass wd", "a.gguf", "", 1, "Q4_0")])
    assert file_name(record) == "20261123T101502Z-engine-etc-pass-wd.json"


def test_run_ids_are_version_7_uuids_in_order_of_time() -> None:
    later = STARTED + timedelta(milliseconds=1)
    ids = [run_id(STARTED, (1 << 74) - 1), run_id(later, 0)]
    assert ids == sorted(ids)
    assert [uuid.UUID(text).version for text in ids] == [7, 7]
    assert {uuid.UUID(text).variant for text in ids} == {uuid.RFC_4122}


def test_fields_of_a_later_version_do_not_stop_an_older_reader() -> None:
    tree = json.loads(encode(a_record())) | {"invented_later": {"x": 1}}
    assert parse(json.dumps(tree).encode(), "x").figures == {"decode_ratio": 1.01}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not a bench record"),
        (b"[]", "not a bench record"),
        (b'{"schema_version": 1}', "not a bench record"),
        (encode(a_record(schema_version=SCHEMA_VERSION + 1)), "update it"),
    ],
)
def test_what_is_not_a_record_is_refused_by_name(data: bytes, message: str) -> None:
    with pytest.raises(BadRecord, match=message) as error:
        parse(data, "some-file.json")
    assert "some-file.json" in error.value.message


def test_every_record_in_the_repository_still_loads() -> None:
    for path in sorted((REPOSITORY / "bench_results").glob("*.json")):
        record = load(path)
        assert record.samples or record.failures or record.figures, path.name
        assert without_paths(path.read_text()) == path.read_text(), f"{path.name} names a path"


def test_the_schema_names_every_field() -> None:
    fields = schema()["$defs"]["Record"]["properties"]
    assert set(fields) == {field.name for field in msgspec.structs.fields(Record)}
    assert [list(schema(of)["$defs"]) for of in SCHEMAS if of != "record"] == [["CaseLine"], ["Printed"]]


def test_a_record_from_before_resources_and_cases_has_none_of_them() -> None:
    tree = json.loads(encode(a_record()))
    for later in ("resources", "cases", "workload", "notes"):
        del tree[later]
    record = parse(json.dumps(tree).encode(), "x")
    assert (record.resources, record.cases, record.workload, record.notes) == ([], None, {}, [])


def test_outside_a_checkout_the_source_is_unknown(tmp_path: Path) -> None:
    source = read_source(tmp_path)
    assert (source.commit, source.is_dirty) == (None, None)


def test_a_record_of_the_run_before_is_no_change_of_the_code(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert read_source(package).is_dirty is False
    (tmp_path / "bench_results").mkdir()
    (tmp_path / "bench_results" / "old.json").write_text("{}")
    assert read_source(package).is_dirty is False
    (package / "b.py").write_text("b = 1\n")
    assert read_source(package).is_dirty is True
