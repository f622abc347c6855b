"""A tokenizer trained here, on a small text, with any template."""

import functools
import json
import random

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = [
    "<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>",
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|user|>", "<|assistant|>",
    "<|end|>", "<|system|>", "[gMASK]", "<sop>", "<|observation|>", "<|END_OF_TURN_TOKEN|>",
]  # fmt: skip
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = (
    "the cat sat on a mat and saw two dogs run to town what is it called here yes no hello world think answer".split()
)


@functools.cache
def _backend(kind: str) -> str:
    rng = random.Random(0)
    corpus = [" ".join(rng.choices(WORDS, k=12)).capitalize() + ".\n\n" for _ in range(400)] + ["user\nassistant\n1234"]
    if kind in ("bytes", "gpt2"):
        backend = tokenizers.Tokenizer(models.BPE())
        # gpt2's own splitting, or that of Llama 3 and Qwen, which keeps line breaks together
        split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")
        bytelevel = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
        backend.pre_tokenizer = bytelevel if kind == "gpt2" else pre_tokenizers.Sequence([split, bytelevel])
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIALS, initial_alphabet=alphabet)
    else:
        corpus = [line.replace("\n", " ") for line in corpus]  # as in Llama 2, a line break is a byte
        backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", *SPECIALS, *fallback])
    backend.train_from_iterator(corpus, trainer)
    return backend.to_str()


@pytest.fixture
def make_tokenizer():
    """A function of (template, kind of tokenizer, special tokens) giving a fast tokenizer."""

    def make(template=None, kind="bytes", eos="<|im_end|>", bos=None, pad="<|endoftext|>", adds_bos=False):
        backend = tokenizers.Tokenizer.from_str(_backend(kind))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos, pad_token=pad)
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
        if adds_bos:
            single = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
            )
            tokenizer.backend_tokenizer.post_processor = single
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def write(tmp_path):
    """A function that writes rows as jsonl and returns the path."""

    def write_rows(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write_rows


@pytest.fixture
def chats():
    """A function of (number, seed) giving chats of one to three exchanges."""

    def make(number, seed=0):
        rng = random.Random(seed)

        def say(low=1, high=20):
            return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

        rows = []
        for _ in range(number):
            messages = [{"role": "system", "content": say()}] if rng.random() < 0.3 else []
            for _ in range(rng.randint(1, 3)):
                messages += [{"role": "user", "content": say()}, {"role": "assistant", "content": say()}]
            rows.append({"messages": messages})
        return rows

    return make
