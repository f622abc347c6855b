"""A run's folder is made, resumed or refused; never overwritten."""

import os

import pytest

from jaxft import config, run_dir
from jaxft.border.errors import ConfigError


def made(folder, *overrides):
    return config.load(None, ["model.path=tiny", f"run_dir={folder}", *overrides])


def test_a_new_folder_holds_the_resolved_config(tmp_path):
    wanted = made(tmp_path / "a" / "b", "optim.lr=3e-5")
    folder, resumed = run_dir.claim(wanted)
    assert folder == tmp_path / "a" / "b" and not resumed
    assert config.load(folder / "config.yaml") == wanted
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_an_empty_folder_is_taken(tmp_path):
    assert run_dir.claim(made(tmp_path)) == (tmp_path, False)


def test_a_run_is_refused_without_resume_and_left_alone(tmp_path):
    run_dir.claim(made(tmp_path, "optim.lr=1e-4"))
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="holds a run; go on with it"):
        run_dir.claim(made(tmp_path, "optim.lr=2e-4"))
    assert (tmp_path / "config.yaml").read_text() == before


def test_resume_goes_on_with_the_same_config(tmp_path):
    run_dir.claim(made(tmp_path))
    assert run_dir.claim(made(tmp_path, "resume=true")) == (tmp_path, True)
    assert run_dir.claim(made(tmp_path / "new", "resume=true")) == (tmp_path / "new", False)


def test_resume_with_another_config_is_refused_by_key(tmp_path):
    run_dir.claim(made(tmp_path))
    with pytest.raises(ConfigError) as caught:
        run_dir.claim(made(tmp_path, "resume=true", "optim.lr=2e-4", "peft.rank=4"))
    assert "peft.rank was 16 and is 4" in str(caught.value) and "optim.lr was None and is 0.0002" in str(caught.value)


def test_resume_may_change_how_a_run_is_kept_and_the_earlier_config_stays(tmp_path):
    first = made(tmp_path)
    run_dir.claim(first)
    longer = made(tmp_path, "resume=true", "checkpoint.every=7")
    assert run_dir.claim(longer) == (tmp_path, True)
    assert config.load(tmp_path / "config.yaml") == longer and config.load(tmp_path / "config.1.yaml") == first


def test_what_cannot_go_on_is_not_begun_anew(tmp_path):
    """A sweep's member, and a run that has ended, without a checkpoint; one that was ended before its first may."""
    run_dir.claim(made(tmp_path, "sweep=[seed=0..1]"))
    member = tmp_path / "members" / "seed=0"
    run_dir.claim(made(member))
    with pytest.raises(ConfigError, match="is a member of the sweep"):
        run_dir.claim(made(member, "resume=true"))
    again = made(tmp_path, "sweep=[seed=0..1]", "resume=true")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    assert run_dir.claim(again) == (tmp_path, True)
    (member / "adapter").mkdir()
    with pytest.raises(ConfigError, match=r"has ended \(adapter/\), and it holds no checkpoint"):
        run_dir.claim(again)
    (tmp_path / "checkpoints" / "20").mkdir()
    assert run_dir.claim(again) == (tmp_path, True)


@pytest.mark.parametrize("resume", ["true", "false"])
def test_a_folder_of_something_else_is_refused(tmp_path, resume):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        run_dir.claim(made(tmp_path, f"resume={resume}"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        run_dir.claim(made(tmp_path / "run"))


def test_a_folder_in_use_is_refused(tmp_path):
    """By whom is told; what has ended holds nothing, though its file stays."""
    folder, _ = run_dir.claim(made(tmp_path))
    again = made(tmp_path, "resume=true")
    with run_dir.held(folder):
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on .* is writing here"):
            run_dir.check(again)
        with pytest.raises(ConfigError, match="is writing here"), run_dir.held(folder):
            pass
    run_dir.check(again)
    with run_dir.held(folder):
        assert (folder / ".lock").exists()
