"""Adapters in peft's format: made by peft and read here, made here and read by peft, with the same logits."""

import jax
import numpy as np
import peft
import pytest
import transformers
from safetensors.numpy import load_file

import jaxft
from jaxft import peft as jaxft_peft
from jaxft.core import tree
from jaxft.peft import LoRA, LoRAWeight, places
from tests.peft import pairs

TOLERANCE = 1e-5  # whole-model logits of order one, float32

# the model and our config; peft is given the same choice
BOTH = {
    "default": ("llama", LoRA(rank=4, targets=("q_proj", "v_proj"))),
    "all-linear": ("llama", LoRA(rank=4)),
    "regex": ("llama", LoRA(rank=4, targets=r".*\.(1|2)\..*(q|down)_proj")),
    "dropout": ("llama", LoRA(rank=4, targets=("q_proj",), dropout=0.3)),
    "rslora": ("llama", LoRA(rank=4, alpha=3, targets=("q_proj", "up_proj"), rslora=True)),
    "some layers": ("llama", LoRA(rank=4, targets=("q_proj", "o_proj"), layers=(0, 2))),
    "exclude": ("llama", LoRA(rank=4, targets="all-linear", exclude=("down_proj",))),
    "exclude regex": ("llama", LoRA(rank=4, targets=("q_proj", "k_proj"), exclude=r".*\.1\..*q_proj")),
    "rank pattern": ("llama", LoRA(rank=4, targets=("q_proj", "k_proj"), rank_pattern={"k_proj": 2})),
    "rank by layer": (
        "llama",
        LoRA(rank=4, targets=("q_proj", "up_proj"), rank_pattern={"layers.0.self_attn.q_proj": 7, r"2.*up_proj": 1}),
    ),
    "alpha by layer": (
        "llama",
        LoRA(rank=3, targets=("q_proj", "up_proj"), alpha_pattern={"1.self_attn.q_proj": 5.5, "up_proj": 1}),
    ),
    "both patterns, rslora": (
        "llama",
        LoRA(
            rank=3,
            targets=("q_proj", "up_proj"),
            rank_pattern={"q_proj": 2},
            alpha_pattern={"1.self_attn.q_proj": 0.7},
            rslora=True,
        ),
    ),
    "head": ("llama", LoRA(rank=4, targets=("lm_head", "q_proj"))),
    "head alone": ("llama", LoRA(rank=4, targets=("lm_head",))),
    "embedding": ("llama", LoRA(rank=4, targets=("embed_tokens", "q_proj"))),
    "embedding rank": ("llama", LoRA(rank=4, targets=("embed_tokens", "q_proj"), rank_pattern={"embed_tokens": 9})),
    "saved": ("llama", LoRA(rank=4, targets=("q_proj",), modules_to_save=("embed_tokens", "lm_head"))),
    "saved norms": ("llama", LoRA(rank=4, targets=("q_proj",), modules_to_save=("norm",))),
    "saved final norm": ("llama", LoRA(rank=4, targets=("q_proj",), modules_to_save=("model.norm",))),
    "saved linear": ("llama", LoRA(rank=4, targets="all-linear", modules_to_save=("up_proj",))),
    "saved container": ("llama", LoRA(rank=4, targets="all-linear", modules_to_save=("mlp",))),
    "tied": ("llama_tied", LoRA(rank=4)),
    "tied embedding": ("llama_tied", LoRA(rank=4, targets=("embed_tokens", "v_proj"))),
    "tied embedding follows": (
        "llama_tied",
        LoRA(rank=4, targets=("embed_tokens", "v_proj"), ensure_weight_tying=True),
    ),
    "tied both follow": (
        "llama_tied",
        LoRA(rank=4, targets=("embed_tokens", "lm_head", "v_proj"), ensure_weight_tying=True),
    ),
    "tied head": ("llama_tied", LoRA(rank=4, targets=("lm_head", "v_proj"))),
    "tied head and embedding": ("llama_tied", LoRA(rank=4, targets=("lm_head", "embed_tokens"))),
    "tied saved embedding": ("llama_tied", LoRA(rank=4, targets=("v_proj",), modules_to_save=("embed_tokens",))),
    "tied saved head": ("llama_tied", LoRA(rank=4, targets=("v_proj",), modules_to_save=("lm_head",))),
    "tied saved both": ("llama_tied", LoRA(rank=4, targets=("v_proj",), modules_to_save=("embed_tokens", "lm_head"))),
    "tied saved follows": (
        "llama_tied",
        LoRA(rank=4, targets=("v_proj",), modules_to_save=("embed_tokens",), ensure_weight_tying=True),
    ),
    "tied lora embedding, saved head": (
        "llama_tied",
        LoRA(rank=4, targets=("embed_tokens",), modules_to_save=("lm_head",)),
    ),
    "biases all": ("llama_bias", LoRA(rank=4, targets=("q_proj",), bias="all")),
    "biases of the adapted": ("llama_bias", LoRA(rank=4, targets=("q_proj", "up_proj"), bias="lora_only")),
    "biases all, layers": ("qwen2", LoRA(rank=4, targets=("q_proj",), layers=(1,), bias="all")),
    "biases of some layers": (
        "gpt2",
        LoRA(rank=4, targets=r".*\.[02]\.attn\.c_attn|.*\.c_fc", bias="lora_only"),
    ),
    "linear with bias": ("llama_bias", LoRA(rank=4)),
    "saved linear with bias": ("llama_bias", LoRA(rank=4, targets=("q_proj",), modules_to_save=("up_proj",))),
    "saved linear, biases all": (
        "qwen2",
        LoRA(rank=4, targets=("q_proj",), modules_to_save=("k_proj",), bias="all"),
    ),
    "saved container, biases all": (
        "llama_bias",
        LoRA(rank=4, targets=("q_proj",), modules_to_save=("mlp",), bias="all"),
    ),
    "gpt2": ("gpt2", LoRA(rank=4)),
    "gpt2 by ending": ("gpt2", LoRA(rank=4, targets=("attn.c_proj", "c_fc"))),
    "gpt2 biases": ("gpt2", LoRA(rank=4, targets=("c_attn",), bias="all")),
    "gpt2 saved norm, biases all": ("gpt2", LoRA(rank=4, targets=("c_attn",), modules_to_save=("ln_f",), bias="all")),
    "gpt2 embeddings": ("gpt2", LoRA(rank=4, targets=("wte", "wpe", "c_attn"))),
    "gpt2 saved": ("gpt2", LoRA(rank=4, targets=("c_attn",), modules_to_save=("ln_f", "wpe"))),
    "gpt2 saved conv": ("gpt2", LoRA(rank=4, targets=("c_attn",), modules_to_save=("c_fc",))),
    "neox": ("gpt_neox", LoRA(rank=4)),
    "neox by name": ("gpt_neox", LoRA(rank=4, targets=("query_key_value", "dense"), modules_to_save=("lm_head",))),
    "neox tied head": ("gpt_neox_tied", LoRA(rank=4, targets=("lm_head", "dense"))),
    "phi3 fused": ("phi3", LoRA(rank=4, targets=("qkv_proj", "gate_up_proj"))),
    "gemma3": ("gemma3_text", LoRA(rank=4)),
    "qwen3": ("qwen3", LoRA(rank=4, modules_to_save=("q_norm", "k_norm"))),
}


