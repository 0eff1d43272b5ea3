"""The builder's command line, and what of the building machine goes into it."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest

from edge_llm.bootstrap import SetupError
from edge_llm.image.build import (
    Order,
    build_command,
    check_emulation,
    find_builder,
    mounted_settings,
    pip_configuration,
    slim,
)

ORDER = Order("arm64", "0.1.0", "abc123")


def arguments(command: list[str]) -> dict[str, str]:
    given = [word for before, word in pairwise(command) if before == "--build-arg"]
    return dict(word.split("=", 1) for word in given)


def test_boards_of_both_architectures_know_the_image_by_one_name() -> None:
    other = Order("amd64", "0.1.0", "abc123")
    assert ORDER.name == other.name == "localhost/edge-llm:0.1.0"
    assert ORDER.tag != other.tag
    assert ORDER.stem != other.stem


def test_the_bases_are_the_containerfiles_unless_given() -> None:
    assert not {"BASE", "BUILD_BASE"} & arguments(build_command("buildah", ORDER, "amd64", {})).keys()
    given = Order("arm64", "0.1.0", "abc123", base="mine:arm64", build_base="mine:amd64")
    found = arguments(build_command("buildah", given, "amd64", {}))
    assert (found["BASE"], found["BUILD_BASE"]) == ("mine:arm64", "mine:amd64")


def test_the_compiler_runs_on_the_building_machines_architecture() -> None:
    command = build_command("podman", ORDER, "amd64", {})
    assert command[command.index("--platform") + 1] == "linux/arm64"
    assert arguments(command)["BUILDPLATFORM"] == "linux/amd64"


def test_settings_for_indexes_are_mounted_never_arguments(tmp_path: Path) -> None:
    command = build_command("buildah", ORDER, "amd64", {"pip": tmp_path / "pip.conf"})
    assert f"id=pip,src={tmp_path}/pip.conf" in command
    assert not [name for name in arguments(command) if "PIP" in name or "CERT" in name]


def test_variables_beat_files_and_later_files_beat_earlier_ones() -> None:
    files = ["[global]\nindex-url = http://first\ntimeout = 5\n", "[global]\nindex-url = http://second\n"]
    assert "index-url = http://second" in pip_configuration(files, {}, False)
    found = pip_configuration(files, {"PIP_INDEX_URL": "http://third"}, False)
    assert "index-url = http://third" in found
    assert "timeout = 5" in found


def test_paths_of_this_machine_are_replaced_by_those_of_the_build() -> None:
    files = ["[global]\ncert = /home/me/ca.pem\nfind-links = /home/me/wheels\n"]
    assert "/home/me" not in pip_configuration(files, {}, False)
    assert "cert = /run/secrets/ca" in pip_configuration(files, {}, True)


def test_a_percent_sign_in_a_password_is_nothing_special() -> None:
    assert "p%40ss" in pip_configuration([], {"PIP_INDEX_URL": "http://me:p%40ss@index"}, False)


def test_mounted_settings_are_for_the_owner_and_gone_afterwards() -> None:
    with mounted_settings({"HOME": "/nowhere"}) as secrets:
        kept = secrets["pip"]
        assert kept.stat().st_mode & 0o777 == 0o600
    assert not kept.exists()


def test_a_bundle_of_certificates_is_mounted_where_one_is_named(tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.touch()
    with mounted_settings({"HOME": "/nowhere", "PIP_CERT": str(bundle)}) as secrets:
        assert secrets["ca"] == bundle
    with mounted_settings({"HOME": "/nowhere"}) as secrets:
        assert "ca" not in secrets


def test_a_machine_that_cannot_start_the_other_architecture_is_told_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="qemu-user-static"):
        check_emulation("aarch64", tmp_path)
    (tmp_path / "proc/sys/fs/binfmt_misc").mkdir(parents=True)
    (tmp_path / "proc/sys/fs/binfmt_misc/qemu-aarch64").touch()
    check_emulation("aarch64", tmp_path)


def test_a_missing_builder_is_named() -> None:
    with pytest.raises(SetupError, match="no-such-builder is missing"):
        find_builder("no-such-builder")


def test_a_slim_base_keeps_licences_and_nothing_of_the_building_machine(tmp_path: Path) -> None:
    kept, dropped = ["usr/share/doc/libc6/copyright", "etc/passwd"], ["usr/share/doc/libc6/changelog.gz"]
    dropped += ["var/lib/apt/lists/x_Packages", "usr/share/man/man1/ls.1.gz", "etc/resolv.conf", "var/log/dpkg.log"]
    for name in kept + dropped:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.symlink("libc6", tmp_path / "usr/share/doc/libc6-dev")
    slim(tmp_path)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(kept)
