"""Publishes weights by hand, or only compares what servers serve with them:

    python -m wsft.publish runs/first/published/step_41 http://gpu1:8001 http://gpu2:8001
    python -m wsft.publish runs/first/checkpoints/step_40 http://gpu1:8001     # exports it to runs/first/published/step_40
    python -m wsft.publish runs/first/final http://gpu1:8001 --check           # loads nothing

Also continues servers that were left paused by a trainer killed while it published. The folder must be at the same path on the
servers' hosts. Its logprobs are computed on the CPU in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from wsft.atomic_files import atomic_folder
from wsft.errors import UserError
from wsft.logs import configure_logging
from wsft.publish.probe import TOLERANCE, Probe
from wsft.publish.publisher import API_KEY
from wsft.publish.servers import connect
from wsft.run.adapter import merge
from wsft.run.checkpoint import METADATA, Checkpoint
from wsft.run.export import export


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m wsft.publish", description="Have inference servers load weights, or compare what they serve."
    )
    parser.add_argument("folder", type=Path, help="a Hugging Face folder of safetensors, or a checkpoint of a run")
    parser.add_argument("urls", nargs="+", metavar="URL", help="of vLLM or SGLang servers")
    parser.add_argument("--check", action="store_true", help="load nothing, only compare logprobs of fixed texts")
    parser.add_argument("--pause", choices=("keep", "abort", "wait"), default="keep", help="requests in flight meanwhile")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds in which a server must answer")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE["fp32"], help="mean difference allowed, in nats")
    args = parser.parse_args()
    configure_logging(0)
    try:
        different = publish(args)
    except (UserError, OSError) as error:
        sys.exit(f"publish: error: {error}")
    sys.exit(1 if different else 0)


def publish(args: argparse.Namespace) -> bool:
    """Whether a server serves other weights."""
    servers = [connect(url, args.timeout, os.environ.get(API_KEY), args.pause) for url in args.urls]
    folder = args.folder.absolute()
    if (folder / METADATA).exists() and not args.check:
        checkpoint = Checkpoint.at(folder)
        folder = folder.parent.parent / "published" / folder.name
        if "adapters" in checkpoint.metadata:
            with atomic_folder(folder) as aside:
                print(merge(checkpoint, aside, None))
        else:
            export(checkpoint, folder)
        print(f"exported to {folder}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{args.folder} is no Hugging Face folder: expected a published version, an export, or a checkpoint")
    probe, different = Probe.of_folder(folder), False
    for server in servers:
        if not args.check:
            pause = server.load(folder, version_of(folder))
            print(f"{server} loaded version {server.version()}, paused for {pause:.2f} s")
        mean, most = probe.differences(probe.scored_by(server))
        verdict = "the same weights" if mean <= args.tolerance else "OTHER WEIGHTS"
        print(f"{server}: {verdict}, logprobs differ by {mean:.2g} nats on average, {most:.2g} at most")
        different |= not mean <= args.tolerance
    return different


def version_of(folder: Path) -> str:
    """Of a published folder its version, of others the name."""
    path = folder / "version.json"
    return json.loads(path.read_text())["version"] if path.is_file() else folder.name


if __name__ == "__main__":
    main()
