"""The composed config: documented throughout, and equal after every round trip."""

import pytest

from jaxft import config
from jaxft.border import fields
from jaxft.border.errors import ConfigError
from jaxft.config import RunConfig
from jaxft.objectives import OBJECTIVES
from jaxft.peft import METHODS


def every_key():
    return list(fields.keys(RunConfig))


def test_every_key_is_documented():
    silent = [".".join(path) for path, field, _ in every_key() if not field.doc]
    assert not silent


def test_every_alternative_is_offered():
    peft, objective = (next(f for f in fields.fields(RunConfig) if f.name == name) for name in ("peft", "objective"))
    assert peft.alternatives is not None and peft.alternatives.classes == {n: m.config for n, m in METHODS.items()}
    assert objective.alternatives is not None
    assert objective.alternatives.classes == {n: o.config for n, o in OBJECTIVES.items()}


def test_every_type_can_be_said_in_words():
    odd = {".".join(path): said for path, field, _ in every_key() if "typing" in (said := fields.words(field.type))}
    assert not odd


@pytest.mark.parametrize("method", METHODS)
def test_round_trip(method, tmp_path):
    file = tmp_path / "run.yaml"
    overrides = [
        "model.path=tiny",
        f"peft={method}",
        "optim.lr=1e-4",
        "optim.groups={'/b$': 16}",
        f"run_dir={tmp_path}",
    ]
    first = config.load(None, overrides)
    file.write_text(config.dump(first))
    assert config.load(file) == first
    assert config.dump(config.load(file)) == config.dump(first)


def test_run_dir_is_named_after_the_config(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {path: tiny}")
    assert config.load(tmp_path / "mine.yaml").run_dir == "runs/mine"
    assert config.load(None, ["model.path=tiny"]).run_dir == "runs/run"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "`optim.lrr` is no key; did you mean `optim.lr`?"),
        ("lr=1", "did you mean `optim.lr`?"),
        ("peft.method=qlora", "did you mean `lora`?"),
        ("peft.ranks=8", "did you mean `peft.rank`?"),
        ("peft.rank=0", "peft.rank: got 0"),
        ("optim.betas=[0.9]", "`optim.betas`: expected a list of 2: a number, a number or null, got the list [0.9]"),
    ],
)
def test_messages(override, message):
    with pytest.raises(ConfigError) as caught:
        config.load(None, ["model.path=tiny", override])
    assert message in str(caught.value)


def test_schema_and_checker_name_the_same_keys():
    described = config.schema()["properties"]
    assert list(described) == [field.name for field in fields.fields(RunConfig)]
    for (section, *rest), field, alternative in every_key():
        if not alternative and len(rest) == 1:
            assert described[section]["properties"][rest[0]]["description"] == field.doc
