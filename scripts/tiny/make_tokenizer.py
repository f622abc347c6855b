"""Train the tokenizer of the embedded default: `python -m scripts.tiny.make_tokenizer assets/tiny`.

Byte-level BPE of 2048 tokens, digits single (so that sums can be learnt), spaces before words part of the word.
Unusual: `<|im_end|>` is both the end of a document and the end of a turn, so the base knows it, and a chat has no
untrained token that must be *predicted*. As with Llama, encoding a text puts `<|bos|>` first, and the chat template
does so itself. The padding is a token of its own: an end of turn is never masked by mistake.
"""

import argparse
import itertools
import json
import pathlib
import random
from collections.abc import Iterator

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from scripts.tiny import chats, documents, words
from scripts.tiny.tasks import TASKS

VOCABULARY = 2048
MAX_POSITION = 512
SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
EXTRA_SPECIAL = ["<|im_start|>"]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}
{{- '\\n' }}
{%- else %}
{{- message['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def texts(count: int, seed: int = 0) -> Iterator[str]:
    """What the merges are learnt from: documents, questions as chats ask them, and each word at the start of a line."""
    rng = random.Random(f"tokenizer {seed}")
    deck = tuple(TASKS.values())
    for _ in range(count):
        yield documents.document(rng)
        row = chats.verifiable(deck, rng, held=False)
        yield " ".join(turn["content"] for turn in row["prompt"])
    lines = "\n".join((*words.COMMON, *words.NAMES, *words.PLACES, "user", "assistant", "system"))
    yield from itertools.repeat(lines, count // 20)


def train(count: int = 20_000, seed: int = 0) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer, trained on `count` documents."""
    special = [*SPECIAL.values(), *EXTRA_SPECIAL]
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(count, seed), trainer=trainer)
    bos = SPECIAL["bos_token"]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        additional_special_tokens=EXTRA_SPECIAL,
        model_max_length=MAX_POSITION,
        clean_up_tokenization_spaces=False,
        padding_side="right",
        **SPECIAL,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save(tokenizer: transformers.PreTrainedTokenizerFast, folder: pathlib.Path) -> None:
    """The tokenizer's files, under the names that transformers 4 knows as well as 5."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    del config["backend"]
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    save(train(args.documents, args.seed), args.folder)


if __name__ == "__main__":
    main()
