"""`--slo ttft=2.5,tpot=0.1`: both limits in one option, of `up` and of `serve gateway`."""

from __future__ import annotations

import click
import pytest

from edge_llm.commands.serve import SloOption
from edge_llm.commands.up import slo_arguments
from edge_llm.config import GatewayConfig, load_settings
from edge_llm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("ttft=2.5,tpot=0.1", (2.5, 0.1)),
        ("tpot=0.1, ttft=2.5", (2.5, 0.1)),
        ("ttft=2", (2.0, None)),
        ("tpot=0.05", (None, 0.05)),
    ],
)
def test_either_or_both_limits_become_settings_and_reach_the_gateway_of_a_local_cluster(
    text: str, limits: tuple[float | None, float | None]
) -> None:
    given = SloOption().convert(text, None, None)
    settings = load_settings(GatewayConfig, given, None, {})
    assert (settings.slo_ttft_s, settings.slo_tpot_s) == limits
    option, passed_on = slo_arguments(given)
    assert option == "--slo"
    assert SloOption().convert(passed_on, None, None) == given


def test_no_limits_are_no_option() -> None:
    assert slo_arguments(None) == ()


@pytest.mark.parametrize("text", ["", "2.5", "ttft", "ttft=", "ttft=fast", "latency=1", "ttft=1,ttft=2", "ttft=1,"])
def test_what_is_no_limit_is_refused_in_words(text: str) -> None:
    with pytest.raises(click.BadParameter, match="seconds"):
        SloOption().convert(text, None, None)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_limit_is_more_than_nothing_and_finite(seconds: str) -> None:
    with pytest.raises(click.BadParameter, match="more than 0 s"):
        SloOption().convert(f"ttft={seconds}", None, None)
    with pytest.raises(ConfigError, match="slo_tpot_s"):
        load_settings(GatewayConfig, {}, None, {"EDGE_LLM_GATEWAY_SLO_TPOT_S": seconds})
