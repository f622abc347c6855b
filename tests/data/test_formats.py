"""Conversion of every format to one form, and the errors of bad rows."""

import json

import pytest

from jaxft.data import formats
from jaxft.data.errors import DataError
from jaxft.data.formats import Conversation, Document, Pair
from jaxft.data.records import Row

ASK, SAY = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOL = {"role": "tool", "content": "3"}


def convert(fields, format=None):
    row = Row(fields, "file.jsonl:7")
    return formats.convert(row, format or formats.detect([row], "file.jsonl"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": "hi"}, Document("hi")),
        ({"prompt": "a", "completion": "b"}, Pair("a", "b")),
        ({"messages": [ASK, SAY]}, Conversation((ASK, SAY), (None, None))),
        ({"prompt": [ASK], "completion": [SAY]}, Conversation((ASK, SAY), (None, None), given=1)),
        (
            {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "say"}]},
            Conversation((ASK, SAY), (None, None)),
        ),
        (
            {"conversations": [ASK, SAY], "system": "be"},
            Conversation(({"role": "system", "content": "be"}, ASK, SAY), (None, None, None)),
        ),
        (
            {"messages": [ASK, {"role": "assistant", "content": [{"type": "text", "text": "say"}], "name": None}]},
            Conversation((ASK, SAY), (None, None)),
        ),
        (
            {"messages": [ASK | {"train": False}, SAY | {"weight": 1}]},
            Conversation((ASK, SAY), (False, True)),
        ),
        (
            {"messages": json.dumps([ASK, CALLS, TOOL, SAY]), "tools": json.dumps([{"name": "f"}])},
            Conversation((ASK, CALLS, TOOL, SAY), (None,) * 4, ({"name": "f"},)),
        ),
    ],
)
def test_forms(fields, expected):
    assert convert(fields) == expected


def test_tool_calls_are_normalised():
    bare = {"name": "f", "arguments": json.dumps({"a": 1})}
    openai = {"id": "1", "type": "function", "function": bare}
    for call in (bare, openai):
        reply = convert({"messages": [ASK, {"role": "assistant", "tool_calls": [call]}]}).messages[1]
        assert reply["tool_calls"][0]["function"] == CALL["function"] and reply["content"] == ""
    sharegpt = [
        {"from": "human", "value": "ask"},
        {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"a": 1}})},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "say"},
    ]
    assert convert({"conversations": sharegpt}).messages == (ASK, CALLS, TOOL, SAY)


def test_alpaca():
    chat = convert({"instruction": "add", "input": "1 2", "output": "3", "text": "add 1 2 3"})
    user = {"role": "user", "content": "add\n\n1 2", "instruction": "add", "input": "1 2"}
    assert chat.messages == (user, {"role": "assistant", "content": "3"})
    chat = convert({"instruction": "b", "output": "c", "history": [["x", "y"]], "system": "s"})
    assert [message["content"] for message in chat.messages] == ["s", "x", "y", "b", "c"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text": " "}, "`text`: got an empty text"),
        ({"text": 3}, "`text`: got int 3; expected a string"),
        ({"prompt": "a"}, "`completion`: got nothing"),
        ({"prompt": "a", "completion": " \n"}, "`completion`: got an empty completion"),
        ({"prompt": "a", "completion": [SAY]}, "got str and list; expected both strings"),
        ({"messages": []}, "`messages`: got list []; expected a list of messages"),
        ({"messages": [SAY, ASK]}, "`messages[0].role`: got 'assistant' as the first message; expected 'system'"),
        ({"messages": [ASK, ASK, SAY]}, "`messages[1].role`: got 'user' after 'user'; expected 'assistant'"),
        ({"messages": [ASK, SAY, SAY]}, "`messages[2].role`: got 'assistant' after 'assistant'"),
        ({"messages": [ASK, SAY, TOOL, SAY]}, "without tool_calls"),
        ({"messages": [ASK, SAY, {"role": "system", "content": "x"}]}, "got 'system' after 'assistant'"),
        ({"messages": [ASK, SAY, ASK]}, "`messages`: got 'user' as the last message"),
        ({"messages": [ASK, {"role": "assistant", "content": ""}]}, "`messages[1].content`: got an empty completion"),
        ({"messages": [ASK, {"role": "assistant"}]}, "`messages[1].content`: got nothing"),
        ({"messages": [ASK, {"role": "bot", "content": "x"}]}, "`messages[1].role`: got 'bot'; expected one of system"),
        ({"messages": [ASK, {"content": "x"}]}, "`messages[1]`: got {'content': 'x'}"),
        ({"messages": [ASK | {"content": [{"type": "image"}]}, SAY]}, "images are not read"),
        ({"messages": [ASK | {"train": True}, SAY]}, "true on assistant messages alone"),
        ({"messages": [ASK, SAY | {"train": "yes"}]}, "`messages[1].train`: got 'yes'"),
        ({"messages": [ASK, SAY], "tools": "what"}, "`tools`: got 'what'"),
        ({"conversations": [{"from": "martian", "value": "x"}]}, "`conversations[0].from`: got 'martian'"),
        ({"instruction": "x", "output": ""}, "an empty completion"),
    ],
)
def test_bad_rows_name_file_line_and_field(fields, words):
    with pytest.raises(DataError) as caught:
        convert(fields)
    assert str(caught.value).startswith("file.jsonl:7: ") and words in str(caught.value)
    assert caught.value.remedy


def test_detection_is_for_the_whole_data_set():
    rows = [DataError("f:1", "", "x", "y", ""), Row({"messages": [ASK, SAY]}, "f:2")]
    assert formats.detect(rows, "f") == "messages"
    with pytest.raises(DataError, match="`messages`: got nothing"):
        convert({"text": "a document among chats"}, "messages")
    with pytest.raises(DataError, match=r"columns \['question'\].*data\.columns"):
        formats.detect([Row({"question": "x"}, "f:1")], "f")
    with pytest.raises(DataError, match="Preference data"):
        formats.detect([Row({"chosen": "x", "rejected": "y"}, "f:1")], "f")
