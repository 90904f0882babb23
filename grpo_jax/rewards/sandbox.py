"""The command that runs another in a sandbox, by bubblewrap."""

import os
import shutil
import subprocess
from collections.abc import Sequence

SCRATCH = 32 * 2**20  # bytes of files in /tmp


def bubblewrap(read: Sequence[str] = ()) -> list[str]:
    """The beginning of a command line that runs the rest of it in a sandbox, for Linux.

    The program has no network, no other processes in mask_inputs, and no environment but a
    locale and a `PATH`. It sees `/usr` and what is named in `read`, read-only, the null and
    random devices, and an empty `/tmp` of its own, of 32 MiB, where it starts. There is no
    `/proc` and no home. It has no privileges, cannot gain any, and is killed, with
    whatever it started, when the one who started it is. It does not limit memory or processes:
    what runs in it does that first (`harness.confine`).

    Args:
      read: files and folders to show, at their own paths.

    Raises:
      ValueError: if bubblewrap is missing or cannot make a sandbox here; the message says why.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise ValueError("there is no bubblewrap here: install the package bubblewrap (Debian: apt install bubblewrap)")
    command = [bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534"]
    command += ["--cap-drop", "ALL", "--die-with-parent", "--new-session", "--clearenv"]
    command += ["--setenv", "LANG", "C.UTF-8", "--setenv", "PATH", "/usr/bin", "--setenv", "HOME", "/tmp"]
    command += ["--setenv", "PYTHONHASHSEED", "0", "--ro-bind", "/usr", "/usr"]
    for folder in ("/bin", "/lib", "/lib32", "/lib64", "/sbin"):
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            command += ["--ro-bind", folder, folder]
    for device in ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"):
        command += ["--dev-bind", device, device]
    command += ["--size", str(SCRATCH), "--tmpfs", "/tmp"]
    for path in dict.fromkeys(path for path in read if not path.startswith("/usr/")):
        command += ["--ro-bind", path, path]
    # The root is a file system in memory too, in which files would have no limit.
    command += ["--remount-ro", "/", "--chdir", "/tmp"]
    trial = subprocess.run([*command, "/usr/bin/env"], capture_output=True, text=True, timeout=60, env={})
    if trial.returncode:
        reason = trial.stderr.strip()
        raise ValueError(f"bubblewrap cannot make a sandbox here (are user namespaces allowed?): {reason}")
    return command
