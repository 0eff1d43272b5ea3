"""The list of packages in an image: the same packages, the same bytes; nothing invented."""

from __future__ import annotations

import json
from typing import Any

from edge_llm.image.sbom import (
    Debian,
    Installed,
    Subject,
    bill,
    canonical,
    debian_packages,
    debian_release,
    hashes_of,
)

SUBJECT = Subject("edge-llm", "0.1.0", "arm64")
PYTHON = [Installed("PyYAML", "6.0.3", "MIT", "ab" * 32), Installed("click", "8.5.1")]
DEBIAN = [Debian("libc6", "2.36-9+deb12u14", "arm64", "glibc")]
STATUS = """\
Package: libc6
Status: install ok installed
Source: glibc (2.36)
Version: 2.36-9+deb12u14
Architecture: arm64
Description: GNU C Library
 Version: not this one

Package: gone
Status: deinstall ok config-files
Version: 1.0
Architecture: all
"""


def components(python: list[Installed] = PYTHON, debian: list[Debian] = DEBIAN) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in json.loads(bill(SUBJECT, python, debian, "bookworm"))["components"]}


def test_the_order_in_which_packages_are_found_does_not_matter() -> None:
    assert bill(SUBJECT, PYTHON, DEBIAN, "bookworm") == bill(SUBJECT, PYTHON[::-1], DEBIAN, "bookworm")


def test_another_package_is_another_document() -> None:
    one, other = (json.loads(bill(SUBJECT, list_, [], ""))["serialNumber"] for list_ in (PYTHON, PYTHON[:1]))
    assert one != other


def test_a_document_names_its_format_and_what_it_is_about() -> None:
    document = json.loads(bill(SUBJECT, PYTHON, DEBIAN, "bookworm"))
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert document["metadata"]["component"]["version"] == "0.1.0"
    assert "timestamp" not in document["metadata"]


def test_packages_have_addresses_that_scanners_look_up() -> None:
    found = components()
    assert found["PyYAML"]["purl"] == "pkg:pypi/pyyaml@6.0.3"
    assert found["libc6"]["purl"] == "pkg:deb/debian/libc6@2.36-9%2Bdeb12u14?arch=arm64&distro=bookworm"


def test_what_is_not_known_is_left_out() -> None:
    found = components()
    assert found["PyYAML"]["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    assert found["PyYAML"]["licenses"] == [{"license": {"name": "MIT"}}]
    assert not {"hashes", "licenses", "properties"} & found["click"].keys()


def test_our_own_build_says_how_it_was_compiled() -> None:
    built = Installed("llama-cpp-python", "0.3.36", properties=(("edge-llm:cmake-flags", "-DGGML_NATIVE=OFF"),))
    found = components([built], [])["llama-cpp-python"]
    assert found["properties"] == [{"name": "edge-llm:cmake-flags", "value": "-DGGML_NATIVE=OFF"}]


def test_removed_debian_packages_and_continued_lines_are_not_counted() -> None:
    assert debian_packages(STATUS) == DEBIAN


def test_hashes_come_from_what_pip_reports_in_either_of_its_forms() -> None:
    def item(name: str, **archive: object) -> dict[str, Any]:
        return {"metadata": {"name": name}, "download_info": {"archive_info": archive}}

    report = {"install": [item("A_b", hashes={"sha256": "11"}), item("c", hash="sha256=22"), item("local")]}
    assert hashes_of(report) == {"a-b": "11", "c": "22"}


def test_names_compare_as_indexes_compare_them() -> None:
    assert canonical("Foo__bar.Baz") == "foo-bar-baz"


def test_the_release_is_read_where_there_is_one() -> None:
    assert debian_release('ID=debian\nVERSION_CODENAME="trixie"\n') == "trixie"
    assert debian_release("ID=other\n") == ""
