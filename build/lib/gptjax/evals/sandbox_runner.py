"""What the process of a sandbox starts with: it limits itself, then runs the program on its stdin.

It needs the standard library alone, and is not to be imported.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
import traceback

# From linux/landlock.h: system calls, the same on all architectures, and what writing is.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PATH_BENEATH = 1
_WRITE = sum(1 << bit for bit in (1, *range(4, 13)))  # Write, remove and make files.
_REFER, _TRUNCATE = 1 << 13, 1 << 14  # Since versions 2 and 3.
_NO_NEW_PRIVILEGES = 38  # PR_SET_NO_NEW_PRIVS

# From linux/seccomp.h, linux/filter.h and linux/audit.h.
_SET_FILTER = (22, 2)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
_LOAD, _IF_EQUAL, _IF_ABOVE, _IF_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _FAIL, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_CLONE_THREAD, _CLONE3, _X32 = 0x10000, 435, 0x40000000
# By machine: what the filter calls it, clone, and what else starts or leaves a process group: fork,
# vfork, execve, execveat, setpgid, setsid.
_PROCESS_CALLS = {
  "x86_64": (0xC000003E, 56, (57, 58, 59, 322, 109, 112)),
  "aarch64": (0xC00000B7, 220, (221, 281, 154, 157)),
}

_MOST_PROCESSES, _MOST_FILES = 64, 64
_STARTS_PROCESSES = ("os.fork", "os.forkpty", "os.system", "os.exec", "os.posix_spawn", "os.spawn")
_CHANGES_FILES = (
  "os.chmod",
  "os.chown",
  "os.link",
  "os.mkdir",
  "os.remove",
  "os.removexattr",
  "os.rename",
  "os.rmdir",
  "os.setxattr",
  "os.symlink",
  "os.truncate",
  "os.utime",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit(settings: dict) -> None:
  # The first process of a namespace of ids gets no signal that it does not handle.
  signal.signal(signal.SIGXCPU, lambda number, _: os._exit(128 + number))
  limits = {
    resource.RLIMIT_CPU: settings["cpu_seconds"],
    resource.RLIMIT_AS: settings["memory_bytes"],
    resource.RLIMIT_FSIZE: settings["file_bytes"],
    resource.RLIMIT_NOFILE: _MOST_FILES,
    resource.RLIMIT_NPROC: _MOST_PROCESSES,
    resource.RLIMIT_CORE: 0,
  }
  for kind, most in limits.items():
    # macOS has no address space to limit.
    with contextlib.suppress(ValueError, OSError):
      # The hard limit of processor time is a second later, and SIGKILL.
      resource.setrlimit(kind, (most, most + (kind == resource.RLIMIT_CPU)))


def confine_writing(folder: str) -> None:
  """Lets the kernel refuse to write outside of a folder, where it is Linux 5.13 or later."""
  if sys.platform != "linux":
    return
  call = ctypes.CDLL(None, use_errno=True).syscall
  version = call(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
  if version < 1:
    return
  rights = _WRITE | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
  handled = ctypes.c_uint64(rights)
  rules = call(_CREATE_RULESET, ctypes.byref(handled), ctypes.c_size_t(8), 0)
  for path in (folder, "/dev/null"):
    opened = os.open(path, os.O_PATH)
    # Of a file that is no directory, writing and truncating alone can be allowed.
    allowed = rights if os.path.isdir(path) else rights & (1 << 1 | _TRUNCATE)
    rule = allowed.to_bytes(8, sys.byteorder) + opened.to_bytes(4, sys.byteorder)
    call(_ADD_RULE, rules, _PATH_BENEATH, rule, 0)
    os.close(opened)
  ctypes.CDLL(None).prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
  call(_RESTRICT_SELF, rules, 0)
  os.close(rules)


def confine_processes() -> None:
  """Lets the kernel refuse to start processes, but not threads, on Linux. A limit of their number
  does not hold for root."""
  if sys.platform != "linux" or os.uname().machine not in _PROCESS_CALLS:
    return
  machine, clone, refused = _PROCESS_CALLS[os.uname().machine]
  fail = _RETURN, 0, 0, _FAIL | errno.EPERM
  # (what, jump if so, jump if not, operand); 4 is where the machine is, 0 the call, 16 its flags.
  steps = [(_LOAD, 0, 0, 4), (_IF_EQUAL, 1, 0, machine), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
  for call in refused:
    steps += [(_IF_EQUAL, 0, 1, call), fail]
  steps += [(_IF_ABOVE, 0, 1, _X32), fail]
  # Its flags are behind a pointer. Without it, the C library takes `clone`.
  steps += [(_IF_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _FAIL | errno.ENOSYS)]
  steps += [(_IF_EQUAL, 0, 3, clone), (_LOAD, 0, 0, 16), (_IF_BITS, 1, 0, _CLONE_THREAD), fail]
  steps += [(_RETURN, 0, 0, _ALLOW)]
  code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
  program = struct.pack("@HP", len(steps), ctypes.addressof(code))
  control = ctypes.CDLL(None).prctl
  control(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
  control(*_SET_FILTER, program)


def refuse(folder: str) -> None:
  """Adds the hook that refuses in a sentence what the program has no business doing."""
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


def main() -> None:
  settings = json.load(sys.stdin)
  with open(os.devnull) as nothing:
    os.dup2(nothing.fileno(), 0)
  limit(settings)
  confine_writing(settings["folder"])
  confine_processes()
  refuse(settings["folder"])
  # Imports of the program's own are looked for in its directory, not beside this file.
  sys.path[0:0] = [settings["folder"]]
  try:
    exec(compile(settings["program"], "program.py", "exec"), {"__name__": "__main__"})
  except MemoryError:
    # A traceback could need the memory that is not there.
    os.write(2, b"\nMemoryError\n")
    os._exit(1)
  except Exception:  # noqa: BLE001 (the program may raise anything)
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)
  sys.stdout.flush()
  os.write(1, settings["token"].encode())


if __name__ == "__main__":
  main()
