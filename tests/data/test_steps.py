"""Solutions in steps: where each is judged."""

import numpy as np
import pytest

from jaxft import data


def loader_of(path, tokenizer, **options):
    config = data.DataConfig(path=path, template="chatml", max_length=64, **options)
    return data.Loader(data.prepare(config, tokenizer, rows="steps").train, config, batch_rows=1, epochs=1)


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "metaspace"])
def test_steps_are_judged_where_they_end(make_tokenizer, write, kind):
    """Text: at the separator after each, with the tokens that the steps up to there have alone."""
    steps, labels = ["the cat sat", "on a mat.", "\nhello world"], [True, False, True]
    path = write([{"prompt": "what is it? ", "completions": steps, "labels": labels}])
    tokenizer = make_tokenizer(kind=kind)
    loader = loader_of(path, tokenizer)
    batch = next(loader)
    ends = np.flatnonzero(batch["step_mask"][0])
    tokens = batch["tokens"][0]
    assert batch["step_label"][0, ends].tolist() == labels and batch["step_label"].sum() == 2
    if kind != "metaspace":
        assert tokenizer.decode(tokens[batch["loss_mask"][0]]) == "".join(f"{step}\n" for step in steps)
        for i, end in enumerate(ends):
            assert tokenizer.decode(tokens[: end + 1]) == "what is it? " + "".join(f"{s}\n" for s in steps[: i + 1])
    assert int((batch["segments"] > 0).sum()) == ends[-1] + 1
    assert "1 solutions (3 steps, 2 right) of 1 rows read" in loader.report().lines()


def test_steps_in_a_chat(make_tokenizer, write):
    steps = ["one", "two"]
    row = {"prompt": [{"role": "user", "content": "add"}], "completions": steps, "labels": [True, False]}
    tokenizer = make_tokenizer()
    batch = next(loader_of(write([row]), tokenizer, step_separator=" <|end|>"))
    ends = np.flatnonzero(batch["step_mask"][0])
    opening = "<|im_start|>user\nadd<|im_end|>\n<|im_start|>assistant\n"
    for i, end in enumerate(ends):
        assert tokenizer.decode(batch["tokens"][0, : end + 1]) == opening + "".join(
            f"{s} <|end|>" for s in steps[: i + 1]
        )
    assert batch["step_label"][0, ends].tolist() == [True, False]
