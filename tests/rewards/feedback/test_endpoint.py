"""An endpoint as judge, against a server on this machine: what is asked again, what is not, and what is read."""

import email.utils
import json
import math
import threading
import time

import pytest

from jaxft.border.errors import ConfigError
from jaxft.rewards.feedback import endpoint
from jaxft.rewards.feedback.asking import Answer, Failure, Ledger, Question, Unreachable
from jaxft.rewards.feedback.endpoint import Client, Endpoint, Writing
from jaxft.rewards.feedback.transport import Gone, Refused
from tests.rewards.feedback.stub import Reply, said, serving

LETTERS = ("A", "B")


def question(text="Which?", labels=LETTERS, seed=0):
    return Question(({"role": "user", "content": text},), labels, seed)


def ask(stub, *asked, writing=None, **settings):
    client = Client(Endpoint(**stub.settings(**settings)), writing)
    return [answer for _, answer in sorted(client.answers(asked or (question(),)), key=lambda item: item[0])]


def test_a_label_is_chosen_by_its_probability():
    """Of all tokens that say it: " A" and "A"."""
    with serving(lambda n, body: said("A", {"A": 0.5, " A": 0.2, "B": 0.1, "The": 0.2})) as stub:
        [answer] = ask(stub)
    assert answer.text == "A" and answer.finished
    assert math.exp(answer.logp["A"]) == pytest.approx(0.7) and math.exp(answer.logp["B"]) == pytest.approx(0.1)
    [seen] = stub.seen
    assert seen.path == "/v1/chat/completions" and seen.key is None
    assert seen.body == {
        "model": "stub", "messages": [{"role": "user", "content": "Which?"}], "temperature": 0, "max_tokens": 16,
        "logprobs": True, "top_logprobs": 20,
    }  # fmt: skip


def test_a_text_is_written_with_its_own_settings():
    with serving(lambda n, body: said("A poem", finish="length")) as stub:
        writing = Writing(max_new_tokens=9, temperature=0.3)
        [answer] = ask(stub, question(labels=(), seed=7), writing=writing, max_tokens_key="max_completion_tokens",
                       extra={"reasoning_effort": "low"})  # fmt: skip
    assert answer == Answer("A poem", None, False)
    about = {"temperature": 0.3, "seed": 7, "max_completion_tokens": 9, "reasoning_effort": "low", "model": "stub"}
    assert {name: stub.seen[0].body[name] for name in about} == about and "logprobs" not in stub.seen[0].body


def test_failures_that_pass_are_asked_again():
    """500 twice, a broken body, JSON that is no completion, and only then an answer."""
    replies = [
        Reply(500), Reply(503, b"busy"), Reply(200, b'{"choices": [{'), Reply(200, b'{"error": "odd"}'), said("B"),
    ]  # fmt: skip
    with serving(lambda n, body: replies[n]) as stub:
        assert ask(stub) == [Answer("B", None)]
    assert len(stub.seen) == 5


def test_no_log_probabilities_are_read_as_text():
    with serving(lambda n, body: said("My answer: B.")) as stub:
        assert ask(stub)[0].logp is None
        assert "logprobs" in stub.seen[0].body
        ask(stub, logprobs=False)
        assert "logprobs" not in stub.seen[1].body and "top_logprobs" not in stub.seen[1].body


@pytest.mark.parametrize("dated", [False, True])
def test_too_many_requests_wait_as_long_as_they_are_told(dated):
    def answer(n, body):
        return Reply(429, headers=(("Retry-After", after()),)) if n == 0 else said("A")

    def after():  # a date has whole seconds
        return email.utils.formatdate(time.time() + 1.99, usegmt=True) if dated else "0.4"

    with serving(answer) as stub:
        begun = time.monotonic()
        assert ask(stub) == [Answer("A", None)]
        assert time.monotonic() - begun > 0.39
        assert len(stub.seen) == 2
    with serving(lambda n, body: Reply(429, headers=(("Retry-After", "3600"),))) as stub:
        [failure] = ask(stub)
        assert isinstance(failure, Gone) and "a pause of 3600 s" in str(failure) and len(stub.seen) == 1


def test_a_server_that_never_answers_is_timed_out():
    never = threading.Event()
    with serving(lambda n, body: Reply(wait=never)) as stub:
        [failure] = ask(stub, timeout=0.1, retries=1)
        never.set()
    assert isinstance(failure, Gone) and "no answer within 0.1 s (asked 2 times)" in str(failure)
    assert len(stub.seen) == 2


def test_garbage_for_ever_fails_the_question():
    with serving(lambda n, body: Reply(200, b"<html>")) as stub:
        [failure] = ask(stub, retries=2)
    assert isinstance(failure, Failure) and "no JSON: '<html>'" in str(failure) and len(stub.seen) == 3


