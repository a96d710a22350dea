"""Debian's packages for the tests, where root can install them: by one test process at a time, as apt wants it."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path


def have(programs: list[str], packages: list[str]) -> bool:
    """Whether the programs are there, if need be after installing the packages."""
    with (Path(tempfile.gettempdir()) / "wsft-tests-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all(map(shutil.which, programs)) and os.geteuid() == 0 and shutil.which("apt-get"):
            env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            for words in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
                subprocess.run(["apt-get", "-qq", *words], env=env, stdout=subprocess.DEVNULL, timeout=500, check=False)
        return all(map(shutil.which, programs))
