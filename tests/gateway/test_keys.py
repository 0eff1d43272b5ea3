"""Who may use the endpoint: the keys file, comparing, reading it again, and every route with every credential."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest
from click.testing import CliRunner
from starlette.routing import Route
from structlog.testing import capture_logs

from edge_llm.commands.serve import serve
from edge_llm.config import GatewayConfig
from edge_llm.errors import ConfigError, ExpiredApiKey, InvalidApiKey
from edge_llm.gateway.edge import PUBLIC
from edge_llm.gateway.keys import MAX_KEY_CHARS, KeysFile, NoKeys, identify, new_key, parse_keys
from edge_llm.gateway.serve import credentials_of
from tests.gateway.conftest import CHAT, COMPLETIONS, HELLO, Service, asking, serving
from tests.loopback import prompt_of, running_cluster, settings_of

NOW_S: Final = datetime(2026, 6, 15, 12, tzinfo=UTC).timestamp()
DAY_S: Final = 86_400.0


def line_of(name: str, secret: str, **more: Any) -> str:
    """An entry of the file, as JSON, which is YAML too."""
    return "- " + json.dumps({"id": name, "sha256": hashlib.sha256(secret.encode()).hexdigest(), **more}) + "\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "api-keys.yaml"
    path.write_text(line_of("alice", "a"))
    path.chmod(0o600)
    return path


# -- the file


def test_an_entry_says_whose_key_it_is_and_what_it_may() -> None:
    text = f"""
    - id: alice
      sha256: {hashlib.sha256(b"a").hexdigest()}
      tenant: family
      requests_per_minute: 60
      tokens_per_minute: 4000
      max_streams: 2
      models: [m1, m2]
      expires: 2030-01-31
    """
    (key,) = parse_keys(text, "file")
    assert (key.id, key.tenant, key.sha256) == ("alice", "family", hashlib.sha256(b"a").digest())
    assert (key.requests_per_minute, key.tokens_per_minute, key.max_streams) == (60, 4000, 2)
    assert (key.may_use("m1"), key.may_use("m3")) == (True, False)
    assert key.expires_s == datetime(2030, 2, 1, tzinfo=UTC).timestamp()


def test_json_is_read_too_and_what_is_left_out_is_no_limit() -> None:
    (key,) = parse_keys(json.dumps([{"id": "a", "sha256": "0" * 64, "expires": "2030-01-31T12:00:00+01:00"}]), "file")
    assert (key.tenant, key.models, key.max_streams) == ("a", None, None)
    assert key.expires_s == datetime(2030, 1, 31, 11, tzinfo=UTC).timestamp()


def test_the_last_day_of_all_is_never() -> None:
    (key,) = parse_keys(line_of("a", "x", expires="9999-12-31"), "file")
    assert key.expires_s is None
    assert key.may_use("anything")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "valid list"),
        ("[]", "no key; `edge-llm serve api-key"),
        ("{id: a}", "valid list"),
        ("- {id: a}", "0.sha256: Field required"),
        ("- {id: a, sha256: abc}", "0.sha256"),
        ("- {id: 'a b', sha256: " + "0" * 64 + "}", "0.id"),
        (line_of("a", "x", tenat="b"), "0.tenat"),
        (line_of("a", "x", max_streams=0), "0.max_streams"),
        (line_of("a", "x", max_streams=1.5), "0.max_streams"),
        (line_of("a", "x", models=[]), "0.models"),
        (line_of("a", "x", expires="soon"), "0.expires"),
        (line_of("a", "x", expires=20300131), "0.expires"),
        (line_of("a", "x", expires="2030-01-31T12:00:00"), "has no zone"),
        (line_of("a", "x") + line_of("a", "y"), "same id twice"),
        (line_of("a", "x") + line_of("b", "x"), "same sha256 twice"),
        ("- {id: a, id: b, sha256: x}", "not YAML"),
        ("- !!python/object:os.system {}", "not YAML"),
        ("[" * 5000, "not YAML"),
    ],
)
def test_a_bad_file_is_refused_with_its_place_and_without_its_hashes(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keys(text, "keys.yaml")
    assert caught.value.message.startswith("keys.yaml")
    assert says in caught.value.message
    assert not re.search(r"[0-9a-f]{16}", caught.value.message)


def test_a_new_key_is_known_by_the_line_that_comes_with_it() -> None:
    secret, line = new_key("alice", "family")
    keys = parse_keys(line, "file")
    key = identify(keys, secret, NOW_S)
    assert (key.id, key.tenant) == ("alice", "family")
    assert secret not in line
    assert secret != new_key("alice", "family")[0]
    for name, tenant in (("", "t"), ("a b", "t"), ("a", "../t"), ("a" * 65, "t")):
        with pytest.raises(ConfigError, match="is not a name"):
            new_key(name, tenant)


def test_an_operators_key_is_made_by_the_command_and_no_other_key_is_one() -> None:
    for more, is_operator in (["--operator"], True), ([], False):
        made = CliRunner().invoke(serve, ["api-key", "--name", "alice", *more])
        (key,) = parse_keys(made.stdout, "file")
        assert key.is_operator is is_operator


def test_the_command_shows_a_key_once_and_gives_the_line_alone_to_the_file() -> None:
    result = CliRunner().invoke(serve, ["api-key", "--name", "alice"])
    assert result.exit_code == 0
    (secret,) = re.findall(r"sk-edge-[A-Za-z0-9_-]{43}", result.stderr)
    assert identify(parse_keys(result.stdout, "file"), secret, NOW_S).id == "alice"
    assert secret not in result.stdout


# -- comparing


def test_whoever_matches_is_found_wherever_it_is_in_the_file() -> None:
    keys = parse_keys("".join(line_of(name, f"secret {name}") for name in "abc"), "file")
    assert [identify(keys, f"secret {name}", NOW_S).id for name in "abc"] == ["a", "b", "c"]


@pytest.mark.parametrize("credential", ["", "wrong", "secret", "secret \ud800", "s" * (MAX_KEY_CHARS + 1)])
def test_no_key_and_a_wrong_one_are_refused_with_the_same_words(credential: str) -> None:
    keys = parse_keys(line_of("a", "secret a"), "file")
    with pytest.raises(InvalidApiKey, match="needs an API key"):
        identify(keys, credential, NOW_S)


def test_a_key_that_is_longer_than_any_is_refused_even_when_its_hash_is_listed() -> None:
    long = "s" * (MAX_KEY_CHARS + 1)
    with pytest.raises(InvalidApiKey):
        identify(parse_keys(line_of("a", long), "file"), long, NOW_S)


def test_a_key_ends_when_its_time_is_over() -> None:
    day = datetime.fromtimestamp(NOW_S, UTC).date()
    keys = parse_keys(line_of("a", "a", expires=day.isoformat()), "file")
    midnight_s = datetime(2026, 6, 16, tzinfo=UTC).timestamp()
    assert identify(keys, "a", midnight_s - 1).id == "a"
    with pytest.raises(ExpiredApiKey, match="key a has expired"):
        identify(keys, "a", midnight_s)


# -- reading again


def test_a_changed_file_counts_from_the_next_request_on(file: Path) -> None:
    keys = KeysFile(file)
    assert keys.identify("a", NOW_S).id == "alice"
    file.write_text(line_of("bobby", "b"))
    assert keys.identify("b", NOW_S).id == "bobby"
    with pytest.raises(InvalidApiKey):
        keys.identify("a", NOW_S)


def test_a_file_that_turns_bad_leaves_the_last_good_keys_and_says_so_once(file: Path) -> None:
    keys = KeysFile(file)
    good = file.read_text()
    for spoil in (lambda: file.write_text("- {"), lambda: file.chmod(0o644), file.unlink):
        spoil()
        with capture_logs() as logs:
            for _ in range(3):
                assert keys.identify("a", NOW_S).id == "alice"
        assert [entry["log_level"] for entry in logs] == ["error"]
    file.write_text(good + line_of("bob", "b"))
    file.chmod(0o600)
    assert keys.identify("b", NOW_S).id == "bob"


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_changed_file_that_cannot_be_opened_for_a_moment_counts_as_soon_as_it_can(file: Path) -> None:
    keys = KeysFile(file)
    file.write_text(line_of("bobby", "b"))
    with no_descriptor_left():
        assert keys.identify("a", NOW_S).id == "alice"
    assert keys.identify("b", NOW_S).id == "bobby"
    with pytest.raises(InvalidApiKey):
        keys.identify("a", NOW_S)


def test_a_board_whose_clock_is_behind_its_keys_file_does_not_bring_back_keys_that_have_ended(file: Path) -> None:
    file.write_text(line_of("alice", "a", expires="2026-01-01"))
    os.utime(file, (NOW_S, NOW_S))
    with pytest.raises(ExpiredApiKey):
        KeysFile(file).identify("a", 0.0)


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o601])
def test_a_file_for_everybody_is_refused_at_the_start(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        KeysFile(file)


def test_a_file_that_is_not_there_or_no_text_is_refused_at_the_start(file: Path) -> None:
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        KeysFile(file)
    file.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        KeysFile(file)


# -- starting


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "example.org"])
def test_without_keys_nothing_but_loopback_is_served_whatever_the_flag_says(host: str) -> None:
    for no_auth in (False, True):
        with pytest.raises(ConfigError, match=r"--api-keys-file api-keys\.yaml"):
            credentials_of(GatewayConfig(host=host, no_auth=no_auth))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_on_loopback_keys_may_be_left_out_but_only_by_saying_so(host: str) -> None:
    with pytest.raises(ConfigError, match="--no-auth"):
        credentials_of(GatewayConfig(host=host))
    assert isinstance(credentials_of(GatewayConfig(host=host, no_auth=True)), NoKeys)


def test_a_keys_file_is_used_anywhere_and_not_together_with_no_auth(file: Path) -> None:
    config = GatewayConfig(host="0.0.0.0", api_keys_file=file)
    assert credentials_of(config).identify("a", NOW_S).id == "alice"
    with pytest.raises(ConfigError, match="exclude each other"):
        credentials_of(GatewayConfig(api_keys_file=file, no_auth=True))


# -- every route with every credential

MATRIX: Final = (
    line_of("right", "right")
    + line_of("expired", "expired", expires="2020-01-01")
    + line_of("other", "other model", models=["another"])
)
TENANTS: Final = (
    line_of("alice", "a", tenant="family")
    + line_of("bob", "b", tenant="family")
    + line_of("carol", "c")
    + line_of("root", "r", operator=True)
)
CREDENTIALS: Final[dict[str, dict[str, str]]] = {
    "none": {},
    "empty": {"authorization": "Bearer "},
    "basic": {"authorization": "Basic cmlnaHQ6"},
    "wrong": {"authorization": "Bearer wrong"},
    "hash": {"authorization": f"Bearer {hashlib.sha256(b'right').hexdigest()}"},
    "expired": {"authorization": "Bearer expired"},
    "other model": {"authorization": "Bearer other model"},
    "right": {"authorization": "Bearer right"},
    "right as x-api-key": {"x-api-key": "right"},
}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def guarded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    file.write_text(MATRIX)
    file.chmod(0o600)
    async with running_cluster() as cluster, serving(cluster, KeysFile(file)) as service:
        await service.start("mixed", "m1")
        yield service


def expected(path: str, method: str, who: str) -> tuple[set[int], str | None]:
    """Status codes and the error's code."""
    if path in PUBLIC or path == "/metrics":
        return {200}, None
    if who == "expired":
        return {401}, "expired_api_key"
    if not who.startswith(("right", "other")):
        return {401}, "invalid_api_key"
    if path.startswith("/cluster/"):
        return {403}, "forbidden"  # nobody here is an operator
    if who == "other model" and method == "POST":
        return {403}, "model_not_allowed"
    if who == "other model" and path == "/v1/models/simulated":
        return {404}, "model_not_found"
    return {200}, None


