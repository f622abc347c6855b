"""The mechanism alone, on a small config of its own."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

import pytest
import yaml

from jaxft.border import check, fields, reading, schema
from jaxft.border.errors import ConfigError
from jaxft.border.fields import Choice


@dataclass(frozen=True)
class Lora:
    """Low rank."""

    rank: int = 16
    """Rank of
    the update."""
    pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    """Ranks that differ."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"peft.rank: got {self.rank}; expected at least 1")


@dataclass(frozen=True)
class Ia3:
    """Rescaling."""

    feedforward: tuple[str, ...] = ()
    """Modules scaled on their input."""


@dataclass(frozen=True)
class Part:
    """One part of a mixture."""

    path: str
    """Where it lies."""
    weight: float = 1.0
    """Share."""


@dataclass(frozen=True)
class Named:
    """Parts by names of the user's own."""

    sources: dict[str, Part] = dataclasses.field(default_factory=dict)
    """Parts."""


@dataclass(frozen=True)
class Optim:
    """The optimiser."""

    name: Literal["adamw", "lion"] = "adamw"
    """Rule."""
    lr: float | None = None
    """Peak learning rate."""
    warmup_steps: int = 0
    """Steps of warm-up."""
    nesterov: bool = False
    """Nesterov momentum."""


@dataclass(frozen=True)
class Data:
    """The data."""

    path: str
    """File, directory or hub name."""
    mixture: tuple[Part, ...] = ()
    """More of them."""
    columns: tuple[str, ...] | str = "auto"
    """Columns to read."""


@dataclass(frozen=True)
class Config:
    """Everything."""

    data: Data
    """What to train on."""
    optim: Optim = Optim()
    """How."""
    peft: Choice = fields.choice("method", {"lora": Lora, "ia3": Ia3}, "lora", "The method.")
    """What is trained."""
    held_out: Data | None = None
    """What to evaluate on."""


def build(text: str = "", *overrides: str) -> Config:
    source = reading.read_yaml(text, "run.yaml")
    for override in overrides:
        reading._lay_over(source, override)
    return check.build(Config, source)


