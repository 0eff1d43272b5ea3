"""Build, settings, keys, model and neighbours: what they are, on this machine, and what follows from it."""

from __future__ import annotations

import http.server
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest

from edge_llm.catalogue.fetch import remember_sha256, sha256_of
from edge_llm.cluster.view import Place
from edge_llm.config import WorkerConfig
from edge_llm.doctor.asking import ask_build, ask_program, free_bytes, kernel_clock
from edge_llm.doctor.build import BuildFacts, Level, check_build, check_levels, check_published, read_levels
from edge_llm.doctor.finding import Finding
from edge_llm.doctor.model import check_card, check_memory, check_model, check_threads, read_memory, read_model
from edge_llm.doctor.peers import Peer, answers_here, ask_peers, check_peers
from edge_llm.doctor.settings import (
    FolderFacts,
    check_folders,
    check_gateway,
    check_keys,
    check_settings,
    read_keys,
    read_settings,
)
from tests.catalogue.conftest import Maker
from tests.doctor.examined import GOOD_BUILD, NOW_S

PI5 = frozenset("fp asimd aes fphp asimdhp asimddp".split())
PC = frozenset("fpu sse2 avx2 fma f16c avx512f avx512_vnni".split())
KEY = f"k1:{'a' * 64}\n"


# --- the build ----------------------------------------------------------------------------------------------------


def build(features: frozenset[str] = PI5, policy: str = "exact", **changes: object) -> dict[str, Finding]:
    facts: BuildFacts = replace(GOOD_BUILD, **changes)  # type: ignore[arg-type]
    return {found.check.removeprefix("build."): found for found in check_build(facts, features, policy)}


def test_a_good_build_is_fine() -> None:
    assert {found.status for found in build().values()} == {"ok"}


def test_a_build_for_another_cpu_is_told_apart_from_one_that_is_broken() -> None:
    def dead(status: int | None, error: str = "") -> dict[str, Finding]:
        return build(status=status, error=error, version=None, system_info="")

    illegal = dead(-signal.SIGILL)["llama_cpp"]
    assert (illegal.status, "another CPU" in illegal.found) == ("fail", True)
    missing = dead(1, "ModuleNotFoundError: No module named 'llama_cpp'")["llama_cpp"]
    assert (missing.status, "No module named" in missing.found) == ("fail", True)
    assert dead(-signal.SIGSEGV)["llama_cpp"].found.endswith("signal 11")
    late = dead(None, "no answer within 60 s")["llama_cpp"]
    assert (late.status, late.found) == ("unknown", "no answer within 60 s")
    assert "tiny_blas" not in dead(1), "nothing is said of what did not load"


def test_a_death_while_the_model_loads_counts_although_the_build_was_said() -> None:
    assert build(status=-signal.SIGILL)["llama_cpp"].status == "fail"


def test_another_version_than_the_program_was_made_for_is_noticed() -> None:
    assert build(version="0.3.20")["llama_cpp"].status == "warn"
    assert build(version="0.3.20", wanted_version=None)["llama_cpp"].status == "ok"


def test_tiny_blas_matters_to_exactness_only() -> None:
    info = GOOD_BUILD.system_info + " LLAMAFILE = 1 |"
    assert build(system_info=info)["tiny_blas"].status == "warn"
    assert build(policy="fast", system_info=info)["tiny_blas"].status == "ok"
    assert build(system_info=GOOD_BUILD.system_info + " LLAMAFILE = 0 |")["tiny_blas"].status == "ok"


@pytest.mark.parametrize(
    ("features", "system_info", "status", "words"),
    [
        (PI5, "CPU : NEON = 1 | ARM_FMA = 1 |", "warn", "without DOTPROD, FP16_VA"),
        (PI5, "CPU : NEON = 1 | DOTPROD = 1 | FP16_VA = 1 | SVE = 1 |", "fail", "with SVE"),
        (PI5, "CPU : NEON = 1 | DOTPROD = 1 | FP16_VA = 1 |", "ok", "DOTPROD, FP16_VA"),
        (PC, "CPU : AVX2 = 1 | FMA = 1 | F16C = 1 |", "ok", "not used: AVX512, AVX512_VNNI"),
        (PC, "CPU : SSE3 = 1 |", "warn", "without AVX2, FMA, F16C"),
        (PC - {"avx512f", "avx512_vnni"}, "CPU : AVX2 = 1 | FMA = 1 | F16C = 1 | AVX512 = 1 |", "fail", "with AVX512"),
    ],
)
def test_the_build_is_held_against_the_cpu(features: frozenset[str], system_info: str, status: str, words: str) -> None:
    found = build(features, system_info=system_info)["cpu_features"]
    assert found.status == status
    assert words in found.found


