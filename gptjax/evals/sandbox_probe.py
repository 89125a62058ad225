"""A program that tries to get out of a sandbox: it prints each forbidden thing that it could do,
and at last 'done'. `told`, defined before it: a file, two sockets and the process of the caller.

It uses the C library, which no hook of Python watches.
"""
# ruff: noqa: F821

import ctypes
import os
import struct

c = ctypes.CDLL(None, use_errno=True)
victim = told["victim"].encode()
INET, UNIX, STREAM, LIMIT_CORE = 2, 1, 1, 4
KEY, SIZE, MAKE = 0x67707478, ctypes.c_size_t(4096), 0o1666  # For shared memory.


def connects(family, address):
  handle = c.socket(family, STREAM, 0)
  return handle >= 0 and c.connect(handle, address, len(address)) == 0


def forks():
  child = c.fork()
  if child == 0:
    os._exit(0)
  return child > 0


def reads_by_handle():
  return c.openat(c.open(b"/", os.O_PATH), victim[1:], os.O_RDONLY) >= 0


def shares_memory():
  made = c.shmget(KEY, SIZE, MAKE)
  c.shmctl(made, 0, None)  # Removes it.
  return made >= 0


attempts = {
  "read files of the user": lambda: c.open(victim, os.O_RDONLY) >= 0 or reads_by_handle(),
  "write files of the user": lambda: c.open(victim, os.O_WRONLY) >= 0,
  "cut files of the user short": lambda: c.truncate(victim, ctypes.c_long(0)) == 0,
  "make files elsewhere": lambda: c.open(victim + b"2", os.O_CREAT | os.O_WRONLY, 0o600) >= 0,
  "change modes": lambda: c.chmod(victim, 0o777) == 0 or c.fchmodat(-100, victim, 0o777, 0) == 0,
  "change owners": lambda: c.chown(victim, os.getuid(), os.getgid()) == 0,
  "change times": lambda: c.utimes(victim, None) == 0,
  "change attributes": lambda: c.setxattr(victim, b"user.x", b"x", ctypes.c_size_t(1), 0) == 0,
  "link files elsewhere": lambda: c.link(victim, b"linked") == 0,
  "send signals to other processes": lambda: c.kill(told["pid"], 0) == 0,
  "change limits of other processes": lambda: (
    c.prlimit(told["pid"], LIMIT_CORE, None, ctypes.create_string_buffer(16)) == 0
  ),
  "start processes": forks,
  "connect to this machine": lambda: connects(
    INET, struct.pack("=HH4s8x", INET, told["port"] >> 8 | (told["port"] & 255) << 8, b"\x7f\0\0\1")
  ),
  "connect to sockets of Unix": lambda: connects(
    UNIX, struct.pack("=H", UNIX) + told["socket"].encode() + b"\0"
  ),
  "share memory with other processes": shares_memory,
  "remove files elsewhere": lambda: c.unlink(victim) == 0,
}
for name, attempt in attempts.items():
  if attempt():
    print(name)
print("done")
