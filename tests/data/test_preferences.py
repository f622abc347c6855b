"""Rows that judge completions: what is prompt, what is compared, and the errors of bad rows."""

import json

import pytest

from jaxft.data import formats
from jaxft.data.errors import DataError
from jaxft.data.forms import Conversation, Labelled, Pair, Preference, Stepwise
from jaxft.data.records import Row

ASK, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "ask"), *[("assistant", "yes")], ("assistant", "no"))
)
MORE = {"role": "user", "content": "more"}


def convert(fields, wanted="pairs", format=None):
    row = Row(fields, "file.jsonl:7")
    return formats.convert(row, format or formats.detect([row], "file.jsonl", wanted), wanted)


def chat(*messages, given):
    return Conversation(messages, (None,) * len(messages), given=given)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "a", "chosen": " b", "rejected": " c"}, Preference(Pair("a", " b"), Pair("a", " c"))),
        (
            {"prompt": [ASK], "chosen": [YES], "rejected": [NO], "margin": 2},
            Preference(chat(ASK, YES, given=1), chat(ASK, NO, given=1), 2.0),
        ),
        ({"chosen": [ASK, YES], "rejected": [ASK, NO]}, Preference(chat(ASK, YES, given=1), chat(ASK, NO, given=1))),
        # both repeat the prompt, as messages or (UltraFeedback, binarised) with it as text beside them
        (
            {"prompt": [ASK], "chosen": [ASK, YES], "rejected": [ASK, NO]},
            Preference(chat(ASK, YES, given=1), chat(ASK, NO, given=1)),
        ),
        (
            {
                "prompt": "ask",
                "prompt_id": "5dc49f4e6ee1f3a6",
                "chosen": [ASK, YES],
                "rejected": [ASK, NO],
                "score_chosen": 8.0,
                "score_rejected": 5.0,
            },
            Preference(chat(ASK, YES, given=1), chat(ASK, NO, given=1)),
        ),
        # the longest common beginning, but something is left of each
        (
            {"chosen": [ASK, YES, MORE, YES], "rejected": [ASK, YES, MORE, NO]},
            Preference(chat(ASK, YES, MORE, YES, given=3), chat(ASK, YES, MORE, NO, given=3)),
        ),
        (
            {"chosen": [ASK, YES], "rejected": [ASK, YES, MORE, NO]},
            Preference(chat(ASK, YES, given=1), chat(ASK, YES, MORE, NO, given=1)),
        ),
        (
            {
                "chosen": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "yes"}],
                "rejected": json.dumps([ASK, NO]),
            },
            Preference(chat(ASK, YES, given=1), chat(ASK, NO, given=1)),
        ),
    ],
)
def test_pairs(fields, expected):
    assert convert(fields) == expected


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),  # no word is cut in two
        ("Q: a\nA: yes", "Q: a\nA: no", "Q: a\nA:"),
        ("Q: a\nyes", "Q: a\nno", "Q: a\n"),
        ("Hi. Yes", "Hi. Yes sir", "Hi."),  # what one text ends with is left of it
        ("Hi.", "Hi. there", ""),
        ("天空是蓝色的", "天空是绿色的", "天空是"),
        ("yes", "no", ""),
    ],
)
def test_the_prompt_that_two_texts_share(chosen, rejected, prompt):
    pair = convert({"chosen": chosen, "rejected": rejected})
    assert (pair.chosen.prompt, pair.rejected.prompt) == (prompt, prompt)
    assert pair.chosen.prompt + pair.chosen.completion == chosen
    assert pair.rejected.prompt + pair.rejected.completion == rejected


def test_labelled_and_stepwise():
    assert convert({"prompt": "a", "completion": "b", "label": False}, "labelled") == Labelled(Pair("a", "b"), False)
    form = convert({"prompt": [ASK], "completion": [YES], "label": True}, "labelled")
    assert form == Labelled(chat(ASK, YES, given=1), True)
    assert isinstance(convert({"prompt": "a", "chosen": "b", "rejected": "c"}, "labelled"), Preference)
    form = convert({"prompt": "1+1", "completions": ["one", "two"], "labels": [True, False]}, "steps")
    assert form == Stepwise("1+1", ("one", "two"), (True, False))


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
LABELLED = {"prompt": "a", "completion": "b", "label": True}
STEPS = {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}


