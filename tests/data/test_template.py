"""Masks: equal to transformers' where a template has marks, exact boundaries where not, and every end learnt."""

from datetime import datetime
from pathlib import Path

import pytest
import trl

from jaxft import data
from jaxft.data import encode, formats, template, texts
from jaxft.data.errors import DataError
from jaxft.data.records import Row

TRL = Path(trl.__file__).parent / "chat_templates"
SYSTEM = {"role": "system", "content": "be good"}
CHAT = [
    {"role": "user", "content": "what is it"},
    {"role": "assistant", "content": "a cat"},
    {"role": "user", "content": "two dogs"},
    {"role": "assistant", "content": "yes\nno"},
]
THINKING = [
    CHAT[0],
    CHAT[1] | {"reasoning_content": "think one"},
    CHAT[2],
    CHAT[3] | {"reasoning_content": "think two"},
]
CALL = {"type": "function", "function": {"name": "run", "arguments": {"to": "town"}}}
TOOLS = [{"type": "function", "function": {"name": "run", "parameters": {}}}]
CALLING = [
    CHAT[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "ran"},
    CHAT[3],
]


def encoded(tokenizer, fields, **options):
    """The examples of one row as (tokens, mask)."""
    config = data.DataConfig(path="x", **options)
    row = Row(fields, "file.jsonl:1")
    format = formats.detect([row], "")
    form = formats.convert(row, format)
    encoder = texts.encoder(tokenizer, config, format, isinstance(form, formats.Conversation))
    chunk = encode.encode(encoder, [row], 0)
    if chunk.errors:
        raise chunk.errors[0]
    stops = chunk.lengths.cumsum()
    return [
        (chunk.tokens[stop - n : stop].tolist(), chunk.loss[stop - n : stop].astype(int).tolist())
        for n, stop in zip(chunk.lengths, stops, strict=True)
    ]


def learnt(tokenizer, fields, **options):
    """For each example, the learnt stretches as text."""
    found = []
    for tokens, mask in encoded(tokenizer, fields, **options):
        parts, part = [], []
        for token, on in [*zip(tokens, mask, strict=True), (0, 0)]:
            if on:
                part.append(token)
            elif part:
                parts, part = [*parts, tokenizer.decode(part)], []
        found.append(parts)
    return found


def transformers_mask(tokenizer, source, messages, tools=None):
    """What transformers makes of a template with marks."""
    out = tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=source, return_assistant_tokens_mask=True, return_dict=True
    )
    return out["input_ids"], out["assistant_masks"]


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("name", template.SHIPPED)
def test_shipped_templates_equal_transformers(make_tokenizer, name, kind):
    tokenizer = make_tokenizer(kind=kind, eos="</s>", bos="<s>", adds_bos=True)
    for messages in (CHAT, [SYSTEM, *CHAT]):
        ((tokens, mask),) = encoded(tokenizer, {"messages": messages}, template=name)
        source = template.sources(tokenizer, name)[0]
        assert (tokens, mask) == transformers_mask(tokenizer, source, messages)
        assert tokens.count(tokenizer.bos_token_id) == {"llama": 2, "chatml": 1}.get(name, 1)
        prompt = tokenizer.apply_chat_template(
            messages[:-1], chat_template=source, add_generation_prompt=True, return_dict=False
        )
        assert tokens[: len(prompt)] == prompt and mask[len(prompt)] == 1 and mask[len(prompt) - 1] == 0


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_shipped_templates_say_what_they_should(make_tokenizer, kind):
    tokenizer = make_tokenizer(kind=kind, eos="</s>", bos="<s>")
    said = {name: learnt(tokenizer, {"messages": CHAT}, template=name)[0] for name in template.SHIPPED}
    assert said["chatml"] == ["a cat<|im_end|>", "yes\nno<|im_end|>"]
    assert said["gemma"] == ["a cat<end_of_turn>", "yes\nno<end_of_turn>"]
    assert said["alpaca"] == said["plain"] == ["a cat</s>", "yes\nno</s>"]
    assert [part.strip() for part in said["llama"]] == ["a cat </s>", "yes\nno </s>"]


def test_alpaca_shows_instruction_and_input(make_tokenizer):
    tokenizer = make_tokenizer(eos="</s>")
    ((tokens, _),) = encoded(tokenizer, {"instruction": "run", "input": "town", "output": "no"}, template="alpaca")
    text = tokenizer.decode(tokens)
    assert text.endswith("### Instruction:\nrun\n\n### Input:\ntown\n\n### Response:\nno</s>\n\n")
    assert text.startswith("Below is an instruction that describes a task, paired with an input")


