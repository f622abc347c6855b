"""Reading a Hugging Face config.json strictly: every field is understood, known to be harmless, or refused by name."""

import difflib
from typing import Any

MISSING: Any = object()

# Fields that do not change the maths of a forward pass at evaluation.
HARMLESS = frozenset(
    """
    _name_or_path _attn_implementation _commit_hash architectures attn_implementation auto_map
    bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout cache_implementation
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label initializer_range is_decoder label2id
    length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    attention_dropout hidden_dropout embd_pdrop attn_pdrop resid_pdrop embd_dropout classifier_pdrop
    attention_probs_dropout_prob hidden_dropout_prob num_labels _num_labels is_llama_config max_sequence_length
    transformers.js_config
""".split()
)


class Fields:
    """A config.json whose fields must all be read: ``get`` and ``take`` mark one, ``finish`` refuses what is left."""

    def __init__(self, raw: dict[str, Any], where: str = "config.json"):
        self.raw, self.where = raw, where
        self._seen: set[str] = set()

    def get(self, name: str, default: Any = MISSING) -> Any:
        """The value, or ``default`` if absent or null. Raises ValueError if absent and there is no default."""
        self._seen.add(name)
        value = self.raw.get(name)
        if value is not None:
            return value
        if default is MISSING:
            raise ValueError(f"{self.where}: '{name}' is missing; a {self.raw.get('model_type')} config needs it")
        return default

    def nullable(self, name: str, default: Any) -> Any:
        """The value, where null is one (no window, say): ``default`` only if absent."""
        self._seen.add(name)
        return self.raw.get(name, default)

    def expect(self, name: str, *allowed: Any, why: str) -> None:
        """Refuses a value other than ``allowed`` (or absence), saying why."""
        self._seen.add(name)
        value = self.raw.get(name)
        if value is not None and value not in allowed:
            raise ValueError(f"{self.where}: {name}={value!r} is not supported ({why}); expected {list(allowed)}")

    def choose(self, name: str, table: dict[Any, Any], default: Any = MISSING) -> Any:
        """The entry of ``table`` for the value; refuses one that the table lacks."""
        value = self.get(name, default)
        if value not in table:
            raise ValueError(f"{self.where}: {name}={value!r} is not known; expected one of {sorted(table)}")
        return table[value]

    def finish(self) -> None:
        """Raises ValueError naming every field that nothing has read and that is not known to be harmless."""
        left = {n: v for n, v in self.raw.items() if n not in self._seen | HARMLESS and v is not None}
        if left:
            near = {n: difflib.get_close_matches(n, self._seen, 1) for n in left}
            named = ", ".join(f"{n}={left[n]!r}" + (f" (nearest known: {m[0]})" if m else "") for n, m in near.items())
            raise ValueError(
                f"{self.where}: not understood for {self.raw.get('model_type')}: {named}. A field that may change "
                "the maths is refused rather than ignored; set it to null if it has no effect on this checkpoint."
            )


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
