import datetime

import pytest

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.errors import UserError
from gptjax.templates.chat import ChatTemplate

CHATML = """{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

HEADERS = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
  {%- set system, messages = messages[0].content | trim, messages[1:] %}
{%- else %}
  {%- set system = '' %}
{%- endif %}
{%- if tools is not none %}{{- tools | tojson(indent=4) }}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nYear: ' + strftime_now('%Y') }}
{{- '\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
  {%- if message.role == 'tool' %}{{- message.content | tojson }}{% continue %}{% endif %}
  {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
  {%- generation %}{{- message.content | trim + '<|eot_id|>' }}{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

INSTRUCTIONS = """{%- set state = namespace(system='') -%}
{{ bos_token }}{% for message in messages -%}
{%- if message['role'] == 'system' %}{% set state.system = message['content'] + '\\n\\n' -%}
{%- elif (message['role'] == 'user') != ((loop.index0 - (state.system != '') | int) % 2 == 0) -%}
{{ raise_exception('users and assistants take turns') }}
{%- elif message['role'] == 'user' -%}
{{ '[INST] ' + state.system + message['content'] + ' [/INST]' }}
{%- else -%}{{ ' ' + message['content'] + eos_token }}
{%- endif -%}{%- endfor -%}"""

TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "instructions": INSTRUCTIONS}
USER = {"role": "user", "content": " Who wrote <b>Moby-Dick</b>? 谁？ "}
ANSWER = {"role": "assistant", "content": "Herman Melville."}
SYSTEM = {"role": "system", "content": "Answer in one sentence.\n"}
CALL = {
  "role": "assistant",
  "content": None,
  "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {"x": 1}}}],
}
TOOL = {"role": "tool", "content": '{"name": "é<"}'}
CONVERSATIONS = [[USER], [SYSTEM, USER], [USER, ANSWER, USER], [SYSTEM, USER, ANSWER]]


@pytest.fixture(scope="module")
def reference():
  import transformers

  return transformers.PreTrainedTokenizerFast


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_a_conversation_reads_as_in_transformers(
  write_tokenizer, reference, tmp_path, name, add_generation_prompt
):
  template = ChatTemplate(write_tokenizer(tmp_path, TEMPLATES[name]))
  theirs = reference.from_pretrained(tmp_path)
  options = {"add_generation_prompt": add_generation_prompt}
  for messages in CONVERSATIONS + ([[*CONVERSATIONS[0], TOOL]] if name == "headers" else []):
    text = theirs.apply_chat_template(messages, tokenize=False, **options)
    assert template.render(messages, **options) == text
    ids = theirs.apply_chat_template(messages, return_dict=False, **options)
    assert template.encode(messages, **options) == ids


@pytest.mark.parametrize("content", ["{{- message.content | trim }}", "{{- message.content }}"])
def test_a_call_of_a_tool_without_content_says_the_call_alone(write_tokenizer, tmp_path, content):
  template = f"""{{%- for message in messages %}}
  {{{{- message.role + ': ' }}}}
  {content}
  {{%- for call in message.tool_calls or [] %}}{{{{- call.function | tojson }}}}{{% endfor %}}
{{%- endfor %}}"""
  rendered = ChatTemplate(write_tokenizer(tmp_path, template)).render([USER, CALL])
  assert rendered.endswith('assistant: {"name": "find", "arguments": {"x": 1}}')


def test_where_a_template_is_found(write_tokenizer, tmp_path):
  assert write_tokenizer(tmp_path, CHATML).chat_template == CHATML
  several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
  assert write_tokenizer(tmp_path, several).chat_template == CHATML
  (tmp_path / "chat_template.jinja").write_text(HEADERS)
  tokenizer = write_tokenizer(tmp_path, CHATML)
  assert tokenizer.chat_template == HEADERS
  tokenizer.save(tmp_path / "saved")
  assert tokenizer_lib.open_saved(tmp_path / "saved").chat_template == HEADERS


def test_the_end_of_a_turn_stops(write_tokenizer, tmp_path):
  def stops(template):
    tokenizer = write_tokenizer(tmp_path, template)
    return {text for text, token in tokenizer.specials.items() if token in tokenizer.stops}

  assert stops(None) == {"<|endoftext|>", "</s>"}
  assert stops(CHATML) == {"<|endoftext|>", "</s>", "<|im_end|>"}
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 304]}')
  assert tokenizer_lib.load(str(tmp_path)).stops >= {304}


def test_a_tokenizer_without_a_template_is_refused():
  with pytest.raises(UserError, match="tokenizer 'bytes' has no chat template"):
    ChatTemplate(tokenizer_lib.load("bytes"))


@pytest.mark.parametrize(
  ("template", "messages", "problem"),
  [
    (CHATML, [{"role": "asistant", "content": ""}], "message 0: no role 'asistant'. Did you mean"),
    (CHATML, [USER, {"content": ""}], "message 1: no role None. Choose one of"),
    (CHATML, [{"role": "user", "text": ""}], r"message 0: no 'content' \(found: role, text\)"),
    (CHATML, [{"role": "user", "content": None}], "message 0: its 'content' is null, which only"),
    (HEADERS, [USER, ANSWER | {"content": None}], "message 1: its 'content' is null, which only"),
    (HEADERS, [USER, CALL], "message 1 has 'tool_calls', for which the chat template .* no form"),
    (
      "{{ 'a' + messages[0].content }}",
      [USER | {"content": 3}],
      "refuses these messages: can only",
    ),
    (INSTRUCTIONS, [ANSWER], "refuses these messages: users and assistants take turns"),
    ("a\n{% if %}", [USER], "is wrong in line 2: "),
    ("{{ a.b.c }}", [USER], "refuses these messages: 'a' is undefined"),
    ("{{ messages.__class__.__mro__ }}", [USER], "refuses .* is unsafe"),
    ("{{ messages.append(1) }}", [USER], "refuses .* .append. of .list. object is unsafe"),
  ],
)
def test_what_cannot_be_rendered_gets_one_sentence(
  write_tokenizer, tmp_path, template, messages, problem
):
  with pytest.raises(UserError, match=problem):
    ChatTemplate(write_tokenizer(tmp_path, template)).render(messages)


MARKED = """{{ bos_token }}{% for message in messages %}
{% if message.role == 'assistant' %}
A: {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{% else %}Q: {{ message.content }}{% endif %}
{% endfor %}{% if add_generation_prompt %}
A: {% endif %}"""
ENDED = """{% for message in messages %}
{{ message.role + ': ' + message.content + '<|im_end|>' }}{% endfor %}
{% if add_generation_prompt %}{{ 'assistant: ' }}{% else %}{{ eos_token }}{% endif %}"""
CHAT = [SYSTEM, USER, ANSWER, USER, {"role": "assistant", "content": "Still him.\n"}]


@pytest.mark.parametrize(
  ("template", "answers"),
  [
    (CHATML, ["Herman Melville.<|im_end|>\n", "Still him.\n<|im_end|>\n"]),
    (INSTRUCTIONS, [" Herman Melville.</s>", " Still him.\n</s>"]),
    (MARKED, ["Herman Melville.</s>", "Still him.\n</s>"]),
    (ENDED, ["Herman Melville.<|im_end|>", "Still him.\n<|im_end|></s>"]),
  ],
  ids=["chatml", "instructions", "marked", "ended"],
)
def test_the_pieces_of_a_conversation_are_its_text_and_tell_the_answers(
  write_tokenizer, tmp_path, template, answers
):
  chat = ChatTemplate(write_tokenizer(tmp_path, template))
  (pieces,) = chat.examples(CHAT)
  assert "".join(text for text, _ in pieces) == chat.render(CHAT, add_generation_prompt=False)
  assert [text for text, is_answer in pieces if is_answer] == answers
  # What comes before an answer is what the model was asked with.
  assert pieces[0][0] == chat.render(CHAT[:2])
  assert "".join(text for text, _ in pieces[:3]) == chat.render(CHAT[:4])


# As Qwen 3's, of which only the answers to the last thing that a user says keep their thoughts.
THINKING = """{%- set state = namespace(asked=0) %}
{%- for m in messages if m.role == 'user' %}{% set state.asked = messages.index(m) %}{% endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role != 'assistant' or loop.index0 > state.asked %}{{- m.content }}
{%- else %}{{- m.content.split('</think>')[-1] }}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
THOUGHTS = [
  {"role": "user", "content": "Who?"},
  {"role": "assistant", "content": "<think>Hm.</think>Ask."},
  {"role": "tool", "content": "Melville"},
  {"role": "assistant", "content": "<think>Yes.</think>Melville."},
  {"role": "user", "content": "When?"},
  {"role": "assistant", "content": "<think>Oh.</think>1851."},
]


def test_an_answer_that_is_written_otherwise_later_is_learnt_as_it_was_given(
  write_tokenizer, tmp_path
):
  chat = ChatTemplate(write_tokenizer(tmp_path, THINKING))
  first, second = chat.examples(THOUGHTS)
  assert [[text for text, learnt in pieces if learnt] for pieces in (first, second)] == [
    ["<think>Hm.</think>Ask.<|im_end|>\n", "<think>Yes.</think>Melville.<|im_end|>\n"],
    ["<think>Oh.</think>1851.<|im_end|>\n"],
  ]
  # Each answer comes after the text that a model is asked with.
  asked = ["".join(text for text, _ in pieces) for pieces in (first[:1], first[:3], second[:1])]
  assert asked == [chat.render(THOUGHTS[:end]) for end in (1, 3, 5)]
  assert "Hm." not in asked[2]
  # What the user says last is no reason to learn it all again.
  assert chat.examples([*THOUGHTS[:4], THOUGHTS[4]]) == [first]


def test_a_template_that_does_not_ask_for_the_answers_is_an_error(write_tokenizer, tmp_path):
  template = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A{% endif %}"
  )
  with pytest.raises(UserError, match=r"does not write message 4 behind what asks for it"):
    ChatTemplate(write_tokenizer(tmp_path, template)).examples(CHAT)