@pytest.mark.anyio
@pytest.mark.parametrize("who", CREDENTIALS)
async def test_every_route_asks_every_credential(guarded: Service, who: str) -> None:
    routes = [route for route in guarded.app.routes if isinstance(route, Route)]
    assert len(routes) == len(guarded.app.routes) >= 8, "a route of another kind is not covered here"
    for route in routes:
        path = route.path.replace("{model:path}", "simulated")
        body = {**HELLO, "prompt": "hello", "max_tokens": 1, "model": "simulated"}
        for method in sorted(route.methods or ()):
            sent = body if method == "POST" else None
            async with guarded.client.request(method, path, headers=CREDENTIALS[who], json=sent) as reply:
                statuses, code = expected(path, method, who)
                text = await reply.text()
                assert reply.status in statuses, (method, path, text)
                if code is not None and method != "HEAD":  # which has no body
                    assert json.loads(text)["error"]["code"] == code
                if reply.status == 401:
                    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/", "/v1/nothing", "/docs", "/openapi.json", "/healthz/", "/V1/models"])
async def test_what_is_no_route_needs_a_key_like_any(guarded: Service, path: str) -> None:
    async with guarded.client.get(path) as reply:
        assert reply.status == 401
    async with guarded.client.get(path, headers=CREDENTIALS["right"], allow_redirects=False) as reply:
        assert reply.status in (404, 307)


