"""`--url` of every command that has one: the same check, before anything is asked or started."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from edge_llm.cli import cli
from edge_llm.commands.endpoint import Address, address_of

WORDS = "'nonsense' is no address of a server: write http://HOST:PORT"
MORE = {"bench job": ("--output", "x", "--", "theorem"), "cluster drain": ("x",), "cluster role": ("x", "mixed")}


def asking(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Parameter]]:
    """Every command with --url, by its words."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from asking(found, (*path, name))
        return
    for param in command.params:
        if "--url" in param.opts:
            yield path, param


def test_every_url_is_checked_when_the_command_line_is_read() -> None:
    found = {" ".join(path): param for path, param in asking(cli)}
    assert {"bench theorem", "bench claims", "bench cluster", "bench serve", "chat", "cluster status"} <= found.keys()
    assert [name for name, param in found.items() if not isinstance(param.type, Address)] == []


@pytest.mark.parametrize("path", [path for path, _ in asking(cli)], ids=" ".join)
def test_what_is_no_address_is_a_usage_error_that_says_what_to_write(path: tuple[str, ...]) -> None:
    done = CliRunner().invoke(cli, [*path, "--url", "nonsense", *MORE.get(" ".join(path), ())])
    assert done.exit_code == 2, done.output
    assert WORDS in done.stderr
    assert "--url" in done.stderr


def test_a_server_to_compare_with_is_checked_like_the_first_one() -> None:
    done = CliRunner().invoke(cli, ["bench", "serve", "--beside", "other=nonsense"])
    assert done.exit_code == 2
    assert f"--beside other=nonsense: {WORDS}" in done.stderr


@pytest.mark.parametrize("text", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_the_path_that_requests_bring_themselves_may_be_given(text: str) -> None:
    assert address_of(text) == "http://h:1"