def refused(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        build(text, *overrides)
    return str(caught.value)


def test_defaults_and_values():
    config = build("data:\n  path: a.jsonl\npeft: {method: ia3, feedforward: [down_proj]}\noptim: {lr: 1e-4}\n")
    assert config == Config(
        data=Data("a.jsonl"), optim=Optim(lr=1e-4), peft=Choice("ia3", Ia3(feedforward=("down_proj",)))
    )


def test_overrides_of_every_kind():
    config = build(
        "data: {path: a, mixture: [{path: b}, {path: c}]}\noptim: {lr: 1.0}\n",
        "optim.lr=null",
        "optim.warmup_steps=3",
        "optim.warmup_steps=7",
        "data.mixture.1.weight=2",
        "data.columns=[x, 'y z']",
        "peft.pattern.q_proj=4",
        "optim.name=lion",
        "held_out.path=c",
    )
    assert config.optim == Optim("lion", None, 7)
    assert config.data == Data("a", (Part("b"), Part("c", 2.0)), ("x", "y z"))
    assert config.peft == Choice("lora", Lora(pattern={"q_proj": 4})) and config.held_out == Data("c")


def test_a_name_alone_picks_an_alternative():
    assert build("data: {path: a}", "peft=ia3").peft == Choice("ia3", Ia3())
    assert build("data: {path: a}", "peft={method: lora, rank: 8}", "peft.rank=9").peft == Choice("lora", Lora(9))


@pytest.mark.parametrize("typed", ["123", "2024-01-02", "a: b", "[x", "true", "null", "- a"])
def test_text_keys_take_what_was_typed(typed):
    assert build("", f"data.path={typed}").data.path == typed


def test_null_stays_null_where_it_may():
    assert build("data: {path: a}\nheld_out: {path: b}", "held_out=null").held_out is None
    assert build("data: {path: a}\noptim:\n").optim == Optim(), "a section with nothing below it is its defaults"


def test_yaml_1_2_scalars():
    values = reading.read_yaml(
        "a: 1e-4\nb: no\nc: 010\nd: 2024-01-02\ne: 1:30\nf: .5\ng: 0x10\nh: '3'\ni: 1_0", "x"
    ).values
    expected = {"a": 1e-4, "b": "no", "c": 10, "d": "2024-01-02", "e": "1:30", "f": 0.5, "g": 16, "h": "3", "i": "1_0"}
    assert values == expected
    assert yaml.load(yaml.dump(values, Dumper=reading.Dumper), reading.Loader) == expected


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("data: {path: a}\noptim:\n  lrr: 1", (), "run.yaml, line 3: `optim.lrr` is no key; did you mean `optim.lr`?"),
        ("data: {path: a}\nlr: 1", (), "run.yaml, line 2: `lr` is no key; did you mean `optim.lr`?"),
        ("data: {path: a}\noptimizer: {}", (), "line 2: `optimizer` is no key; did you mean `optim`?"),
        (
            "data: {path: a}",
            ("optim.warmup=1",),
            "command line: `optim.warmup` is no key; did you mean `optim.warmup_steps`?",
        ),
        ("data: {path: a}\nzzz: 1", (), "line 2: `zzz` is no key; its keys are data, optim, peft, held_out"),
        (
            "data: {path: a}\npeft: {method: ia3, rank: 3}",
            (),
            "`peft.rank` is no key of peft.method=ia3; it belongs to lora",
        ),
        (
            "data: {path: a}\npeft: {method: lorra}",
            (),
            'expected one of lora, ia3; got the text "lorra"; did you mean `lora`?',
        ),
        ("data: {path: a}\npeft: 3", (), "`peft`: expected method (one of lora, ia3) and its keys, got 3"),
        (
            "data: {path: a}\noptim: {warmup_steps: '3'}",
            (),
            '`optim.warmup_steps`: expected an integer, got the text "3"; take the quotes away',
        ),
        ("data: {path: a}\noptim: {warmup_steps: 1.5}", (), "`optim.warmup_steps`: expected an integer, got 1.5"),
        ("data: {path: a}\noptim: {warmup_steps: true}", (), "`optim.warmup_steps`: expected an integer, got true"),
        (
            "data: {path: a}",
            ("optim.warmup_steps=abc",),
            'command line: `optim.warmup_steps`: expected an integer, got the text "abc"',
        ),
        ("data: {path: a}\noptim: {lr: [1]}", (), "`optim.lr`: expected a number or null, got the list [1]"),
        (
            "data: {path: a}\noptim: {nesterov: yes}",
            (),
            'expected true or false, got the text "yes"; write true or false',
        ),
        (
            "data: {path: a}\noptim: {name: adam}",
            (),
            'expected one of adamw, lion, got the text "adam"; did you mean `adamw`?',
        ),
        ("data: {path: 3}", (), "`data.path`: expected text, got 3; put it in quotes"),
        (
            "data: {path: a, mixture: [{path: b}, {weight: 1}]}",
            (),
            "`data.mixture.1.path` must be given (text): Where it lies.",
        ),
        ("data: {path: a, mixture: {path: b}}", (), "`data.mixture`: expected a list of mappings, got the mapping"),
        (
            "data: a",
            (),
            'run.yaml, line 1: `data`: expected a mapping (its keys: path, mixture, columns), got the text "a"',
        ),
        ("data: {path: a}\npeft:\n  rank: 0", (), "run.yaml, line 3: peft.rank: got 0; expected at least 1"),
        ("", (), "`data.path` must be given (text): File, directory or hub name."),
        ("data: {path: a}\ndata: {path: b}", (), "run.yaml, line 2: `data` is written twice; first on line 1"),
        (
            "data: {path: a}\noptim:\n  lr: 1\n  lr: 2",
            (),
            "run.yaml, line 4: `optim.lr` is written twice; first on line 3",
        ),
        ("data: {path: a\noptim: 1", (), "run.yaml, line 2: not YAML"),
        ("- a", (), "run.yaml: expected `key: value` lines, got list"),
        ("data: {path: a}", ("lr",), "command line: expected key=value (such as optim.lr=1e-4), got 'lr'"),
        ("data: {path: a}", ("optim.lr=",), "command line: `optim.lr` has no value; write optim.lr=null for none"),
        (
            "data: {path: a}\npeft: ia3",
            ("peft.rank=3",),
            "command line: `peft.rank`: `peft` is 'ia3', which has no keys",
        ),
        (
            "data: {path: a, mixture: []}",
            ("data.mixture.0.path=b",),
            "`data.mixture` is a list of 0; give an index below that",
        ),
    ],
)
def test_messages(text, overrides, message):
    assert message in refused(text, *overrides)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00a", b"a: \x00", b"a:\n\t- b", b"a: &x\nb: *y"])
def test_files_that_are_no_yaml(tmp_path, content):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.yaml.*: not "):
        reading.read(tmp_path / "run.yaml")


def test_every_problem_is_told_at_once():
    lines = refused("data: {path: 1}\noptim: {lrr: 1, lr: x}\nfoo: 1").splitlines()
    assert len(lines) == 4 and all(line.startswith("run.yaml, line ") for line in lines)


def test_anchors_and_merges():
    config = build("data: &d {path: a}\nheld_out:\n  <<: *d\n  columns: x\n")
    assert config.held_out == Data("a", columns="x")


def test_round_trip():
    config = build(
        "data: {path: '1e-4', mixture: [{path: b}]}\npeft: {rank: 4, pattern: {q: 1}}\nheld_out: {path: 'null'}"
    )
    text = yaml.dump(check.plain(config), Dumper=reading.Dumper, sort_keys=False)
    assert build(text) == config


def test_docs_are_read_from_the_source():
    assert fields.docstrings(Lora) == {"rank": "Rank of the update.", "pattern": "Ranks that differ."}
    every = {".".join(path): alternative for path, _, alternative in fields.keys(Config)}
    assert every["peft.rank"] == "lora" and every["peft.feedforward"] == "ia3" and every["data.mixture"] == ""


def test_schema_says_what_the_checker_does():
    described = schema.schema(Config, "toy")
    assert json.loads(json.dumps(described)) == described
    optim = described["properties"]["optim"]
    assert optim["additionalProperties"] is False and optim["properties"]["lr"]["description"] == "Peak learning rate."
    assert (
        optim["properties"]["name"]["enum"] == ["adamw", "lion"] and optim["properties"]["name"]["default"] == "adamw"
    )
    lora, ia3, names = described["properties"]["peft"]["oneOf"]
    assert "method" not in lora["required"] and "method" in ia3["required"] and names == {"enum": ["lora", "ia3"]}
    assert described["properties"]["data"]["required"] == ["path"]
    assert schema.schema(Named, "toy")["properties"]["sources"]["additionalProperties"]["required"] == ["path"]
