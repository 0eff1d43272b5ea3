"""The file that says where workers are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_llm.cluster.static import StaticFile, parse_places, text_of
from edge_llm.cluster.view import Place
from edge_llm.errors import ConfigError

TWO = """
- {name: pi-a, address: "10.0.0.11:9001"}
- name: pi_b.local
  address: 10.0.0.12:9001
"""
PLACES = (Place("pi-a", "10.0.0.11:9001"), Place("pi_b.local", "10.0.0.12:9001"))


def test_a_file_names_workers_and_their_addresses() -> None:
    assert parse_places(TWO, "w.yaml") == PLACES


@pytest.mark.parametrize("address", ["[fe80::1]:9001", "127.0.0.1:65535"])
def test_an_address_is_an_ip_with_a_port(address: str) -> None:
    assert parse_places(f'- {{name: a, address: "{address}"}}', "w.yaml") == (Place("a", address),)


@pytest.mark.parametrize("text", ["", "[]", "# nobody yet"])
def test_a_cluster_may_be_empty_for_now(text: str) -> None:
    assert parse_places(text, "w.yaml") == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- {name: a", "is not YAML"),
        ("- 2026-13-45", "is not YAML"),
        ("[" * 1500, "is not YAML"),
        ("- \x07", "is not YAML"),
        ("- !!python/object:os.system {}", "is not YAML"),
        ("name: a", "must be a list of workers"),
        ("just text", "must be a list of workers"),
        ("- just text", "worker 1: the keys are name and address; it has 'just text'"),
        ("- {name: a}", "worker 1: the keys are name and address; it has name"),
        ('- {name: a, address: "10.0.0.1:1", role: decode}', "it has name, address, role"),
        ('- {name: a, address: "10.0.0.1:1"}\n- {}', "worker 2: the keys are"),
        ('- {name: "a b", address: "10.0.0.1:1"}', "name 'a b'"),
        ('- {name: "", address: "10.0.0.1:1"}', "name ''"),
        ('- {name: 007, address: "10.0.0.1:1"}', "needs quotes"),
        ('- {name: on, address: "10.0.0.1:1"}', "name True"),
        ('- {name: a, address: ["10.0.0.1:1"]}', "address"),
        ("- {name: a, address: 10.0.0.1}", "address '10.0.0.1'"),
        ('- {name: a, address: "node-3.lan:1"}', "worker 1 (a): address 'node-3.lan:1' is not \"IP:port\""),
        ('- {name: a, address: "localhost:1"}', "host names are not looked up"),
        ('- {name: a, address: "10.0.0.256:1"}', "address '10.0.0.256:1'"),
        ('- {name: a, address: "10.0.0.1.:1"}', "address '10.0.0.1.:1'"),
        ('- {name: a, address: "fe80::1:9001"}', "address 'fe80::1:9001'"),
        ('- {name: a, address: "[10.0.0.1]:9001"}', "address '[10.0.0.1]:9001'"),
        ('- {name: a, address: "10.0.0.1:"}', "address '10.0.0.1:'"),
        ('- {name: a, address: "10.0.0.1:0"}', "address '10.0.0.1:0'"),
        ('- {name: a, address: "10.0.0.1:65536"}', "address '10.0.0.1:65536'"),
        ('- {name: a, address: "http://h:1"}', "address 'http://h:1'"),
        ('- {name: a, address: "u@h:1"}', "address 'u@h:1'"),
        ('- {name: a, address: "10.0.0.1:1"}\n- {name: a, address: "10.0.0.1:2"}', "names a worker twice"),
    ],
    ids=lambda value: value[:40],
)
def test_a_wrong_file_is_an_error_that_says_where_and_what(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_places(text, "w.yaml")
    assert "w.yaml" in caught.value.message
    assert said in caught.value.message


def written(path: Path, text: str, second: int) -> None:
    """Write and date the file, so that every version has its own time however fast the test is."""
    path.write_text(text)
    os.utime(path, (second, second))


def test_the_file_is_read_again_when_it_changes_and_only_then(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    written(path, TWO, 1)
    file = StaticFile(path)
    assert file.places() == PLACES
    assert file.places() is file.places()
    written(path, TWO.replace("pi-a", "pi-c"), 2)
    assert [place.worker for place in file.places()] == ["pi-c", "pi_b.local"]
    written(path, '- {name: d, address: "10.0.0.1:1"}', 2)
    assert [place.worker for place in file.places()] == ["d"], "same time, another size"


def test_a_file_that_went_bad_is_an_error_until_it_is_good_again(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    written(path, TWO, 1)
    file = StaticFile(path)
    file.places()
    written(path, "- {name: a", 2)
    for _ in range(2):
        with pytest.raises(ConfigError, match="is not YAML"):
            file.places()
    written(path, TWO, 1)
    assert file.places() == PLACES


def test_a_file_that_is_not_there_or_not_text_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    with pytest.raises(ConfigError, match=r"w\.yaml: No such file"):
        StaticFile(path).places()
    path.mkdir()
    with pytest.raises(ConfigError, match=r"w\.yaml: Is a directory"):
        StaticFile(path).places()
    path.rmdir()
    path.write_bytes(b"- \xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        StaticFile(path).places()


def test_what_is_written_is_read_again() -> None:
    workers = [("pi-a", "10.0.0.11:9001"), ("b.c", "[fe80::1]:1"), ("123", "10.0.0.12:9001")]
    assert parse_places(text_of(workers), "w") == tuple(Place(name, address) for name, address in workers)
