"""An environment for Atropos, to copy: the model answers questions of facts.py, and an answer's reward is its score.

    python wsft/environment/facts_env.py serve --env.rollout_server_url http://localhost:8000 \\
        --openai.base_url http://localhost:8001/v1 --openai.model_name MODEL --env.tokenizer_name MODEL
    python wsft/environment/facts_env.py evaluate ... --env.data_dir_to_save_evals FOLDER

Needs atroposlib with its dependencies, and of wsft nothing but facts.py. The inference server is vLLM with wsft's plugin, which
reports the weights that sampled each token.
"""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import Any

import aiohttp
from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig, ScoredDataGroup
from facts import MAX_TOKENS, Question, questions, reward
from pydantic import Field


class FactsConfig(BaseEnvConfig):
    seed: int = Field(0, description="Of the questions.")
    batches_per_version: int = Field(
        1, description="Batches to sample with the same weights before waiting for the next; 0: as many as the trainer takes."
    )
    held_out: int = Field(128, description="Held-out questions of an evaluation, one sample each.")


class FactsEnv(BaseEnv):
    name = "facts"
    env_config_cls = FactsConfig

    @classmethod
    def config_init(cls) -> tuple[FactsConfig, list[APIServerConfig]]:
        config = FactsConfig(
            group_size=8,
            max_batches_offpolicy=1,  # batches sampled ahead
            ensure_scores_are_not_same=False,  # the trainer skips such groups, and its mean score is that of all samples
            max_token_length=128,
            steps_per_eval=0,
            total_steps=10**9,  # until it is stopped
            wandb_name="facts",  # the server wants a name
            use_wandb=False,
        )
        return config, [APIServerConfig(server_type="vllm", api_key="none", health_check=False)]

    async def setup(self) -> None:
        self.questions = questions(held_out=False, seed=self.config.seed)
        self.version, self.groups = "", 0  # of the weights, and groups started with them

    async def get_next_item(self) -> Question | None:
        """None: not yet."""
        if self.config.batches_per_version:
            version = await self.weight_version()
            if version != self.version:
                self.version, self.groups = version, 0
            if self.groups >= self.config.batches_per_version * self.config.batch_size // self.config.group_size:
                return None
            self.groups += 1
        return next(self.questions)

    async def weight_version(self) -> str:
        url = self.server.servers[0].config.base_url.replace("/v1", "/weight_info")
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            return (await answer.json())["weight_version"]

    async def collect_trajectories(self, item: Question) -> tuple[ScoredDataGroup, list]:
        version = self.version
        try:
            return await self.group(item), []
        except Exception:
            self.groups -= version == self.version  # another group is sampled instead
            raise

    async def group(self, item: Question) -> ScoredDataGroup:
        samples = await self.sample(item, self.config.group_size)
        group = ScoredDataGroup(tokens=[], masks=[], scores=[], inference_logprobs=[], overrides=[])
        for prompt, answer, logprobs, finish in samples:
            group["tokens"].append(prompt + answer)
            group["masks"].append([-100] * len(prompt) + answer)
            group["inference_logprobs"].append([1.0] * len(prompt) + logprobs)
            group["scores"].append(reward(item, self.decode(answer)))
            spans = [
                {"version": int(span["version"]), "start": len(prompt) + span["start"], "end": len(prompt) + span["end"]}
                for span in finish["weight_versions"]
            ]
            group["overrides"].append({"weight_versions": spans})
        return group

    async def sample(
        self, question: Question, n: int, split: str = "train"
    ) -> list[tuple[list[int], list[int], list[float], Any]]:
        """n samples: tokens of the prompt, tokens of the answer, their logprobs, and the finish reason with weight versions."""
        prompt = self.tokenizer.apply_chat_template(question.messages, tokenize=False, add_generation_prompt=True)
        model = self.server.servers[0].config.model_name
        prompt_tokens, *answers = await self.server.tokens_and_logprobs_completion(
            prompt=prompt, model=model, n=n, max_tokens=MAX_TOKENS, temperature=1.0, weight_versions=True, split=split
        )
        return [(prompt_tokens, *each) for each in zip(*answers, strict=True)]

    def decode(self, answer: list[int]) -> str:
        return self.tokenizer.decode(answer, skip_special_tokens=True).strip()

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        chosen = list(islice(questions(held_out=True, seed=self.config.seed), self.config.held_out))
        sampled = await asyncio.gather(*(self.sample(question, 1, "eval") for question in chosen))
        answers = [self.decode(answer) for ((_, answer, _, _),) in sampled]
        rewards = [reward(question, answer) for question, answer in zip(chosen, answers, strict=True)]
        samples = [
            {"question": question.text, "answer": answer, "reward": each}
            for question, answer, each in zip(chosen, answers, rewards, strict=True)
        ]
        metrics = {"reward": sum(rewards) / len(rewards), "right": sum(each == 1 for each in rewards) / len(rewards)}
        await self.evaluate_log(metrics, samples=samples, generation_parameters={"temperature": 1.0}, verbose=False)


if __name__ == "__main__":
    FactsEnv.cli()
