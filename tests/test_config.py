"""The composed config: documented throughout, and equal after every round trip."""

import pytest

from jaxft import config, recipes
from jaxft.border import check, fields, reading
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


def test_a_list_of_methods(tmp_path):
    """Each entry is overridden by its index, and comes back from the dump; the schema offers a list."""
    methods = "peft=[{method: lora}, {method: trainable_tokens, tokens: [3, <tool>]}, norms]"
    first = config.load(None, ["model.path=tiny", methods, "peft.0.rank=3", f"run_dir={tmp_path}"])
    assert [choice.name for choice in first.peft] == ["lora", "trainable_tokens", "norms"]
    assert first.peft[0].value.rank == 3 and first.peft[1].value.tokens == (3, "<tool>")
    (tmp_path / "run.yaml").write_text(config.dump(first))
    assert config.load(tmp_path / "run.yaml") == first
    with pytest.raises(ConfigError, match=r"`peft` is a list of 3; give an index"):
        config.load(None, ["model.path=tiny", methods, "peft.rank=3"])
    schema = config.schema()
    one, several = schema["properties"]["peft"]["anyOf"]
    assert several["items"] == one and len(schema["$defs"]["method"]["oneOf"]) == len(METHODS) + 2


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
        ("train.accumulate=0", "train.accumulate: got 0"),
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


@pytest.mark.parametrize("recipe", recipes.every(), ids=lambda recipe: recipe.name)
def test_shipped_configs(recipe):
    """Each loads, says in its header what it does and how, and holds nothing but what differs from the defaults."""
    loaded = config.load(recipe.path, [] if "path:" in recipe.path.read_text() else ["model.path=x"])
    assert recipe.title and recipe.facts["command"].startswith(f"jaxft train configs/{recipe.name}.yaml")
    assert len(recipe.path.read_text().splitlines()) <= 40
    alternatives = [f"peft.method={loaded.peft[0].name}", f"objective.name={loaded.objective.name}"]
    defaults = check.plain(config.load(None, ["model.path=x", *alternatives]))
    written = reading.read(recipe.path).values
    same = [
        f"{section}.{key}"
        for section, keys in written.items()
        for key, value in keys.items()
        if defaults[section][key] == value and key not in ("method", "name")
    ]
    assert not same, f"the default already: {same}"


def test_recipes_are_found_by_name(tmp_path, monkeypatch):
    shipped = recipes.find("sft_lora")
    monkeypatch.chdir(tmp_path)
    assert recipes.find("configs/sft_lora.yaml") == recipes.find("sft_lora.yaml") == recipes.find("sft_lora") == shipped
    (tmp_path / "sft_lora.yaml").write_text("model: {path: mine}")
    assert recipes.find("sft_lora.yaml").resolve() == tmp_path / "sft_lora.yaml"
