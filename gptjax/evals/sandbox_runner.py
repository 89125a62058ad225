"""The main program of a sandbox's processes: it confines itself, then runs the code it was given.

The program's process serves calls of the program's functions; the judge's process runs the check,
which imports those functions from `program`. The two exchange plain data. This needs only the
standard library, and must not be imported by the process that evaluates.
"""

import builtins
import contextlib
import json
import os
import resource
import signal
import sys
import traceback
import types

_MOST_PROCESSES, _MOST_FILES = 64, 64
_STARTS_PROCESSES = ("os.fork", "os.forkpty", "os.system", "os.exec", "os.posix_spawn", "os.spawn")
_CHANGES_FILES = (
  *("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.removexattr", "os.rename"),
  *("os.rmdir", "os.setxattr", "os.symlink", "os.truncate", "os.utime"),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


# --- Limits ------------------------------------------------------------------------------------


def limit(order: dict) -> None:
  # The first process of a namespace of ids gets no signal that it does not handle.
  signal.signal(signal.SIGXCPU, lambda number, _: os._exit(128 + number))
  limits = {
    resource.RLIMIT_CPU: order["cpu_seconds"],
    resource.RLIMIT_AS: order["memory_bytes"],
    resource.RLIMIT_FSIZE: order["file_bytes"],
    resource.RLIMIT_NOFILE: _MOST_FILES,
    resource.RLIMIT_NPROC: _MOST_PROCESSES,
    resource.RLIMIT_CORE: 0,
  }
  for kind, most in limits.items():
    # macOS has no address space to limit.
    with contextlib.suppress(ValueError, OSError):
      # The hard limit of processor time is a second later, and SIGKILL.
      resource.setrlimit(kind, (most, most + (kind == resource.RLIMIT_CPU)))


def refuse(folder: str) -> None:
  """Adds a hook that explains refusals in a sentence. Programs can get around it, for instance with
  `ctypes`; the kernel then refuses."""
  inside = os.path.realpath(folder)

  def check_path(path) -> None:
    if isinstance(path, int):
      return
    real = os.path.realpath(os.fsdecode(path))
    if real != os.devnull and os.path.commonpath([real, inside]) != inside:
      raise PermissionError(f"the sandbox writes nothing outside of its directory ({real})")

  def hook(event: str, arguments: tuple) -> None:
    if event == "open":
      path, _, flags = arguments
      if path is not None and isinstance(flags, int) and flags & _WRITING:
        check_path(path)
    elif event in _CHANGES_FILES:
      for path in arguments:
        if isinstance(path, (str, bytes, os.PathLike)):
          check_path(path)
    elif event in _STARTS_PROCESSES or event == "subprocess.Popen":
      raise PermissionError("the sandbox starts no processes")
    elif event == "os.killpg" or (event == "os.kill" and arguments[0] != os.getpid()):
      raise PermissionError("the sandbox signals no processes")
    elif event.startswith("socket.") and event != "socket.__new__":
      raise PermissionError("the sandbox has no network")

  sys.addaudithook(hook)


# --- Plain data --------------------------------------------------------------------------------


class NotPlainError(TypeError):
  """A value that is not plain data, or bytes that are not a message."""


def to_json(value):
  """Converts plain data for JSON; a type that JSON lacks becomes {name of the type: ...}."""
  match value:
    case None | bool() | str():
      return value if value is None or isinstance(value, bool) else str(value)
    case int():
      return {"int": f"{int(value):x}"}
    case float():
      return {"float": float(value).hex()}
    case complex():
      return {"complex": [value.real.hex(), value.imag.hex()]}
    case bytes() | bytearray():
      return {"bytes": bytes(value).hex()}
    case list():
      return [to_json(one) for one in value]
    case dict():
      return {"dict": [[to_json(key), to_json(one)] for key, one in value.items()]}
  for kind in (tuple, set, frozenset):
    if isinstance(value, kind):
      return {kind.__name__: [to_json(one) for one in value]}
  raise NotPlainError(f"a value of type {type(value).__name__} is no plain data")


def from_json(value):
  """The inverse of `to_json`; it returns values of builtin types only, whatever was sent."""
  match value:
    case None | bool() | str():
      return value
    case list():
      return [from_json(one) for one in value]
    case {"int": str(digits)}:
      return int(digits, 16)
    case {"float": str(digits)}:
      return float.fromhex(digits)
    case {"complex": [str(real), str(imaginary)]}:
      return complex(float.fromhex(real), float.fromhex(imaginary))
    case {"bytes": str(digits)}:
      return bytes.fromhex(digits)
    case {"dict": list(pairs)}:
      return {from_json(key): from_json(one) for key, one in pairs}
    case {"tuple": list(items)}:
      return tuple(map(from_json, items))
    case {"set": list(items)}:
      return set(map(from_json, items))
    case {"frozenset": list(items)}:
      return frozenset(map(from_json, items))
  raise NotPlainError("what the program sent is no plain data")


class Channel:
  """Messages between two processes, one a line of JSON, over two pipes."""

  def __init__(self, order: dict):
    self._in, self._out = os.fdopen(order["read"]), os.fdopen(order["write"], "w")
    self._most = order["file_bytes"]

  def send(self, message) -> None:
    text = json.dumps(message)
    if len(text) >= self._most:
      raise NotPlainError(f"a message of {len(text)} characters is larger than {self._most}")
    print(text, file=self._out, flush=True)

  def receive(self):
    """The next message; EOFError at the end or if there is none."""
    line = self._in.readline(self._most)
    if not line.endswith("\n"):
      raise EOFError
    return json.loads(line)


# --- The two processes -------------------------------------------------------------------------


def serve(order: dict) -> None:
  """Runs the program, then answers the calls of the judge."""
  channel = Channel(order)
  names = {"__name__": "__main__"}
  try:
    exec(compile(order["code"], "program.py", "exec"), names)
  except MemoryError:
    # A traceback could need more memory.
    os.write(2, b"\nMemoryError\n")
    os._exit(1)
  except Exception:  # noqa: BLE001 (the program may raise anything)
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)
  channel.send("ready")
  with contextlib.suppress(EOFError):
    while True:
      name, args, kwargs = from_json(channel.receive())
      if name not in names:
        channel.send({"error": ["NameError", f"the program defines no {name!r}"]})
        continue
      try:
        answer = {"value": to_json(names[name](*args, **kwargs))}
      except NotPlainError as error:
        answer = {"error": ["TypeError", str(error)]}
      except Exception as error:  # noqa: BLE001 (the program may raise anything)
        answer = {"error": [type(error).__name__, str(error)]}
      channel.send(answer)


