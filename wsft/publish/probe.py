"""Compares what a server serves with what the trainer has: logprobs of a few fixed sequences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from wsft.model.causal_lm import WeightedSFTModel
from wsft.model.loading import class_for
from wsft.publish.servers import Server

TEXTS = (
    "The weather in Paris was cold and clear, so they decided to walk along the river before dinner.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Question: What is 17 + 25? Answer: 17 + 25 = 42.",
)
# longer than two blocks of a prefix cache (128 tokens in vLLM on a CPU, else 16)
LONG_TEXT = 16 * TEXTS[0]
LONGEST_PREFIX, SAMPLED = 288, 8  # tokens
# mean absolute difference in nats, above that of two implementations with the same weights in that precision
TOLERANCE = {"fp32": 0.002, "bf16": 0.1}
# of one implementation with itself: 1e-7 in float32, and 5e-4 with a cache of weights of two small steps before (vLLM)
CACHE_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}


@dataclass
class Probe:
    """Token sequences, and their logprobs under the trainer's weights, from the second token of each."""

    sequences: list[list[int]]
    logprobs: list[list[float]]

    @classmethod
    def of(cls, model: WeightedSFTModel, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Probe:
        """A collective under ZeRO-3: all ranks run the same sequences."""
        sequences = cls.texts(tokenizer)
        return cls(sequences, cls.score(model, sequences, device))

    @staticmethod
    def texts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]

    @staticmethod
    @torch.no_grad()
    def score(model: WeightedSFTModel, sequences: list[list[int]], device: torch.device) -> list[list[float]]:
        """Logprobs of each sequence from its second token. A collective under ZeRO-3."""
        logprobs = []
        for tokens in sequences:
            row = torch.tensor([tokens], device=device)
            trained = torch.arange(1, len(tokens), device=device)
            logprobs.append(model.run(row, trained, torch.zeros(len(trained), device=device)).logp_N.tolist())
        return logprobs

    @classmethod
    @torch.no_grad()
    def of_folder(cls, folder: Path) -> Probe:
        """With the model of a Hugging Face folder, in float32 on the CPU."""
        model = class_for(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32).eval()
        sequences = cls.texts(AutoTokenizer.from_pretrained(folder))
        logprobs = []
        for tokens in sequences:
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, :-1]
            targets = torch.tensor(tokens[1:]).unsqueeze(1)
            logprobs.append(logits.log_softmax(-1).gather(1, targets).squeeze(1).tolist())
        return cls(sequences, logprobs)

    def scored_by(self, server: Server) -> Probe:
        """The same sequences with the server's logprobs."""
        return Probe(self.sequences, [server.logprobs(tokens) for tokens in self.sequences])

    @staticmethod
    def prefix_for(server: Server, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """A prompt that fills blocks of the server's prefix cache."""
        return tokenizer(LONG_TEXT, add_special_tokens=False)["input_ids"][
            : min(LONGEST_PREFIX, server.context() - SAMPLED - 1)
        ]

    @staticmethod
    def cache_difference(server: Server, prefix: list[int]) -> float:
        """Mean difference in nats between the logprobs of tokens sampled behind the prefix, which the server may have in its
        cache, and those of the same tokens in a prompt, which it computes anew: not 0 for a cache that was filled with other
        weights."""
        tokens, sampled = server.sample(prefix, SAMPLED)
        again = server.logprobs(prefix + tokens)[len(prefix) - 1 :]
        return sum(abs(a - b) for a, b in zip(sampled, again, strict=True)) / len(tokens)

    def differences(self, other: Probe) -> tuple[float, float]:
        """Mean and maximum of |self - other| over the tokens, in nats."""
        return differences(*([logprob for row in x.logprobs for logprob in row] for x in (self, other)))


def differences(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Mean and maximum of the absolute difference."""
    found = (torch.tensor(theirs) - torch.tensor(ours)).abs()
    return float(found.mean()), float(found.max())