def test_python_of_32_bits_and_an_old_one_are_failures() -> None:
    assert build(pointer_bytes=4)["python"].status == "fail"
    assert build(python=(3, 10, 4))["python"].status == "fail"


def test_a_level_older_than_the_build_is_not_believed(tmp_path: Path) -> None:
    assert check_levels((), 5.0, "m", "exact").status == "warn"
    assert check_levels((), 5.0, "m", "fast").status == "ok"
    (tmp_path / "a.json").write_text('{"schema": 1, "level": "exact"}')
    (tmp_path / "b.json").write_text("[]")
    (tmp_path / "c.json").write_text("{")
    os.utime(tmp_path / "a.json", (100, 100))
    levels = read_levels(tmp_path)
    assert levels == (Level("exact", 100.0),)
    assert check_levels(levels, 99.0, "m", "exact").status == "ok"
    old = check_levels(levels, 101.0, "m", "exact")
    assert (old.status, old.commands) == ("unknown", ("edge-llm doctor --load",))


def test_what_a_loaded_model_would_publish_is_judged() -> None:
    assert check_published({"level": "exact", "reason": ""}, "m").status == "ok"
    assert check_published({"level": "unverified", "reason": "run it"}, "m").status == "warn"
    assert check_published({"problem": "does not fit"}, "m").status == "fail"


def test_this_very_build_answers_from_a_process_of_its_own() -> None:
    facts, published = ask_build({})
    assert (facts.status, facts.version, published) == (0, facts.wanted_version, {})
    assert "CPU" in facts.system_info


def test_a_model_that_cannot_be_loaded_is_said_in_words(tmp_path: Path, make_gguf: Maker) -> None:
    facts, published = ask_build({}, {"model": str(tmp_path / "missing.gguf")})
    assert facts.version is not None, "the build was said before"
    assert "missing.gguf" in published["problem"]


def test_questions_without_an_answer_are_none(tmp_path: Path) -> None:
    assert ask_program(["no-such-program-of-anybody"]) is None
    assert ask_program(["false"]) is None
    assert ask_program(["echo", "yes"]) == "yes\n"
    room = free_bytes(tmp_path / "not" / "there")
    assert room is not None
    assert room > 0
    clock = kernel_clock()
    assert clock is None or clock[1] >= 0


# --- settings and keys --------------------------------------------------------------------------------------------


