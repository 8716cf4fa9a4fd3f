"""The process of the command line: how it starts, how Ctrl-C interrupts it, and how it ends."""

import contextlib
import os
import platform
import signal
import socket
import sys
import threading
import time

HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"


def restart_with_huge_pages():
  """Restarts this Python program, once, so that its large arrays lie in huge pages of memory.

  XLA's CPU backend allocates its temporaries anew in every step; with pages of 4 KiB a training step of a 33 M
  parameter network spends a sixth of its time on page faults. The C library reads the setting when a process starts,
  hence the restart, which keeps the process id and takes a few hundredths of a second. Nothing happens if the setting
  is there already (GLIBC_TUNABLES), if the kernel does not leave the choice to programs, without glibc, or in IPython.
  """
  tunables = os.environ.get("GLIBC_TUNABLES", "")
  if "glibc.malloc.hugetlb" in tunables or platform.libc_ver()[0] != "glibc" or not os.path.exists(HUGE_PAGES):
    return
  if "IPython" in sys.modules:  # a notebook or a shell, whose variables would be lost
    return
  with open(HUGE_PAGES, encoding="ascii") as file:
    if "[madvise]" not in file.read():
      return
  os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, "glibc.malloc.hugetlb=1"]))
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


HARMLESS = ("MainThread", "interrupts", "tqdm_monitor")  # threads that wait without JAX
SAME_INTERRUPT = 0.5  # seconds within which two signals are one Ctrl-C, that a launcher has passed on


def end_on_second_interrupt():
  """Has a second Ctrl-C end the process at once.

  The first one ends it in order, but only when Python comes to it, and a compilation can take minutes; then a save that
  has begun is waited for.
  """
  if "IPython" in sys.modules:  # whose signals are not ours
    return
  received, sent = socket.socketpair()
  sent.setblocking(False)
  signal.set_wakeup_fd(sent.fileno(), warn_on_full_buffer=False)
  # The thread needs `sent` only to keep it open.
  threading.Thread(target=_count_interrupts, args=(received, sent), name="interrupts", daemon=True).start()


def _count_interrupts(received: socket.socket, sent: socket.socket):
  first = None
  while number := received.recv(1):
    if number[0] != signal.SIGINT:
      continue
    first = first or time.monotonic()
    if time.monotonic() - first > SAME_INTERRUPT:
      os._exit(128 + signal.SIGINT)


def end_process(error: BaseException):
  """Ends the process as Python does after an exception, but without the threads that are left.

  One that waits, for a slow disk say, would delay the end; one that works with JAX meanwhile would abort it.
  """
  if "IPython" in sys.modules:  # of a notebook or a shell, which goes on
    raise error
  if isinstance(error, KeyboardInterrupt):
    print("interrupted", file=sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)  # a shell then ends its script, too
  if not [
    thread for thread in threading.enumerate() if thread.name not in ("MainThread", "interrupts", "tqdm_monitor")
  ]:
    raise error
  status = error.code or 0 if isinstance(error, SystemExit) else 1
  if not isinstance(error, SystemExit):
    sys.excepthook(type(error), error, error.__traceback__)
  elif not isinstance(status, int):
    print(status, file=sys.stderr)
    status = 1
  with contextlib.suppress(OSError):  # of a pipe that nobody reads
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(status)
