"""Trains to step 5, meets a full disk, and trains on when there is room: the arguments are a case, a folder, and keys.

The case "a small disk" mounts one for this process alone, which is gone with it; what was on it is copied into the
folder. "a quota" limits the size of a file. Each training is a process of its own.
"""

import ctypes
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from unetgn.training.train import main

NOT_PERMITTED = 77
NEW_NAMESPACES = 0x10000000 | 0x00020000  # CLONE_NEWUSER | CLONE_NEWNS


def mount(*options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(disk)], check=True, stdin=subprocess.DEVNULL)


def become_root_of_a_namespace() -> None:
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_NAMESPACES):
        sys.exit(NOT_PERMITTED)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def train(*more: str, file_size: int = resource.RLIM_INFINITY) -> int:
    """Train in a forked process, whose files may have so many bytes. Returns the exit code."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
        code = main([*keys, *more])
        sys.stdout.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


case, out, *keys = sys.argv[1:]
disk = Path(out) / "disk"
disk.mkdir()
if case == "a small disk":  # two checkpoints of 700 KiB do not fit, and then they do
    become_root_of_a_namespace()
    mount("-o", "size=1200k")
os.chdir(disk)
begun = train("train.steps=5")
full = train(file_size=200 * 512 if case == "a quota" else resource.RLIM_INFINITY)
shutil.copytree("run", Path(out) / "full")
if case == "a small disk":
    mount("-o", "remount,size=64m")
after = train()
shutil.copytree("run", Path(out) / "after")
print("codes:", begun, full, after)
