"""The composed config: documented throughout, and equal after every round trip."""

import json

import pytest

from jaxft import config, recipes
from jaxft.border import check, fields, reading
from jaxft.border.errors import ConfigError
from jaxft.cli import stages
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
        ("train.steps=0", "train.steps: got 0; expected at least 1"),
        ("train.epochs=0", "train.epochs: got 0"),
        ("optim.lr=-1", "optim.lr: got -1.0; expected a finite number, at least 0"),
        ("optim.lr=.nan", "`optim.lr`: expected a number or null, got nan (Input should be a finite number)"),
        ("optim.clip_norm=.inf", "`optim.clip_norm`: expected a number or null, got inf"),
        ("objective.nme=dpo", "did you mean `objective.name`?"),
        ("optim.betas=[0.9, 1]", "optim.betas: got (0.9, 1.0)"),
        ("optim.clip_norm=0", "optim.clip_norm: got 0"),
        ("optim.warmup_ratio=2", "optim.warmup_ratio: got 2"),
        ("log.every=0", "log.every: got 0"),
        ("eval.every=0", "eval.every: got 0"),
        ("checkpoint.every=0", "checkpoint.every: got 0"),
        ("peft.0.rank=3", "`peft` is a mapping and no list, which has no index: leave the 0 out"),
        ("peft={method: adapter, path: a,b=c}", "`peft.b=c` is no key"),
        ("peft={method: adapter, path: a,b=c}", "inside {...} a text with a comma or a colon is put in quotes"),
        ("optim.betas=[0.9]", "`optim.betas`: expected a list of 2: a number, a number or null, got the list [0.9]"),
    ],
)
def test_messages(override, message):
    with pytest.raises(ConfigError) as caught:
        config.load(None, ["model.path=tiny", override])
    assert message in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_any_method_takes_the_place_of_a_files(method, tmp_path, capsys):
    """Settings of the file that it does not have are left out, and told; those of the command line never are."""
    said = {"adapter": ["peft.path=x"], "last_layers": ["peft.n=1"]}.get(method, [])
    loaded = config.load(recipes.find("quickstart"), [f"peft.method={method}", *said])
    assert loaded.peft[0].name == method
    told = capsys.readouterr().err
    has_alpha = "alpha" in [field.name for field in fields.fields(METHODS[method].config)]
    assert told.count("\n") == (not has_alpha) and (": `peft.alpha` left out" in told) == (not has_alpha)


def test_what_a_file_says_of_another_method(tmp_path, capsys):
    file, own = tmp_path / "run.yaml", tmp_path / "own.py"
    own.write_text(
        "from dataclasses import dataclass\nfrom jaxft.peft import IA3\n\n\n"
        '@dataclass(frozen=True, kw_only=True)\nclass Own(IA3):\n    gain: float = 1.0\n    """A gain."""\n'
    )
    file.write_text("model: {path: x}\npeft: {method: lora, alpha: 32, layers: [1]}\n")
    (chosen,) = config.load(file, [f"peft.module={own}:Own"]).peft
    assert (chosen.value.gain, chosen.value.layers) == (1.0, (1,)) and "`peft.alpha`" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"`peft.alpha` is no key of peft.module"):
        config.load(file, [f"peft.module={own}:Own", "peft.alpha=3"])
    file.write_text(f"model: {{path: x}}\npeft: {{module: '{own}:Own', gain: 2, layers: [1]}}\n")
    (chosen,) = config.load(file, ["peft.method=lora"]).peft
    assert (chosen.name, chosen.value.layers) == ("lora", (1,)) and "`peft.gain`" in capsys.readouterr().err
    file.write_text("model: {path: x}\npeft: {method: lora, alhpa: 32}\n")
    with pytest.raises(ConfigError, match=r"did you mean `peft.alpha`"):
        config.load(file, ["peft.method=lora"])
    with pytest.raises(ConfigError, match=r"expected one of the two"):
        config.load(file, ["peft.method=lora", f"peft.module={own}:Own"])


def test_schema_and_checker_name_the_same_keys():
    described = config.schema()["properties"]
    assert list(described) == [field.name for field in fields.fields(RunConfig)]
    for (section, *rest), field, alternative in every_key():
        if not alternative and len(rest) == 1:
            assert described[section]["properties"][rest[0]]["description"] == field.doc


PIPELINES = [recipe for recipe in recipes.every() if stages.is_pipeline(recipe.path)]
SINGLE = [recipe for recipe in recipes.every() if recipe not in PIPELINES]


@pytest.mark.parametrize("recipe", PIPELINES, ids=lambda recipe: recipe.name)
def test_shipped_pipelines(recipe):
    """Each resolves, and holds its stages' names, what they take, and what differs from the defaults."""
    found = stages.read(recipe.path)
    assert recipe.title and recipe.facts["command"].startswith(f"jaxft run configs/{recipe.name}.yaml")
    assert len(found.stages) > 1 and len(recipe.path.read_text().splitlines()) <= 50


@pytest.mark.parametrize("recipe", SINGLE, ids=lambda recipe: recipe.name)
def test_shipped_configs(recipe):
    """Each loads, says in its header what it does and how, and holds nothing but what differs from the defaults."""
    loaded = config.load(recipe.path, [] if "model" in reading.read(recipe.path).values else ["model.path=x"])
    assert recipe.title and recipe.facts["command"].startswith(f"jaxft train configs/{recipe.name}.yaml")
    assert len(recipe.path.read_text().splitlines()) <= 40
    alternatives = [f"peft.method={loaded.peft[0].name}", f"objective.name={loaded.objective.name}"]
    needed = dict[str, str]()
    for reward in loaded.rewards:
        needed = {f.name: getattr(reward.value, f.name) for f in fields.fields(type(reward.value)) if f.required}
        alternatives.append(f"rewards={json.dumps({'name': reward.name, **needed})}")
    defaults = check.plain(config.load(None, ["model.path=x", *alternatives]))
    written = reading.read(recipe.path).values
    same = [
        f"{section}.{key}"
        for section, keys in written.items()
        for key, value in keys.items()
        if defaults[section][key] == value and key not in ("method", "name", *needed)
    ]
    assert not same, f"the default already: {same}"


def test_recipes_are_found_by_name(tmp_path, monkeypatch):
    shipped = recipes.find("sft_lora")
    monkeypatch.chdir(tmp_path)
    assert recipes.find("configs/sft_lora.yaml") == recipes.find("sft_lora.yaml") == recipes.find("sft_lora") == shipped
    (tmp_path / "sft_lora.yaml").write_text("model: {path: mine}")
    assert recipes.find("sft_lora.yaml").resolve() == tmp_path / "sft_lora.yaml"