def test_what_is_wrong_with_one_question_fails_it_alone_and_at_once():
    def answer(n, body):
        long = body["messages"][0]["content"] == "long"
        return Reply(400, b'{"error": {"message": "too many tokens"}}') if long else said("A")

    with serving(answer) as stub:
        first, failure, last = ask(stub, question("1"), question("long"), question("2"))
    assert first == last == Answer("A", None) and len(stub.seen) == 3
    assert isinstance(failure, Failure) and "HTTP 400: too many tokens" in str(failure)


@pytest.mark.parametrize(
    "status, told",
    [(404, "no model 'stub' there"), (401, r"refuses the key in \$STUB_KEY"), (302, "points elsewhere"), (418, "418")],
)
def test_what_is_wrong_with_every_question_is_raised_at_once(status, told, monkeypatch):
    """And the key goes neither to where a redirection points nor into a message, though the server repeats it."""
    monkeypatch.setenv("STUB_KEY", "sk-very-secret")
    with serving(lambda n, body: said("A")) as other:
        headers = (("Location", other.url + "/chat/completions"),) if status == 302 else ()
        body = b'{"error": {"message": "bad sk-very-secret"}}'
        with serving(lambda n, _: Reply(status, body, headers)) as stub:
            with pytest.raises(Refused, match=told) as error:
                ask(stub, key_env="STUB_KEY")
            assert [seen.key for seen in stub.seen] == ["Bearer sk-very-secret"]
        assert "sk-very-secret" not in str(error.value) and not other.seen


def test_the_key_is_written_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_KEY", "sk-very-secret")
    with serving(lambda n, body: said("A sk-very-secret")) as stub:
        with Ledger(tmp_path / "l.jsonl") as ledger:
            ledger.ask(Client(Endpoint(**stub.settings(key_env="STUB_KEY"))), [question()])
    assert "(key)" in (tmp_path / "l.jsonl").read_text() and "secret" not in (tmp_path / "l.jsonl").read_text()
    monkeypatch.delenv("STUB_KEY")
    with pytest.raises(ConfigError, match="STUB_KEY is not set"):
        Client(Endpoint(**stub.settings(key_env="STUB_KEY")))


def test_nobody_there_stops_the_asking():
    with serving(lambda n, body: said("A")) as stub:
        pass  # gone when it is asked
    with pytest.raises(Unreachable, match="3 questions in a row"):
        ask(stub, *[question(str(i)) for i in range(50)], retries=1, concurrency=1)
    [failure] = ask(stub, retries=1)
    assert isinstance(failure, Gone) and "no connection" in str(failure)


def test_one_that_fails_among_others_stops_nothing():
    with serving(lambda n, body: Reply(500) if "bad" in str(body["messages"]) else said("A")) as stub:
        found = ask(stub, *[question(f"bad {i}" if i % 2 else str(i)) for i in range(10)], retries=0, concurrency=1)
    assert [isinstance(answer, Gone) for answer in found] == [False, True] * 5


def test_limits_of_requests_a_minute_and_at_once():
    lock, now, most = threading.Lock(), [0], [0]
    times = []

    def answer(n, body):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
            times.append(time.monotonic())
        time.sleep(0.03)
        with lock:
            now[0] -= 1
        return said("A")

    with serving(answer) as stub:
        ask(stub, *[question(str(i)) for i in range(9)], concurrency=3)
        assert most[0] == 3
        times.clear()
        ask(stub, *[question(str(i)) for i in range(5)], per_minute=1200)  # one every 50 ms
        assert max(times) - min(times) > 0.17


def test_a_rating_of_two_tokens_shares_the_first():
    """1 and 10, where digits are tokens: P(10) = P(1) P(0 after 1), and P(1) is what is left of it."""

    def place(token, tops):
        listed = [{"token": t, "logprob": math.log(p)} for t, p in tops.items()]
        return {"token": token, "logprob": math.log(tops[token]), "top_logprobs": listed}

    labels = tuple(map(str, range(1, 11)))
    content = [place("1", {"1": 0.6, "7": 0.4}), place("0", {"0": 0.75, "<end>": 0.25})]
    body = {"choices": [{"message": {"content": "10"}, "logprobs": {"content": content}}]}
    found = endpoint.read(json.loads(json.dumps(body)), labels).logp
    assert {label: math.exp(p) for label, p in found.items()} == pytest.approx({"1": 0.15, "7": 0.4, "10": 0.45})


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"url": "ftp://x"}, "url: expected http"),
        ({"url": "https://me:pass@x/v1"}, "without a password"),
        ({"url": "https://x/v1/chat/completions"}, "chat/completions"),
        ({"key_env": "sk-abc-123"}, "key_env: expected the name of an environment variable"),
        ({"extra": {"model": "x"}}, "extra: got 'model'"),
        ({"concurrency": 0}, "concurrency: got 0"),
        ({"retries": -1}, "retries: got -1; expected at least 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, told):
    with pytest.raises(ValueError, match=told) as error:
        Endpoint(**{"url": "http://x/v1", "model": "m", **settings})
    assert "pass@" not in str(error.value) and "sk-abc" not in str(error.value)
