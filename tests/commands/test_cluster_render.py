"""`edge-llm cluster render` as a user runs it: files in, a folder or one YAML out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from edge_llm.cli import cli
from edge_llm.engine.random_model import make_model

TWO = """
model: tiny
{source}
boards:
  - {{name: pi-a, ram: {ram}}}
  - {{name: pi-b, ram: {ram}}}
slots: 2
n_ctx: 1024
"""


def run(*arguments: str | Path) -> Result:
    """Standard output and standard error apart."""
    return CliRunner().invoke(cli, ["cluster", "render", *map(str, arguments)])


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models"))


def described(folder: Path, source: str, ram: str = "8GB") -> Path:
    file = folder / "cluster.yaml"
    file.write_text(TWO.format(source=source, ram=ram))
    return file


def test_a_folder_is_written_with_the_commands_that_use_it(gguf: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    done = run(described(tmp_path, f"gguf: {gguf}"), "-o", target)
    assert done.exit_code == 0, done.output
    assert (target / "kustomization.yaml").is_file()
    assert f"kubectl apply -k {target}" in done.stdout
    assert "kubectl label node pi-a edge-llm/role=prefill" in done.stdout


def test_one_yaml_goes_to_standard_output_and_the_rest_to_standard_error(gguf: Path, tmp_path: Path) -> None:
    done = run(described(tmp_path, f"gguf: {gguf}"))
    assert done.exit_code == 0, done.stderr
    kinds = [item["kind"] for item in yaml.safe_load_all(done.stdout) if item]
    assert kinds.count("StatefulSet") == 2
    assert "KV a token" in done.stderr


def test_check_renders_nothing(gguf: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    done = run(described(tmp_path, f"gguf: {gguf}"), "-o", target, "--check", "--json")
    found = json.loads(done.stdout)
    assert [row["role"] for row in found["boards"]] == ["prefill", "decode"]
    assert found["output"] is None
    assert not target.exists()


def test_what_a_board_said_of_a_model_is_as_good_as_its_file(gguf: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(cli, ["models", "show", str(gguf), "--json"])
    (tmp_path / "model.json").write_text(said.stdout)
    by_facts = json.loads(run(described(tmp_path, "facts: model.json"), "--check", "--json").stdout)
    by_file = json.loads(run(described(tmp_path, f"gguf: {gguf}"), "--check", "--json").stdout)
    assert by_facts == by_file
    (tmp_path / "model.json").write_text("{}")
    done = run(described(tmp_path, "facts: model.json"), "--check")
    assert done.exit_code == 1
    assert "weights_bytes" in done.stderr


def test_what_does_not_fit_is_refused_with_the_sum(gguf: Path, tmp_path: Path) -> None:
    done = run(described(tmp_path, f"gguf: {gguf}", ram="1GB"), "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "does not fit on pi-" in done.stderr
    assert "weights" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("tmp_cache")
def test_a_model_that_is_not_here_is_refused_with_how_to_make_its_kv_known(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("{model: qwen3-0.6b-q4_0, boards: [{name: a, ram: 8GB}]}")
    done = run(file)
    assert done.exit_code == 1
    assert "how much KV a token takes stands only in the file's header" in done.stderr
    assert "edge-llm models pin qwen3-0.6b-q4_0" in done.stderr
    file.write_text("{model: smollm2-135m-instruct-q4_1, boards: [{name: a, ram: 8GB}]}")
    done = run(file)
    assert "Known is its file's size, 94 MiB" in done.stderr
    assert "edge-llm models pull smollm2-135m-instruct-q4_1" in done.stderr


def test_a_place_on_the_boards_needs_a_file_here(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("{model: /var/lib/edge-llm/models/x.gguf, boards: [{name: a, ram: 8GB}]}")
    done = run(file)
    assert done.exit_code == 1
    assert "gguf: FILE" in done.stderr


def test_json_of_a_figure_is_not_asked_for_where_manifests_are_printed(gguf: Path, tmp_path: Path) -> None:
    done = run(described(tmp_path, f"gguf: {gguf}"), "--json")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--json goes with --check or -o" in done.stderr


def test_the_command_to_apply_a_folder_can_be_pasted_whatever_it_is_called(gguf: Path, tmp_path: Path) -> None:
    target = tmp_path / "my cluster"
    done = run(described(tmp_path, f"gguf: {gguf}"), "-o", target)
    assert f"kubectl apply -k '{target}'" in done.stdout


def boards(folder: Path, gguf: Path, *lines: str) -> Path:
    file = folder / "cluster.yaml"
    listed = "".join(f"  - {{{line}, ram: 8GB}}\n" for line in lines)
    file.write_text(f"model: tiny\ngguf: {gguf}\nboards:\n{listed}slots: 2\nn_ctx: 1024\n")
    return file


def steps(done: Result) -> list[str]:
    """The commands that are printed to be run."""
    assert done.exit_code == 0, done.output
    return [line.strip() for line in done.stdout.splitlines() if line.startswith(("  kubectl", "  edge-llm"))]


def test_a_cluster_that_grows_keeps_its_roles_and_chooses_for_new_boards_only(gguf: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    four = [f"name: pi-{letter}" for letter in "abcd"]
    assert steps(run(boards(tmp_path, gguf, *four), "-o", target)) == [
        "kubectl label node pi-a edge-llm/role=prefill",
        "kubectl label node pi-b pi-c pi-d edge-llm/role=decode",
        f"kubectl apply -k {target}",
    ]
    grown = boards(tmp_path, gguf, *four, "name: pi-e", "name: pi-f")
    again = [
        "kubectl label node pi-a pi-e edge-llm/role=prefill",
        "kubectl label node pi-b pi-c pi-d pi-f edge-llm/role=decode",
        f"kubectl apply -k {target}",
    ]
    assert steps(run(grown, "-o", target)) == again
    assert steps(run(grown, "-o", target)) == again
    elsewhere = json.loads(run(grown, "-o", tmp_path / "other", "--check", "--json").stdout)
    assert elsewhere["labels"][0] == "kubectl label node pi-a pi-b edge-llm/role=prefill", "without it two others read"


def test_a_role_that_is_changed_by_hand_replaces_the_worker_first_and_says_why(gguf: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    steps(run(boards(tmp_path, gguf, "name: pi-a", "name: pi-b", "name: pi-c"), "-o", target))
    changed = boards(tmp_path, gguf, "name: pi-a", "name: pi-b, role: prefill", "name: pi-c")
    checked = json.loads(run(changed, "-o", target, "--check", "--json").stdout)
    done = run(changed, "-o", target)
    moved, *rest = steps(done)
    assert checked["moves"] == [moved]
    assert moved.startswith("edge-llm cluster role POD prefill --kubeconfig ")
    assert moved.endswith("on pi-b")
    assert rest == [
        "kubectl label node pi-a edge-llm/role=prefill",
        "kubectl label node pi-c edge-llm/role=decode",
        f"kubectl apply -k {target}",
    ]
    assert "pi-b (decode -> prefill). A label alone would move nobody" in done.stdout


def test_a_board_that_was_alone_stays_mixed_when_a_second_one_comes(gguf: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert steps(run(boards(tmp_path, gguf, "name: pi-a"), "-o", target)) == [f"kubectl apply -k {target}"]
    assert steps(run(boards(tmp_path, gguf, "name: pi-a", "name: pi-b"), "-o", target)) == [
        "kubectl label node pi-b edge-llm/role=decode",
        "kubectl label node pi-a edge-llm/role=mixed",
        f"kubectl apply -k {target}",
    ]


def test_a_description_may_come_on_standard_input(gguf: Path, tmp_path: Path) -> None:
    text = described(tmp_path, f"gguf: {gguf}").read_text()
    done = CliRunner().invoke(cli, ["cluster", "render", "-", "--check", "--json"], input=text)
    assert json.loads(done.stdout)["model"] == "tiny", done.stderr
    done = CliRunner().invoke(cli, ["cluster", "render", "-", "--check"], input="model: [")
    assert "standard input is not YAML: line 1" in done.stderr
    done = CliRunner().invoke(cli, ["cluster", "render", "-", "--check"], input=b"\xff\xfe")
    assert done.exit_code == 1
    assert "standard input is no text" in done.stderr


def test_help_explains_every_key() -> None:
    said = " ".join(run("--help").stdout.split())
    for words in (
        "Keys of DESCRIPTION:",
        "boards.ram Needed. What the board is sold with",
        "n_ctx [4096] Tokens of one answer",
    ):
        assert words in said
    assert "cpu: cortex-a76" in said
    assert ".py" not in said, "it stands there, not in a source file"


def test_a_context_past_the_models_own_is_refused_before_anything_is_summed_up(gguf: Path, tmp_path: Path) -> None:
    file = described(tmp_path, f"gguf: {gguf}")
    file.write_text(file.read_text().replace("n_ctx: 1024", "n_ctx: 100000"))
    done = run(file, "--check")
    assert done.exit_code == 1
    assert "n_ctx: 100,000 is more than tiny was trained for, 4,096 tokens" in done.stderr


def test_sizes_of_another_file_than_the_lists_are_refused(gguf: Path, tmp_path: Path) -> None:
    file = described(tmp_path, f"gguf: {gguf}")
    file.write_text(file.read_text().replace("model: tiny", "model: smollm2-135m-instruct-q4_1"))
    done = run(file, "--check")
    assert done.exit_code == 1
    assert "is of another model than smollm2-135m-instruct-q4_1" in done.stderr


def test_a_model_that_workers_would_refuse_is_noted_before_anything_else(gguf: Path, tmp_path: Path) -> None:
    file = described(tmp_path, f"gguf: {gguf}")
    file.write_text(file.read_text().replace("model: tiny", "model: smollm2-360m-instruct-q4_0"))
    first, second, *_ = json.loads(run(file, "--check", "--json").stdout)["notes"]
    assert "has no sha256 in" in first
    assert "`edge-llm models pin smollm2-360m-instruct-q4_0 --write " in first
    assert second.startswith("sizes are of random-dense-Q4_0-1.gguf (gguf: ")


def test_a_role_that_was_changed_before_is_not_forgotten_by_a_second_rendering(gguf: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    run(boards(tmp_path, gguf, "name: pi-a, role: prefill", "name: pi-b, role: decode"), "-o", target)
    swapped = boards(tmp_path, gguf, "name: pi-a, role: decode", "name: pi-b, role: prefill")
    assert "edge-llm cluster role POD prefill" in run(swapped, "-o", target).stdout
    again = run(swapped, "-o", target)
    assert "kubectl label node pi-a edge-llm/role=decode" in steps(again), "without --overwrite: kubectl refuses it"
    assert "`already has a value`" in again.stdout
    assert "`edge-llm cluster role POD ROLE --kubeconfig FILE`" in again.stdout


def test_an_own_list_of_models_is_the_one_of_this_machine(gguf: Path, tmp_path: Path) -> None:
    file = described(tmp_path, f"gguf: {gguf}\ncomponents: [model-download, network-policy, own-models-yaml]")
    done = run(file)
    (made,) = [
        item
        for item in yaml.safe_load_all(done.stdout)
        if item and item["kind"] == "ConfigMap" and item["metadata"]["name"].startswith("edge-llm-models")
    ]
    assert "smollm2-360m-instruct-q4_0" in made["data"]["models.yaml"]
