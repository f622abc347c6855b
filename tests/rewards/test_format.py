"""How completions are written: think tags as trl has them, patterns, JSON, exact answers, chosen letters."""

import importlib.util
import itertools

import pytest
from trl.rewards import think_format_reward

from jaxft.rewards import format, schema
from jaxft.rewards.format import ExactMatch, JSONSchema, MultipleChoice, Pattern, ThinkFormat


def given(make, config, texts, **columns):
    return make(config)([""] * len(texts), texts, **columns)


def test_think_tags_are_those_of_trl():
    pieces = ["<think>", "</think>", "a", "\n"]
    texts = ["".join(some) for count in range(6) for some in itertools.product(pieces, repeat=count)]
    theirs = think_format_reward([[{"role": "assistant", "content": text}] for text in texts])
    assert 0 < sum(theirs) < len(texts)
    assert given(format.think, ThinkFormat(), texts) == theirs


def test_other_tags_and_tags_that_the_template_opens():
    assert given(format.think, ThinkFormat(tags=("[R]", "[/R]")), ["[R]a[/R]b", "<think>a</think>b"]) == [1, 0]
    texts = ["a</think>b", "<think>a</think>b", "ab", "</think>"]
    assert given(format.think, ThinkFormat(opened=True), texts) == [1, 0, 0, 1]
    with pytest.raises(ValueError, match="expected two texts"):
        ThinkFormat(tags=("", "x"))


def test_patterns():
    texts = ["<a>\n1</a>", "say <a>1</a>", "<think><a>1</a></think>x", "<think>"]
    assert given(format.pattern, Pattern(pattern="<a>.*</a>"), texts) == [1, 0, 0, 0]
    assert given(format.pattern, Pattern(pattern="<a>.*</a>", match="search"), texts) == [1, 1, 1, 0]
    assert given(format.pattern, Pattern(pattern="<a>.*</a>", match="search", of="answer"), texts) == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="which is no regex"):
        Pattern(pattern="(")


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 1}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


def test_json_in_a_fence_or_bare():
    texts = [
        '{"name": "a", "age": 3}', '{"name": "a", "age": -1}', '{"name": ""}', '{"age": 3}', '{"name": "a", "x": 1}',
        'Here:\n```json\n{"name": "a"}\n```\nDone.', '<think>{}</think>{"name": "a"}', '{"name": "a"', "[" * 100_000,
        '{"name": "a", "age": NaN}', "<think>",
    ]  # fmt: skip
    assert given(format.json_schema, JSONSchema(schema=SCHEMA), texts) == [1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0]
    assert given(format.json_schema, JSONSchema(schema=SCHEMA, fenced=False), texts)[5] == 0
    assert given(format.json_schema, JSONSchema(), texts)[:5] == [1, 1, 1, 1, 1]


def test_schemas_of_files_and_columns(tmp_path):
    (tmp_path / "schema.json").write_text('{"type": "integer"}')
    texts, own = ["1", '"a"'], ['{"type": "string"}', {"type": "string"}]
    assert given(format.json_schema, JSONSchema(path=str(tmp_path / "schema.json")), texts) == [1, 0]
    assert given(format.json_schema, JSONSchema(column="s"), texts, s=own) == [0, 1]
    with pytest.raises(ValueError, match="column s is no JSON"):
        given(format.json_schema, JSONSchema(column="s"), ["1"], s=["{"])
    with pytest.raises(ValueError, match="expected one of them"):
        JSONSchema(path="a", column="b")


