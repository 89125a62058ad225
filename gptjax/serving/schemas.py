"""The fields of each request: what is read, what is accepted without effect, what is refused."""

from gptjax.inference.sampling import MAX_CANDIDATES
from gptjax.serving.fields import (
  BOOLEAN,
  OBJECT,
  STRING,
  Schema,
  array,
  choice,
  either,
  integer,
  number,
  record,
  variants,
)

_NAME = {"type": "string", "minLength": 1}
_ANY: Schema = {}
_MANY = 2**31

# Fields of OpenAI's API that change nothing in an answer here.
_WORDS = ("prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "user")
HARMLESS = {**dict.fromkeys(_WORDS, STRING), "metadata": OBJECT, "store": BOOLEAN}

_SAMPLING = {
  "temperature": number(0, 2),
  "top_p": number(0, 1, exclusive=True),
  "top_k": integer(0, _MANY),
  "min_p": number(0, 1),
  "seed": integer(-(2**63), 2**63 - 1),
}
_PENALTIES = {
  "frequency_penalty": number(-2, 2),
  "presence_penalty": number(-2, 2),
  "repetition_penalty": number(0, 100, exclusive=True),
  "logit_bias": {"type": "object", "additionalProperties": number(-100, 100)},
  "stop": either(_NAME, array(_NAME, maximum=16)),
}
_STREAM = {
  "stream": BOOLEAN,
  "stream_options": record({"include_usage": BOOLEAN, "include_obfuscation": BOOLEAN}),
}
_N = integer(1, 128)
_IDS = array(integer(0, _MANY), minimum=1)

COMPLETION = record(
  {
    "model": STRING,
    "prompt": either(STRING, array(STRING, 1), _IDS, array(_IDS, 1)),
    "max_tokens": integer(0, _MANY),
    "n": _N,
    "best_of": _N,
    "echo": BOOLEAN,
    "logprobs": integer(0, MAX_CANDIDATES),
    "ignore_eos": BOOLEAN,
    **_SAMPLING,
    **_PENALTIES,
    **_STREAM,
    **HARMLESS,
  },
  ["model", "prompt"],
)

_PART = record({"text": STRING}, ["text"])
_REFUSAL = record({"refusal": STRING}, ["refusal"])
_CONTENT = either(STRING, array(variants("type", {"text": _PART}), 1))
_ANSWER_PART = variants("type", {"text": _PART, "refusal": _REFUSAL})
_CALL = record(
  {
    "id": STRING,
    "type": choice("function"),
    "index": integer(0),
    "function": record({"name": _NAME, "arguments": STRING}, ["name", "arguments"]),
  },
  ["function"],
)
_SAID = record({"content": _CONTENT, "name": STRING}, ["content"])
MESSAGE = variants(
  "role",
  {
    "system": _SAID,
    "developer": _SAID,
    "user": _SAID,
    "assistant": record(
      {
        "content": either(STRING, array(_ANSWER_PART)),
        "name": STRING,
        "refusal": STRING,
        "tool_calls": array(_CALL),
      }
    ),
    "tool": record({"content": _CONTENT, "tool_call_id": STRING, "name": STRING}, ["content"]),
  },
)
_FUNCTION = {
  "name": {"type": "string", "minLength": 1, "maxLength": 128},
  "description": STRING,
  "parameters": OBJECT,
  "strict": BOOLEAN,
}
TOOL = variants(
  "type", {"function": record({"function": record(_FUNCTION, ["name"])}, ["function"])}
)
_NAMED = record({"name": _NAME}, ["name"])
_CHOICE = choice("none", "auto", "required")
_CHOSEN = record({"function": _NAMED}, ["function"])
_JSON_SCHEMA = {"name": _NAME, "description": STRING, "schema": OBJECT, "strict": BOOLEAN}
_FORMATS = {
  "text": record({}),
  "json_object": record({}),
  "regex": record({"pattern": STRING}, ["pattern"]),
  "grammar": record({"grammar": STRING}, ["grammar"]),
}

CHAT_COMPLETION = record(
  {
    "model": STRING,
    "messages": array(MESSAGE, 1),
    "max_tokens": integer(1, _MANY),
    "max_completion_tokens": integer(1, _MANY),
    "n": _N,
    "logprobs": BOOLEAN,
    "top_logprobs": integer(0, MAX_CANDIDATES),
    "response_format": variants(
      "type",
      {
        **_FORMATS,
        "json_schema": record({"json_schema": record(_JSON_SCHEMA, ["name"])}, ["json_schema"]),
      },
    ),
    "tools": array(TOOL),
    "tool_choice": either(_CHOICE, variants("type", {"function": _CHOSEN})),
    "parallel_tool_calls": BOOLEAN,
    "modalities": array(choice("text"), 1),
    "reasoning_effort": STRING,
    "verbosity": STRING,
    **_SAMPLING,
    **_PENALTIES,
    **_STREAM,
    **HARMLESS,
  },
  ["model", "messages"],
)

_WRITTEN = record({"text": STRING, "annotations": array(_ANY), "logprobs": array(_ANY)}, ["text"])
_PARTS = {"input_text": _PART, "output_text": _WRITTEN, "text": _PART}
_ITEM_CONTENT = either(STRING, array(variants("type", {**_PARTS, "refusal": _REFUSAL})))
_ITEM = {"id": STRING, "status": STRING}
_ROLE = choice("system", "developer", "user", "assistant")
_MESSAGE = {"role": _ROLE, "content": _ITEM_CONTENT, "phase": STRING}
_CALLED = {"call_id": STRING, "name": _NAME, "arguments": STRING}
_RETURNED = {"call_id": STRING, "output": _ITEM_CONTENT}
ITEMS = variants(
  "type",
  {
    "message": record(_MESSAGE | _ITEM, ["role", "content"]),
    "function_call": record(_CALLED | _ITEM, ["name", "arguments"]),
    "function_call_output": record(_RETURNED | _ITEM, ["output"]),
    "reasoning": record({}, closed=False),
  },
)
FUNCTION_TOOL = record({"type": STRING, **_FUNCTION}, ["type", "name"], closed=False)

RESPONSE = record(
  {
    "model": STRING,
    "input": either(STRING, array(OBJECT, 1)),
    "instructions": STRING,
    "max_output_tokens": integer(1, _MANY),
    "top_logprobs": integer(0, MAX_CANDIDATES),
    "text": record(
      {
        "format": variants("type", {**_FORMATS, "json_schema": record(_JSON_SCHEMA, ["name"])}),
        "verbosity": STRING,
      }
    ),
    "tools": array(record({"type": STRING}, ["type"], closed=False)),
    "tool_choice": either(_CHOICE, variants("type", {"function": _NAMED})),
    "parallel_tool_calls": BOOLEAN,
    "stream": BOOLEAN,
    "stream_options": record({"include_obfuscation": BOOLEAN}),
    "include": array(STRING),
    "reasoning": OBJECT,
    "max_tool_calls": integer(0),
    "truncation": choice("disabled"),
    **_SAMPLING,
    **HARMLESS,
  },
  ["model", "input"],
)

EMBEDDING = record(
  {
    "model": STRING,
    "input": either(STRING, array(STRING, 1, 2048), _IDS, array(_IDS, 1, 2048)),
    "encoding_format": choice("float", "base64"),
    **HARMLESS,
  },
  ["model", "input"],
)

TOKENIZE = record(
  {
    "model": STRING,
    "prompt": STRING,
    "messages": array(MESSAGE, 1),
    "add_special_tokens": BOOLEAN,
    "add_generation_prompt": BOOLEAN,
  }
)
DETOKENIZE = record({"model": STRING, "tokens": array(integer(0, _MANY))}, ["tokens"])

# Fields that would change an answer and are not supported, and why; all may be null.
REFUSED = {
  "completions": {
    "suffix": "The text after a completion cannot be given; write the model's own tokens for that "
    "into the prompt."
  },
  "chat_completions": {
    "audio": "The model writes text alone.",
    "functions": "It is replaced by 'tools'.",
    "function_call": "It is replaced by 'tool_choice'.",
    "prediction": "Predicted outputs are not supported.",
    "web_search_options": "The server searches nothing.",
  },
  "responses": {
    "background": "Answers are not kept.",
    "conversation": "Conversations are not kept; send all of it as 'input'.",
    "previous_response_id": "Answers are not kept; send the whole conversation as 'input'.",
    "prompt": "Prompts are not kept; send the text as 'input'.",
  },
  "embeddings": {"dimensions": "The model's vectors have one size."},
}