def peft_config(name: str, config: LoRA) -> peft.LoraConfig:
    """The same choice said to peft."""
    layers = {} if config.layers is None else {"layers_to_transform": list(config.layers)}
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=2 * config.rank if config.alpha is None else config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets if isinstance(config.targets, str) else list(config.targets),
        exclude_modules=(config.exclude if isinstance(config.exclude, str) else list(config.exclude)) or None,
        modules_to_save=list(config.modules_to_save) or None,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        use_rslora=config.rslora,
        bias=config.bias,
        ensure_weight_tying=config.ensure_weight_tying,
        fan_in_fan_out=name.startswith("gpt2"),
        **layers,
    )


@pytest.mark.parametrize("case", BOTH)
def test_from_peft(case, tmp_path):
    """Logits, and the number of parameters that train."""
    name, config = BOTH[case]
    made = pairs.peft_model(name, peft_config(name, config))
    params = pairs.load(name, pairs.peft_save(made, tmp_path / "adapter"))
    expected = pairs.torch_logits(made)
    assert np.abs(expected - pairs.torch_logits(pairs.torch_model(name))).max() > 1e-2, "the adapter does nothing"
    np.testing.assert_allclose(pairs.logits(name, params), expected, rtol=0, atol=TOLERANCE)
    trainable, _ = tree.partition(params, tree.trainable_mask(params))
    assert sum(np.count_nonzero(a) for a in jax.tree.leaves(trainable)) == _trained(made)
    np.testing.assert_allclose(pairs.logits(name, tree.merge(params)), expected, rtol=0, atol=TOLERANCE)
    if not any(
        key.endswith("base_layer.weight") for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ):
        bare, base = jax.tree.leaves(tree.strip(params)), jax.tree.leaves(pairs.ours(name).params)
        assert all(a is b for a, b in zip(bare, base, strict=True))


