"""Prompt templates: what they make of a row, which a row gets, promptsource's files, and what is refused."""

import collections
import dataclasses
import pickle
import textwrap

import pytest

from jaxft import data
from jaxft.data import wordings
from jaxft.data.config import SourceConfig
from jaxft.data.errors import DataError
from jaxft.data.records import Row

CONFIG = data.DataConfig(template="chatml", max_length=96)
ROWS = [{"text": f"the cat {i}", "label": i % 2, "other": "x"} for i in range(40)]
TWO = ("Say yes or no: {{ text }} ||| {{ ['no', 'yes'][label] }}", {"input": "{text}?", "target": "answer {label}"})
PROMPTSOURCE = """\
dataset: news
templates:
  0a: !Template
    answer_choices: World ||| Sports
    id: 0a
    jinja: "{{text}}\\n\\nWhich section? {{answer_choices | join(', ')}} ||| \\n{{ answer_choices[label] }}"
    metadata: !TemplateMetadata
      choices_in_prompt: true
      languages: [en]
      metrics: [Accuracy]
      original_task: true
    name: sections
    reference: ''
  0b: !Template
    answer_choices: null
    id: 0b
    jinja: "{% if label == 1 %}{{ ['Tell', 'Say'] | choice }}: {{text}}|||sports{% endif %}"
    metadata: !TemplateMetadata {}
    name: only_sports
    reference: ''
"""


def told(row, *prompts):
    """What each template makes of a row."""
    return [wordings.filled(w, Row(row, "f:1"), 0) for w in wordings.read(prompts)]


def chats_of(path, tokenizer, **options):
    """The prompt and the answer of every row, in order."""
    config = dataclasses.replace(CONFIG, path=path, **options)
    prepared = data.prepare(config, tokenizer)
    return [(p.text, p.answer) for p in data.prompts_of(prepared.train, prepared.format, config, tokenizer)]


def test_texts_and_jinja():
    row = {"text": "a {b} ||| c", "label": 1, "words": ["x", "y"]}
    assert told(row, "Q: {text}\n|||\n{label} ") == [{"inputs": "Q: a {b} ||| c", "targets": "1"}]
    assert told(row, {"input": "{{ words | join('+') }}", "target": "{label}"}) == [{"inputs": "x+y", "targets": "1"}]
    assert told(row, {"prompt": 'json {"a": 1}: {text}', "completion": " {words}"}) == [
        {"prompt": 'json {"a": 1}: a {b} ||| c', "completion": " ['x', 'y']"}
    ]
    # promptsource's filters and answers to choose from
    assert told(
        row,
        {
            "jinja": "{{ [3, 1, 3] | most_frequent }} ||| {{ answer_choices[label] }}",
            "answer_choices": ["no", "{{words[0]}}"],
        },
    ) == [{"inputs": "[3]", "targets": "x"}]


def test_a_file_of_promptsource(make_tokenizer, write, tmp_path):
    """Read as it is; a template that says nothing of a row is passed over, and its draws repeat."""
    (tmp_path / "t.yaml").write_text(PROMPTSOURCE)
    path, prompts = write(ROWS), str(tmp_path / "t.yaml")
    found = chats_of(path, make_tokenizer(), prompts=prompts)
    kinds = collections.Counter()
    for (text, answer), row in zip(found, ROWS, strict=True):
        asked = text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
        if asked == f"{row['text']}\n\nWhich section? World, Sports":
            assert answer == ["World", "Sports"][row["label"]]
            kinds["sections"] += 1
        else:
            assert row["label"] == 1 and answer == "sports"
            kinds[asked.split(":")[0]] += 1
    assert kinds["sections"] >= 20 and kinds["Tell"] and kinds["Say"]
    assert found == chats_of(path, make_tokenizer(), prompts=prompts)


def test_which_template_a_row_gets(make_tokenizer, write):
    """By its content and the seed alone: not by its place, and not by the order of the data."""
    tokenizer = make_tokenizer()
    found = chats_of(write(ROWS), tokenizer, prompts=TWO)
    assert sorted(chats_of(write(ROWS[::-1], "b.jsonl"), tokenizer, prompts=TWO, seed=3)) == sorted(found)
    first = [text.count("yes or no") for text, _ in found]
    assert 10 <= sum(first) <= 30
    other = [text.count("yes or no") for text, _ in chats_of(write(ROWS), tokenizer, prompts=TWO, prompts_seed=1)]
    assert other != first
    both = chats_of(write(ROWS), tokenizer, prompts=TWO, prompts_a_row=2)
    assert len(both) == 80 and both[::2] == found
    assert all(a != b for a, b in zip(both[::2], both[1::2], strict=True))
    source = data.prepare(dataclasses.replace(CONFIG, path=write(ROWS), prompts=TWO), tokenizer).train.source
    assert pickle.loads(pickle.dumps(source)).rows(3, 9) == source.rows(3, 9)  # as worker processes get it


