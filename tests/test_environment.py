"""The test environment against the real server, with the tokenizer and chat template of a real model."""

import json
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, pairwise
from typing import ClassVar

import pytest
import requests
from atropos_server import atropos_server, free_port
from conftest import ROOT, clean_environment

from wsft import AtroposBatchProcessor
from wsft.environment.facts import Question, questions, reward
from wsft.environment.server import QUEUED_BATCHES, AtroposEnvironment, run
from wsft.environment.texts import (
    CUSTOM,
    PATTERNS,
    built_in_texts,
    groups,
    load_tokenizer,
    read_texts,
    tokenise,
    tokenise_all,
)
from wsft.errors import UserError

GROUP_SIZE = 4
CUSTOM_LINE = {
    "prompt": "Who are you?",
    "completions": [[["I am ", 0.25], ["a small", 1.0], [" model \U0001f9d1‍\U0001f680.", -2], ["", 0.5]], [["Guess.", -1.0]]],
}
KEYS = {
    *("tokens", "masks", "scores", "advantages", "ref_logprobs", "messages", "generation_params", "inference_logprobs"),
    *("overrides", "group_overrides", "images", "env_id", "distill_token_ids", "distill_logprobs"),
}


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    loaded = load_tokenizer(smollm2)
    assert loaded.chat_template
    return loaded


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return tokenise_all(built_in_texts(), tokenizer, max_token_len=256)


@pytest.fixture(scope="module")
def custom_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "weighted.jsonl"
    path.write_text(json.dumps(CUSTOM_LINE) + "\n\n" + json.dumps(CUSTOM_LINE | {"prompt": "And who made you?"}) + "\n")
    return path


@pytest.fixture(scope="module")
def server():
    with atropos_server() as running:
        yield running


