"""The quickstart: to its end (minutes), and interrupted."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment
from fed_run import PATIENCE_S, wait_until

from wsft import AtroposBatchProcessor

RUN = ROOT / "runs" / "quickstart"


def processes_of(mark):
    """Command lines of the processes that carry the mark in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # gone, or not ours
            continue
    return found


def start(**variables):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    environment = clean_environment(**variables)
    return subprocess.Popen(["bash", "launch/quickstart.sh"], cwd=ROOT, env=environment, start_new_session=True, **pipes)


@pytest.mark.parametrize(
    "signal_number, code", [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_an_interrupted_quickstart_leaves_no_process(signal_number, code):
    mark = f"WSFT_TEST_MARK={os.getpid()}-{signal_number}"
    quickstart = start(STEPS="100000", WSFT_TEST_MARK=mark.split("=")[1])
    for line in quickstart.stdout:
        if line.startswith("Atropos server on port"):  # the environment is started, too, and the ranks are next
            break
    for process in ("uvicorn", "train.py"):  # the server may have been forked, and not yet be running
        wait_until(lambda process=process: any(process in command for command in processes_of(mark)))
    quickstart.send_signal(signal_number)
    quickstart.communicate(timeout=PATIENCE_S)
    assert quickstart.returncode == code
    wait_until(lambda: not processes_of(mark))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstart_teaches_and_runs_twice():
    for _ in range(2):
        quickstart = start()
        output, _ = quickstart.communicate()
        assert quickstart.returncode == 0, output
        assert "favoured tokens became likelier, disfavoured ones less likely" in output
        assert "Traceback" not in output and "Warning" not in output
        steps = [json.loads(line) for line in (RUN / "metrics.jsonl").open()]
        assert [s["step"] for s in steps] == list(range(1, 11)) and (RUN / "report.html").stat().st_size > 1_000_000
        assert "look at a batch: runs/quickstart/inspect.html" in output and (RUN / "inspect.html").stat().st_size > 20_000
        groups = [json.loads(line) for line in (RUN / "groups.jsonl").open()]
        assert not AtroposBatchProcessor().process_atropos_batch(groups).rejected
