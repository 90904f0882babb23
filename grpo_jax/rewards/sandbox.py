"""The command that runs another in a sandbox, by bubblewrap."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence

from grpo_jax.rewards.harness import MACHINES, seccomp_filter

SCRATCH = 32 * 2**20  # bytes of files in /tmp
INODES = 1000  # files and folders in /tmp; each takes the kernel's memory, an empty one too
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

# In mounts of its own, before bubblewrap: it can limit neither the files of a tmpfs, nor who changes the mode and the
# times of a device, which is the host's own. (Its read-only mounts have no devices; these have, and stay read-only.)
STAGE = f"""
mount -t tmpfs -o size={SCRATCH},nr_inodes={INODES},mode=0700 scratch /sys || exit 1
for device in {" ".join(DEVICES)}; do
    mount --bind $device $device && mount -o remount,bind,ro $device || exit 1
done
printf '%b' "$1" > /sys/filter && exec 9< /sys/filter && rm /sys/filter || exit 1
shift
exec "$@"
"""


def bubblewrap(read: Sequence[str] = (), *, processes: bool = True) -> list[str]:
    """The beginning of a command line that runs the rest of it in a sandbox, for Linux.

    The program has no network, sees no other processes, and has no environment but a
    locale and a `PATH`. It sees `/usr` and the paths in `read`, read-only, the null and
    random devices, and an empty `/tmp` of its own, of 32 MiB and 1000 files, where it starts. There is no
    `/proc` and no home. It has no privileges, cannot gain any, and is killed, with
    its children, when its parent is. On x86_64 and aarch64 the kernel refuses it calls that it has no use for
    (`harness.seccomp_filter`), such as `flock`. It does not limit memory: programs in it do that first
    (`harness.confine`, `rewards.pool`).

    Args:
      read: files and folders to show, at their own paths.
      processes: False refuses the program new processes, on the machines where the kernel does; threads are allowed.

    Raises:
      ValueError: if bubblewrap is missing or cannot make a sandbox here; the message says why.
    """
    bwrap, unshare = shutil.which("bwrap"), shutil.which("unshare")
    if bwrap is None:
        raise ValueError("there is no bubblewrap here: install the package bubblewrap (Debian: apt install bubblewrap)")
    if unshare is None or shutil.which("mount") is None:
        raise ValueError("there is no unshare or no mount here: install util-linux (Debian: apt install mount)")
    known = sys.platform == "linux" and platform.machine() in MACHINES
    calls = seccomp_filter(platform.machine(), processes=processes) if known else b""
    command = [unshare, "--user", "--map-root-user", "--mount", "/bin/sh", "-c", STAGE, "sh"]
    command += ["".join(f"\\0{byte:03o}" for byte in calls)]
    command += [
        bwrap,
        *(["--seccomp", "9"] if known else []),
        "--unshare-all",
        "--unshare-user",
        "--disable-userns",
        "--uid",
        "65534",
        "--gid",
        "65534",
    ]
    command += ["--cap-drop", "ALL", "--die-with-parent", "--new-session", "--clearenv"]
    command += ["--setenv", "LANG", "C.UTF-8", "--setenv", "PATH", "/usr/bin", "--setenv", "HOME", "/tmp"]
    command += ["--setenv", "PYTHONHASHSEED", "0", "--ro-bind", "/usr", "/usr"]
    for folder in ("/bin", "/lib", "/lib32", "/lib64", "/sbin"):
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            command += ["--ro-bind", folder, folder]
    for device in DEVICES:
        command += ["--dev-bind", device, device]
    command += ["--bind", "/sys", "/tmp"]
    for path in dict.fromkeys(path for path in read if not path.startswith("/usr/")):
        command += ["--ro-bind", path, path]
    # The root is a file system in memory too, in which files would have no limit.
    command += ["--remount-ro", "/", "--chdir", "/tmp"]
    trial = subprocess.run([*command, "/usr/bin/env"], capture_output=True, text=True, timeout=60, env={})
    if trial.returncode:
        reason = trial.stderr.strip()
        raise ValueError(f"bubblewrap cannot make a sandbox here (are user namespaces allowed?): {reason}")
    return command
