"""Used by launch/multi_node.sh: checks every host, starts launch/single_node.sh on each by pdsh, forwards output and signals.

    python launch/hosts.py OUTPUT_DIR HOSTFILE [settings of train.py]

Runs in the project's folder, which must be at the same path on every host, on a shared file system.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from wsft.config import WeightedSFTConfig, without_password
from wsft.errors import UserError

PACKAGES = ("torch", "deepspeed", "transformers", "numpy")
# environment variables to pass to the ranks, except those that look secret
HANDED_OVER = re.compile(
    r"PATH|LD_LIBRARY_PATH|XDG_CACHE_HOME|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|"
    r"(HTTPS?|ALL|NO)_PROXY|(https?|all|no)_proxy|"
    r"(PYTHON|NCCL_|GLOO_|UCX_|FI_|TORCH|PYTORCH_|CUDA_|CUBLAS_|CUDNN_|NVIDIA_|TRITON_|HF_|TRANSFORMERS_|TOKENIZERS_|OMP_|MKL_|"
    r"ONEDNN_|MALLOC_|DS_|DEEPSPEED_|WANDB_)\w*"
)
NETWORK = ("NCCL_", "GLOO_", "UCX_", "FI_")  # not secret: NCCL_IB_PKEY is a partition of InfiniBand
SECRET = re.compile(r"key|token(?!izers)|secret|passw|credential", re.IGNORECASE)
LOOK_S = 45  # time limit for the answers of hosts
PATIENCE_S = 15  # after a rank failed, until the others are ended


def main(output_dir: str, hostfile: str, arguments: list[str]) -> int:
    if not shutil.which("pdsh"):
        raise UserError("there is no pdsh here: install it (Debian: apt-get install pdsh), or use launch/slurm.sbatch")
    slots = read_hostfile(Path(hostfile))
    config = WeightedSFTConfig.from_args(arguments)
    port = int(os.environ.get("MASTER_PORT") or random.randrange(20_000, 30_000))
    logs = Path(output_dir) / "logs"
    logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_environment(logs / ".deepspeed_env")
    log(f"checking {len(slots)} hosts: {', '.join(slots)}")
    wrong = check_hosts(slots, port, logs, config)
    if wrong:
        raise UserError("nothing was started:\n  " + "\n  ".join(wrong))
    return Launch(slots, port, logs, arguments).follow()


def log(message: str) -> None:
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> slots, in the order of the file, which is DeepSpeed's."""
    if not path.is_file():
        raise UserError(f'there is no hostfile {path}: name a file with a line "host slots=8" for each host')
    slots: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, count = words[0], re.fullmatch(r"slots=([1-9]\d*)", " ".join(words[1:]))
        if not count or name in slots:
            why = "names a host again" if name in slots else 'is not "host slots=8"'
            raise UserError(f"line {number} of {path} {why}: {line.strip()!r}")
        slots[name] = int(count[1])
    if len(slots) < 2:
        raise UserError(f"{path} names {len(slots)} host(s): for one machine use launch/single_node.sh")
    if len(set(slots.values())) > 1:
        raise UserError(
            f"{path} has hosts with {' and '.join(map(str, sorted(set(slots.values()))))} slots: give all the same number"
        )
    return slots


def write_environment(path: Path) -> None:
    """Environment variables for the ranks: of this process, and from the files that DeepSpeed reads for this."""
    given = {name: value for name, value in os.environ.items() if HANDED_OVER.fullmatch(name)}
    for folder in (Path.home(), Path()):
        file = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        with contextlib.suppress(FileNotFoundError):
            given |= dict(line.split("=", 1) for line in file.read_text().splitlines() if "=" in line)
    secret = sorted(name for name, value in given.items() if is_secret(name, value))
    if secret:
        log(f"not passed on, as they look secret: {', '.join(secret)}; log in on the first host (wandb login, hf auth login)")
    path.write_text("".join(f"{name}={shlex.quote(given[name])}\n" for name in sorted(given.keys() - secret)))
    path.chmod(0o600)


def is_secret(name: str, value: str) -> bool:
    """Whether a variable looks secret by its name, or is the URL of a proxy with a password."""
    return not name.startswith(NETWORK) and (bool(SECRET.search(name)) or without_password(value) != value)


# -- checking the hosts ------------------------------------------------------------------------------------------------------


