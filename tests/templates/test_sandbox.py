"""Templates from outside compute within limits, and those in use are not hindered."""

import time

import jinja2
import pytest

from gptjax.errors import UserError
from gptjax.templates.prompts import Example, Template
from gptjax.templates.sandbox import BoundedEnvironment

# Starts with a text of two characters, and makes more of it 99 times.
GROWING = (
  "{%% set n = namespace(x='aa') %%}{%% for i in range(99) %%}{%% set n.x = %s %%}{%% endfor %%}"
)
BOMBS = {
  "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
  "loops over a text": "{% set t = 'a' * 9999 %}{% for a in t %}{% for b in t %}{% endfor %}"
  "{% endfor %}",
  "a long range": "{% for a in range(10**9) %}{% endfor %}",
  "repetition": "{{ 'a' * 10**11 }}",
  "repetition the other way": "{{ 10**11 * 'a' }}",
  "a repeated list": "{{ [0] * 10**10 }}",
  "a power": "{{ 10 ** (10 ** 10) }}",
  "powers": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}"
  "{% endfor %}",
  "doubling": GROWING % "n.x ~ n.x",
  "doubling by +": GROWING % "n.x + n.x",
  "doubling by join": GROWING % "[n.x, n.x] | join",
  "doubling by replace": GROWING % "n.x.replace('a', n.x)",
  "doubling by format": GROWING % "'{0}{0}'.format(n.x)",
  "doubling by %": GROWING % "'%s%s' % (n.x, n.x)",
  "doubling in a block": "{% set x %}{{ 'a' * 9999 }}{% endset %}{% for i in range(9999) %}"
  "{{ x * 99 }}{% endfor %}",
  "lists of lists": GROWING % "[n.x, n.x]" + "{{ n.x }}",
  "namespaces of namespaces": "{% set n = namespace(x=1) %}{% set n.x = n %}{{ n }}",
  "a width": "{{ 'a'.center(10**10) }}",
  "a width of a filter": "{{ 'a' | center(10**10) }}",
  "an indentation": "{{ 'a\nb' | indent(10**10) }}",
  "a width of a format": "{{ '%9999999999d' % 1 }}",
  "a width of a format filter": "{{ '%9999999999d' | format(1) }}",
  "a width beside a format": "{{ '%*d' % (10**10, 1) }}",
  "a width of format": "{{ '{:9999999999}'.format(1) }}",
  "a width within format": "{{ '{:{}}'.format(1, 10**10) }}",
  "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
  "{{ f(60) }}",
  "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
  "slices": "{% set t = 'a' * 10**8 %}{% for i in range(99999) %}{% set u = t[1:] %}{% endfor %}",
  "comparisons": "{% set t = 'a' * 10**8 %}{% for i in range(99999) %}{{ 'b' in t }}{% endfor %}",
  "filler": "{{ lipsum(10**6) }}",
  "constant text": "{% set x %}{% for i in range(99999) %}"
  + "a" * 99999
  + "{% endfor %}{% endset %}",
  "deep brackets": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
  "deep blocks": "{% for i in [1] %}" * 40 + "{% endfor %}" * 40,
  "division": "{{ 1 // 0 }}",
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_a_template_that_computes_too_much_gets_a_sentence_and_soon(source):
  started = time.monotonic()
  with pytest.raises(UserError, match=r"bomb\.jinja: "):
    Template("bomb.jinja", source).render(Example({}, "data.jsonl:7"))
  assert time.monotonic() - started < 20


def test_templates_of_long_conversations_are_rendered():
  template = Template(
    "chat.jinja",
    "{% set ns = namespace(text='', last=messages | length - 1) %}"
    "{% for m in messages[::-1] if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endfor %}"
    "{% for message in messages %}{{ '<|' + message.role ~ '|>' }}"
    "{% if loop.last or message.role in ['user', 'tool'] %}{{ message.content | trim }}"
    "{% else %}{{ message.content.split('</think>')[-1].lstrip('\n') }}{% endif %}"
    "{{ message | tojson | length > 3 }}{% endfor %}",
  )
  turn = "What is it that a long answer says? " * 200
  messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i in range(1000)]
  text = template.render(Example({"messages": messages}, "data.jsonl:1"))
  assert text.count("What is it") == 200_000


@pytest.mark.parametrize(
  "source",
  [
    "{% for a, b in x.items() %}{{ loop.index }}/{{ loop.length }}{{ a }}{{ b }}{% endfor %}",
    "{% for a in [1, 2, 3] | map('string') | list %}{{ loop.previtem }}{{ a }}{% endfor %}",
    "{% for a in [3, 1, 2] | sort | reverse %}{{ a }}{% else %}none{% endfor %}",
    "{% for a in missing %}{{ a }}{% else %}none{% endfor %}{{ missing is defined }}",
    "{% for a in [1, 2] recursive %}{{ a }}{{ loop([]) }}{% endfor %}",
    "{{ 'a' ~ 1 ~ none }} {{ 1 < 2 <= 3 }} {{ 'abc'[::-1] }} {{ 'b' in 'abc' }}",
    "{{ 7 % 4 }} {{ 2 ** 5 }}",
    "{{ '%s and %05.1f' % ('a', 2.5) }} {{ '{:>4}'.format(1) }} {{ '%d' | format(3) }}",
    "{{ x | tojson }}",
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}{% call f(1) %}c{% endcall %}",
    "{% filter upper %}a{{ x.a }}{% endfilter %}{% set y %}{{ x }}{% endset %}{{ y | length }}",
    "{{ [1, 2] + [3] }} {{ 'ab' * 3 }} {{ x | dictsort }} {{ 10**12 }} {{ 7 | string }}",
    "{{ range(3) | list }}",
    "{{ [{'a': 1}, {'a': 2}] | map(attribute='a') | sum }} {{ [1, 2] | first }} {{ '' is none }}",
  ],
)
def test_what_is_rendered_is_what_jinja_renders(source):
  variables = {"x": {"a": 1, "b": "two"}}
  plain = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(source).render(variables)
  assert BoundedEnvironment().from_string(source).render(variables) == plain
