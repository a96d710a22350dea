"""An analytical cost model, nothing measured: what a micro-batch of ZeRO-3 sends as ranks grow, against what it computes.

    python -m benchmarks.scaling [--batch_tokens 1048576] [--micro_batch_tokens 8192] [--fabric 400 100] [--efficiency 0.5]

A rank gathers the parameters of a micro-batch twice (forward; recomputation and backward) and reduce-scatters their gradients
once, each 2 bytes a parameter in bfloat16, layer by layer, while it computes. So a micro-batch takes the longer of the two:

- compute: 8 FLOPs per parameter and token (2 forward, 2 again under activation checkpointing, 4 backward; attention left out);
- traffic: rings over all ranks. Every rank receives (N-1)/N of the bytes over NVLink, every host as much over its network, at
  once; a step of a ring adds the latency that NCCL's tuner assumes of it (src/graph/tuning.cc, "Simple": 8.4 us, and 3.4 us for
  each hop over NVLink, 14 us for each over a network).

With hpZ ("zero_hpz_partition_size": ranks a host) the second gather stays within the host, and a rank holds another share: 2
bytes a parameter, over the ranks of a host (Wang et al. 2023, "ZeRO++").
"""

import argparse

RANKS_A_HOST = 8
BYTES = 2  # of a parameter, and of a gradient on its way
NVLINK = 450e9  # bytes/s that a GPU receives: H100, SXM
BASE_S, NVLINK_S, NETWORK_S = 8.4e-6, 3.4e-6, 14e-6
MODELS = {"7B": (7.62e9, 28), "70B": (70.55e9, 80)}  # parameters and layers of Qwen2.5-7B and Llama-3.1-70B
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)


def collective_s(num_bytes: float, ranks: int, network: float) -> float:
    """Seconds of an all-gather or a reduce-scatter among ranks that fill their hosts (`network`: bytes/s that one receives)."""
    hosts = max(1, ranks // RANKS_A_HOST)
    moved = num_bytes * (ranks - 1) / ranks
    between = hosts if hosts > 1 else 0  # hops of a ring that leave a host
    latency = BASE_S + (ranks - 1) / ranks * (between * NETWORK_S + (ranks - between) * NVLINK_S)
    return latency + max(moved / NVLINK, moved / network if between else 0)


def compute_s(params: float, tokens: int, args: argparse.Namespace) -> float:
    return 8 * params * tokens / (args.peak_tflops * 1e12 * args.efficiency)


def traffic_s(params: float, layers: int, ranks: int, fabric: int, hpz: bool, args: argparse.Namespace) -> float:
    network = fabric * 1e9 / 8 * RANKS_A_HOST * args.achieved
    far, near = (layers * collective_s(BYTES * params / layers, n, network) for n in (ranks, RANKS_A_HOST))
    return 2 * far + (near if hpz else far)


def table(args: argparse.Namespace) -> list[str]:
    """A row for each model and number of GPUs; bold where the traffic is what a micro-batch waits for."""
    head = ["model, GPUs", "tokens a rank", "compute"]
    for fabric in args.fabric:
        head += [f"traffic, {fabric} Gbit/s", "with hpZ", "hides from"]
    rows = [head, ["---"] * len(head)]
    for model, (params, layers) in MODELS.items():
        for ranks in RANKS:
            tokens = min(args.micro_batch_tokens, args.batch_tokens // ranks)
            compute = compute_s(params, tokens, args)
            cells = [f"{model}, {ranks}", f"{tokens:,}", f"{1000 * compute:,.0f} ms"]
            for fabric in args.fabric:
                plain, hpz = (traffic_s(params, layers, ranks, fabric, flag, args) for flag in (False, True))
                cells += [f"{'**' * (s > compute)}{1000 * s:,.0f} ms{'**' * (s > compute)}" for s in (plain, hpz)]
                cells.append(f"{plain / compute_s(params, 1, args):,.0f} tokens")
            rows.append(cells)
    return [f"| {' | '.join(cells)} |" for cells in rows]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_tokens", type=int, default=2**20, help="that a step runs, shared by all ranks")
    parser.add_argument("--micro_batch_tokens", type=int, default=8192)
    parser.add_argument("--fabric", type=int, nargs="+", default=[400, 100], help="Gbit/s of network for each GPU")
    parser.add_argument("--achieved", type=float, default=0.8, help="share of those that a collective gets")
    parser.add_argument("--peak_tflops", type=float, default=989, help="of a GPU, dense bfloat16: H100, SXM")
    parser.add_argument("--efficiency", type=float, default=0.5, help="share of those that the matrix products get")
    print("\n".join(table(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
