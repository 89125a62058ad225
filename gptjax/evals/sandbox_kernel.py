"""Confines a process of a sandbox by the Linux kernel: files by Landlock, the rest by a filter of
system calls (seccomp). It needs only the standard library.

Each is used if the kernel has it; `sandbox.probe` tests whether that is enough.
"""

import ctypes
import errno
import os
import struct
import sys

# From linux/landlock.h: system calls, the same on all architectures, and the rights.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIRECTORY = 1, 1 << 1, 1 << 2, 1 << 3
_MAKE_AND_REMOVE = sum(1 << bit for bit in range(4, 13))
_REFER, _TRUNCATE = 1 << 13, 1 << 14  # Since versions 2 and 3.
_READ = _EXECUTE | _READ_FILE | _READ_DIRECTORY
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
_NO_NEW_PRIVILEGES = 38  # PR_SET_NO_NEW_PRIVS
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

# From linux/seccomp.h, linux/filter.h and linux/audit.h.
_SET_FILTER = (22, 2)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
_LOAD, _IF_EQUAL, _IF_ABOVE, _IF_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _FAIL, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_CLONE_THREAD, _CLONE3, _X32 = 0x10000, 435, 0x40000000
# Requests of ioctl: flags of a file (FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR), and fake input of a
# terminal (TIOCSTI).
_REQUESTS = (0x40086602, 0x401C5820, 0x5412)
_CALL, _ARGUMENTS, _MACHINE = 0, (16, 24), 4  # Offsets in the filter's input (seccomp_data).

# By machine: its number, clone, kill, tgkill, prlimit64, ioctl, and calls that are always refused.
_MACHINES = {
  "x86_64": (
    0xC000003E,
    *(56, 62, 234, 302, 16),
    (
      *(57, 58, 59, 322, 109, 112),  # fork, vfork, execve, execveat, setpgid, setsid
      *(200, 129, 297, 101, 310, 311, 312),  # tkill, rt_(tg)sigqueueinfo, ptrace, process_vm, kcmp
      *(142, 144, 203, 314, 141, 251, 256, 279),  # priorities, affinity, pages of others
      *(90, 91, 268, 92, 93, 94, 260),  # chmod and chown of all kinds
      *(132, 235, 261, 280),  # utime, utimes, futimesat, utimensat
      *(188, 189, 190, 197, 198, 199),  # setxattr, removexattr
      *(86, 265),  # link, linkat
      *(41, 42, 49, 50),  # socket, connect, bind, listen
      *(29, 30, 31, 64, 65, 66, 220, 68, 69, 70, 71, 240, 241),  # IPC of System V, queues of POSIX
      *(272, 308, 165, 166, 155, 161),  # unshare, setns, mount, umount2, pivot_root, chroot
      *(248, 249, 250, 321, 298, 323, 303, 304, 135),  # keys, bpf, perf, userfaultfd, handles
    ),
  ),
  "aarch64": (
    0xC00000B7,
    *(220, 129, 131, 261, 29),
    (
      *(221, 281, 154, 157),
      *(130, 138, 240, 117, 270, 271, 272),
      *(118, 119, 122, 274, 140, 30, 238, 239),
      *(52, 53, 54, 55),
      88,
      *(5, 6, 7, 14, 15, 16),
      37,
      *(198, 203, 200, 201),
      *(194, 195, 196, 190, 191, 192, 193, 186, 187, 188, 189, 180, 181),
      *(97, 268, 40, 39, 41, 51),
      *(217, 218, 219, 280, 241, 282, 264, 265, 92),
    ),
  ),
}
# The same everywhere: io_uring, pidfd, mounts by handles, process_madvise, fchmodat2, xattrat.
_NEWER = (*range(425, 428), *range(428, 434), 424, 434, 438, 440, 442, 452, 463, 466)


def confine(folder: str, readable: list[str]) -> None:
  """Makes the kernel refuse all but reading some paths, writing in a folder, and computing."""
  if sys.platform != "linux":
    return
  ctypes.CDLL(None).prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
  _confine_files(folder, readable)
  _confine_calls()


def _confine_files(folder: str, readable: list[str]) -> None:
  call = ctypes.CDLL(None, use_errno=True).syscall
  version = call(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
  if version < 1:
    return
  rights = _READ | _WRITE_FILE | _MAKE_AND_REMOVE
  rights |= (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
  handled = ctypes.c_uint64(rights)
  rules = call(_CREATE_RULESET, ctypes.byref(handled), ctypes.c_size_t(8), 0)
  allowed = dict.fromkeys(readable, _READ) | dict.fromkeys(_DEVICES, rights) | {folder: rights}
  for path, allows in allowed.items():
    if not os.path.exists(path):
      continue
    opened = os.open(path, os.O_PATH)
    allows &= rights if os.path.isdir(path) else rights & _OF_FILES
    rule = allows.to_bytes(8, sys.byteorder) + opened.to_bytes(4, sys.byteorder)
    call(_ADD_RULE, rules, _PATH_BENEATH, rule, 0)
    os.close(opened)
  call(_RESTRICT_SELF, rules, 0)
  os.close(rules)


def _confine_calls() -> None:
  """Forbids starting processes (not threads), reaching others, and changes that Landlock allows."""
  if os.uname().machine not in _MACHINES:
    return
  machine, clone, kill, tgkill, prlimit, ioctl, refused = _MACHINES[os.uname().machine]
  fail = _RETURN, 0, 0, _FAIL | errno.EPERM
  allow = _RETURN, 0, 0, _ALLOW
  # (operation, instructions to skip if true, to skip if false, operand).
  steps = [(_LOAD, 0, 0, _MACHINE), (_IF_EQUAL, 1, 0, machine), (_RETURN, 0, 0, _KILL)]
  steps += [(_LOAD, 0, 0, _CALL), (_IF_ABOVE, 0, 1, _X32), fail]
  for number in (*refused, *_NEWER):
    steps += [(_IF_EQUAL, 0, 1, number), fail]
  # The flags of clone3 are behind a pointer. Without it, the C library takes `clone`.
  steps += [(_IF_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _FAIL | errno.ENOSYS)]
  steps += [(_IF_EQUAL, 0, 4, clone), (_LOAD, 0, 0, _ARGUMENTS[0])]
  steps += [(_IF_BITS, 1, 0, _CLONE_THREAD), fail, allow]
  own = os.getpid()
  for number, ids in ((kill, (own,)), (tgkill, (own,)), (prlimit, (0, own))):
    steps += [(_IF_EQUAL, 0, 3 + len(ids), number), (_LOAD, 0, 0, _ARGUMENTS[0])]
    steps += [(_IF_EQUAL, len(ids) - i, 0, one) for i, one in enumerate(ids)]
    steps += [fail, allow]
  steps += [(_IF_EQUAL, 0, 3 + len(_REQUESTS), ioctl), (_LOAD, 0, 0, _ARGUMENTS[1])]
  steps += [(_IF_EQUAL, len(_REQUESTS) - i, 0, one) for i, one in enumerate(_REQUESTS)]
  steps += [allow, fail, allow]
  code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
  program = struct.pack("@HP", len(steps), ctypes.addressof(code))
  ctypes.CDLL(None).prctl(*_SET_FILTER, program)
