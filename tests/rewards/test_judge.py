"""The reward of a judge: win-rates within the completions of a prompt, ratings, and what is cached."""

import json
import math

import pytest

from jaxft import rewards
from jaxft.rewards import judge as judge_
from jaxft.rewards.feedback.endpoint import Endpoint
from tests.rewards.feedback.stub import Reply, said, serving
from tests.rewards.feedback.test_verdicts import replies


def made(stub, **settings):
    config = rewards.Judge(endpoint=Endpoint(**stub.settings(**settings.pop("endpoint", {}))), **settings)
    return rewards.made(rewards.REWARDS, [("judge", config)])


def by_length(n, body):
    """Prefers the longer of two replies, surely; of equally long ones the one that it reads first."""
    a, b = replies(body["messages"][0]["content"])
    return said("B" if len(b) > len(a) else "A")


PROMPTS = ["p", "p", "q", "p", "q"]
TEXTS = ["x", "xxx", "zz", "yy", "z"]


def test_win_rates_within_a_group(tmp_path):
    """p: x loses twice, xxx wins twice, yy wins once of two; q: zz beats z."""
    with serving(by_length) as stub:
        asked = made(stub, cache=str(tmp_path / "c.jsonl"))
        found = rewards.call(asked, PROMPTS, TEXTS, {})
        assert found.values[:, 0].tolist() == [0.0, 1.0, 1.0, 0.5, 0.0] and not found.reports
        assert len(stub.seen) == 8  # three pairs and one, in both orders
        assert found.metrics["judge/confidence"] == 1.0 and found.metrics["judge/order_decided"] == 0.0
        rewards.call(asked, PROMPTS, TEXTS, {})
        assert len(stub.seen) == 8
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 8


def test_a_bias_for_a_place_is_cancelled_and_told():
    with serving(lambda n, body: said("A", {"A": 0.9, "B": 0.1})) as stub:
        found = rewards.call(made(stub), PROMPTS, TEXTS, {})
    assert found.values[:, 0] == pytest.approx(0.5)
    assert found.metrics == pytest.approx(
        {"judge/confidence": 0.5, "judge/order_decided": 1.0, "judge/first_favoured": 0.4, "judge/no_answer": 0.0}
    )


def test_fewer_opponents():
    """Each of five is put beside the next two around the group: ten of its ten pairs; beside the next one: five."""
    texts = ["x" * i for i in range(1, 6)]
    for opponents, pairs in ((2, 10), (1, 5)):
        with serving(by_length) as stub:
            found = rewards.call(made(stub, opponents=opponents), ["p"] * 5, texts, {})
            assert len(stub.seen) == 2 * pairs
    assert found.values[:, 0].tolist() == [0.0, 0.5, 0.5, 0.5, 1.0]


def test_against_a_reference_a_single_completion_has_a_reward():
    with serving(by_length) as stub:
        asked = made(stub, reference="answer")
        found = rewards.call(asked, ["p", "q"], ["xxx", "x"], {"answer": ["yy", "yy"]})
        alone = rewards.call(made(stub), ["p"], ["xxx"], {})
        with pytest.raises(rewards.RewardError, match="no column 'answer'"):
            rewards.call(asked, ["p"], ["xxx"], {})
    assert found.values[:, 0].tolist() == [1.0, 0.0]
    assert math.isnan(alone.values[0, 0]) and not alone.reports


def test_ratings_leave_out_the_reasoning():
    def answer(n, body):
        text = body["messages"][0]["content"]
        assert "secret" not in text
        return said("9", {"9": 0.5, "10": 0.5}) if "\ngood\n" in text else said("2")

    with serving(answer) as stub:
        found = rewards.call(made(stub, method="pointwise"), ["p", "p"], ["<think>secret</think>good", "bad"], {})
    assert found.values[:, 0].tolist() == pytest.approx([9.5, 2.0])


def test_what_fails_is_reported_with_its_sample_and_asked_once():
    def answer(n, body):
        text = body["messages"][0]["content"]
        return Reply(400, b"{}") if "\nx\n" in text else by_length(n, body)

    with serving(answer) as stub:
        found = rewards.call(made(stub), PROMPTS, TEXTS, {})
        assert len(stub.seen) == 8
    assert math.isnan(found.values[0, 0]) and found.values[1:, 0].tolist() == [1.0, 1.0, 0.0, 0.0]
    [report] = found.reports
    assert report.sample == 0 and "HTTP 400" in report.problem


def test_a_wrong_model_name_ends_the_run_and_an_outage_is_reported():
    with serving(lambda n, body: Reply(404)) as stub:
        with pytest.raises(rewards.RewardError, match="no model 'stub' there"):
            rewards.call(made(stub), PROMPTS, TEXTS, {})
        assert len(stub.seen) <= 8
    asked = made(stub, endpoint={"retries": 0, "concurrency": 1})
    found = rewards.call(asked, PROMPTS, TEXTS, {})
    assert all(math.isnan(value) for value in found.values[:, 0])
    assert len(found.reports) == 5 and "no connection" in found.reports[0].problem


def test_principles_differ_by_prompt_and_are_written_down(tmp_path):
    with serving(by_length) as stub:
        asked = made(stub, principles=2, cache=str(tmp_path / "c.jsonl"))
        rewards.call(asked, [f"p{i // 2}" for i in range(8)], ["x", "xx"] * 4, {})
    records = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert len(records) == 4 * 2 * 2 and len({record["principle"] for record in records}) > 2
    assert {record["order"] for record in records} == {"as given", "swapped"}


@pytest.mark.parametrize(
    "settings, told",
    [
        ({}, "endpoint: got nothing"),
        ({"model": judge_.Local(path="x")}, "which the command line loads"),
        ({"endpoint": Endpoint(url="http://x", model="m"), "model": judge_.Local(path="x")}, "one of the two"),
        ({"method": "pointwise", "reference": "a"}, "reference: nothing is compared"),
        ({"opponents": 0}, "opponents: got 0"),
        ({"principles": 99, "endpoint": Endpoint(url="http://x", model="m")}, "needs at least 99"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        rewards.made(rewards.REWARDS, [("judge", rewards.Judge(**settings))])
