"""What a model's chat template makes of roles and switches."""

from __future__ import annotations

from typing import cast

import pytest

from edge_llm.engine.native import NativeModel
from edge_llm.engine.vocabulary import LlamaVocabulary
from edge_llm.errors import InvalidRequest

# As Qwen's: roles that it does not know are left out.
TEMPLATE = (
    "{% for m in messages %}{% if m.role in ['system', 'user'] %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}[no thinking]{% endif %}"
)
SAID = [{"role": "developer", "content": "In verse."}, {"role": "user", "content": "Hello!"}]


class Model:
    """Nothing but a template."""

    def __init__(self, template: str | None) -> None:
        self._template = template

    def metadata(self, key: str) -> str | None:
        return self._template if key == "tokenizer.chat_template" else None


class Templated(LlamaVocabulary):
    def __init__(self, template: str | None) -> None:
        super().__init__(cast("NativeModel", Model(template)))

    def _text_of(self, which: str) -> str:
        return f"<{which}>"


def test_what_a_developer_says_is_the_systems_where_the_template_does_not_know_developers() -> None:
    assert Templated(TEMPLATE).render_chat(SAID) == "[system]In verse.[user]Hello!"


def test_a_template_that_knows_developers_is_told_of_them() -> None:
    template = "{% for m in messages %}{% if m.role == 'developer' %}[dev]{% endif %}{{ m.content }}{% endfor %}"
    assert Templated(template).render_chat(SAID) == "[dev]In verse.Hello!"


def test_a_template_is_told_its_switches_and_passes_over_others() -> None:
    said = [{"role": "user", "content": "Hello!"}]
    assert Templated(TEMPLATE).render_chat(said, {"enable_thinking": False}) == "[user]Hello![no thinking]"
    assert Templated(TEMPLATE).render_chat(said, {"enable_thinking": True, "unknown": 5}) == "[user]Hello!"


@pytest.mark.parametrize("name", ["messages", "bos_token", "add_generation_prompt", "strftime_now"])
def test_what_a_template_is_given_anyway_cannot_be_replaced(name: str) -> None:
    with pytest.raises(InvalidRequest, match="refuses"):
        Templated(TEMPLATE).render_chat(SAID, {name: "x"})


def test_a_model_without_a_template_says_what_to_use_instead() -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        Templated(None).render_chat(SAID)