@pytest.mark.parametrize(
  "template",
  [
    "{{ messages | length }}{% if x %}{% generation %}{% endgeneration %}{% endif %}",
    "{% set x %}{% generation %}{{ bos_token }}{% endgeneration %}{% endset %}{{ x[1:] }}",
  ],
)
def test_marks_around_no_text_are_an_error(write_tokenizer, tmp_path, template):
  with pytest.raises(UserError, match="but what it marks in these messages is nothing, or not one"):
    ChatTemplate(write_tokenizer(tmp_path, template)).examples(CHAT)


def test_a_template_may_be_told_what_day_it_is(write_tokenizer, tmp_path):
  tokenizer = write_tokenizer(tmp_path, "{{ strftime_now('%d %b %Y') }}")
  assert ChatTemplate(tokenizer, datetime.date(2024, 7, 26)).render([USER]) == "26 Jul 2024"
  assert ChatTemplate(tokenizer).render([USER]).endswith(str(datetime.date.today().year))


def test_tools_reach_the_template(write_tokenizer, tmp_path):
  chat = ChatTemplate(write_tokenizer(tmp_path, "{{ tools | tojson }}"))
  assert chat.render([USER], tools=[{"name": "f"}]) == '[{"name": "f"}]'
  assert chat.render([USER]) == "null"
