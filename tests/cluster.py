"""Two hosts made of namespaces, and runs on them that wait for the test: fixtures, by `pytest_plugins = ["cluster"]`."""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT, clean_environment, make_group, run_ranks, write_groups
from debian import have
from fed_run import PATIENCE_S, fed, flags
from safetensors.torch import load_file

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge", "openssh-server", "openssh-client", "pdsh", "iproute2"]
NEEDED = ["slurmctld", "slurmd", "sbatch", "munged", "/usr/sbin/sshd", "pdsh", "ip"]
STEPS = 20
CLONE_NEWNET = 0x40000000
DS = {
    "optimizer": {"type": "SGD", "params": {"lr": "auto", "momentum": 0.9}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


class Cluster:
    """node1 and node2, by tests/cluster.sh; its folder's name tells them from those of another cluster."""

    def __init__(self, folder):
        self.folder = folder
        self.path = f"{Path(sys.executable).parent}:/usr/sbin:{os.environ['PATH']}"

    def do(self, what, *more):
        subprocess.run(["bash", "tests/cluster.sh", what, str(self.folder), *more], cwd=ROOT, check=True, timeout=PATIENCE_S)

    def start(self, node, *command, output=None, **more):
        """The process of a command on a node."""
        words = ["nsenter", "-t", (self.folder / f"{node}.pid").read_text().strip(), "-n", "-u", "-p", "-i", "-m"]
        env = clean_environment(PATH=self.path, SLURM_CONF=str(self.folder / "slurm.conf")) | more
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(output.open("w")) if output else subprocess.DEVNULL
            words += [f"--wd={ROOT}", "--", *map(str, command)]
            return subprocess.Popen(words, env=env, cwd=ROOT, stdout=file, stderr=file, stdin=subprocess.DEVNULL)

    def on(self, node, *command, timeout=PATIENCE_S, **more):
        """Its exit code and output."""
        output = self.folder / "output.txt"
        process = self.start(node, *command, output=output, **more)
        try:
            return process.wait(timeout), output.read_text()
        finally:
            process.kill()

    @contextlib.contextmanager
    def network_of(self, node):
        """What this thread starts and connects to meanwhile is on the node's network."""
        setns = ctypes.CDLL(None, use_errno=True).setns
        pid = (self.folder / f"{node}.pid").read_text().strip()
        with open("/proc/thread-self/ns/net") as here, open(f"/proc/{pid}/ns/net") as there:
            assert setns(there.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert setns(here.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())

    def processes(self, node, words):
        """On a node, those with the words in their command line."""
        pids = subprocess.run(
            ["ip", "netns", "pids", f"{self.folder.name}-{node}"], capture_output=True, text=True, check=True
        ).stdout.split()
        found = []
        for pid in map(int, pids):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if words in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def runs(self):
        return [
            p for node in ("node1", "node2") for p in self.processes(node, "train.py") + self.processes(node, "single_node")
        ]


@pytest.fixture(scope="module")
def cluster(request, tmp_path_factory):
    """One for each file, at the same time as those of other files."""
    if os.geteuid():
        pytest.skip("two hosts and a SLURM are made by root")
    if not have(NEEDED, PACKAGES):
        pytest.skip(f"needs {' '.join(PACKAGES)}, and apt cannot install them here")
    made = Cluster(tmp_path_factory.mktemp(request.module.__name__.removeprefix("test_")))
    made.do("down")  # what a run that was killed left
    try:
        made.do("up")
    except subprocess.CalledProcessError:
        made.do("down")
        pytest.skip("no hosts out of namespaces here: `bash tests/cluster.sh up DIR` says why")
    yield made
    made.do("down")


@pytest.fixture(scope="module")
def shared(tiny_model, tmp_path_factory):
    """Settings of a run, its groups, and the parameters that one process comes to with them."""
    import numpy as np

    folder, rng = tmp_path_factory.mktemp("shared"), np.random.default_rng(0)
    groups = [make_group(rng, [5, 9, 4, 12]) for _ in range(STEPS)]
    data = write_groups(folder / "data.jsonl", groups)
    (folder / "ds.json").write_text(json.dumps(DS))
    settings = dict(model_name=tiny_model, data=data, deepspeed=folder / "ds.json", batch_size=4, device="cpu")
    settings |= dict(learning_rate=0.01, training_steps=STEPS, save_steps=1000)
    ((code, output),) = run_ranks(["train.py", *flags(settings, output_dir=folder / "alone")], 1)
    assert code == 0, output
    alone, start = (load_file(f"{path}/model.safetensors") for path in (folder / "alone" / "final", tiny_model))
    return SimpleNamespace(settings=settings, groups=groups, alone=alone, start=start)


@pytest.fixture
def settings(shared, tmp_path):
    """Of a run from a file."""
    return shared.settings | {"output_dir": tmp_path / "run"}


@pytest.fixture
def feeder(cluster, shared, tmp_path):
    """Of an Atropos server on node1; it has released nothing."""
    with contextlib.ExitStack() as opened:
        with cluster.network_of("node1"):
            _, feeder = opened.enter_context(fed(tmp_path / "run", shared.groups, released=0))
        yield feeder


@pytest.fixture
def fed_settings(settings, feeder):
    """Of a run that trains what the feeder releases, and can neither go on nor end before."""
    return {name: value for name, value in settings.items() if name != "data"} | {"atropos_url": feeder.url}


def assert_as_one_process(folder, shared):
    found = load_file(folder / "final" / "model.safetensors")
    for name, value in shared.alone.items():
        assert ((found[name] - value).norm() / value.norm()).item() < 1e-5, name
        assert not torch.equal(value, shared.start[name])
