"""Every format of the allow-list and every layout of a model, bit for bit, on models made here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_llm.engine.llama import LlamaBackend
from edge_llm.engine.verify import Verifier

LoadBackend = Callable[..., LlamaBackend]
EVERY_ROW = {"batch", "chunks", "placement", "split", "threads", "resumed"}


@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "IQ4_NL"])
def test_a_format_of_the_allow_list_is_exact(backend_of: LoadBackend, quantization: str) -> None:
    backend = backend_of(quantization=quantization, n_ctx=1024, slots=8)
    report = Verifier(backend, (0, 70, 600), threads=(1, 2)).run()
    assert report.level == "exact", report.reason
    assert {row.name for row in report.rows} == EVERY_ROW


@pytest.mark.parametrize("shape", ["sliding-window", "wide-kv", "head-size-256", "mqa", "moe"])
def test_a_layout_splits_exactly(backend_of: LoadBackend, shape: str) -> None:
    backend = backend_of(shape)
    assert backend.facts.splits, backend.facts.split_reason
    report = Verifier(backend, (0, 40, 200), steps=24, threads=(1, 2)).run()
    assert report.level == "exact", report.reason
    assert {row.name for row in report.rows} == EVERY_ROW


def test_wide_kv_has_the_row_size_of_phi_3_mini(backend_of: LoadBackend) -> None:
    assert backend_of("wide-kv").facts.kv_bytes_per_token == 384 << 10


def test_chunks_of_a_sliding_window_model_are_no_wider_than_its_window(backend_of: LoadBackend) -> None:
    assert backend_of("sliding-window", chunk_tokens=256).facts.chunk_tokens == 96


def test_recurrent_state_is_refused_with_its_reason_and_runs_unsplit_exactly(backend_of: LoadBackend) -> None:
    backend = backend_of("recurrent")
    assert not backend.facts.splits
    assert not backend.facts.serves_prompts
    assert "recurrent" in backend.facts.split_reason
    report = Verifier(backend, (0, 40), steps=24, threads=(1, 2)).run()
    assert report.level == "exact", report.reason
    assert {row.name for row in report.rows} == EVERY_ROW - {"split"}
    assert "not split" in report.reason


def test_policy_fast_with_k_quants_is_not_exact_and_says_so(backend_of: LoadBackend) -> None:
    # in a process of its own: llama.cpp reads the switch of its tiled kernels once
    command = [
        sys.executable,
        "-m",
        "edge_llm",
        "verify",
        "--random",
        "Q4_K_M",
        "--policy",
        "fast",
        "--quick",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    found = json.loads(done.stdout)
    assert found["level"] == "same-plan", done.stderr
    assert "policy fast" in found["reason"]
    assert done.returncode == 0


def test_a_process_that_cannot_requantize_says_why_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edge_llm.engine.quantize", "absent.gguf", str(tmp_path / "out.gguf"), "Q9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("unknown quantization 'Q9': known are")
    assert len(done.stderr.splitlines()) == 1
