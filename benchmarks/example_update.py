"""The update of Atropos's example trainer, run in place of train.py by benchmarks/loop.py, to compare with:

    TRAINER=benchmarks/example_update.py bash launch/loop.sh

Written from a reading of its data.py, training.py and config.py. At its defaults,
- all sequences of a batch are padded to one length, a multiple of 64, and run 2 at a time with dense logits;
- the loss of 2 sequences is the mean of the means over their trained tokens, divided by 32 however many such pairs there are;
- PPO's clip at 0.2 against the sampler's logprobs, but with the larger of the two surrogates where the advantage is negative;
- plus 0.1 x Schulman's k3 estimate of the KL divergence from the sampler, and gradients are clipped at norm 1.

What is not part of the update is as in the compared runs: AdamW and learning rate, float32 weights that compute in bf16 (here
by autocast), the client of Atropos's server, and publishing over gloo.
"""

import contextlib
import json
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from wsft import WeightedSFTConfig
from wsft.distributed.world import World
from wsft.model.loading import empty_model
from wsft.publish.broadcast import Broadcast
from wsft.publish.servers import Server, connect
from wsft.publish.tensors import TrainedTensors
from wsft.rollouts.client import AtroposClient

PER_MICRO_BATCH, ACCUMULATION, CLIP, KL, MULTIPLE = 2, 32, 0.2, 0.1, 64


def main() -> None:
    config = WeightedSFTConfig.from_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = World(torch.device("cpu"), config.publish_timeout)
    model = AutoModelForCausalLM.from_pretrained(config.model_name, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, betas=(0.9, 0.95), weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / (config.warmup_steps + 1)))
    empty, bucket_bytes = empty_model(model.config, False), config.publish_bucket_mib * 2**20
    tensors = TrainedTensors(model, empty, config.model_name, lambda _: contextlib.nullcontext(), bucket_bytes)
    broadcast = Broadcast(tensors, world, "gloo", config.publish_timeout)
    server = connect(config.publish_to, config.publish_timeout)
    client = AtroposClient(
        config.atropos_url, batch_size=config.batch_size, max_token_len=config.max_token_len,
        num_steps=config.training_steps, timeout=config.publish_timeout,
    )  # fmt: skip
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    with open(Path(config.output_dir) / "metrics.jsonl", "w") as metrics:
        publish(broadcast, server, 0)
        for step in range(config.training_steps):
            start, body = time.monotonic(), None
            while body is None:
                body = client.poll()
            groups, wait = json.loads(body)["batch"], time.monotonic() - start
            loss = update(model, optimizer, groups)
            schedule.step()
            if (step + 1) % config.publish_steps == 0:
                publish(broadcast, server, step + 1)
            client.step = step + 1
            line = {"step": step + 1, "loss": loss, "time/at": time.time(), "time/wait": wait}
            line |= {"time/step": time.monotonic() - start, **of_groups(groups, step)}
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            print(line, flush=True)


def publish(broadcast: Broadcast, server: Server, step: int) -> None:
    (pause,) = broadcast.send([server], str(step))
    if not isinstance(pause, float):
        raise pause


def of_groups(groups: list[dict], step: int) -> dict[str, float]:
    scores = [score for group in groups for score in group["scores"]]
    spans = [span for group in groups for each in group["overrides"] for span in each["weight_versions"]]
    tokens = sum(span["end"] - span["start"] for span in spans)
    stale = sum((step - span["version"]) * (span["end"] - span["start"]) for span in spans) / tokens
    return {"score/mean": sum(scores) / len(scores), "data/sequences": len(scores), "data/staleness": stale}


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, groups: list[dict]) -> float:
    total = 0.0
    for tokens_BT, labels_BT, advantages_B1, sampled_BT in micro_batches(groups):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens_BT).logits
        # [B, T]: logp of the label, 0 where there is none
        logp_BT = -torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels_BT, reduction="none")
        trained_BT = (labels_BT != -100).float()
        log_ratio_BT = logp_BT - sampled_BT
        ratio_BT = log_ratio_BT.exp()
        plain_BT, clipped_BT = ratio_BT * advantages_B1, ratio_BT.clamp(1 - CLIP, 1 + CLIP) * advantages_B1
        surrogate_BT = torch.where(advantages_B1 >= 0, torch.min(plain_BT, clipped_BT), torch.max(plain_BT, clipped_BT))
        kl_BT = (-log_ratio_BT).exp() + log_ratio_BT - 1
        loss_BT = (KL * kl_BT - surrogate_BT) * trained_BT
        loss = (loss_BT.sum(1) / trained_BT.sum(1).clamp_min(1e-8)).mean() / ACCUMULATION
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def micro_batches(groups: list[dict]) -> list[tuple[torch.Tensor, ...]]:
    """Inputs, their next tokens as labels, advantages of the sequences, logprobs of the sampler for the labels."""
    longest = max(len(tokens) for group in groups for tokens in group["tokens"])
    length = 1 + MULTIPLE * math.ceil((longest - 1) / MULTIPLE)

    def rows(name: str, fill: float) -> torch.Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for group in groups for row in group[name]])

    advantages = []
    for group in groups:
        scores = torch.tensor(group["scores"], dtype=torch.float32)
        advantages.append((scores - scores.mean()) / scores.std(correction=0).clamp_min(1e-8))
    columns = rows("tokens", 0)[:, :-1], rows("masks", -100)[:, 1:], torch.cat(advantages)[:, None]
    each = [part.split(PER_MICRO_BATCH) for part in (*columns, rows("inference_logprobs", 1.0)[:, 1:])]
    return [parts for parts in zip(*each, strict=True) if len(parts[0]) == PER_MICRO_BATCH]  # it leaves out the rest


if __name__ == "__main__":
    main()