def check_hosts(slots: dict[str, int], port: int, logs: Path, config: WeightedSFTConfig) -> list[str]:
    """A sentence for each fault that would prevent the run from starting."""
    first = next(iter(slots))
    question = {"first": first, "port": port, "environment": str(logs.absolute() / ".deepspeed_env")}
    question |= {"server": None if config.data else config.atropos_url}
    named = (config.model_name, config.deepspeed)
    question |= {"files": [name for name in named if isinstance(name, str) and Path(name).exists()]}
    here = f"{shlex.quote(sys.executable)} launch/hosts.py --metadata %h {shlex.quote(json.dumps(question).replace('%', '%%'))}"
    folder = shlex.quote(os.getcwd())
    command = f"cd {folder} && test -x {shlex.quote(sys.executable)} || {{ echo absent; exit; }}; PYTHONPATH={folder} {here}"
    asked = pdsh(list(slots), command, "-u", str(LOOK_S), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, complaints = asked.communicate()
    answers = {host: {} for host in slots}
    for host, text in (line.split(": ", 1) for line in output.splitlines() if ": " in line):
        if text == "absent":
            answers[host] = {
                "wrong": [f"has no {os.getcwd()}, or no {sys.executable}: both must exist at the same paths as here"]
            }
        elif text.startswith("{"):
            answers[host] = json.loads(text)
    wrong = []
    for host, answer in answers.items():
        words = [line.split(": ", 1)[-1] for line in complaints.splitlines() if host in line and "exited with" not in line]
        reason = words[-1] if words else f"not within {LOOK_S} s"
        unreachable = f"does not answer by ssh ({reason}): start it, repair it, or leave it out of the hostfile"
        wrong += [f"{host} {sentence}" for sentence in (answer["wrong"] if answer else [unreachable])]
    compared = {host: answer["same"] for host, answer in answers.items() if "same" in answer}
    for name in next(iter(compared.values()), {}):
        found = {host: same[name] for host, same in compared.items()}
        if len(set(found.values())) > 1:
            each = ", ".join(f"{value} on {host}" for host, value in found.items())
            wrong.append(f"{name} differs between hosts: {each}; install the same on all")
    for host, answer in answers.items():
        gpus = answer.get("gpus", slots[host])
        if config.device != "cpu" and gpus < slots[host] and (gpus or config.device == "cuda" or any_gpus(answers)):
            wrong.append(f"{host} has {gpus} GPU(s), the hostfile says slots={slots[host]}")
    return wrong


def any_gpus(answers: dict[str, dict[str, Any]]) -> bool:
    return any(answer.get("gpus") for answer in answers.values())


def metadata(host: str, question: dict[str, Any]) -> dict[str, Any]:
    """Properties of this machine, which is `host` in the hostfile."""
    import torch

    code = sorted([*Path("wsft").glob("*.py"), Path("train.py")])
    same = {name: version(name) for name in PACKAGES}
    same |= {"Python": platform.python_version(), "the code": f"{zlib.crc32(b''.join(p.read_bytes() for p in code)):08x}"}
    return {"same": same, "gpus": torch.cuda.device_count(), "wrong": list(_wrong_here(host, question))}


def _wrong_here(host: str, question: dict[str, Any]) -> Iterator[str]:
    first, port = question["first"], question["port"]
    for path in [question["environment"], *question["files"]]:
        if not Path(path).exists():
            yield f"does not see {path}: it must be on a file system that all hosts share"
    with contextlib.suppress(socket.gaierror):
        address = socket.gethostbyname(socket.gethostname())
        if address.startswith("127.") and "GLOO_SOCKET_IFNAME" not in os.environ:
            yield (
                f"takes its own name {socket.gethostname()} for {address}, where no other host reaches it: give the name its "
                f"network address in /etc/hosts there, or set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) here"
            )
    if host == first:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                yield f"cannot listen on port {port} ({error.strerror}): set MASTER_PORT to another, or none"
        if question["server"]:
            yield from _server_from_here(question["server"])
        return
    try:
        socket.create_connection((first, port), timeout=5).close()
    except ConnectionRefusedError:
        pass  # reachable, though nothing listens yet
    except OSError as error:
        yield f"does not reach port {port} of {first} ({error.strerror or error}): is there a firewall, or another name?"


def _server_from_here(url: str) -> Iterator[str]:
    import requests

    from wsft.connections import proxies_for

    try:
        requests.get(f"{url.rstrip('/')}/info", timeout=10, proxies=proxies_for(url))
    except requests.RequestException as error:
        yield (
            f"does not reach the Atropos server at {without_password(url)} ({type(error).__name__}): start it, or give the "
            f"address that it has for this host with --atropos_url"
        )


# -- the run -----------------------------------------------------------------------------------------------------------------


def pdsh(hosts: list[str], command: str, *options: str, **kwargs: Any) -> subprocess.Popen:
    """Start pdsh in a session of its own, since Ctrl-C is forwarded by this process. Launchers on the hosts notice its end. The
    shell in between ends the ssh processes, which pdsh does not."""
    patience = f"-o BatchMode=yes -o ConnectTimeout=10 {os.environ.get('PDSH_SSH_ARGS_APPEND', '')}"
    env = os.environ | {"PDSH_SSH_ARGS_APPEND": patience}
    ends = "trap 'kill $(cat /proc/$!/task/*/children) $!' TERM; \"$@\" & wait $!"
    words = ["setpriv", "--pdeathsig", "TERM", "bash", "-c", ends, "bash"]
    words += ["pdsh", "-R", "ssh", "-S", "-f", str(len(hosts)), *options, "-w", ",".join(hosts), command]
    return subprocess.Popen(words, env=env, text=True, stdin=subprocess.DEVNULL, start_new_session=True, **kwargs)


class Launch:
    """One run on all hosts. Attributes: failed: rank, host and reason of the first failure, if any."""

    def __init__(self, slots: dict[str, int], port: int, logs: Path, arguments: list[str]):
        self.hosts, self.logs, per_host = list(slots), logs, next(iter(slots.values()))
        self.failed: re.Match | None = None
        self._stop_signal = 0
        given = f"WSFT_HOST=%h WSFT_FIRST_RANK=$((%n * {per_host})) NUM_GPUS={per_host} WSFT_NUM_RANKS={sum(slots.values())} "
        given += f"MASTER_ADDR={self.hosts[0]} MASTER_PORT={port}"
        script = shlex.join(["bash", "launch/single_node.sh", *arguments]).replace("%", "%%")
        environment = shlex.quote(str(logs / ".deepspeed_env")).replace("%", "%%")
        command = f"cd {shlex.quote(os.getcwd())} && set -a && . {environment} && set +a && exec env {given} {script}"
        log(f"starting {sum(slots.values())} ranks; each writes {logs}/rank_N.log, rank 0 logs here")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, self._request_stop)
        self._run = pdsh(self.hosts, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def follow(self) -> int:
        """Wait for the end; returns the exit code."""
        forwarding, deadline = threading.Thread(target=self._forward_output, daemon=True), None
        forwarding.start()
        while self._run.poll() is None:
            time.sleep(0.2)
            if self.failed and deadline is None:
                deadline = time.monotonic() + PATIENCE_S
            if deadline and time.monotonic() > deadline:
                log("ending the ranks that did not end by themselves")
                self._signal(2)
                deadline += PATIENCE_S
        forwarding.join(PATIENCE_S)
        if self.failed:
            rank, host, reason = self.failed.groups()
            log(f"error: rank {rank} failed first, on {host}: {reason}; the end of its log ({self.logs}/rank_{rank}.log):")
            with contextlib.suppress(FileNotFoundError):
                for line in collections.deque((self.logs / f"rank_{rank}.log").open(errors="replace"), 12):
                    log(f"  {line.rstrip()}")
            return self._run.returncode or 1
        return 128 + self._stop_signal if self._stop_signal else self._run.returncode

    def _forward_output(self) -> None:
        """Print the output of rank 0 and of the launchers, and write that of each rank to its log."""
        with contextlib.ExitStack() as opened:
            files = collections.defaultdict(lambda: None)
            for line in self._run.stdout:
                host, _, text = line.rstrip("\n").partition(": ")
                prefix = re.match(r"\[rank (\d+)\] ?", text)
                name = f"rank_{prefix[1]}.log" if prefix else "launchers.log"
                text = text[prefix.end() :] if prefix else f"{host}: {text}"
                files[name] = files[name] or opened.enter_context((self.logs / name).open("a", buffering=1))
                print(text, file=files[name])
                failure = re.match(r"\S+: error: rank (\d+) failed first on (\S+): (.*)", text)
                self.failed = self.failed or failure
                if name == "rank_0.log" or not (prefix or failure):
                    log(text)

    def _request_stop(self, number: int, _: object) -> None:
        if self._stop_signal:
            log("again: ending all ranks at once")
        else:
            log(f"{signal.Signals(number).name}: all ranks finish their step, save and end; a second signal ends them at once")
            self._stop_signal = number
        self._signal(1)

    def _signal(self, times: int) -> None:
        """Send TERM to the launcher of each host, without waiting."""
        command = "; ".join([f"kill -TERM $(cat {shlex.quote(str(self.logs.absolute()))}/%h.pid)"] * times)
        pdsh(self.hosts, command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    if sys.argv[1] == "--metadata":
        print(json.dumps(metadata(sys.argv[2], json.loads(sys.argv[3]))))
        sys.exit()
    try:
        sys.exit(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "", sys.argv[3:]))
    except UserError as error:
        sys.exit(f"multi_node.sh: error: {error}")
