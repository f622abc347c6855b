"""The embedded default: answers are right, train and held-out never meet, committed files are what is generated."""

import functools
import json
import random
import re
from pathlib import Path

import pytest
import transformers

from scripts.tiny import chats, documents, language, make_data, make_tokenizer, score, sea, words
from scripts.tiny import task as tasklib
from scripts.tiny.tasks import EASY, TASKS

ROOT = Path(__file__).resolve().parents[2]
DATA, MODEL = ROOT / "assets" / "data", ROOT / "assets" / "tiny"

# Worked by hand: task, fields, answer.
BY_HAND = [
    ("add", {"a": "47", "b": "8"}, "55"),
    ("subtract", {"a": "60", "b": "23"}, "37"),
    ("multiply", {"a": "34", "b": "6"}, "204"),
    ("sort_numbers", {"items": "9 100 21"}, "9 21 100"),
    ("largest", {"items": "9 70 21"}, "70"),
    ("smallest", {"items": "9 70 21"}, "9"),
    ("compare", {"a": "9", "b": "10"}, "less"),
    ("sequence", {"items": "30 25 20"}, "15"),
    ("evens", {"items": "9 70 21 4"}, "70 4"),
    ("evens", {"items": "9 7 21"}, "none"),
    ("reverse_words", {"items": "cup tree red"}, "red tree cup"),
    ("sort_words", {"items": "tree cup red"}, "cup red tree"),
    ("nth_word", {"items": "tree cup red", "place": "second"}, "cup"),
    ("remove_word", {"items": "tree cup red", "word": "cup"}, "tree red"),
    ("replace_word", {"items": "tree cup red", "word": "cup", "new": "big"}, "tree big red"),
    ("count_word", {"items": "cup red cup cup", "word": "cup"}, "3"),
    ("upper", {"items": "cup red"}, "CUP RED"),
    ("spell", {"word": "cup"}, "c u p"),
    ("reverse_letters", {"word": "cup"}, "p u c"),
    ("count_letter", {"word": "butter", "letter": "t"}, "2"),
    ("remove_letter", {"word": "butter", "letter": "t"}, "b u e r"),
    ("replace_letter", {"word": "butter", "letter": "t", "new": "d"}, "b u d d e r"),
    ("weekday", {"day": "Saturday", "n": "9"}, "Monday"),
    ("date", {"day": "27", "month": "February", "n": "3"}, "2 March"),
    ("date", {"day": "31", "month": "December", "n": "1"}, "1 January"),
    ("clock", {"time": "23:50", "n": "25"}, "0:15"),
    ("units", {"n": "3", "large": "hours", "small": "minutes"}, "180"),
    ("change", {"price": "7", "paid": "20"}, "13"),
    ("colour_of", {"text": "Tom has an orange hat. Mia has a red cup.", "name": "Tom", "thing": "hat"}, "orange"),
    ("place_of", {"text": "Tom is at the park. Mia is at the barn.", "name": "Mia"}, "barn"),
    ("owner_of", {"text": "Tom has an orange hat. Mia has a red cup.", "thing": "cup"}, "Mia"),
    ("table", {"table": "name | figs | nuts\nTom | 3 | 4\nMia | 5 | 6", "name": "Mia", "column": "figs"}, "5"),
    ("tallest", {"text": "Mia is taller than Tom. Zoe is taller than Mia."}, "Zoe"),
]


