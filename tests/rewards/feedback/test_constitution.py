"""A constitution is read, or every problem in it named; prompts draw principles by their weights."""

import collections

import pytest
import yaml

from jaxft.border.errors import ConfigError
from jaxft.rewards.feedback import constitution

FINE = {"name": "a", "critique": "c?", "revision": "r.", "comparison": "which?"}


def written(tmp_path, *principles):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"principles": list(principles)}))
    return str(tmp_path / "own.yaml")


def test_the_one_that_ships():
    found = constitution.read(rated=True)
    names = [one.name for one in found.principles]
    assert 10 <= len(names) <= 16 and {"helpful", "honest", "harmless", "privacy", "no_needless_refusal"} <= {*names}
    assert all(text.endswith("?") for one in found.principles for text in (one.comparison, one.rating))


def test_draws_follow_the_weights_and_the_seed(tmp_path):
    """First draws by weight; the second by the weights that are left: b is second in 1/2 1/2 of all draws after a, and
    in 1/4 1/3 after c."""
    names = (("a", 2.0), ("b", 1), ("c", 1))
    found = constitution.read(written(tmp_path, *({**FINE, "name": n, "weight": w} for n, w in names)))
    drawn = [[one.name for one in found.chosen(f"prompt {i}", 3, 2)] for i in range(4000)]
    first, second = (collections.Counter(names[k] for names in drawn) for k in (0, 1))
    for name, share in (("a", 1 / 2), ("b", 1 / 4), ("c", 1 / 4)):
        assert first[name] / 4000 == pytest.approx(share, abs=0.03)
    assert second["b"] / 4000 == pytest.approx(1 / 2 * 1 / 2 + 1 / 4 * 1 / 3, abs=0.03)
    assert all(len({*names}) == 2 for names in drawn)
    assert drawn == [[one.name for one in found.chosen(f"prompt {i}", 3, 2)] for i in range(4000)]
    assert drawn != [[one.name for one in found.chosen(f"prompt {i}", 4, 2)] for i in range(4000)]


@pytest.mark.parametrize(
    "principles, told",
    [
        ([{**FINE, "critque": "x"}], "principles.0.critque: no such key; did you mean critique?"),
        ([{"name": "a"}], "principles.0.revision: must be given"),
        ([FINE, {**FINE, "critique": 3, "name": "b"}], "principles.1.critique: got 3; expected text"),
        ([FINE, FINE], "the name 'a' is there twice"),
        ([{**FINE, "weight": 0}], "principles.0.weight: got 0; expected a number above 0"),
        (["be nice"], "principles.0: got 'be nice'; expected a mapping"),
        ([], "with a list of at least one"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, principles, told):
    file = written(tmp_path, *principles)
    with pytest.raises(ConfigError) as error:
        constitution.read(file)
    assert told in str(error.value) and file in str(error.value)


def test_what_a_run_needs_of_it(tmp_path):
    file = written(tmp_path, FINE)
    with pytest.raises(ConfigError, match=r"principles.0.rating: must be given, for single replies are rated"):
        constitution.read(file, rated=True)
    with pytest.raises(ConfigError, match="got 1 principles"):
        constitution.read(file, least=2)
    with pytest.raises(ConfigError, match="cannot be read there"):
        constitution.read(str(tmp_path / "none.yaml"))
    (tmp_path / "broken.yaml").write_text("principles: [")
    with pytest.raises(ConfigError, match="no YAML"):
        constitution.read(str(tmp_path / "broken.yaml"))
