# SPDX-License-Identifier: Apache-2.0
"""Templates render as in transformers, in a process that a hostile one cannot leave or hold up."""

import datetime
import threading
import time

import pytest

from opsd_jax.data import chat_template
from opsd_jax.data.chat_template import render_template
from opsd_jax.errors import UserError
from tests.data.test_tokenizer import TEMPLATES, byte_tokenizer

NOW = datetime.datetime(2025, 3, 4, 5, 6)
ASK = [{"role": "user", "content": " What is 2+2?\n"}]


@pytest.fixture
def limits(monkeypatch):
    """Small ones, in a child of this test's own: the memory limit is the child's for life."""
    child = chat_template._Child()
    monkeypatch.setattr(chat_template, "_child", child)
    monkeypatch.setattr(chat_template, "TIME_LIMIT_S", 2.0)
    yield
    child.close()


FEATURES = {
    "json": "{{ messages | tojson }}{{ {'b': 1, 'a': 'é<'} | tojson(indent=2) }}",
    "loops": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% endfor %}x",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}",
    "strings": "{{ messages[0]['content'].strip().split('?')[0] | upper }}{{ 'a' 'b' }}",
    "defaults": "{{ bos_token }}{{ tools is none }}{{ documents }}{{ unknown | default('d') }}",
    "macro": "{%- macro say(x) -%}[{{ x }}]{%- endmacro -%}{{ say(messages[0].role) }}\n",
    "dict": "{{ dict(a=1).items() | list }}",
}  # fmt: skip


@pytest.mark.parametrize("name", [*TEMPLATES, *FEATURES])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_the_text_is_that_of_transformers(name, turns):
    inner = byte_tokenizer((TEMPLATES | FEATURES)[name])
    said = ASK + [{"role": "assistant", "content": "4 </think> é🙂"}, ASK[0]][: turns - 1]
    for opened in (True, False):
        wanted = inner.apply_chat_template(said, tokenize=False, add_generation_prompt=opened)
        values = inner.special_tokens_map | {"add_generation_prompt": opened}
        assert render_template(inner.chat_template, said, NOW, **values) == wanted


def test_the_clock_stands_still():
    template = "{{ strftime_now('%d %b %Y') }}"
    assert render_template(template, ASK, NOW) == "04 Mar 2025"
    assert render_template(template, ASK, NOW.replace(year=1999)) == "04 Mar 1999"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}", "2 s"),
        ("{{ lipsum(n=10**7) }}", "2 s"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        ("{{ 'x' * 10**10 }}", "memory"),
        ("{% for i in range(9**5) %}{{ 'x' * 10**4 }}{% endfor %}", "than 4,194,304 characters"),
        ("{{ raise_exception('no system\nplease') }}", "no system please"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns.__x__ = 1 %}", "__x__"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{" + "(" * 3000, "template"),
    ],
)  # fmt: skip
def test_a_hostile_template_costs_one_sentence(limits, template, words):
    with pytest.raises(UserError, match=words) as told:
        render_template(template, ASK, NOW)
    assert "\n" not in str(told.value) and "the chat template" in str(told.value)
    start = time.monotonic()
    with pytest.raises(UserError, match=words):
        render_template(template, ASK, NOW)
    assert time.monotonic() - start < 2 or words != "2 s"  # time is not spent twice
    assert render_template("{{ messages[0].role }}", ASK, NOW) == "user"


def test_threads_get_their_own_texts():
    found = {}

    def ask(n):
        found[n] = [
            render_template("{{ messages[0].content }}", [{"role": "user", "content": n}], NOW)
            for _ in range(20)
        ]

    threads = [threading.Thread(target=ask, args=(str(n),)) for n in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert found == {str(n): [str(n)] * 20 for n in range(4)}