def test_chatml_shows_tools(make_tokenizer):
    tokenizer = make_tokenizer()
    fields = {"messages": CALLING, "tools": TOOLS}
    ((tokens, mask),) = encoded(tokenizer, fields, template="chatml")
    assert (tokens, mask) == transformers_mask(tokenizer, template.sources(tokenizer, "chatml")[0], CALLING, TOOLS)
    call = '<tool_call>\n{"name": "run", "arguments": {"to": "town"}}\n</tool_call><|im_end|>'
    assert learnt(tokenizer, fields, template="chatml") == [[call, "yes\nno<|im_end|>"]]
    text = tokenizer.decode(tokens)
    assert (
        '\n<tools>\n{"type": "function", "function": {"name": "run"' in text
        and "<tool_response>\nran\n</tool_response>" in text
    )
    for name in ("llama", "gemma", "alpaca", "plain"):
        with pytest.raises(DataError, match="tools"):
            encoded(tokenizer, fields, template=name)


STABLE = ["gemma", "llama3", "qwen2_5", "qwen3_instruct_2507", "lfm2", "phi3", "cohere"]


@pytest.mark.parametrize("name", STABLE)
def test_boundaries_equal_marks(make_tokenizer, name):
    """A template without marks gives the mask of its twin with marks, but for white space after the ends."""
    tokenizer = make_tokenizer((TRL / f"{name}.jinja").read_text(), eos="<eos>", bos="<s>")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [*tokenizer.all_special_tokens, "<|END_OF_TURN_TOKEN|>"]}
    )
    ((tokens, mask),) = encoded(tokenizer, {"messages": CHAT})
    theirs, marked = transformers_mask(tokenizer, (TRL / f"{name}_training.jinja").read_text(), CHAT)
    assert tokens == theirs
    differ = [tokens[i] for i in range(len(tokens)) if mask[i] != marked[i]]
    assert tokenizer.decode(differ).strip() == ""


@pytest.mark.parametrize("name", ["gemma", "llama3", "qwen2_5", "qwen3", "lfm2", "phi3", "cohere", "glm4moe"])
def test_marks_of_any_template_equal_transformers(make_tokenizer, name):
    source = (TRL / f"{name}_training.jinja").read_text()
    tokenizer = make_tokenizer(source, eos="<eos>", bos="<s>")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [*tokenizer.all_special_tokens, "<|END_OF_TURN_TOKEN|>"]}
    )
    ((tokens, mask),) = encoded(tokenizer, {"messages": CHAT})
    assert (tokens, mask) == transformers_mask(tokenizer, source, CHAT)


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma", "phi3"])
def test_every_learnt_turn_continues_its_prompt(make_tokenizer, name, kind):
    """Token for token: what precedes a learnt turn is the prompt that inference would give, and its end is learnt."""
    tokenizer = make_tokenizer((TRL / f"{name}.jinja").read_text(), eos="<eos>", bos="<s>", kind=kind)
    turns = []
    for tokens, mask in encoded(tokenizer, {"messages": CHAT}):
        starts = [i for i in range(1, len(tokens)) if mask[i] and not mask[i - 1]]
        turns += [tokens[:i] for i in starts if tokens[i - 1] != tokenizer.convert_tokens_to_ids("<|end|>")]
    prompts = [tokenizer.apply_chat_template(CHAT[:k], add_generation_prompt=True, return_dict=False) for k in (1, 3)]
    assert turns == prompts


def test_a_template_that_rewrites_turns_gives_one_text_for_each(make_tokenizer):
    """Qwen3 strips the thinking of all but the last turn; each turn is learnt as it will be said."""
    tokenizer = make_tokenizer((TRL / "qwen3.jinja").read_text())
    assert learnt(tokenizer, {"messages": THINKING}) == [
        ["<think>\nthink one\n</think>\n\na cat<|im_end|>"],
        ["<think>\nthink two\n</think>\n\nyes\nno<|im_end|>"],
    ]
    (first, _), (second, _) = encoded(tokenizer, {"messages": THINKING})
    assert tokenizer.decode(first) == tokenizer.apply_chat_template(THINKING[:2], tokenize=False)
    assert tokenizer.decode(second) == tokenizer.apply_chat_template(THINKING, tokenize=False)
    assert len(encoded(tokenizer, {"messages": THINKING}, loss_on="last")) == 1
    # The thinking between the tool calls of one turn is kept: one text, two learnt parts.
    calling = [CALLING[0], CALLING[1] | {"reasoning_content": "think"}, *CALLING[2:]]
    assert [len(parts) for parts in learnt(tokenizer, {"messages": calling, "tools": TOOLS})] == [2]