@functools.cache
def committed(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


@functools.cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(MODEL)


def asked(row: dict) -> list[str]:
    """What users ask in a row."""
    return [turn["content"] for turn in row.get("messages", row.get("prompt")) if turn["role"] == "user"]


@pytest.mark.parametrize(("name", "fields", "answer"), BY_HAND)
def test_answer_by_hand(name, fields, answer):
    assert TASKS[name].solve(fields) == answer


def test_every_task_is_worked_by_hand():
    assert {name for name, _, _ in BY_HAND} == set(TASKS)
    assert len(TASKS) >= 12
    assert set(EASY) <= set(TASKS)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("held", [False, True])
def test_draw_keeps_to_its_side(name, held):
    rng = random.Random(0)
    for _ in range(30):
        instance = tasklib.draw(TASKS[name], rng, held=held)
        assert tasklib.held_out(instance.key) == held
        assert instance.answer == instance.answer.strip() != ""
        assert tasklib.correct(f" {instance.answer}\n", instance.answer)
        assert not tasklib.correct(chats.mistaken(instance, rng), instance.answer)


@pytest.mark.parametrize("name", TASKS)
def test_phrasings(name):
    """A worksheet ends in its answer; a chat's question shares no wording with it and does not tell the answer."""
    task = TASKS[name]
    assert all(form.endswith("{answer}") for form in task.worksheet)
    assert not any("{answer}" in form for form in task.ask)
    assert not set(task.worksheet) & set(task.ask)
    instance = tasklib.draw(task, random.Random(0), held=False)
    line = tasklib.worksheet(instance, random.Random(1))
    prompt = tasklib.worksheet_prompt(instance, random.Random(1))
    assert line.startswith(prompt) and line[len(prompt) :].strip() == instance.answer


def test_split_ignores_order_and_name():
    add, take, change = TASKS["add"], TASKS["subtract"], TASKS["change"]
    assert tasklib.identity(add, {"a": "4", "b": "31"}) == tasklib.identity(add, {"a": "31", "b": "4"})
    assert tasklib.identity(take, {"a": "9", "b": "2"}) == tasklib.identity(change, {"price": "2", "paid": "9"})


def test_corpus_repeats_whatever_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(make_data, "CHUNK_BYTES", 20_000)
    one, two, other = tmp_path / "one", tmp_path / "two", tmp_path / "other"
    make_data.write_corpus(one, megabytes=0.06, workers=1)
    make_data.write_corpus(two, megabytes=0.06, workers=2)
    make_data.write_corpus(other, megabytes=0.06, seed=1)
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()
    assert 50_000 < one.stat().st_size < 80_000


def test_committed_sets_are_what_is_generated():
    rows = make_data.asset_rows()
    assert {path.stem for path in DATA.glob("*.jsonl")} == set(rows)
    for name, generated in rows.items():
        assert committed(name) == generated, (
            f"run python -m scripts.tiny.make_data --assets assets/data ({name} differs)"
        )
    assert sum(path.stat().st_size for path in DATA.glob("*.jsonl")) < 6_000_000


def test_held_out_questions_are_in_no_training_set():
    names = ("quickstart", "chat", "preference", "steps", "prompts")
    trained = {question for name in names for row in committed(f"{name}_train") for question in asked(row)}
    for name in names:
        held = {question for row in committed(f"{name}_heldout") for question in asked(row)}
        greetings = {greeting for greeting, _ in chats.GREETINGS}
        assert held - greetings and not (held - greetings) & trained
    held = {row["text"] for row in committed("domain_heldout")}
    assert not held & {row["text"] for row in committed("domain_train")}


def test_corpus_holds_no_held_out_exercise(monkeypatch):
    """Every exercise and every sum of the corpus is of the training side, and no chat is in it."""
    drawn = []
    real = tasklib.draw
    monkeypatch.setattr(tasklib, "draw", lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1])
    corpus = make_data.corpus_chunk(0, 300_000, 0)
    assert len(drawn) > 1000
    assert not any(tasklib.held_out(instance.key) for instance in drawn)
    assert "<|im" not in corpus
    for row in committed("skills_heldout"):
        assert json.dumps("\n" + row["prompt"])[1:-1] not in corpus  # at the start of a line: 2 + 8 ends 12 + 8
    for row in committed("quickstart_heldout"):
        assert json.dumps(asked(row)[0])[1:-1] not in corpus


def test_sums_in_stories_are_of_the_training_side():
    rng = random.Random(0)
    text = "\n".join(language.shop(rng) + language.counting(rng) for _ in range(500))
    sums = re.findall(r"had (\d+) \w+\. \w+ brought (\d+) more\. Now there were (\d+)", text)
    paid = re.findall(r"gave (\d+) coins? and got (\d+) coins? back", text)
    assert len(sums) > 100 and len(paid) == 500
    for a, b, total in sums:
        assert int(a) + int(b) == int(total)
        assert not tasklib.held_out(tasklib.identity(TASKS["add"], {"a": a, "b": b}))
    for a, back in paid:
        price = str(int(a) - int(back))
        assert not tasklib.held_out(tasklib.identity(TASKS["subtract"], {"a": a, "b": price}))


