"""What all tests share: the real model, and folders of one's own."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from edge_llm.catalogue.resolve import resolve
from edge_llm.config import DEFAULT_MODEL

# A busy machine is no failure: how long an example takes says nothing about what it shows.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# A script that runs `make test &` has Ctrl-C ignored in all that it starts; the programs under test must hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The default model, fetched and verified by the catalogue when it is not there."""
    return resolve(DEFAULT_MODEL).path


@pytest.fixture
def tmp_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache, configuration, state and data folders of this test alone; returns the cache folder."""
    for variable in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return tmp_path / "XDG_CACHE_HOME" / "edge-llm"