def test_marks_do_not_hide_that_a_turn_is_rewritten(make_tokenizer):
    tokenizer = make_tokenizer((TRL / "lfm2_2_5.jinja").read_text(), bos="<s>")
    found = learnt(tokenizer, {"messages": THINKING})
    assert found == [["<think>think one</think>a cat<|im_end|>\n"], ["<think>think two</think>yes\nno<|im_end|>\n"]]


def test_an_ending_outside_the_marks_is_learnt(make_tokenizer):
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    )
    tokenizer = make_tokenizer(source)
    assert learnt(tokenizer, {"messages": CHAT}) == [["a cat<|im_end|>", "yes\nno<|im_end|>"]]


def test_eos_is_appended_where_the_template_writes_no_ending(make_tokenizer):
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    source += "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = make_tokenizer(source, eos="</s>", pad="</s>")  # pad is eos, and learnt all the same
    assert learnt(tokenizer, {"messages": CHAT}) == [[" a cat</s>"], [" yes\nno</s>"]]
    assert learnt(tokenizer, {"messages": CHAT}, loss_on="all")[0][0].endswith("no</s>")


def test_a_template_whose_opening_is_not_its_reply_is_refused(make_tokenizer):
    tokenizer = make_tokenizer((TRL / "deepseekv3.jinja").read_text(), bos="<s>")
    with pytest.raises(DataError, match=r"file\.jsonl:1: `messages\[1\]`.*opens with '<think>"):
        encoded(tokenizer, {"messages": CHAT})


def test_what_a_template_leaves_out_is_refused(make_tokenizer):
    tokenizer = make_tokenizer((TRL / "llama3.jinja").read_text(), bos="<s>")
    with pytest.raises(DataError, match=r"`messages\[1\]\.reasoning_content`: got 'think one'"):
        encoded(tokenizer, {"messages": THINKING})
    with pytest.raises(DataError, match="`tools`"):
        encoded(tokenizer, {"messages": CHAT, "tools": TOOLS})
    tokenizer.chat_template = (TRL / "smolvlm.jinja").read_text()  # knows only contents in parts
    with pytest.raises(DataError, match=r"`messages\[1\]\.content`: got 'a cat'"):
        encoded(tokenizer, {"messages": CHAT})


def test_what_a_template_itself_refuses_names_the_row(make_tokenizer):
    tokenizer = make_tokenizer((TRL / "gemma.jinja").read_text(), bos="<s>")
    with pytest.raises(DataError, match=r"file\.jsonl:1: got messages that the chat template refuses \(System role"):
        encoded(tokenizer, {"messages": [SYSTEM, *CHAT]})


@pytest.mark.parametrize("source", ["chatml", "qwen2_5"])
def test_which_turns_are_learnt(make_tokenizer, source):
    shipped = source == "chatml"
    tokenizer = make_tokenizer(None if shipped else (TRL / f"{source}.jinja").read_text())
    name = source if shipped else "tokenizer"
    one, two = "a cat<|im_end|>", "yes\nno<|im_end|>"

    def parts(messages, **options):
        return learnt(tokenizer, {"messages": messages}, template=name, **options)

    assert parts(CHAT) == [[one, two]]
    assert parts(CHAT, loss_on="last") == [[two]]
    assert parts([CHAT[0], CHAT[1] | {"train": False}, *CHAT[2:]]) == [[two]]
    assert parts([CHAT[0], CHAT[1] | {"weight": 1}, *CHAT[2:]], loss_on="last") == [[one, two]]
    assert parts([CHAT[0], CHAT[1], CHAT[2], CHAT[3] | {"train": False}]) == [[one]]
    assert parts([message | {"train": False} for message in CHAT]) == []
    ((tokens, mask),) = encoded(tokenizer, {"messages": CHAT}, template=name, loss_on="all")
    assert all(mask) and len(tokens) > 20
    with pytest.raises(DataError, match="flags on messages"):
        parts([CHAT[0], CHAT[1] | {"train": False}], loss_on="all")
    given = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    assert learnt(tokenizer, given, template=name) == [[two]]


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_strings_end_in_eos(make_tokenizer, kind):
    tokenizer = make_tokenizer(kind=kind, eos="</s>", bos="<s>", pad="</s>", adds_bos=True)
    ((tokens, mask),) = encoded(tokenizer, {"text": "the cat sat"})
    assert tokens == [*tokenizer("the cat sat")["input_ids"], tokenizer.eos_token_id]
    assert mask == [0] + [1] * (len(tokens) - 1)
    ((tokens, mask),) = encoded(tokenizer, {"text": "the cat sat</s>"})
    assert tokens.count(tokenizer.eos_token_id) == 1
    ((tokens, mask),) = encoded(tokenizer, {"prompt": "what is it", "completion": " a cat"})
    prompt = tokenizer("what is it")["input_ids"]
    assert tokens == [*tokenizer("what is it a cat")["input_ids"], tokenizer.eos_token_id]
    assert tokens[: len(prompt)] == prompt and mask == [0] * len(prompt) + [1] * (len(tokens) - len(prompt))
    assert all(encoded(tokenizer, {"prompt": "a", "completion": " b"}, loss_on="all")[0][1][1:])


