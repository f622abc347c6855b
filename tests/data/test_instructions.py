"""Well-known sets, with rows in the schema that each is published in."""

import json

import pytest

from jaxft.data import formats
from jaxft.data.errors import DataError
from jaxft.data.records import Row


def convert(fields, wanted="tokens", format=None):
    row = Row(fields, "file.jsonl:7")
    found = formats.detect([row], "file.jsonl", wanted)
    assert format is None or found == format
    return formats.convert(row, found, wanted)


def said(chat):
    return [(message["role"], message["content"]) for message in chat.messages]


FLAN = {  # Open-Orca/FLAN
    "inputs": "Premise: It rains.\n\nHypothesis: It is wet.\n\nDoes the premise entail the hypothesis?",
    "targets": "yes",
    "_template_idx": 3,
    "_task_source": "Flan2021",
    "_task_name": "snli:1.1.0",
    "_template_type": "zs_noopt",
}
DOLLY = {  # databricks/databricks-dolly-15k
    "instruction": "When did Virgin Australia start operating?",
    "context": "Virgin Australia commenced services on 31 August 2000.",
    "response": "On 31 August 2000.",
    "category": "closed_qa",
}
DIALOGUE = "\n\nHuman: What do I do?\n\nAssistant: About what?\n\nHuman: My cat:\nit sings.\n\nAssistant: "
HH = {"chosen": f"{DIALOGUE}Record it.", "rejected": f"{DIALOGUE}Run. "}  # Anthropic/hh-rlhf


def rated(response, overall, *ratings, fine=None):
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {
        "annotations": {
            name: {"Rating": rating, "Rationale": "Because.", "Type": None, "Rationale For Rating": None}
            for name, rating in zip(aspects, ratings, strict=False)
        },
        "critique": "Fine.",
        "custom_system_prompt": "As an AI assistant, be honest.",
        "fine-grained_score": fine,
        "model": "falcon-40b-instruct",
        "overall_score": overall,
        "principle": "honesty",
        "response": response,
    }


def ultrafeedback(*completions, instruction="Name a colour."):  # openbmb/UltraFeedback
    return {
        "source": "evol_instruct",
        "instruction": instruction,
        "models": ["falcon-40b-instruct"] * len(completions),
        "completions": list(completions),
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def test_flan():
    assert said(convert(FLAN, format="flan")) == [("user", FLAN["inputs"]), ("assistant", "yes")]
    with pytest.raises(DataError, match=r"`targets\.content`: got an empty completion"):
        convert(FLAN | {"targets": " "})


def test_dolly():
    chat = convert(DOLLY, format="dolly")
    assert said(chat) == [
        ("user", f"{DOLLY['instruction']}\n\n{DOLLY['context']}"),
        ("assistant", "On 31 August 2000."),
    ]
    assert said(convert(DOLLY | {"context": ""}))[0] == ("user", DOLLY["instruction"])
    with pytest.raises(DataError, match=r"`response\[1\].content`: got an empty completion"):
        convert(DOLLY | {"response": ""})


def test_transcripts():
    pair = convert(HH, "pairs", "hh_rlhf")
    before = [("user", "What do I do?"), ("assistant", "About what?"), ("user", "My cat:\nit sings.")]
    assert said(pair.chosen) == [*before, ("assistant", "Record it.")] and pair.chosen.given == 3
    assert said(pair.rejected) == [*before, ("assistant", "Run.")] and pair.rejected.given == 3
    assert convert(HH, format="hh_rlhf") == pair.chosen  # sft learns what is preferred
    with pytest.raises(DataError, match=r"`rejected\[3\].content`: got an empty completion"):
        convert(HH | {"rejected": HH["rejected"].replace("Run. ", "")}, "pairs")


def test_ultrafeedback():
    row = ultrafeedback(rated("red", 5.0), rated("blue", 8.5), rated("mud", 1.0), rated("tie", 8.5))
    pair = convert(row, "pairs", "ultrafeedback")
    assert said(pair.chosen) == [("user", "Name a colour."), ("assistant", "blue")] and pair.chosen.given == 1
    assert said(convert(row, format="ultrafeedback")) == said(pair.chosen)
    drawn = set()
    for i in range(20):
        again = [convert(row | {"instruction": f"Name {i}."}, "pairs") for _ in range(2)]
        assert again[0] == again[1]
        drawn.add(said(again[0].rejected)[1][1])
    assert drawn == {"red", "mud"}
    assert convert(ultrafeedback(rated("a", 5.0), rated("b", 5.0)), "pairs") is None
    pair = convert(ultrafeedback(rated("a", None, "5", fine=3.5), rated("b", 4.0, fine=3.0)), "pairs")
    assert said(pair.chosen)[1][1] == "b"
    # without a score: the mean of the ratings, those that are numbers
    row = ultrafeedback(rated("a", None, "4", "N/A", "5"), rated("b", None, "5", "5", "4"), rated("c", None))
    pair = convert(row, "pairs")
    assert (said(pair.chosen)[1][1], said(pair.rejected)[1][1]) == ("b", "a")


def test_the_old_formats_still_claim_their_rows():
    """Columns beside those of a format do not make a row another one's."""
    for fields, format in (
        ({"text": "x", "inputs": "a", "targets": "b"}, "text"),
        ({"instruction": "a", "output": "b", "response": "c"}, "alpaca"),
        ({"prompt": "a", "completion": "b", "label": True}, "prompt_completion"),
        ({"messages": [], "chosen": HH["chosen"], "rejected": HH["rejected"]}, "messages"),
    ):
        assert formats.detect([Row(fields, "f:1")], "f") == format, json.dumps(fields)