def test_wrong_settings_are_said_as_their_reader_says_them(tmp_path: Path, tmp_cache: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("worker: {slots: 0}\ngateway: {port: 9000}\n")
    settings = read_settings(file, {"EDGE_LLM_UP_NONSENSE": "1"})
    (found,) = check_settings(settings)
    assert found.status == "fail"
    assert f"worker.slots in {file}" in found.found
    assert "EDGE_LLM_UP_NONSENSE" in found.found
    assert settings.gateway.port == 9000, "sections without fault are in force"


def test_a_settings_file_that_is_not_there_is_said_once(tmp_path: Path, tmp_cache: Path) -> None:
    (found,) = check_settings(read_settings(tmp_path / "none.yaml", {}))
    assert (found.status, found.found.count("none.yaml")) == ("fail", 1)


def test_no_settings_are_fine(tmp_cache: Path) -> None:
    (found,) = check_settings(read_settings(None, {}))
    assert (found.status, found.found) == ("ok", "no file; valid")


def settings_with(**files: Path) -> Mapping[str, str]:
    return {f"EDGE_LLM_{name.upper()}": str(path) for name, path in files.items()}


def key_file(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def keys_of(environ: Mapping[str, str]) -> list[Finding]:
    return check_keys(read_keys(read_settings(None, environ), NOW_S))


@pytest.mark.parametrize(
    ("mode", "status", "command"), [(0o600, "ok", ""), (0o640, "warn", "chmod 600"), (0o644, "fail", "chmod 600")]
)
def test_a_cluster_key_is_for_its_owner(tmp_path: Path, tmp_cache: Path, mode: int, status: str, command: str) -> None:
    path = key_file(tmp_path / "cluster.key", KEY, mode)
    (found,) = keys_of(settings_with(worker_key_file=path, gateway_key_file=path))
    assert found.status == status
    assert " ".join(found.commands).startswith(command)
    assert "aaaa" not in f"{found}", "the key is never shown"


def test_a_key_file_that_is_missing_or_no_key_is_a_failure(tmp_path: Path, tmp_cache: Path) -> None:
    (missing,) = keys_of(settings_with(worker_key_file=tmp_path / "none"))
    assert (missing.status, missing.commands[0].startswith("edge-llm serve key > ")) == ("fail", True)
    (wrong,) = keys_of(settings_with(worker_key_file=key_file(tmp_path / "key", "not a key\n")))
    assert wrong.status == "fail"


def api_keys(path: Path, expires: str) -> Path:
    return key_file(path, f'- {{id: alice, sha256: "{"a" * 64}", expires: {expires}}}\n')


@pytest.mark.parametrize(
    ("expires", "status"), [("2027-01-14", "warn"), ("2027-01-20", "warn"), ("2027-03-01", "ok")]
)  # NOW_S is 2027-01-15
def test_api_keys_are_told_before_their_end(tmp_path: Path, tmp_cache: Path, expires: str, status: str) -> None:
    (found,) = keys_of(settings_with(gateway_api_keys_file=api_keys(tmp_path / "keys.yaml", expires)))
    assert (found.check, found.status) == ("keys.api", status)


def test_no_keys_are_fine_for_a_board_alone(tmp_cache: Path) -> None:
    (found,) = keys_of({})
    assert found.status == "ok"


def test_a_gateway_that_would_not_open_is_noticed_in_its_own_words(tmp_path: Path, tmp_cache: Path) -> None:
    workers = {"EDGE_LLM_GATEWAY_WORKERS_FILE": str(tmp_path / "workers.yaml")}
    assert check_gateway(read_settings(None, {})) == []
    open_to_all = {**workers, "EDGE_LLM_GATEWAY_HOST": "10.0.0.10"}
    (found,) = check_gateway(read_settings(None, open_to_all))
    assert (found.status, "API keys are needed" in found.found) == ("fail", True)
    (keyless,) = check_gateway(read_settings(None, {**workers, "EDGE_LLM_GATEWAY_NO_AUTH": "1"}))
    assert (keyless.status, "no cluster key" in keyless.found) == ("fail", True)
    key = {"EDGE_LLM_GATEWAY_KEY_FILE": str(key_file(tmp_path / "key", KEY))}
    (good,) = check_gateway(read_settings(None, {**workers, **key, "EDGE_LLM_GATEWAY_NO_AUTH": "1"}))
    assert good.status == "ok"


def test_folders_of_somebody_else_are_noticed() -> None:
    assert check_folders([FolderFacts("cache", "/a", True)]).status == "ok"
    found = check_folders([FolderFacts("cache", "/a", True), FolderFacts("state", "/b", False)])
    assert (found.status, found.commands) == ("warn", ("sudo chown -R $USER /b",))


# --- the model ----------------------------------------------------------------------------------------------------


@pytest.fixture
def catalogue(tmp_path: Path, tmp_cache: Path, make_gguf: Maker, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One model of a catalogue of its own; returns where it is installed."""
    source = make_gguf()
    models = tmp_path / "models"
    models.mkdir()
    manifest = tmp_path / "models.yaml"
    size, digest = source.stat().st_size, sha256_of(source)
    manifest.write_text(
        f"models:\n  tiny:\n    file: tiny.gguf\n    size: {size}\n    sha256: {digest}\n"
        f"    sources: [{{file: {source}}}]\n"
    )
    monkeypatch.setenv("EDGE_LLM_CATALOGUE_MODELS_FILE", str(manifest))
    monkeypatch.setenv("EDGE_LLM_CATALOGUE_MODELS_DIR", str(models))
    return models / "tiny.gguf"


def test_a_model_is_followed_from_missing_to_verified(catalogue: Path, make_gguf: Maker) -> None:
    def status() -> tuple[str, str]:
        facts = read_model("tiny")
        return facts.state, check_model(facts).status

    missing = read_model("tiny")
    assert status() == ("not fetched", "warn")
    catalogue.write_bytes(make_gguf("copy.gguf").read_bytes())
    assert missing.needs_bytes == catalogue.stat().st_size
    assert status() == ("not verified", "warn"), "nobody has hashed it, and the doctor does not take that time"
    remember_sha256(catalogue, sha256_of(catalogue))
    assert status() == ("verified", "ok")
    remember_sha256(catalogue, "0" * 64)
    assert status() == ("wrong hash", "fail")
    catalogue.write_bytes(b"GGUF")
    assert status() == ("wrong size", "fail")


def test_a_name_nobody_knows_and_a_path_without_a_file_are_failures(catalogue: Path, tmp_path: Path) -> None:
    assert check_model(read_model("tinny")).status == "fail"
    assert "did you mean tiny" in read_model("tinny").problem
    gone = check_model(read_model(str(tmp_path / "gone.gguf")))
    assert (gone.status, "gone.gguf" in gone.found) == ("fail", True)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    assert check_model(read_model(str(tmp_path / "bad.gguf"))).status == "fail"


def test_a_model_with_recurrent_state_runs_unsplit(make_gguf: Maker, tmp_cache: Path) -> None:
    facts = read_model(str(make_gguf("mamba.gguf", "mamba")))
    assert check_card(facts).status == "warn"
    assert check_card(read_model(str(make_gguf()))).status == "ok"


MIB = 1 << 20


def test_memory_is_the_workers_own_sum(make_gguf: Maker, tmp_cache: Path) -> None:
    card = read_model(str(make_gguf())).card
    assert card is not None

    def status(role: str, free_bytes: int, most_bytes: int | None = None, limit_bytes: int = 0) -> str:
        settings = {"role": role, "memory_limit_bytes": limit_bytes, "spare_slots": 8, "prefix_cache_bytes": 0}
        config = WorkerConfig.model_validate({**settings, "n_ctx": 65_536})
        return check_memory(read_memory(card, config, "aarch64", free_bytes, most_bytes), config).status

    facts = read_memory(
        card, WorkerConfig(role="prefill", n_ctx=65_536, spare_slots=8, prefix_cache_bytes=0), "aarch64", 0, 0
    )
    assert facts.own_bytes + 64 * MIB < facts.whole_bytes, "what it keeps for decoding takes memory"
    between = (facts.own_bytes + facts.whole_bytes) // 2
    assert status("prefill", facts.whole_bytes) == "ok"
    assert status("prefill", between) == "warn"
    assert status("prefill", facts.own_bytes - 1) == "fail"
    assert status("prefill", facts.own_bytes - 1, most_bytes=4 * facts.own_bytes) == "warn", "other programs have it"
    assert status("prefill", 1 << 40, limit_bytes=facts.own_bytes - 1) == "fail", "a limit is a limit"


def test_more_threads_than_cores_are_noticed() -> None:
    assert check_threads(WorkerConfig(threads=8), 4, is_pi5=True).status == "warn"
    advised = check_threads(WorkerConfig(), 4, is_pi5=True)
    assert (advised.status, "30069" in advised.found) == ("ok", True)
    assert "30069" not in check_threads(WorkerConfig(threads=2), 4, is_pi5=True).found
    assert "30069" not in check_threads(WorkerConfig(), 4, is_pi5=False).found


# --- neighbours ---------------------------------------------------------------------------------------------------


@contextmanager
def health(ahead_s: float | None, status: int = 200, body: bytes = b'{"status":"ok"}') -> Iterator[int]:
    """A server that says it is well, with a clock of its own; returns its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(status)
            if ahead_s is not None:
                self.send_header("date", formatdate(time.time() + ahead_s, usegmt=True))
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 64  # all neighbours ask at once

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


def neighbour(port: int, now: Callable[[], float] = time.time) -> Finding:
    (found,) = check_peers(ask_peers([Place("pi-b", f"127.0.0.1:{port}")], now))
    return found


@pytest.mark.parametrize(
    ("ahead_s", "status", "words"),
    [
        (0.0, "ok", "answers"),
        (12.0, "warn", "ahead of"),
        (-12.0, "warn", "behind"),
        (600.0, "fail", "ahead of"),
        (-40.0, "fail", "behind"),
    ],
)
def test_a_neighbours_clock_is_read_from_its_answer(ahead_s: float, status: str, words: str) -> None:
    with health(ahead_s) as port:
        found = neighbour(port)
    assert (found.check, found.status) == ("peers.pi-b", status)
    assert words in found.found


def test_a_neighbour_that_is_away_or_somebody_else_is_a_warning() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        away = neighbour(closed.getsockname()[1])
    assert (away.status, "does not answer" in away.found) == ("warn", True)
    with health(0.0, status=404) as port:
        assert "404" in neighbour(port).found
    with health(None) as port:
        assert neighbour(port).status == "unknown"


def test_neighbours_are_asked_together_and_told_in_order() -> None:
    with health(0.0) as port:
        places = [Place(f"pi-{number}", f"127.0.0.1:{port}") for number in range(20)]
        peers = ask_peers(places, time.time)
    assert [peer.name for peer in peers] == [place.worker for place in places]
    assert not [peer for peer in peers if peer.error]
    assert ask_peers([], time.time) == []


def test_an_address_of_ipv6_is_asked_too() -> None:
    (peer,) = ask_peers([Place("six", "[::1]:9")], time.time)
    assert isinstance(peer, Peer)
    assert peer.error


def test_a_port_of_ours_is_told_from_a_strangers() -> None:
    with health(0.0) as port:
        assert answers_here(port)
    with health(0.0, body=b"<html>hello</html>") as port:
        assert not answers_here(port)
    assert not answers_here(9)