@pytest.mark.parametrize(
    ("wanted", "fields", "words"),
    [
        ("pairs", PAIR | {"rejected": "b"}, "`chosen, rejected`: got the same in both: 'b'; expected two different"),
        ("pairs", {"chosen": [ASK, YES], "rejected": [ASK, YES]}, "`chosen, rejected`: got the same in both"),
        ("pairs", PAIR | {"chosen": " "}, "`chosen`: got an empty completion"),
        ("pairs", PAIR | {"rejected": ""}, "`rejected`: got an empty completion"),
        ("pairs", PAIR | {"rejected": None}, "`rejected`: got nothing"),
        ("pairs", PAIR | {"rejected": [NO]}, "`prompt, chosen, rejected`: got str, str, list; expected all strings or"),
        ("pairs", {"chosen": [YES], "rejected": "c"}, "`chosen, rejected`: got list, str; expected all strings or all"),
        ("pairs", {"prompt": "b", "chosen": [YES], "rejected": [NO]}, "`prompt`: got 'b', a text that the messages"),
        ("pairs", {"prompt": [ASK], "chosen": [], "rejected": [NO]}, "`chosen`: got an empty list"),
        ("pairs", {"prompt": [ASK], "chosen": [YES], "rejected": ["x"]}, "`rejected[0]`: got 'x'"),
        (
            "pairs",
            {"prompt": [ASK], "chosen": [YES | {"content": ""}], "rejected": [NO]},
            "`chosen[0].content`: got an empty completion",
        ),
        ("pairs", {"chosen": [ASK, YES], "rejected": [ASK, MORE]}, "`rejected[1].role`: got 'user' after 'user'"),
        ("pairs", {"prompt": [YES], "chosen": [ASK, YES], "rejected": [NO]}, "`prompt[0].role`: got 'assistant'"),
        ("pairs", {"chosen": [ASK, YES | {"train": True}], "rejected": [ASK, NO]}, "`train`: got flags"),
        ("pairs", PAIR | {"margin": "1"}, "`margin`: got str '1'; expected a finite number"),
        ("pairs", PAIR | {"margin": True}, "`margin`: got bool True"),
        ("pairs", PAIR | {"margin": float("nan")}, "`margin`: got float nan"),
        ("labelled", LABELLED | {"label": 1}, "`label`: got int 1; expected true or false"),
        ("labelled", LABELLED | {"label": "true"}, "`label`: got str 'true'"),
        ("labelled", {"prompt": "a", "completion": "b"}, "`label`: got nothing"),
        ("labelled", LABELLED | {"completion": " "}, "`completion`: got an empty completion"),
        ("labelled", LABELLED | {"completion": [YES]}, "`prompt, completion`: got str and list"),
        ("steps", STEPS | {"labels": [True]}, "`completions, labels`: got 2 steps and 1 labels"),
        ("steps", STEPS | {"labels": [True, 0]}, "`labels[1]`: got int 0; expected a list of true and false"),
        ("steps", STEPS | {"completions": ["b", 3]}, "`completions[1]`: got int 3"),
        ("steps", STEPS | {"completions": ["b", " "]}, "`completions[1]`: got an empty completion"),
        ("steps", STEPS | {"completions": []}, "`completions`: got list []"),
        ("steps", STEPS | {"completions": "b"}, "`completions`: got str 'b'; expected a list of steps"),
        ("steps", STEPS | {"prompt": 1}, "`prompt`: got int 1"),
        ("pairs", {"instruction": "a", "completions": [{"model": "m"}]}, "`completions[0]`: got {'model': 'm'}"),
        ("pairs", {"chosen": "Human, hi", "rejected": "\n\nHuman: a"}, "`chosen`: got 'Human, hi'"),
    ],
)
def test_bad_rows_name_file_line_and_column(wanted, fields, words):
    format = "hh_rlhf" if str(fields.get("chosen")).startswith("Human") else None
    with pytest.raises(DataError) as caught:
        convert(fields, wanted, format)
    assert str(caught.value).startswith("file.jsonl:7: ") and words in str(caught.value)
    assert caught.value.remedy


def test_formats_belong_to_objectives():
    with pytest.raises(DataError, match=r"columns \['text'\].*preference: chosen, rejected"):
        formats.detect([Row({"text": "x"}, "f:1")], "f", "pairs")
    with pytest.raises(DataError, match=r"`data\.format`: got 'text'; expected one of hh_rlhf, preference"):
        formats.check("text", "pairs")