def test_a_row_is_held_out_with_all_its_wordings(make_tokenizer, write):
    """And the same rows are, whatever they are told by."""
    path, tokenizer = write(ROWS), make_tokenizer()
    held = []
    for prompts, each in ((TWO, 2), (TWO[:1], 1)):
        config = dataclasses.replace(CONFIG, path=path, prompts=prompts, prompts_a_row=each, eval_fraction=0.2)
        prepared = data.prepare(config, tokenizer)
        assert prepared.held_out is not None
        wheres = [
            {row.where.split(" (")[0] for row in part.source_rows()} for part in (prepared.train, prepared.held_out)
        ]
        assert not wheres[0] & wheres[1] and len(prepared.held_out) == 8 * each
        held.append(wheres[1])
    assert held[0] == held[1]


def test_preferences_and_tasks(make_tokenizer, write):
    """Other columns make other formats; what judges a row and the number of its task stay."""
    rows = [{"q": f"what {i}", "good": "yes", "bad": "no", "margin": 2.0, "task": 1, "text": "t"} for i in range(3)]
    prompts = ({"prompt": "{q}?", "chosen": " {good}", "rejected": " {bad}"},)
    config = dataclasses.replace(CONFIG, path=write(rows), prompts=prompts, task_column="task")
    prepared = data.prepare(config, make_tokenizer(), "pairs")
    assert prepared.format == "preference" and prepared.train.tasks.tolist() == [1] * 6
    assert prepared.train.columns["margin"].tolist() == [2.0] * 6


def test_sources_share_a_file(make_tokenizer, write, tmp_path):
    (tmp_path / "t.yaml").write_text("say: 'Say {text} ||| {label}'\nask:\n  input: '{text}?'\n  target: '{label}'\n")
    sources = {name: SourceConfig(write(ROWS[:9], f"{name}.jsonl")) for name in ("a", "b")}
    sources["b"] = dataclasses.replace(sources["b"], prompts=("{text} b ||| b",))
    config = dataclasses.replace(CONFIG, sources=sources, prompts=str(tmp_path / "t.yaml"))
    prepared = data.prepare(config, make_tokenizer())
    found = data.prompts_of(prepared.train, prepared.format, config, make_tokenizer())
    assert {prompt.answer for prompt in found if prompt.source == "a"} == {"0", "1"}
    assert {prompt.answer for prompt in found if prompt.source == "b"} == {"b"}


@pytest.mark.parametrize(
    "prompts, said",
    [
        (("{text} ||| {nothing}",), ":1: `prompts`: got template '1' of data.prompts failing on it"),
        (("{{ txt }} ||| x",), "'txt' is undefined"),
        (("{text} ||| {{ label }}",), "it has {text} beside Jinja, where a column is {{ text }}"),
        (("{{ text ||| x",), "data.prompts: `template '1'`: got what Jinja does not read"),
        (("no parts",), "expected a text with ||| between input and target"),
        (("{text} ||| a ||| b",), "giving 3 parts; expected an input and a target"),
        (({"input": "{text}", "target": " "},), "got an empty `target` by template '1'"),
        (("{% if label > 5 %}a ||| b{% endif %}",), "got 0 templates that say anything of this row; expected 1"),
        (({"input": 3},), "data.prompts: `template '1'`: got input: 3"),
        (({"name": "a"},), "got no text"),
        (({"name": "a", "jinja": "x|||y"}, {"name": "a", "jinja": "z|||y"}), "got 'a' twice"),
        (("{{ ''.__class__.__mro__ }} ||| x",), "failing on it (SecurityError"),
        ("nowhere.yaml", "nowhere.yaml: `data.prompts`: got no such file"),
    ],
)
def test_what_is_refused(make_tokenizer, write, prompts, said):
    with pytest.raises(DataError) as caught:
        data.prepare(dataclasses.replace(CONFIG, path=write(ROWS), prompts=prompts), make_tokenizer())
    assert said in str(caught.value)


def test_bad_rows_are_counted_and_files_named(make_tokenizer, write, tmp_path):
    """A column that one row lacks: refused by file and line and template, or skipped."""
    path, file = write([*ROWS[:3], {"text": "alone"}, *ROWS[3:]]), tmp_path / "bad.yaml"
    config = dataclasses.replace(CONFIG, path=path, prompts=("{text} ||| {label}",))
    with pytest.raises(DataError, match=r"rows\.jsonl:4: `prompts`: got template '1' of data.prompts failing"):
        data.prepare(config, make_tokenizer())
    assert data.prepare(dataclasses.replace(config, on_error="skip"), make_tokenizer()).train.reading.skipped == 1
    for text, said in (("a: [", "bad.yaml:1: "), ("", "got None; expected a list"), ("a: 3", "`template 'a'`: got 3")):
        file.write_text(textwrap.dedent(text))
        with pytest.raises(DataError, match=said):
            data.prepare(dataclasses.replace(config, prompts=str(file)), make_tokenizer())
    with pytest.raises(DataError, match=r"`data.prompts_a_row`: got 2; expected 1 to 1"):
        data.prepare(dataclasses.replace(config, prompts_a_row=2), make_tokenizer())
