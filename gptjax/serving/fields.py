"""What the fields of a request may be, in a part of JSON Schema, and the check that they are.

The same tables make the description at /openapi.json.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.errors import did_you_mean
from gptjax.serving.errors import ApiError, wrong

Schema = Mapping[str, Any]

STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}

_TYPES = {
  "string": (str,),
  "integer": (int,),
  "number": (int, float),
  "boolean": (bool,),
  "array": (list,),
  "object": (dict,),
}
_ARTICLES = {"integer": "a whole number", "array": "an array", "object": "an object"}


def integer(minimum: int, maximum: int | None = None) -> Schema:
  most = {} if maximum is None else {"maximum": maximum}
  return {"type": "integer", "minimum": minimum, **most}


def number(minimum: float, maximum: float, *, exclusive: bool = False) -> Schema:
  low = "exclusiveMinimum" if exclusive else "minimum"
  return {"type": "number", low: minimum, "maximum": maximum}


def choice(*values: str) -> Schema:
  return {"type": "string", "enum": list(values)}


def array(items: Schema, minimum: int = 0, maximum: int | None = None) -> Schema:
  most = {} if maximum is None else {"maxItems": maximum}
  return {"type": "array", "items": items, "minItems": minimum, **most}


def either(*options: Schema) -> Schema:
  return {"anyOf": list(options)}


def record(
  properties: Mapping[str, Schema], required: Sequence[str] = (), *, closed: bool = True
) -> Schema:
  """An object; if `closed`, of no other fields than these."""
  need = {"required": list(required)} if required else {}
  shape = {"type": "object", "properties": dict(properties), **need}
  return shape | ({"additionalProperties": False} if closed else {})


def variants(key: str, records: Mapping[str, Schema]) -> Schema:
  """Objects that are told apart by the value of one of their fields."""
  options = []
  for value, schema in records.items():
    properties = {key: {"type": "string", "enum": [value]}, **schema["properties"]}
    required = [key, *schema.get("required", ())]
    options.append({**schema, "properties": properties, "required": required})
  return {"oneOf": options, "discriminator": {"propertyName": key}}


def read(body: bytes, schema: Schema, refused: Mapping[str, str]) -> dict[str, Any]:
  """Reads the JSON of a request, without the fields that are null.

  Args:
    body: of the request.
    schema: of an object.
    refused: fields that are not supported, and why.

  Raises:
    ApiError: it is no JSON object of this schema.
  """

  def refuse(constant: str):
    raise ValueError(f"{constant} is no number of JSON")

  try:
    fields = json.loads(body, parse_constant=refuse)
    if b"\\u" in body:
      json.dumps(fields, ensure_ascii=False).encode()
  except UnicodeEncodeError as error:
    message = "The body has half of a surrogate pair, which is no character."
    raise ApiError(400, message, code="invalid_json") from error
  except (ValueError, RecursionError) as error:
    raise ApiError(400, f"The body is no JSON: {error}.", code="invalid_json") from error
  if not isinstance(fields, dict):
    raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
  fields = {name: value for name, value in fields.items() if value is not None}
  for name in fields:
    if name in refused:
      message = f"{name} is not supported. {refused[name]}"
      raise wrong(name, message, "unsupported_parameter")
  check(fields, schema, "")
  return fields


def check(value: Any, schema: Schema, name: str) -> None:
  """Raises ApiError, which names the field, unless a value is as a schema says."""
  if "anyOf" in schema:
    _check_any(value, schema["anyOf"], name)
  elif "oneOf" in schema:
    _check_variant(value, schema, name)
  elif "type" in schema:
    if not _is_of(value, schema):
      raise wrong(name, f"{name} is {_shown(value)}; it must be {_words(schema)}.", "invalid_type")
    checks = {"object": _check_object, "array": _check_array, "string": _check_string}
    checks.get(schema["type"], _check_number)(value, schema, name)


def _check_any(value: Any, options: Sequence[Schema], name: str) -> None:
  errors = []
  for option in options:
    if _is_of(value, option):
      try:
        return check(value, option, name)
      except ApiError as error:
        errors.append(error)
  if errors:  # The option that a value is nearest to is wrong at the greatest depth.
    raise max(errors, key=lambda error: (len(error.param), error.code != "invalid_type"))
  wanted = _words({"anyOf": options})
  raise wrong(name, f"{name} is {_shown(value)}; it must be {wanted}.", "invalid_type")


def _check_variant(value: Any, schema: Schema, name: str) -> None:
  key = schema["discriminator"]["propertyName"]
  options = {option["properties"][key]["enum"][0]: option for option in schema["oneOf"]}
  if not isinstance(value, dict):
    raise wrong(name, f"{name} is {_shown(value)}; it must be an object.", "invalid_type")
  kind = value.get(key)
  if not isinstance(kind, str) or kind not in options:
    at = _join(name, key)
    wanted = ", ".join(map(repr, options))
    raise wrong(at, f"{at} is {_shown(kind)}; choose one of: {wanted}.")
  check(value, options[kind], name)


def _check_object(value: dict, schema: Schema, name: str) -> None:
  properties = schema.get("properties", {})
  for key in schema.get("required", ()):
    if key not in value:
      at = _join(name, key)
      raise wrong(at, f"{at} is missing; it must be {_words(properties[key])}.", "missing_field")
  extra = schema.get("additionalProperties", True)
  for key, one in value.items():
    at = _join(name, key)
    if key in properties:
      if one is not None:
        check(one, properties[key], at)
      elif key in schema.get("required", ()) and not properties[key].get("nullable"):
        raise wrong(at, f"{at} is null; it must be {_words(properties[key])}.", "invalid_type")
    elif extra is False:
      raise wrong(at, f"no field {at!r}. {did_you_mean(key, properties)}", "unknown_field")
    elif isinstance(extra, dict):
      check(one, extra, at)


def _check_array(value: list, schema: Schema, name: str) -> None:
  least, most = schema.get("minItems", 0), schema.get("maxItems", math.inf)
  if not least <= len(value) <= most:
    bounds = f"at least {least}" if len(value) < least else f"at most {most}"
    raise wrong(name, f"{name} has {len(value)} items; it must have {bounds}.")
  items = schema["items"]
  if items.get("type") == "integer":  # Prompts of ids are long.
    low, high = items.get("minimum", -math.inf), items.get("maximum", math.inf)
    if all(type(item) is int and low <= item <= high for item in value):
      return
  for index, item in enumerate(value):
    check(item, items, f"{name}[{index}]")


def _check_string(value: str, schema: Schema, name: str) -> None:
  if value not in schema.get("enum", (value,)):
    close = did_you_mean(value[:40], schema["enum"])
    raise wrong(name, f"{name}: no choice {_shown(value)}. {close}")
  least, most = schema.get("minLength", 0), schema.get("maxLength", math.inf)
  if not least <= len(value) <= most:
    bounds = f"at least {least}" if len(value) < least else f"at most {most}"
    raise wrong(name, f"{name} has {len(value)} characters; it must have {bounds}.")


def _check_number(value: float, schema: Schema, name: str) -> None:
  low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
  above = schema.get("exclusiveMinimum", -math.inf)
  if not (isinstance(value, bool) or (low <= value <= high and above < value < math.inf)):
    raise wrong(name, f"{name} is {_shown(value)}; it must be {_words(schema)}.", "out_of_range")


def _is_of(value: Any, schema: Schema) -> bool:
  """Whether a value is of a schema's type."""
  if "oneOf" in schema:
    return isinstance(value, dict)
  kind = schema.get("type")
  if kind is None:
    return True
  # Booleans are integers in Python.
  return isinstance(value, _TYPES[kind]) and isinstance(value, bool) <= (kind == "boolean")


def _words(schema: Schema) -> str:
  """What a schema wants, for a sentence."""
  if "anyOf" in schema:
    return " or ".join(dict.fromkeys(map(_words, schema["anyOf"])))
  if "enum" in schema:
    return " or ".join(map(repr, schema["enum"]))
  kind = schema.get("type", "object")
  words = _ARTICLES.get(kind, f"a {kind}")
  bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
  told = [f"{word} {schema[key]}" for key, word in bounds.items() if key in schema]
  return f"{words} of {' and '.join(told)}" if told else words


def _shown(value: Any) -> str:
  if isinstance(value, dict | list):
    return "an object" if isinstance(value, dict) else "an array"
  # Python refuses to write whole numbers of thousands of digits.
  is_huge = isinstance(value, int) and value.bit_length() > 999
  text = "a huge number" if is_huge else json.dumps(value, ensure_ascii=False)
  return text if len(text) <= 44 else f"{text[:40]}..."


def _join(name: str, key: str) -> str:
  key = key if len(key) <= 64 else f"{key[:61]}..."
  return f"{name}.{key}" if name else key
