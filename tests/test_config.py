"""Settings: who beats whom, and that nothing wrong becomes a default in silence."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from edge_llm import config
from edge_llm.config import (
    PUBLIC_HUB,
    CatalogueConfig,
    GatewayConfig,
    UpConfig,
    WorkerConfig,
    catalogue_settings,
    load_settings,
)
from edge_llm.errors import ConfigError

SECTIONS: dict[str, type[BaseModel]] = {
    "worker": WorkerConfig,
    "gateway": GatewayConfig,
    "up": UpConfig,
    "catalogue": CatalogueConfig,
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without any settings."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def written(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text)
    return path


def test_flags_beat_environment_beats_file_beats_default(home: Path) -> None:
    file = written(home, "worker: {n_ctx: 1000, slots: 2, threads: 3}\ngateway: {port: 1}\n")
    environment = {"EDGE_LLM_WORKER_N_CTX": "2000", "EDGE_LLM_WORKER_SLOTS": "4", "EDGE_LLM_GATEWAY_PORT": "2"}
    found = load_settings(WorkerConfig, {"n_ctx": 3000, "slots": None}, file, environment)
    assert (found.n_ctx, found.slots, found.threads, found.chunk_tokens) == (3000, 4, 3, 128)


def test_the_file_is_the_flag_else_the_variable_else_the_users_folder(home: Path) -> None:
    flag, variable = home / "flag.yaml", home / "variable.yaml"
    flag.write_text("worker: {slots: 1}\n")
    variable.write_text("worker: {slots: 2}\n")
    for folder, slots in ((home / ".config", 3), (home / "xdg", 4)):
        (folder / "edge-llm").mkdir(parents=True)
        (folder / "edge-llm/config.yaml").write_text(f"worker: {{slots: {slots}}}\n")
    named = {"EDGE_LLM_CONFIG": str(variable), "XDG_CONFIG_HOME": str(home / "xdg")}
    assert load_settings(WorkerConfig, {}, flag, named).slots == 1
    assert load_settings(WorkerConfig, {}, None, named).slots == 2
    assert load_settings(WorkerConfig, {}, None, {"XDG_CONFIG_HOME": str(home / "xdg")}).slots == 4
    assert load_settings(WorkerConfig, {}, None, {}).slots == 3


def test_a_named_file_must_be_there_the_users_own_need_not(home: Path) -> None:
    assert load_settings(WorkerConfig, {}, None, {}) == WorkerConfig()
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_settings(WorkerConfig, {}, home / "absent.yaml", {})
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_settings(WorkerConfig, {}, None, {"EDGE_LLM_CONFIG": str(home / "absent.yaml")})


@pytest.mark.parametrize("text", ["", "# nothing\n", "worker:\n", "worker: {}\n", "up: {port: 1}\n"])
def test_a_file_that_says_nothing_changes_nothing(home: Path, text: str) -> None:
    assert load_settings(WorkerConfig, {}, written(home, text), {}) == WorkerConfig()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("wroker: {slots: 1}\n", ["wroker", "worker, gateway, up, catalogue"]),
        ("worker: {slotz: 1}\n", ["section worker", "slotz", "n_ctx, slots, spare_slots"]),
        ("worker: {1: 1}\n", ["section worker", "unknown: 1"]),
        ("worker: 7\n", ["section worker", "no keys"]),
        ("worker: []\n", ["section worker", "no keys"]),
        ("worker: false\n", ["section worker", "no keys"]),
        ("[worker]\n", ["the sections are"]),
        ("worker: {slots: 1\n", ["cannot read"]),
        ("worker: {slots: 1, slots: 2}\n", ["twice"]),
        ("worker: {slots: 0}\n", ["worker.slots", "got 0"]),
        ("worker: {slots: many}\n", ["worker.slots", "got 'many'"]),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_what_it_may_hold(home: Path, text: str, words: list[str]) -> None:
    file = written(home, text)
    with pytest.raises(ConfigError) as caught:
        load_settings(WorkerConfig, {}, file, {})
    for word in [str(file), *words]:
        assert word in caught.value.message


def test_a_file_that_is_no_text_is_refused_with_its_name(home: Path) -> None:
    file = home / "settings.yaml"
    file.write_bytes(b"worker: \xff\xfe\n")
    for path in (file, home):
        with pytest.raises(ConfigError, match=f"cannot read the configuration file {path}"):
            load_settings(WorkerConfig, {}, path, {})


def test_an_unknown_variable_is_refused_and_the_known_ones_are_named(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"EDGE_LLM_WORKER_NCTX; known are .*EDGE_LLM_WORKER_N_CTX"):
        load_settings(WorkerConfig, {}, None, {"EDGE_LLM_WORKER_NCTX": "1"})
    other_section = {"EDGE_LLM_GATEWAY_NONSENSE": "1"}
    assert load_settings(WorkerConfig, {}, None, other_section) == WorkerConfig()


@pytest.mark.parametrize(
    ("kind", "section", "key", "value"),
    [
        (WorkerConfig, "worker", "role", "server"),
        (WorkerConfig, "worker", "name", "a b"),
        (WorkerConfig, "worker", "port", 65_536),
        (WorkerConfig, "worker", "n_ctx", 63),
        (WorkerConfig, "worker", "slots", 65),
        (WorkerConfig, "worker", "threads", -1),
        (WorkerConfig, "worker", "chunk_tokens", 0),
        (WorkerConfig, "worker", "k_type", "q9"),
        (WorkerConfig, "worker", "policy", "quick"),
        (WorkerConfig, "worker", "level_cap", "unverified"),
        (WorkerConfig, "worker", "simulate", "perhaps"),
        (WorkerConfig, "worker", "drain_s", -1),
        (WorkerConfig, "worker", "allowed_peers", ["10.0.0.0/8", "10.0.0.1/8"]),
        (WorkerConfig, "worker", "allowed_peers", ["somewhere"]),
        (GatewayConfig, "gateway", "queue_wait_s", 0),
        (GatewayConfig, "gateway", "max_body_bytes", 1),
        (GatewayConfig, "gateway", "checkpoint_tokens", -1),
        (GatewayConfig, "gateway", "checkpoint_tokens", 1),
        (GatewayConfig, "gateway", "checkpoint_tokens", 7),
        (UpConfig, "up", "prefill", -1),
        (UpConfig, "up", "threads", "some"),
        (CatalogueConfig, "catalogue", "hub", "example.org"),
    ],
)
def test_a_wrong_value_is_named_with_its_section_and_what_was_given(
    home: Path, kind: type[WorkerConfig], section: str, key: str, value: object
) -> None:
    shown = repr(value)
    with pytest.raises(ConfigError) as caught:
        load_settings(kind, {key: value}, None, {})
    assert f"{section}.{key}" in caught.value.message
    assert f"(got {shown})" in caught.value.message


@pytest.mark.parametrize("tokens", [0, 8, 64])
def test_checkpoints_are_off_or_some_tokens_apart(home: Path, tokens: int) -> None:
    assert load_settings(GatewayConfig, {"checkpoint_tokens": tokens}, None, {}).checkpoint_tokens == tokens


def test_checkpoints_that_would_hold_up_every_stream_are_refused_with_what_to_say_instead(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"EDGE_LLM_GATEWAY_CHECKPOINT_TOKENS.*either 0 .*at least 8.*streams wait"):
        load_settings(GatewayConfig, {}, None, {"EDGE_LLM_GATEWAY_CHECKPOINT_TOKENS": "3"})


def test_all_wrong_values_are_named_at_once(home: Path) -> None:
    environment = {"EDGE_LLM_WORKER_SLOTS": "0", "EDGE_LLM_WORKER_N_CTX": "x"}
    with pytest.raises(ConfigError, match=r"worker\.n_ctx.*worker\.slots"):
        load_settings(WorkerConfig, {}, None, environment)


def test_a_cluster_without_anybody_who_decodes_is_refused(home: Path) -> None:
    with pytest.raises(ConfigError, match="--decode 1 or --mixed 1"):
        load_settings(UpConfig, {"decode": 0}, None, {})
    assert load_settings(UpConfig, {"decode": 0, "mixed": 1}, None, {}).mixed == 1


def test_variables_hold_what_flags_hold(home: Path) -> None:
    environment = {
        "EDGE_LLM_WORKER_SIMULATE": "true",
        "EDGE_LLM_WORKER_KEY_FILE": "/k",
        "EDGE_LLM_WORKER_ALLOWED_PEERS": "10.0.0.0/8, fc00::/7",
        "EDGE_LLM_WORKER_DRAIN_S": "0.5",
    }
    found = load_settings(WorkerConfig, {}, None, environment)
    assert (found.simulate, found.key_file, found.drain_s) == (True, Path("/k"), 0.5)
    assert found.allowed_peers == ("10.0.0.0/8", "fc00::/7")


def test_a_tilde_is_the_users_home(home: Path) -> None:
    file = written(home, "catalogue: {models_dir: ~/models, models_file: '~/mine.yaml'}\nworker: {key_file: ~/key}\n")
    found = catalogue_settings({"EDGE_LLM_CONFIG": str(file)})
    assert (found.models_dir, found.models_file) == (home / "models", home / "mine.yaml")
    assert load_settings(WorkerConfig, {}, file, {}).key_file == home / "key"


def test_the_catalogue_has_a_place_for_everything_by_default(home: Path) -> None:
    found = catalogue_settings({})
    assert found.models_dir == home / ".cache/edge-llm/models"
    assert found.hub == PUBLIC_HUB
    assert found.models_file is not None
    assert found.models_file.name == "models.yaml"
    assert found.models_file.is_file()
    assert catalogue_settings({"XDG_CACHE_HOME": "/c"}).models_dir == Path("/c/edge-llm/models")


def test_the_hub_is_the_setting_else_the_variable_of_others(home: Path) -> None:
    mirror = {"HF_ENDPOINT": "https://mirror.example/"}
    assert catalogue_settings(mirror).hub == "https://mirror.example"
    assert catalogue_settings(mirror | {"EDGE_LLM_CATALOGUE_HUB": "http://mine"}).hub == "http://mine"
    with pytest.raises(ConfigError, match=r"HF_ENDPOINT.*mirror"):
        catalogue_settings({"HF_ENDPOINT": "mirror"})


def test_the_settings_in_the_readme_are_settings(home: Path) -> None:
    """Prose drifts: the YAML example under "Settings" is loaded as a user would."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    example = readme.partition("## Settings")[2].partition("```yaml\n")[2].partition("```")[0]
    file = written(home, example)
    assert set(yaml.safe_load(example)) <= SECTIONS.keys()
    for kind in (WorkerConfig, GatewayConfig, UpConfig):
        load_settings(kind, {}, file, {})


@pytest.mark.parametrize("kind", SECTIONS.values(), ids=SECTIONS)
def test_every_setting_says_what_it_is_for(kind: type[BaseModel]) -> None:
    """config.py is the list of settings: a line of words stands below each of them."""
    tree = ast.parse(inspect.getsource(config))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__).body
    silent = [
        node.target.id
        for node, following in zip(body, [*body[1:], None], strict=True)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and not (isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant))
    ]
    assert silent == []