@pytest.mark.anyio
async def test_a_key_sees_only_the_models_it_may_use(guarded: Service) -> None:
    async with guarded.client.get("/v1/models", headers=CREDENTIALS["other model"]) as reply:
        assert (await reply.json())["data"] == []
    body = {"prompt": prompt_of(4), "max_tokens": 1}
    refused = await guarded.post(COMPLETIONS, body, CREDENTIALS["other model"])
    assert (refused.status, refused.error["code"], refused.error["type"]) == (
        403,
        "model_not_allowed",
        "permission_error",
    )


@pytest.mark.anyio
async def test_figures_are_for_this_machine_and_for_keys_and_a_proxy_here_speaks_for_others(guarded: Service) -> None:
    added = {
        "x-forwarded-for": "203.0.113.7",
        "X-Forwarded-Proto": "https",
        "forwarded": "for=203.0.113.7",
        "x-real-ip": "203.0.113.7",
        "Via": "1.1 proxy",
    }
    for name, value in added.items():
        headers = {name: value}
        async with guarded.client.get("/metrics", headers=headers) as reply:
            assert reply.status == 401
        async with guarded.client.get("/metrics", headers=headers | CREDENTIALS["right"]) as reply:
            assert reply.status == 200


@pytest.mark.anyio
async def test_figures_that_were_opened_are_for_everybody_and_nothing_else_is(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(MATRIX)
    file.chmod(0o600)
    elsewhere = {"x-forwarded-for": "203.0.113.7"}
    async with running_cluster() as cluster, serving(cluster, KeysFile(file), open_metrics=True) as service:
        async with service.client.get("/metrics", headers=elsewhere) as reply:
            assert reply.status == 200
        async with service.client.get("/v1/models", headers=elsewhere) as reply:
            assert reply.status == 401


@pytest.mark.anyio
async def test_a_key_sees_decisions_on_its_tenants_requests_and_only_an_operators_all(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(TENANTS)
    file.chmod(0o600)
    async with running_cluster() as cluster, serving(cluster, KeysFile(file)) as service:
        await service.start("mixed", "m1")
        for who in "abc":
            body = asking(prompt_of(4), max_tokens=1)
            reply = await service.post(COMPLETIONS, body, {"x-api-key": who, "x-request-id": f"of-{who}"})
            assert reply.status == 200
        seen: dict[str, list[str]] = {}
        for who in "abcr":
            async with service.client.get("/cluster", headers={"x-api-key": who}) as answer:
                view = await answer.json()
            seen[who] = [decision["request_id"].split(".")[0] for decision in view["decisions"]]
            assert [node["worker"] for node in view["nodes"]] == ["m1"]
    assert seen == {"a": ["of-b", "of-a"], "b": ["of-b", "of-a"], "c": ["of-c"], "r": ["of-c", "of-b", "of-a"]}


@pytest.mark.anyio
async def test_of_what_other_tenants_have_running_a_key_sees_sums_only(tmp_path: Path) -> None:
    """With limits of latency the gateway knows every stream by itself: its depth, its tokens, its limit."""
    file = tmp_path / "keys.yaml"
    file.write_text(TENANTS)
    file.chmod(0o600)
    slow = replace(settings_of("mixed"), decode_run_s=0.005)
    limited = asking(prompt_of(4), max_tokens=400) | {"edge_llm": {"slo": {"ttft_s": 9.0, "tpot_s": 9.0}}}
    async with running_cluster() as cluster, serving(cluster, KeysFile(file)) as service:
        await service.start("mixed", "m1", slow)
        async with service.streaming(COMPLETIONS, limited, {"x-api-key": "a"}) as streamed:
            await streamed.heard(lambda streamed: len(streamed.chunks) >= 3)
            async with service.client.get("/cluster", headers={"x-api-key": "c"}) as answer:
                view = await answer.json()
    (node,) = view["nodes"]
    assert node["booked"] == {"sequences": 1, "decoding": 1, "prompts": 0, "served": 0, "pending_tokens": 0}


@pytest.mark.anyio
async def test_logs_name_keys_by_id_and_hold_neither_keys_nor_text(guarded: Service) -> None:
    secret_text = "the treasure is under the old oak"
    with capture_logs() as logs:
        chat = {"messages": [{"role": "user", "content": secret_text}], "max_tokens": 4}
        assert (await guarded.post(CHAT, chat, CREDENTIALS["right"])).status == 200
        await guarded.post(CHAT, chat, CREDENTIALS["wrong"])
        await guarded.post(CHAT, chat, CREDENTIALS["other model"])
        await guarded.post(COMPLETIONS, {"prompt": secret_text, "max_tokens": 10**6}, CREDENTIALS["right"])
        await guarded.post(COMPLETIONS, {"prompt": [secret_text, secret_text]}, CREDENTIALS["right"])
        await guarded.post(COMPLETIONS, {"prompt": secret_text, "temperature": secret_text}, CREDENTIALS["right"])
        streamed = asking(prompt_of(9)) | {"prompt": secret_text, "stream": True}
        answer = await guarded.post_text(COMPLETIONS, streamed, CREDENTIALS["right"])
    assert answer.endswith("[DONE]\n\n")
    written = json.dumps(logs, default=repr)
    assert any(entry.get("key") == "right" for entry in logs), "the log says whose request it was"
    assert {entry["code"] for entry in logs if entry["event"] == "refused"} >= {"invalid_api_key"}
    for word in ("treasure", "oak", "Bearer", "wrong"):
        assert word not in written
    for number in prompt_of(1):
        assert f"[{number}," not in written


def test_the_file_is_not_readable_through_another_users_umask(tmp_path: Path) -> None:
    """What the shell makes of `>> api-keys.yaml` is refused until it was closed: the message says how."""
    path = tmp_path / "made.yaml"
    before = os.umask(0o022)
    try:
        path.write_text(line_of("a", "a"))
    finally:
        os.umask(before)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}"):
        KeysFile(path)
