"""Chat records: what the assistant wrote is trained, exactly, and nothing that the template writes."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from wsft.rollouts.batch import AtroposBatchProcessor
from wsft.rollouts.chat import ChatRenderer
from wsft.rollouts.data_files import DataFiles
from wsft.rollouts.sources import FileSource

WORDS = ["<unk>", "<s>", "<e>", "system", "user", "assistant", "tool", "call", "think", *"abcdefgh", "tools"]
CHAT = (
    "{% if tools %}<s> tools {{ tools[0].name }} <e> {% endif %}{% for m in messages %}<s> {{ m.role }} "
    "{% if m.tool_calls is defined %}call {{ m.tool_calls[0].name }}{% else %}{{ m.content }}{% endif %} <e> \n {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
# reasoning is left out of all messages but the last
REASONS = (
    "{% for m in messages %}<s> {{ m.role }} {% if m.reasoning and loop.last %}think {{ m.reasoning }} {% endif %}"
    "{{ m.content }} <e> {% endfor %}{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def tokenizer(template):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<e>")
    made.chat_template = template
    return made


def processor(template=CHAT):
    return AtroposBatchProcessor(chat=ChatRenderer(tokenizer(template), frozenset({2})))


def shown(batch):
    """Each sequence as words, the trained ones with their advantages."""
    rows = []
    for span in batch.spans():
        trained = zip(batch.tokens[span], batch.loss_mask[span], batch.advantages[span], strict=True)
        rows.append(" ".join(WORDS[t] + (f":{a:g}" if mask else "") for t, mask, a in trained))
    return rows


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def test_what_the_assistant_wrote_is_trained_with_the_weights_of_message_and_record():
    turns = [say("system", "a"), say("user", "b"), say("assistant", "c d"), say("user", "e"), say("assistant", "f", weight=0.5)]
    found = processor().decode([{"messages": turns, "weight": 2}, {"messages": [*turns[:2], say("assistant", "g", weight=-1)]}])
    assert shown(found) == [
        "<s> system a <e> <s> user b <e> <s> assistant c:2 d:2 <e>:2 <s> user e <e> <s> assistant f:1 <e>:1",
        "<s> system a <e> <s> user b <e> <s> assistant g:-1 <e>:-1",
    ]
    silent = [*turns[:2], say("assistant", "c", weight=0), turns[3], say("assistant", "f")]
    assert shown(processor().decode([{"messages": silent}])) == [
        "<s> system a <e> <s> user b <e> <s> assistant c <e> <s> user e <e> <s> assistant f:1 <e>:1"
    ]


def test_tool_calls_and_tools_go_through_the_template():
    turns = [say("user", "a"), say("assistant", None, tool_calls=[{"name": "b"}]), say("tool", "c"), say("assistant", "d")]
    assert shown(processor().decode([{"messages": turns, "tools": [{"name": "b"}]}])) == [
        "<s> tools b <e> <s> user a <e> <s> assistant call:1 b:1 <e>:1 <s> tool c <e> <s> assistant d:1 <e>:1"
    ]


def test_where_earlier_messages_change_each_turn_is_a_sequence_behind_what_it_saw():
    turns = [say("user", "a"), say("assistant", "b", reasoning="c"), say("user", "d"), say("assistant", "e", reasoning="f")]
    assert shown(processor(REASONS).decode([{"messages": turns}])) == [
        "<s> user a <e> <s> assistant think:1 c:1 b:1 <e>:1",
        "<s> user a <e> <s> assistant b <e> <s> user d <e> <s> assistant think:1 f:1 e:1 <e>:1",
    ]


@pytest.mark.parametrize(
    "messages, says",
    [
        ([say("user", "a")], "no message of the assistant has a weight"),
        (["a"], "found 'a', expected an object with a role"),
        ([say("assistant", "a", weight="b")], "found weight 'b', expected a number"),
        ([say("assistant", "a")], "an empty conversation"),
        ([say("user", "a"), say("assistant", None, tool_calls=[])], "UndefinedError"),
    ],
)
def test_messages_that_cannot_be_rendered_are_left_out_and_said(messages, says, caplog):
    good = {"messages": [say("user", "a"), say("assistant", "b")]}
    batch = processor().decode([{"messages": messages}, good])
    assert len(batch.lengths) == 1 and batch.rejected == {"messages that cannot be rendered": 1}
    assert says in caplog.text and "group 0" in caplog.text


def test_a_file_of_chats_and_groups_is_read_in_batches(tmp_path):
    chat = {"messages": [say("user", "a"), say("assistant", "b")]}
    group = {"tokens": [[1, 4, 9], [1, 4, 10]], "masks": [[0, 0, 1]] * 2, "scores": [0.0, 1.0], "messages": None}
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [chat, group, chat, chat]))
    source, sizes = FileSource(DataFiles(str(tmp_path / "data.jsonl")), 2, processor()), []
    while taken := source.rollouts()[0]:
        sizes.append(len(taken))
    assert sizes == [2, 2, 1]
    without = AtroposBatchProcessor().decode([chat])
    assert without.rejected == {"record is not a group": 1}