def test_rows_have_the_forms_that_training_reads():
    for name in ("quickstart", "chat"):
        for row in committed(f"{name}_train"):
            roles = [turn["role"] for turn in row["messages"]]
            assert roles[-2:] == ["user", "assistant"] and list(row) == ["messages"]
    for row in committed("preference_train"):
        assert [turn["role"] for turn in row["prompt"] + row["chosen"]] == ["user", "assistant"]
        assert row["chosen"] != row["rejected"]
    assert {row["task"] for row in committed("prompts_train")} == set(TASKS)


def test_steps_are_right_up_to_the_first_slip():
    """Words in reverse order, which the question tells: of an answer with a slip, what comes before it is right."""
    rows = [row for row in committed("steps_train") if "everse" in row["prompt"][0]["content"]]
    slips = 0
    for row in rows:
        said = re.findall(r"[a-z]+", row["prompt"][0]["content"].partition(":")[2])[::-1]
        count = len(row["completions"])
        if len(said) == count:
            right = [row["completions"][:n] == said[:n] for n in range(1, count + 1)]
            assert row["labels"] == right and len(set(row["completions"]) - set(said)) <= 1
            slips += not all(right)
    assert 100 < slips < 0.75 * len(rows)
    every = [label for row in committed("steps_train") for label in row["labels"]]
    assert 0.4 < sum(every) / len(every) < 0.75


def test_tokenizer():
    tok = tokenizer()
    assert len(tok) == make_tokenizer.VOCABULARY
    assert len({tok.bos_token_id, tok.eos_token_id, tok.pad_token_id}) == 3
    assert tok.tokenize("2048") == ["2", "0", "4", "8"]
    for word in (*words.COMMON, *words.NAMES, *words.PLACES):
        assert len(tok.tokenize(word)) == len(tok.tokenize(f" {word}")) == 1
    text = 'Zoe said: "Naïve café, 3.5 km?"\n\n\tÆ 漢字'
    ids = tok(text).input_ids
    assert ids[0] == tok.bos_token_id and tok.decode(ids, skip_special_tokens=True) == text


def test_chat_template_marks_what_is_learnt():
    tok = tokenizer()
    row = next(row for row in committed("chat_train") if len(row["messages"]) >= 4)
    out = tok.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
    learnt = [i for i, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    said = [turn["content"] + tok.eos_token for turn in row["messages"] if turn["role"] == "assistant"]
    assert tok.decode(learnt) == "".join(said)
    prompt = tok.apply_chat_template(row["messages"][:-1], add_generation_prompt=True)["input_ids"]
    assert out["input_ids"][: len(prompt)] == prompt


def test_tokenizer_training_repeats():
    one, two = (make_tokenizer.train(60).backend_tokenizer.to_str() for _ in range(2))
    assert one == two


def test_documents_fit_the_model():
    tok, rng = tokenizer(), random.Random(0)
    config = transformers.AutoConfig.from_pretrained(MODEL)
    texts = [documents.document(rng) for _ in range(300)] + [sea.log(rng) for _ in range(50)]
    assert max(len(tok(text).input_ids) for text in texts) < config.max_position_embeddings


def test_model_is_tiny():
    config = transformers.AutoConfig.from_pretrained(MODEL)
    width, inner, heads = config.hidden_size, config.intermediate_size, config.head_dim
    attention = 2 * width * heads * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * width * inner + 2 * width
    total = config.num_hidden_layers * layer + config.vocab_size * width + width
    assert total == 4_066_560
    assert (config.vocab_size, config.eos_token_id) == (len(tokenizer()), tokenizer().eos_token_id)


def test_score_counts_the_first_line_of_a_worksheet_and_the_whole_reply_of_a_chat():
    sheet = {"prompt": "2 + 8 =", "answer": "10", "task": "add"}
    chat = {"prompt": [{"role": "user", "content": "What is 2 plus 8?"}], "answer": "10", "task": "change"}
    assert score.score([sheet, sheet], [" 10.\n\n3 + 4 = 7", " 11\n10"]) == {"add": 0.5}
    assert score.score([chat, chat], ["10\n", "10\n3 + 4"]) == {"change": 0.5}