class ProgramEnded(BaseException):
  """The program has ended or sent an invalid message; derived so that no check catches it."""


def judge(order: dict) -> None:
  """Runs the check, and writes {"passed": ..., "reason": ...} to a pipe of its own."""
  channel = Channel(order)
  verdict = os.fdopen(os.dup(1), "w")
  with open(os.devnull, "w") as nothing:
    os.dup2(nothing.fileno(), 1)

  def ask(message=None):
    try:
      if message is not None:
        channel.send(message)
      return channel.receive()
    except (OSError, EOFError, ValueError, RecursionError) as error:
      raise ProgramEnded from error

  def call(name: str, *args, **kwargs):
    answer = ask(to_json([name, list(args), kwargs]))
    match answer:
      case {"value": value}:
        return from_json(value)
      case {"error": [str(kind), str(text)]}:
        known = getattr(builtins, kind, None)
        usable = isinstance(known, type) and issubclass(known, Exception)
        raise (known if usable and not issubclass(known, UnicodeError) else RuntimeError)(text)
    raise NotPlainError("what the program sent is no answer")

  def look_up(name: str):
    if name.startswith("__"):  # The import system asks a module for such names.
      raise AttributeError(name)
    return lambda *args, **kwargs: call(name, *args, **kwargs)

  module = types.ModuleType("program")
  module.__getattr__ = look_up
  sys.modules["program"] = module
  found = {"passed": False, "reason": ""}
  try:
    if ask() != "ready":
      raise ProgramEnded
    exec(compile(order["code"], "check.py", "exec"), {"__name__": "__main__"})
    found["passed"] = True
  except ProgramEnded:
    pass  # The program's own status says why.
  except BaseException as error:  # noqa: BLE001 (a check may raise anything)
    found["reason"] = traceback.format_exception_only(error)[-1].strip()
  json.dump(found, verdict)
  verdict.flush()


def main(confine, order: dict) -> None:
  """Runs one of the two processes; `confine(folder, paths)` confines it by the kernel."""
  with open(os.devnull) as nothing:
    os.dup2(nothing.fileno(), 0)
  limit(order)
  confine(order["folder"], order["readable"])
  refuse(order["folder"])
  # The program's imports are looked for in its directory.
  sys.path[0:0] = [order["folder"]]
  {"program": serve, "judge": judge}[order["role"]](order)
