"""Chat templates by name, for tokenizers without one of their own.

Each is (Jinja text, special tokens that the tokenizer must have).
"""

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UserError, did_you_mean

_NO_TOOLS = """\
{%- for message in messages if tools or message.tool_calls or message.role == 'tool' %}
{{- raise_exception('it has no form for tools') }}
{%- endfor %}
"""

# OpenAI's chat markup language, as published with the chat models of March 2023.
_CHATML = """\
{% for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

# The prompt format of Llama 3's model card, without its tools and dates.
_LLAMA3 = """\
{{- bos_token | default('<|begin_of_text|>') }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

# The two prompts of Stanford Alpaca (Taori et al. 2023). Their data has one turn; a later one
# begins at its instruction, and a system's message takes the place of the sentence at the start.
_ALPACA = """\
{%- set start = namespace(text='') %}
{%- for message in messages %}
{%- if message.role in ['system', 'developer'] %}
{%- set start.text = message.content %}
{%- elif message.role == 'user' %}
{%- if loop.first or (loop.index0 == 1 and start.text) %}
{%- if start.text %}
{{- start.text }}
{%- elif message.input %}
{{- 'Below is an instruction that describes a task, paired with an input that provides further ' }}
{{- 'context. Write a response that appropriately completes the request.' }}
{%- else %}
{{- 'Below is an instruction that describes a task. Write a response that appropriately ' }}
{{- 'completes the request.' }}
{%- endif %}
{%- endif %}
{{- '\\n\\n### Instruction:\\n' }}
{%- if message.input %}
{{- message.instruction + '\\n\\n### Input:\\n' + message.input }}
{%- else %}
{{- message.content }}
{%- endif %}
{%- elif message.role == 'assistant' %}
{{- '\\n\\n### Response:' + message.content + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '\\n\\n### Response:' }}
{%- endif %}"""

TEMPLATES = {
  "chatml": (_NO_TOOLS + _CHATML, ("<|im_start|>", "<|im_end|>")),
  "llama3": (_NO_TOOLS + _LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
  "alpaca": (_NO_TOOLS + _ALPACA, ()),
}


def set_template(tokenizer: Tokenizer, name: str) -> Tokenizer:
  """Returns the tokenizer with the chat template `name` of `TEMPLATES`, or as it is for ''.

  Raises:
    UserError: there is no such template, the tokenizer lacks a special token of it, or has no
      template of its own to be used.
  """
  if not name:
    if tokenizer.chat_template is None:
      raise UserError(
        f"tokenizer {tokenizer.spec!r} has no chat template of its own. "
        f"Set --config.task.chat_template= to one of: {', '.join(TEMPLATES)}."
      )
    return tokenizer
  if name not in TEMPLATES:
    raise UserError(f"task.chat_template: no template {name!r}. {did_you_mean(name, TEMPLATES)}")
  template, needed = TEMPLATES[name]
  if missing := [text for text in needed if text not in tokenizer.specials]:
    raise UserError(
      f"task.chat_template={name!r} needs the special token {missing[0]!r}, which tokenizer "
      f"{tokenizer.spec!r} does not have; 'alpaca' needs none."
    )
  return tokenizer.with_chat_template(template)
