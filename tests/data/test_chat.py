import json

import pytest

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.data.chat import ChatTemplate
from gptjax.errors import UserError

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
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>",
            "<|end_header_id|>"]  # fmt: skip

USER = {"role": "user", "content": " Who wrote <b>Moby-Dick</b>? 谁？ "}
ANSWER = {"role": "assistant", "content": "Herman Melville."}
SYSTEM = {"role": "system", "content": "Answer in one sentence.\n"}
TOOL = {"role": "tool", "content": '{"name": "é<"}'}
CONVERSATIONS = [[USER], [SYSTEM, USER], [USER, ANSWER, USER], [SYSTEM, USER, ANSWER]]


@pytest.fixture(scope="module")
def write():
  """Returns a function that writes a byte-level tokenizer and what a template's model has."""
  made = json.loads(tokenizer_lib.train("bpe:300", ["a little text"])._files["tokenizer.json"])
  size = len(made["model"]["vocab"])
  plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
  made["added_tokens"] += [
    {"id": size + number, "content": text, "special": True, **plain}
    for number, text in enumerate(SPECIALS)
  ]

  def write(folder, template):
    (folder / "tokenizer.json").write_text(json.dumps(made))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer_lib.load(str(folder))

  return write


@pytest.fixture(scope="module")
def reference():
  import transformers

  return transformers.PreTrainedTokenizerFast


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_a_conversation_reads_as_in_transformers(
  write, reference, tmp_path, name, add_generation_prompt
):
  template = ChatTemplate(write(tmp_path, TEMPLATES[name]))
  theirs = reference.from_pretrained(tmp_path)
  options = {"add_generation_prompt": add_generation_prompt}
  for messages in CONVERSATIONS + ([[*CONVERSATIONS[0], TOOL]] if name == "headers" else []):
    text = theirs.apply_chat_template(messages, tokenize=False, **options)
    assert template.render(messages, **options) == text
    ids = theirs.apply_chat_template(messages, return_dict=False, **options)
    assert template.encode(messages, **options) == ids


def test_where_a_template_is_found(write, tmp_path):
  assert write(tmp_path, CHATML).chat_template == CHATML
  several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
  assert write(tmp_path, several).chat_template == CHATML
  (tmp_path / "chat_template.jinja").write_text(HEADERS)
  tokenizer = write(tmp_path, CHATML)
  assert tokenizer.chat_template == HEADERS
  tokenizer.save(tmp_path / "saved")
  assert tokenizer_lib.open_saved(tmp_path / "saved").chat_template == HEADERS


def test_the_end_of_a_turn_stops(write, tmp_path):
  def stops(template):
    tokenizer = write(tmp_path, template)
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
    (CHATML, [{"role": "user", "content": None}], "refuses these messages: can only concatenate"),
    (INSTRUCTIONS, [ANSWER], "refuses these messages: users and assistants take turns"),
    ("a\n{% if %}", [USER], "is wrong in line 2: "),
    ("{{ a.b.c }}", [USER], "refuses these messages: 'a' is undefined"),
    ("{{ messages.__class__.__mro__ }}", [USER], "refuses .* is unsafe"),
    ("{{ messages.append(1) }}", [USER], "refuses .* .append. of .list. object is unsafe"),
  ],
)
def test_what_cannot_be_rendered_gets_one_sentence(write, tmp_path, template, messages, problem):
  with pytest.raises(UserError, match=problem):
    ChatTemplate(write(tmp_path, template)).render(messages)
