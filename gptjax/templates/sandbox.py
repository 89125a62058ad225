"""A sandbox for foreign Jinja templates that bounds what they compute.

Jinja's own sandbox keeps a template from everything but its variables, not from filling the memory
or running for ever. Here everything a template does is charged to a budget: each turn of a loop,
and each call, filter and operator by the size of its possible result.
"""

import re
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

# Errors of wrong templates, when they are compiled or rendered, except TemplateSyntaxError.
ERRORS = (
  *(jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
  *(RecursionError, MemoryError, SyntaxError),  # Python's own compiler has limits too.
)

# In characters; they take a second or two to make. The longest templates in use need a few thousand
# times less for a long conversation.
_BUDGET = 1 << 28
_TURN = 1024  # for a turn of a loop or a call, beside what it writes
_ITEM = 128  # for an item of a list or an object
_JINJAS_OWN = ("_loop_vars", "_block_vars")  # arguments that Jinja passes to every function
_LONGEST_INTEGER_BITS = 4096
# Widths within a format: '%999999d', '%*d', '{:999999}'.
_WIDTH = re.compile(r"%[^a-zA-Z%]*(\*|\d{6})|\{[^{}]*\d{6}")


class TooMuchError(jinja2.TemplateError):
  """A template computes too much."""

  def __init__(self):
    super().__init__("it computes or writes more than any text needs")


class _Context(jinja2.runtime.Context):
  """The variables of a rendering, and the rest of its budget."""

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self._left = [_BUDGET]

  def derived(self, *args: Any, **kwargs: Any) -> "_Context":
    inner = super().derived(*args, **kwargs)
    inner._left = self._left
    return inner

  def spend(self, amount: int) -> None:
    self._left[0] -= amount
    if self._left[0] < 0:
      raise TooMuchError


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """Jinja's sandbox, in which a template that computes too much raises TooMuchError.

  Args:
    filters: beside Jinja's own.
    options: options of jinja2.Environment.
  """

  context_class = _Context
  intercepted_binops = frozenset({"+", "*", "**", "%"})

  def __init__(self, filters: Mapping[str, Callable] | None = None, **options: Any):
    finalize = options.pop("finalize", lambda value: value)
    # The optimizer would compute constants before there is a budget.
    super().__init__(optimized=False, **options)

    @jinja2.pass_context
    def charge_and_finalize(context: _Context, value: Any) -> Any:
      return finalize(_charge(context, value))

    self.finalize = charge_and_finalize
    del self.globals["lipsum"]
    all_filters = {**self.filters, **(filters or {})}
    self.filters = {name: _bound_filter(name, one) for name, one in all_filters.items()}
    self.filters |= {"_charge": _charge, "_charge_turns": _charge_turns}

  def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
    """Parses a template, and adds charges for nodes that call no function of the environment."""
    tree = super()._parse(source, name, filename)
    for loop in tree.find_all(jinja2.nodes.For):
      written = sum(len(text.data) for text in loop.find_all(jinja2.nodes.TemplateData))
      loop.iter = _filtered(loop.iter, "_charge_turns", jinja2.nodes.Const(_TURN + written))
    for concat in tree.find_all(jinja2.nodes.Concat):
      concat.nodes = [_filtered(node, "_charge") for node in concat.nodes]
    for test in tree.find_all((jinja2.nodes.Compare, jinja2.nodes.Operand)):
      test.expr = _filtered(test.expr, "_charge")
    for item in tree.find_all(jinja2.nodes.Getitem):
      if isinstance(item.arg, jinja2.nodes.Slice):
        item.node = _filtered(item.node, "_charge")
    return tree

  def call(__self, __context: _Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
    __context.spend(_TURN)
    if not isinstance(__obj, jinja2.runtime.Macro):  # A macro is charged for its body.
      given = [*args, *(value for name, value in kwargs.items() if name not in _JINJAS_OWN)]
      owner = getattr(__obj, "__self__", None)
      # Functions that are no methods make no more than they get, or have a limit of their own.
      __context.spend(_size(given) if owner is None else _largest(owner, *given))
    return super().call(__context, __obj, *args, **kwargs)

  def call_binop(self, context: _Context, operator: str, left: Any, right: Any) -> Any:
    match operator, left, right:
      case _, int(), int():
        bits = left.bit_length() * (max(right, 1) if operator == "**" else 1) + right.bit_length()
        if bits > _LONGEST_INTEGER_BITS:
          raise TooMuchError
      case "*", int(), _:
        context.spend(_size(right) * max(left, 0))
      case "*", _, int():
        context.spend(_size(left) * max(right, 0))
      case "%", str(), _:
        _check_format(left)
        context.spend(_largest(left, right))
      case _:
        context.spend(_size((left, right)))
    return super().call_binop(context, operator, left, right)

  def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
    wrapped = super().wrap_str_format(value)
    if wrapped is not None:
      _check_format(value.__self__)
      wrapped.__self__ = value.__self__  # For `call`, which charges for it.
    return wrapped


def _filtered(node: jinja2.nodes.Expr, name: str, *args: jinja2.nodes.Expr) -> jinja2.nodes.Filter:
  return jinja2.nodes.Filter(node, name, [*args], [], None, None, lineno=node.lineno)


@jinja2.pass_context
def _charge(context: _Context, value: Any) -> Any:
  context.spend(len(value) if type(value) is str else _size(value))
  return value


@jinja2.pass_context
def _charge_turns(context: _Context, items: Any, turn: int) -> Any:
  if not isinstance(items, jinja2.Undefined):
    items = items if hasattr(items, "__len__") else list(items)
    context.spend(turn * len(items))
  return items


def _bound_filter(name: str, function: Callable) -> Callable:
  """Makes a filter charge for its possible result, and compute it at once instead of lazily."""
  passed = getattr(function, "jinja_pass_arg", None)

  @jinja2.pass_context
  def bounded(context: _Context, value: Any, *args: Any, **kwargs: Any) -> Any:
    if name == "format":
      _check_format(value)
    context.spend(_TURN + _largest(value, *args, *kwargs.values()))
    contexts = {"environment": context.environment, "eval_context": context.eval_ctx}
    before = (contexts.get(passed.name, context),) if passed else ()
    made = function(*before, value, *args, **kwargs)
    return list(made) if isinstance(made, Generator) else made

  return bounded


def _largest(first: Any, *others: Any) -> int:
  """The largest possible result of a function: its two largest arguments multiplied.

  An integer after the first argument is a width or a number of times.
  """
  sizes = [_size(first)]
  sizes += [abs(one) if isinstance(one, int) else _size(one) for one in others]
  one, other = sorted([1, 1, *sizes])[-2:]
  return one * other


def _size(value: Any) -> int:
  """Characters of all texts in a value, and a few for everything else, counted up to the budget."""
  if type(value) is str:
    return len(value)
  size, rest = 0, [value]
  while rest and size <= _BUDGET:
    one = rest.pop()
    match one:
      case str():
        size += len(one)
        continue
      case dict():
        rest += [*one.keys(), *one.values()]
      case list() | tuple() | set():
        rest += one
      case range():
        size += _ITEM * len(one)
      case jinja2.utils.Namespace():  # Prints its content, which may include itself.
        size += _BUDGET
    size += _ITEM
  return size


def _check_format(text: Any) -> None:
  if isinstance(text, str) and _WIDTH.search(text):
    raise TooMuchError