def _trained(made: peft.PeftModel) -> int:
    """Trained elements; an embedding and the head that follows it are one."""
    arrays = [p for p in made.parameters() if p.requires_grad]
    return sum(p.numel() for p in {p.untyped_storage().data_ptr(): p for p in arrays}.values())


@pytest.mark.parametrize("case", BOTH)
def test_to_peft(case, tmp_path, key):
    """Logits; and what peft loads of ours is what it would have made of the config: the same modules."""
    name, config = BOTH[case]
    params = pairs.adapted(name, config, key)
    directory = pairs.save(name, params, tmp_path / "adapter")
    expected = pairs.logits(name, params)
    read = pairs.peft_load(name, directory)
    np.testing.assert_allclose(pairs.torch_logits(read), expected, rtol=0, atol=TOLERANCE)
    again = pairs.load(name, directory)
    np.testing.assert_allclose(pairs.logits(name, again), expected, rtol=0, atol=1e-6)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    own = sorted(load_file(directory / "adapter_model.safetensors"))
    theirs = pairs.peft_save(read, tmp_path / "theirs")
    base = (".embed_tokens.weight", ".embed_out.weight", ".lm_head.weight", ".wte.weight", ".wpe.weight")
    written = load_file(theirs / "adapter_model.safetensors")
    extra = [k for k in written if k not in own]
    assert set(own) <= set(written)
    again = (".modules_to_save.", ".original_module.")  # the biases of modules trained whole once more
    assert all(k.endswith((".base_layer.weight", *base)) or any(part in k for part in again) for k in extra), extra


@pytest.mark.parametrize("case", BOTH)
def test_targets_select_what_peft_selects(case):
    """The set of adapted modules, each with its rank and scale."""
    name, config = BOTH[case]
    made = pairs.quietly(peft.get_peft_model, pairs.torch_model(name), peft_config(name, config))
    prefix = "base_model.model."
    theirs = {
        module.removeprefix(prefix): (layer.r["default"], layer.scaling["default"])
        for module, layer in made.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    if config.ensure_weight_tying:
        theirs.pop("lm_head", None)
    assert set(_selected(name, config)) == set(theirs)
    for module, (rank, scale) in _selected(name, config).items():
        assert rank == theirs[module][0]
        assert np.isclose(scale, theirs[module][1], rtol=1e-6)


def _selected(name: str, config: LoRA) -> dict[str, tuple[int, float]]:

    loaded = pairs.ours(name)
    params = jaxft_peft.adapt(pairs.model(name), jax.random.key(0), config)
    found = {}
    for row in places.rows(loaded.names):
        w = places.get(params, row)
        if not isinstance(w, LoRAWeight):
            continue
        ranks, scales = np.atleast_1d(w.rank), np.atleast_1d(w.scale)
        modules = row.modules(loaded.config.num_layers)
        found |= {m: (int(r), float(s)) for m, r, s in zip(modules, ranks, scales, strict=True) if r}
    return found


@pytest.mark.parametrize("case", ["default", "tied embedding", "tied saved head", "tied saved follows", "gpt2"])
def test_merged_model_in_transformers(case, tmp_path):
    """Through the public names: peft's adapter, merged and exported, gives peft's logits in `transformers`.

    A tied model whose embedding alone was changed becomes an untied one."""
    name, config = BOTH[case]
    made = pairs.peft_model(name, peft_config(name, config))
    adapter = pairs.peft_save(made, tmp_path / "adapter")
    pairs.torch_model(name).save_pretrained(tmp_path / "base")
    model = jaxft.load(tmp_path / "base", dtype="float32")
    params = jaxft.load_adapter(model, adapter)
    exported = jaxft.save_hf(model, jaxft.merge(params), tmp_path / "merged")
    read = transformers.AutoModelForCausalLM.from_pretrained(exported, attn_implementation="eager").eval()
    np.testing.assert_allclose(pairs.torch_logits(read), pairs.torch_logits(made), rtol=0, atol=TOLERANCE)
    assert read.config.tie_word_embeddings == (case in ("tied saved follows", "gpt2"))
    again = jaxft.load_adapter(model, jaxft.save_adapter(model, params, tmp_path / "ours"))
    np.testing.assert_array_equal(pairs.logits(name, again), pairs.logits(name, params))
