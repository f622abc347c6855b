"""The command line as a user meets it: output, messages and exit codes."""

import json
from pathlib import Path

import pytest

from jaxft import cli, recipes
from jaxft.cli import failures, keys

ASSETS = Path(__file__).resolve().parents[2] / "assets"
TINY, ROWS = ASSETS / "tiny", ASSETS / "data" / "quickstart_heldout.jsonl"


def jaxft(capsys, *words):
    """(exit code, stdout, stderr) of one command."""
    try:
        code = cli.main(words)
    except SystemExit as stop:  # argparse
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_overview_names_every_verb(capsys):
    code, out, _ = jaxft(capsys, "--help")
    assert code == 0 and all(f"  {verb} " in out for verb in cli.VERBS)
    assert jaxft(capsys)[0] == 2


def test_version(capsys):
    assert jaxft(capsys, "--version")[1].startswith("jaxft 0.")


def test_unknown_verb(capsys):
    code, _, err = jaxft(capsys, "recipe")
    assert code == 2 and "no verb 'recipe'; did you mean recipes?" in err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(capsys, verb):
    code, out, _ = jaxft(capsys, verb, "--help")
    assert code == 0 and f"usage: jaxft {verb}" in out and "--traceback" in out


def test_schema(capsys, tmp_path):
    code, out, _ = jaxft(capsys, "schema")
    assert code == 0 and json.loads(out)["additionalProperties"] is False
    code, out, _ = jaxft(capsys, "schema", str(tmp_path / "s.json"))
    assert code == 0 and "yaml-language-server" in out and json.loads((tmp_path / "s.json").read_text())


def test_env(capsys):
    code, out, _ = jaxft(capsys, "env")
    assert code == 0 and "jaxlib" in out and "backend" in out
    facts = json.loads(jaxft(capsys, "env", "--json")[1])
    assert facts["devices"]["devices"] == "8" and facts["versions"]["jax"] and "plan" in facts["extras"]


def test_recipes(capsys):
    code, out, _ = jaxft(capsys, "recipes")
    assert code == 0 and recipes.every() and all(recipe.name in out for recipe in recipes.every())
    name = recipes.every()[0].name
    assert jaxft(capsys, "recipes", name)[1] == recipes.find(name).read_text()
    code, _, err = jaxft(capsys, "recipes", "nope")
    assert code == 2 and "no shipped recipe of that name" in err


def test_data_shows_learnt_tokens_and_statistics(capsys):
    words = [f"model.path={TINY}", f"data.path={ROWS}", "data.max_length=128"]
    code, out, err = jaxft(capsys, "data", *words, "--rows", "1")
    assert code == 0, err
    assert "<|im_end|>⟧" in out and "480 examples of 480 rows read" in out and "p50" in out


def test_data_shows_what_the_objective_judges(capsys, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "what", "chosen": " a cat", "rejected": " a dog"}\n')
    words = [f"model.path={TINY}", f"data.path={rows}", "data.max_length=32"]
    code, out, err = jaxft(capsys, "data", *words, "objective.name=dpo")
    assert code == 0 and "chosen      ⟦ a cat" in out and "1 pairs of 1 rows read" in out, err
    code, out, err = jaxft(capsys, "data", *words, "objective.name=kto")
    assert code == 0 and "undesirable ⟦ a dog" in out and "1 desirable, 1 undesirable" in out, err
    code, _, err = jaxft(capsys, "data", *words, "objective.name=dpo", "data.packing=wrapped")
    assert code == 1 and "`data.packing`: got wrapped, for an objective on pairs" in err
    code, _, err = jaxft(capsys, "data", *words)
    assert code == 1 and "for preference objectives" in err


def test_data_names_a_bad_row(capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    code, _, err = jaxft(capsys, "data", f"model.path={TINY}", f"data.path={tmp_path / 'rows.jsonl'}")
    assert code == 1 and "rows.jsonl:2" in err and "Traceback" not in err


def test_help_lists_every_key(capsys):
    keys.show()
    out = capsys.readouterr().out
    assert all(key in out for key in ("optim.lr", "peft.rank", "peft.method", "objective.loss", "run_dir", "resume"))
    assert "Rank r of the update." in out and "an integer" in out


def test_help_of_one_method(capsys):
    """Keys that methods inherit are told once; asked for alone, a method tells all of its keys."""
    keys.show()
    assert capsys.readouterr().out.count("peft.modules_to_save") == 1
    code, out, _ = jaxft(capsys, "train", "--help", "peft=hra")
    assert code == 0 and "peft.modules_to_save" in out and "peft.gram_schmidt" in out and "optim.lr" not in out
    code, out, _ = jaxft(capsys, "train", "--help", "optim")
    assert code == 0 and "optim.lr" in out and "peft.rank" not in out
    code, _, err = jaxft(capsys, "train", "--help", "peft=hara")
    assert code == 2 and "no peft=hara; expected one of" in err


def test_a_message_for_people_has_no_traceback(capsys):
    code, _, err = jaxft(capsys, "recipes", "nope", "--traceback")
    assert code == 2 and "Traceback" in err
    code, _, err = jaxft(capsys, "recipes", "nope")
    assert code == 2 and err.startswith("jaxft recipes: error: ") and "Traceback" not in err


def test_exit_codes(capsys):
    def outcome(error):
        with failures.told("train", traceback=False) as outcome:
            raise error
        return outcome.code, capsys.readouterr().err

    code, err = outcome(FileNotFoundError(2, "No such file or directory", "rows.jsonl"))
    assert code == 1 and "Traceback" not in err and "rows.jsonl" in err
    code, err = outcome(ValueError("raised outside jaxft: a bug"))
    assert code == 1 and "Traceback" in err
    assert outcome(KeyboardInterrupt())[0] == 130