SCHEMAS = [
    {"type": ["integer", "null"]}, {"type": "number", "multipleOf": 0.5}, {"enum": [1, "a", [1, {"b": None}]]},
    {"const": True}, {"const": 1}, {"type": "string", "pattern": "^a+$", "maxLength": 3}, {"exclusiveMaximum": 3},
    {"exclusiveMinimum": 0, "maximum": 2.5}, {"items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
    {"prefixItems": [{"type": "string"}, True], "items": False}, {"uniqueItems": True},
    {"properties": {"a": {"const": 1}}, "additionalProperties": {"type": "string"}, "minProperties": 1},
    {"maxProperties": 1}, {"anyOf": [{"type": "string"}, {"minimum": 2}]}, {"not": {"type": "array"}},
    {"oneOf": [{"type": "number"}, {"minimum": 2}]}, {"allOf": [{"type": "number"}, {"minimum": 2}]}, True, False,
    {"type": "object", "required": ["a"], "title": "remarks are allowed", "minLength": 5},
]  # fmt: skip
VALUES = [
    None, True, False, 0, 1, 1.0, 2, 2.5, 0.3, 3, -1, 1e300, "", "a", "aaa", "aaaa", "ba", "\U0001f600" * 3, [], [1],
    [1, 1.0], [1, True], ["a", 1], ["a", 1, 2], [1, {"b": None}], [[1], [1]], {}, {"a": 1}, {"a": True},
    {"a": 1, "b": "c"}, {"a": 1, "b": 2}, {"b": "c"}, [{"a": 1}, {"a": 1.0}],
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_the_part_of_the_standard_agrees_with_jsonschema(number):
    jsonschema = pytest.importorskip("jsonschema")
    allows, theirs = schema.part(SCHEMAS[number]), jsonschema.Draft202012Validator(SCHEMAS[number])
    assert [allows(value) for value in VALUES] == [theirs.is_valid(value) for value in VALUES]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"properties": {"a": {"format": "date"}}}, "schema/properties/a: got the keyword 'format'"),
        ({"$ref": "#/$defs/a"}, "got the keyword"),
        ({"type": "int"}, "schema/type: got 'int'"),
        ({"minLength": -1}, "expected a count"),
        ({"items": 3}, "schema/items: got 3"),
        ({"required": "a"}, "schema/required"),
        ({"pattern": "("}, "no regex"),
        ({"anyOf": []}, "expected a list of schemas"),
        ({"enum": 1}, "expected a list"),
    ],
)
def test_what_is_not_understood_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said.replace("$", r"\$")):
        schema.part(wrong)


def test_without_the_package_the_part_is_used(monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jsonschema" else known(name))
    with pytest.raises(ValueError, match="without the package jsonschema"):
        schema.validator({"format": "date"})
    assert schema.validator({"type": "integer"})(3)
    assert schema.validator({"multipleOf": 0.1})(0.3)  # as decimals, which the package takes for binary fractions


def test_a_schema_that_is_none_is_refused():
    with pytest.raises(ValueError, match="got 'int' at"):
        schema.validator({"type": "int"})


def test_exact_answers():
    texts = ["Paris.", "<think>x</think>paris", "It is Paris", "<think>", "London"]
    rights = ["Paris", "PARIS", "Paris", "Paris", ["Paris", "London"]]
    assert given(format.exact, ExactMatch(), texts, answer=rights) == [1, 1, 0, 0, 1]
    assert given(format.exact, ExactMatch(normalise=False), texts, answer=rights) == [0, 0, 0, 0, 1]
    assert given(format.exact, ExactMatch(extract=r"It is (\w+)"), texts, answer=rights) == [0, 0, 1, 0, 0]
    assert given(format.exact, ExactMatch(answer="n"), ["1,000", "x"], n=[1000, None]) == [1, None]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("(b)", "B"), ("B. Paris", "B"), ("B) Paris", "B"), ("**B**", "B"), (r"so \boxed{C}", "C"),
        (r"\boxed{\text{C}}", "C"), (r"\boxed{(C) Rome}", "C"), ("The answer is (D).", "D"), ("Answer: a", "A"),
        ("The answer is A. No: the answer is B", "B"), ("The correct choice is option C", "C"), ("A dog barks", None),
        ("I think (B) fits, yes (B)", "B"), ("either (A) or (B)", None), ("the answer is Berlin", None), ("", None),
        (r"\boxed{7}", None), ("Apples", None), ("The answer is a dog", "A"),
    ],
)  # fmt: skip
def test_the_letter_that_is_chosen(text, letter):
    assert format.letter(text, "ABCD") == letter


def test_choices_by_letter_or_number():
    texts = ["B", "<think>A</think>B", "<think>B", "A", "C"]
    assert given(format.choice, MultipleChoice(), texts, answer=["B", "(b)", "B", 0, None]) == [1, 1, 0, 1, None]
    with pytest.raises(ValueError, match="expected one of A, B, or its number"):
        given(format.choice, MultipleChoice(letters="AB"), ["A"], answer=["C"])
    with pytest.raises(ValueError, match="different letters"):
        MultipleChoice(letters="AAb")