def test_a_boundary_inside_a_token(make_tokenizer):
    """Trailing space of a prompt: tokenised as at inference where that is the same text, else learnt with its token."""
    pair = {"prompt": "what is it ", "completion": "a cat"}
    tokenizer = make_tokenizer(kind="gpt2", eos="</s>")
    ((tokens, mask),) = encoded(tokenizer, pair)
    prompt = tokenizer("what is it ")["input_ids"]
    assert tokens[: len(prompt)] == prompt and mask == [0] * len(prompt) + [1] * (len(tokens) - len(prompt))
    assert tokenizer.decode(tokens) == "what is it a cat</s>"
    assert tokens[:-1] != tokenizer("what is it a cat")["input_ids"]
    tokenizer = make_tokenizer(kind="metaspace", eos="</s>")
    ((tokens, mask),) = encoded(tokenizer, pair)
    assert tokens[:-1] == tokenizer("what is it a cat")["input_ids"]
    assert tokenizer.decode([t for t, on in zip(tokens, mask, strict=True) if on]).strip() == "a cat</s>"


def test_a_boundary_at_which_the_prompt_alone_has_other_tokens(make_tokenizer):
    """gpt2 splits two line breaks before a word, and keeps them one token at the end of a prompt."""
    tokenizer = make_tokenizer((TRL / "llama3.jinja").read_text(), kind="gpt2", bos="<s>")
    ((tokens, mask),) = encoded(tokenizer, {"messages": CHAT[:2]})
    prompt = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=False)
    assert tokens[: len(prompt)] == prompt and mask == [0] * len(prompt) + [1] * (len(tokens) - len(prompt))
    whole = tokenizer.apply_chat_template(CHAT[:2], return_dict=False)
    assert tokens != whole and tokenizer.decode(tokens) == tokenizer.decode(whole)


def test_a_base_model_without_a_template_or_marks(make_tokenizer):
    with pytest.raises(DataError, match=r"without a chat template.*chatml, llama, gemma, alpaca, plain"):
        encoded(make_tokenizer(), {"messages": CHAT})
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="without an EOS token"):
        encoded(tokenizer, {"text": "x"})
    with pytest.raises(DataError, match="no such file"):
        encoded(make_tokenizer(), {"messages": CHAT}, template="missing.jinja")
    with pytest.raises(DataError, match="'vicuna'"):
        encoded(make_tokenizer(), {"messages": CHAT}, template="vicuna")


def test_named_templates_need_their_marks(make_tokenizer):
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(DataError, match=r"no <\|im_start\|> and no <\|im_end\|>"):
        template.sources(tokenizer, "chatml")


def test_the_date_is_fixed(make_tokenizer):
    tokenizer = make_tokenizer((TRL / "llama3_2.jinja").read_text(), bos="<s>")
    ((tokens, _),) = encoded(tokenizer, {"messages": CHAT})
    text = tokenizer.decode(tokens)
    assert "26 Jul 2024" in text and datetime.now().strftime("%d %b %Y") not in text


def test_template_options_and_files(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer((TRL / "qwen3.jinja").read_text())
    thought = learnt(tokenizer, {"messages": CHAT[:2]})
    plain = learnt(tokenizer, {"messages": CHAT[:2]}, template_options={"enable_thinking": False})
    assert thought == [["<think>\n\n</think>\n\na cat<|im_end|>"]] and plain == [["a cat<|im_end|>"]]
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    path = str(tmp_path / "own.jinja")
    assert learnt(tokenizer, {"messages": CHAT}, template=path) == [["a cat<|im_end|>", "yes\nno<|im_end|>"]]
    template.install(tokenizer, path)
    assert tokenizer.apply_chat_template(CHAT[:1], tokenize=False) == "what is it<|im_end|>"