@contextmanager
def environment(*args):
    """The environment as a process, its output in `.stderr`."""
    command = [sys.executable, "-m", "wsft.environment", *map(str, args)]
    process = subprocess.Popen(command, env=clean_environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_line(process, text):
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return line
    raise AssertionError(f"{text!r} never came: {lines}")


def start_trainer(url, batch_size):
    """Register and ask once, after which environments may register."""
    fields = dict(wandb_group="", wandb_project="", checkpoint_dir="", save_checkpoint_interval=0, starting_step=0, num_steps=9)
    requests.post(f"{url}/register", json=fields | dict(batch_size=batch_size, max_token_len=256)).raise_for_status()
    assert requests.get(f"{url}/info").json()["batch_size"] == batch_size
    return requests.get(f"{url}/batch").json()["batch"]


def fetch(url, patience=300.0):
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        batch = requests.get(f"{url}/batch").json()["batch"]
        if batch:
            return batch
        time.sleep(0.05)
    raise AssertionError(f"no batch in {patience} s")


def posted(server, smollm2, pattern, **changes):
    """What a trainer receives of six groups: the batch, as delivered."""
    requests.get(f"{server.url}/reset_data")
    start_trainer(server.url, 6 * GROUP_SIZE)
    args = dict(url=server.url, tokenizer=smollm2, pattern=pattern, level="token", texts=None, groups=6, output=None)
    run(Namespace(**args | dict(group_size=GROUP_SIZE, seed=0, max_token_len=256) | changes))
    return fetch(server.url)


def wait_until_queued(url, count, patience=300.0):
    deadline = time.monotonic() + patience
    while (queued := requests.get(f"{url}/status").json()["queue_size"]) < count:
        assert time.monotonic() < deadline, f"{queued} of {count} groups after {patience} s"
        time.sleep(0.05)


def sequences(batch):
    for group in batch:
        for i, (tokens, masks) in enumerate(zip(group["tokens"], group["masks"], strict=True)):
            border = masks.count(-100)
            assert masks == [-100] * border + tokens[border:]
            assert group["advantages"][i][:border] == [0.0] * border
            yield tokens[:border], tokens[border:], group["advantages"][i][border:], group["scores"][i]


def answers():
    """Prompt -> completion -> the weight of it, of the built-in texts."""
    return {text.prompt: dict(pieces[0] for pieces in text.completions) for text in built_in_texts().values()}


def is_what_it_is_called(pattern, advantages, weight):
    n = len(advantages)
    steps = [later - earlier for earlier, later in pairwise(advantages)]
    return {
        "uniform_positive": advantages == [1.0] * n,
        "uniform_negative": advantages == [-1.0] * n,
        "increasing": min(steps) > 0 and advantages[0] > 0 and advantages[-1] == 1,
        "decreasing": max(steps) < 0 and advantages[-1] > 0 and advantages[0] == 1,
        "sparse_positive": set(advantages) == {0.0, 1.0} and 1 <= sum(advantages) <= n / 10 + 1,
        "end_weighted": advantages[-1] == 1 and advantages[0] == 0.1 and n / 4 <= advantages.count(1.0) < n / 4 + 1,
        "mixed": advantages == [weight] * n,
    }[pattern]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_reaches_the_trainer_on_the_tokens_of_the_completion(pattern, server, smollm2, tokenizer):
    known, seen = answers(), set()
    batch = posted(server, smollm2, pattern)
    assert [len(group["tokens"]) for group in batch] == [GROUP_SIZE] * 6 and all(set(group) == KEYS for group in batch)
    for head, trained, advantages, score in sequences(batch):
        asked = tokenizer.decode(head)
        prompt = asked.rpartition("<|im_start|>user\n")[2].removesuffix("<|im_end|>\n<|im_start|>assistant\n")
        user = [{"role": "user", "content": prompt}]
        assert asked == tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
        completion = tokenizer.decode(trained).removesuffix(tokenizer.eos_token)
        assert trained[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in trained[:-1]
        weight = known[prompt][completion]  # the exact text, or a KeyError
        assert is_what_it_is_called(pattern, advantages, weight)
        assert score == pytest.approx(sum(advantages) / len(advantages))
        seen.add(weight)
    assert seen == {1.0, -1.0}


def test_custom_weights_land_on_the_tokens_that_begin_in_their_piece(server, smollm2, tokenizer, custom_file):
    batch = posted(server, smollm2, CUSTOM, texts=custom_file, group_size=2, groups=12)
    for _, trained, advantages, _ in sequences(batch):
        words = [tokenizer.decode([token]) for token in trained]
        if words[0] == "I":
            assert words[:5] == ["I", " am", " a", " small", " model"]
            assert advantages == [0.25, 0.25, 1.0, 1.0] + [-2.0] * (len(words) - 5) + [0.5]
        else:
            assert advantages == [-1.0] * len(words) and "".join(words) == "Guess.<|im_end|>"
    assert {tuple(sorted(map(len, group["tokens"]))) for group in batch}.pop()[0] > 20


def test_at_sequence_level_there_are_scores_and_no_advantages(server, smollm2):
    for group in posted(server, smollm2, "mixed", level="sequence"):
        assert group["advantages"] is None
        assert sorted(group["scores"]) == [-1.0, -1.0, 1.0, 1.0]


def test_a_seed_gives_the_same_groups_in_every_process_and_the_file_is_what_the_trainer_reads(smollm2, prompts, tmp_path):
    path = tmp_path / "new" / "rollouts.jsonl"
    flags = ["--tokenizer", smollm2, "--pattern", "sparse_positive", "--groups", 30, "--group_size", 5, "--seed", 7]
    with environment(*flags, "--output", path) as process:
        assert process.wait(300) == 0, process.stderr.read()
    written = [json.loads(line) for line in path.open()]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert written == list(islice(groups(prompts, "sparse_positive", "token", 5, seed=7), 30))
    assert written != list(islice(groups(prompts, "sparse_positive", "token", 5, seed=8), 30))
    assert all(set(group) == KEYS and len(group["tokens"]) == 5 for group in written)
    processed = AtroposBatchProcessor(pad_token_id=0).process_atropos_batch(written)
    trained = sum(label != -100 for group in written for row in group["masks"] for label in row)
    assert AtroposBatchProcessor(pad_token_id=0).to_tensors(processed)["loss_masks"].sum() == trained


def test_built_in_completions_are_of_many_lengths(prompts):
    lengths = {len(completion.weights) for completions in prompts for completion in completions}
    assert len(prompts) == 24 and min(lengths) >= 10 and 40 < max(lengths) <= 60 and len(lengths) > 20
    for completions in prompts:
        assert sorted(completion.favoured for completion in completions) == [False, False, True, True]


def test_an_environment_waits_for_server_and_trainer_and_then_keeps_a_few_batches_ahead(smollm2):
    port = free_port()
    url, batch_size = f"http://127.0.0.1:{port}", 8
    with environment("--url", url, "--tokenizer", smollm2, "--pattern", "mixed", "--group_size", 4) as process:
        wait_for_line(process, "cannot be reached")
        with atropos_server(port):
            wait_for_line(process, "wait for trainer to start")
            # had it posted before there was a trainer, the registration would not count
            assert start_trainer(url, batch_size) is None
            wait_for_line(process, "registered at")
            full = QUEUED_BATCHES * batch_size // 4
            for _ in range(2):  # it fills up, stays full, and posts again once the trainer has taken some
                wait_until_queued(url, full)
                time.sleep(1)
                assert requests.get(f"{url}/status").json()["queue_size"] == full
                for _ in range(QUEUED_BATCHES):
                    assert sum(len(group["tokens"]) for group in fetch(url)) == batch_size
            process.send_signal(signal.SIGTERM)
            printed = process.communicate(timeout=300)[1]
            assert (process.returncode, printed) == (0, "")


def test_an_environment_tolerates_a_restart_of_the_server_and_registers_again(smollm2, tokenizer):
    with (
        atropos_server() as server,
        environment("--url", server.url, "--tokenizer", smollm2, "--pattern", "mixed", "--group_size", 4) as process,
    ):
        start_trainer(server.url, 4)
        assert len(fetch(server.url)) == 1
        server.kill()
        wait_for_line(process, "cannot be reached")
        time.sleep(3)  # what real environments die of
        server.start()
        wait_for_line(process, "wait for trainer to start")
        assert start_trainer(server.url, 8) is None
        wait_for_line(process, "batches of 8")
        (group, _) = fetch(server.url)
        assert group["env_id"] == 0 and process.poll() is None

        # A reset without an outage: the server is there and no longer knows the environment. Not while that posts: a
        # post on its way when the reset comes makes a queue without a trainer, which is the trainer's to mend.
        wait_until_queued(server.url, QUEUED_BATCHES * 8 // 4)
        requests.get(f"{server.url}/reset_data")
        wait_for_line(process, "wait for trainer to start")
        assert start_trainer(server.url, 4) is None
        assert len(fetch(server.url)) == 1
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.communicate(timeout=300)[1] and process.returncode == 0


def test_a_given_number_of_groups_arrives_once_each_in_their_order(server, smollm2, prompts):
    batch = posted(server, smollm2, "increasing", seed=3)
    sent = list(islice(groups(prompts, "increasing", "token", GROUP_SIZE, seed=3), 6))
    assert [group | {"env_id": None} for group in batch] == sent
    assert requests.get(f"{server.url}/status").json()["queue_size"] == 0


def test_sigterm_before_anything_is_up_ends_quietly(smollm2):
    with environment("--url", f"http://127.0.0.1:{free_port()}", "--tokenizer", smollm2, "--pattern", "mixed") as process:
        wait_for_line(process, "cannot be reached")
        process.terminate()
        assert process.wait(300) == 0 and "Traceback" not in process.stderr.read()


def test_a_warning_says_that_groups_cannot_fill_the_batches(server, prompts, caplog):
    requests.get(f"{server.url}/reset_data")
    start_trainer(server.url, 8)
    AtroposEnvironment(server.url, group_size=3, max_token_len=256).post(next(groups(prompts, "mixed", "token", 3, seed=0)))
    assert "batches of 8 cannot be made of groups of 3" in caplog.text


class BreaksOff(BaseHTTPRequestHandler):
    """A server that takes the first post of a group and ends without an answer, as one that is killed then does."""

    received: ClassVar[list[dict]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/scored_data":
            self.received.append(body)
            if len(self.received) == 1:
                return
        self._answer({"status": "success", "env_id": 0})

    def do_GET(self):
        self._answer({"batch_size": 4, "queue_size": 0})

    def _answer(self, answer):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())


def test_a_group_whose_answer_is_lost_is_not_sent_again(prompts):
    sent = list(islice(groups(prompts, "mixed", "token", 4, seed=0), 2))
    with ThreadingHTTPServer(("127.0.0.1", 0), BreaksOff) as broken:
        threading.Thread(target=broken.serve_forever, daemon=True).start()
        atropos = AtroposEnvironment(f"http://127.0.0.1:{broken.server_port}", 4, 256)
        for group in sent:
            atropos.post(group)
        broken.shutdown()
    assert BreaksOff.received == [group | {"env_id": 0} for group in sent]


BROKEN = {
    "not JSON": '{"prompt": "a", ',
    "a list": "[1, 2]",
    "no completions": '{"prompt": "a", "completions": []}',
    "an empty completion": '{"prompt": "a", "completions": [[]]}',
    "text without weight": '{"prompt": "a", "completions": [["text"]]}',
    "a weight that is NaN": '{"prompt": "a", "completions": [[["text", NaN]]]}',
    "an infinite weight": '{"prompt": "a", "completions": [[["text", 1e999]]]}',
    "a weight in quotes": '{"prompt": "a", "completions": [[["text", "1.0"]]]}',
    "another key": '{"prompt": "a", "completions": [[["text", 1.0]]], "weight": 2}',
}


@pytest.mark.parametrize("line", BROKEN.values(), ids=BROKEN)
def test_a_broken_line_is_named_with_its_number_and_what_was_expected(line, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(f"{json.dumps(CUSTOM_LINE)}\n{line}\n")
    with pytest.raises(UserError, match=r"line 2 of .*texts\.jsonl.*expected .*\[text, weight\].*finite"):
        read_texts(path)


def test_texts_that_cannot_be_tokenised_whole_are_named_before_anything_is_posted(tokenizer, custom_file):
    with pytest.raises(UserError, match=r"line 1 of .*: a sequence of \d+ tokens; expected at most 24"):
        tokenise_all(read_texts(custom_file), tokenizer, max_token_len=24)
    with pytest.raises(UserError, match="does not continue the prompt"):
        tokenise("Hello?", [("  ", 1.0)], tokenizer)


def test_what_a_template_writes_before_the_answer_is_untrained(smollm2):
    tokenizer = load_tokenizer(smollm2)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' }}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    completion = tokenise("Hello?", [("Good day.", 1.0)], tokenizer)
    trained = [token for token, label in zip(completion.tokens, completion.labels(), strict=True) if label != -100]
    assert tokenizer.decode(trained) == "Good day.<|im_end|>"
    assert tokenizer.decode(completion.tokens).endswith("</think>\n\nGood day.<|im_end|>")


def test_without_a_chat_template_prompt_and_completion_are_two_lines(tiny_model, caplog):
    tokenizer = load_tokenizer(tiny_model)
    assert caplog.text.count("no chat template") == 1
    completion = tokenise("w5 w6", [("w7 ", 1.0), ("w8", -1.0)], tokenizer)
    assert completion.tokens == [5, 6, 7, 8, tokenizer.eos_token_id]
    assert completion.labels() == [-100, -100, 7, 8, tokenizer.eos_token_id] and completion.weights == [1.0, -1.0, -1.0]


@pytest.mark.parametrize(
    ("flags", "printed"),
    [
        (["--pattern", "mixed", "--tokenizer", "absent_folder"], "no tokenizer in 'absent_folder'"),
        (["--pattern", "custom", "--tokenizer", "x"], "give --texts FILE"),
        (["--pattern", "custom", "--tokenizer", "x", "--texts", "absent.jsonl"], "absent.jsonl' is not a file"),
        (["--pattern", "mixed", "--tokenizer", "x", "--output", "x.jsonl"], "give --groups N"),
    ],
)
def test_a_wrong_flag_ends_with_a_sentence(flags, printed):
    with environment(*flags) as process:
        output = process.communicate(timeout=300)[1]
    assert process.returncode != 0 and printed in output and "Traceback" not in output


def test_a_url_that_is_no_server_is_an_error(server):
    with pytest.raises(UserError, match="like http://localhost:8000"):
        AtroposEnvironment("localhost", 4, 256).post({})
    with pytest.raises(UserError, match="is this an Atropos server"):
        AtroposEnvironment(f"{server.url}/elsewhere", 4, 256).post({})


ASKED = Question("Return age and name as JSON: In Boston lives Oscar, who is 11.", {"age": 11, "name": "Oscar"})


@pytest.mark.parametrize(
    "answer, wanted",
    [
        ('{"age": 11, "name": "Oscar"}', 1),
        ('{\n  "name": "Oscar",\n  "age": 11\n}', 1),
        ('{"age": "11", "name": "Oscar"}', 0.5),
        ('{"age": 11, "name": "Oscar", "city": "Boston"}', 0.5),
        ('```json\n{"age": 11, "name": "Oscar"}\n```', 0.5),
        ('{"age": 12, "name": "Oscar"}', 0.5),
        ('{"age": 11, "age": 12, "name": "Oscar"}', 0.5),
        ('{"age": 11', 0.25),
        *((text, 0) for text in ("Oscar is 11.", "{}", "[]", "11", "")),
    ],
)
def test_the_reward_of_an_answer(answer, wanted):
    assert reward(ASKED, answer) == wanted


def test_held_out_questions_are_about_other_names_and_cities():
    held_out, others = (list(islice(questions(which, 0), 500)) for which in (True, False))
    assert held_out == list(islice(questions(True, 0), 500))
    for key in ("name", "city"):
        found = [{question.wanted[key] for question in some if key in question.wanted} for some in (held_out, others)]
        assert found[0] and found[1] and not found[0] & found[1]


def test_no_answer_earns_much_without_reading_the_question():
    chosen = list(islice(questions(True, 0), 300))
    answers = [*(json.dumps(question.wanted) for question in chosen), '{"name": "Tom", "age": 11, "city": "Paris"}']
    assert max(sum(reward(question, answer) for question in chosen) / len(chosen) for answer in answers) < 0.15
