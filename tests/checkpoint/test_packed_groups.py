"""Checkpoints of GPTQ, AWQ, HQQ and compressed-tensors, read as they are stored: against their formats' definitions."""

import functools
import json
import re

import jax
import numpy as np
import optax
import pytest

import jaxft
from jaxft import peft
from jaxft.checkpoint import hf, writer
from jaxft.checkpoint.errors import CheckpointError
from jaxft.core import tree, verbs
from jaxft.quant import IntGroups, QuantConfig
from jaxft.sharding import mesh as meshes
from jaxft.sharding.mesh import MeshConfig
from tests.checkpoint import files, packers

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
HQQ = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}, "skip_modules": ["lm_head"]}
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"], "kv_cache_scheme": None,
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}, "input_activations": None}},
}  # fmt: skip
part = functools.partial
ATTENTION = r"self_attn\.[qkv]_proj\.weight$"
CASES = {
    "gptq": ("llama", part(packers.gptq), GPTQ, {}),
    "gptq desc_act": ("llama", part(packers.gptq, desc_act=True), GPTQ | {"desc_act": True}, {}),
    "gptq v2": ("llama_bias", part(packers.gptq, form="gptq_v2"), GPTQ | {"checkpoint_format": "gptq_v2"}, {}),
    "gptq symmetric, zero biases": ("llama", part(packers.gptq, sym=True), GPTQ | {"sym": True}, {"bias": True}),
    "gptq column": (
        "llama", part(packers.gptq, size=-1), GPTQ | {"group_size": -1}, {"beside": "quantize_config.json"}
    ),
    "gptq last group smaller": ("llama", part(packers.gptq, size=32), GPTQ | {"group_size": 32}, {}),
    "gptq 8 bits": ("gpt2", part(packers.gptq, bits=8, desc_act=True), GPTQ | {"bits": 8, "desc_act": True}, {}),
    "gptq partly": ("llama", part(packers.gptq), GPTQ, {"only": ATTENTION}),
    "gptq fused": ("phi3", part(packers.gptq, desc_act=True), GPTQ | {"desc_act": True}, {}),
    "awq": ("qwen2", packers.awq, AWQ | {"modules_to_not_convert": ["down_proj"]}, {"only": ATTENTION}),
    "awq's own file": (
        "llama", packers.awq, {"w_bit": 4, "q_group_size": 16, "version": "GEMM"}, {"beside": "quant_config.json"}
    ),
    "hqq": ("llama", packers.hqq, HQQ, {}),
    "hqq 8 bits as floats": ("llama_bias", part(packers.hqq, bits=8, size=8, as_float=True), HQQ, {}),
    "compressed-tensors": ("llama", packers.compressed, COMPRESSED, {}),
    "compressed-tensors by activation": ("llama", part(packers.compressed, desc_act=True), COMPRESSED, {}),
    "compressed-tensors, columns of 8 bits": (
        "llama", part(packers.compressed, bits=8, size=-1, sym=True), COMPRESSED, {}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_stands_for_what_the_format_defines(name, saved, tmp_path):
    model, make, config, how = CASES[name]
    packed, dense = packers.write(saved(model), tmp_path, make, config, **how)
    got, want = hf.load(packed, "float32").params, dict(tree.paths(hf.load(dense, "float32").params, inside=False))
    found = 0
    for path, w in tree.paths(got, inside=False):
        q = getattr(w, "base", w)
        if not isinstance(q, IntGroups):
            jax.tree.map(np.testing.assert_array_equal, w, want[path])
            continue
        found += q.shape[0] if q.ndim == 3 else 1
        right = getattr(want[path], "base", want[path])
        np.testing.assert_allclose(jax.jit(verbs.dense)(q), right, rtol=1e-5, atol=1e-6, err_msg=path)
        assert (q.group is not None) == ("desc_act" in str(make) or ("smaller" in name and "down" in path)), path
        assert (q.zero is None) == ("symmetric" in name or "columns" in name)
    assert found == sum(key.endswith(("qweight", "W_q", "weight_packed")) for key in files.read(packed))


@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 2, 2)])
def test_on_a_mesh(shape, saved, tmp_path):
    """The same bytes, sharded along both axes of the matrix though its rows are of any group."""
    packed, _ = packers.write(saved("llama"), tmp_path, *CASES["gptq desc_act"][1:3])
    mesh = meshes.create(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    got, plain = (hf.load(packed, mesh=m).params for m in (mesh, None))
    jax.tree.map(np.testing.assert_array_equal, got, plain)
    gate = got["layers"]["mlp"]["gate"]
    assert gate.codes.addressable_shards[0].data.shape == (3, 16 // shape[1], 48 // shape[2])
    assert gate.scale.addressable_shards[0].data.shape == (3, 2, 48 // shape[2])


def test_lora_on_it_trains_and_moves_nothing_else(saved, tmp_path):
    packed, _ = packers.write(saved("llama"), tmp_path, *CASES["gptq desc_act"][1:3])
    model = jaxft.load(packed, dtype="float32")
    params = peft.adapt(model, jax.random.key(0), peft.LoRA(rank=4))
    trainable, frozen = jaxft.partition(params, jaxft.trainable_mask(params))
    tokens = np.random.default_rng(0).integers(3, 97, (4, 16))
    adam = optax.adam(1e-2)

    def loss(trainable, frozen):
        return -model.logprobs(jaxft.combine(trainable, frozen), tokens).mean()

    @jax.jit
    def step(trainable, state, frozen):
        value, grads = jax.value_and_grad(loss)(trainable, frozen)
        updates, state = adam.update(grads, state)
        return optax.apply_updates(trainable, updates), state, value

    state, losses, after = adam.init(trainable), [], trainable
    for _ in range(10):
        after, state, value = step(after, state, frozen)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.5
    assert {path.rpartition("/")[2] for path, _ in tree.arrays(after)} == {"a", "b"}
    trained = jaxft.combine(after, frozen)
    jax.tree.map(np.testing.assert_array_equal, tree.strip(trained), model.params)


def without(*parts):
    return lambda f: {name: array for name, array in f.items() if not name.endswith(tuple(parts))}


def changed(part, change):
    name = f"model.layers.1.self_attn.q_proj.{part}"
    return lambda f: f | {name: change(f[name])}


BROKEN = {
    "no scales": ("gptq", without("1.self_attn.q_proj.scales"), r"q_proj.*scales: missing; expected it beside"),
    "no zeros": ("awq", without("1.self_attn.q_proj.qzeros"), r"q_proj.*qzeros: missing"),
    "no codes": ("gptq", without("1.self_attn.q_proj.qweight"), r"no tensor .*q_proj.weight.*q_proj"),
    "cut codes": ("gptq", changed("qweight", lambda a: a[:-1]), r"q_proj.*got shape \[32, 24\]; expected \[32, 32\]"),
    "cut scales": ("gptq", changed("scales", lambda a: a[:, :-1]), r"scales: got shape \[2, 31\]; expected \[2, 32\]"),
    "a scale of nan": ("hqq", changed("scale", lambda a: a * np.nan), "scale: got numbers that are not finite"),
    "whole scales": ("gptq", changed("scales", lambda a: a.astype(np.int32)), "scales: got int32; expected floating"),
    "floating codes": ("gptq", changed("qweight", lambda a: a.astype(np.float32)), "got float32; expected int32"),
    "a group too many": ("gptq desc_act", changed("g_idx", lambda a: a + 1), "groups 1 to 2; expected 0 to 1"),
    "cut bytes": ("hqq", changed("W_q", lambda a: a[1:]), "W_q: got 496 bytes; expected 512"),
    "no axis": ("hqq", without("1.self_attn.q_proj.axis"), "axis: missing"),
    "groups of outputs": ("hqq", changed("axis", lambda a: a * 0), "axis: got 0, groups of output features"),
    "three bits": ("hqq", changed("nbits", lambda a: a - 1), "nbits: got 3; expected 4 or 8"),
    "packed shape": ("compressed-tensors", changed("weight_packed", lambda a: a[:, 1:]), r"weight_packed: got shape"),
    "other widths": (
        "compressed-tensors", changed("weight_shape", lambda a: a * 2), r"got shape \[64, 64\]; expected \[32, 32\]"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_checkpoint_is_refused(name, saved, tmp_path):
    case, change, message = BROKEN[name]
    _, make, config, _ = CASES[case]
    packed, _ = packers.write(saved("llama"), tmp_path, make, config, only=ATTENTION)
    files.write(packed, change(files.read(packed)))
    with pytest.raises(CheckpointError, match=message):
        hf.load(packed)


def test_layers_of_several_forms_are_refused(saved, tmp_path):
    packed, dense = packers.write(saved("llama"), tmp_path, packers.gptq, GPTQ, only=ATTENTION)
    name = "model.layers.1.self_attn.q_proj"
    plain = {f"{name}.weight": files.read(dense)[f"{name}.weight"]}
    files.write(packed, {n: a for n, a in files.read(packed).items() if name not in n} | plain)
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.q_proj.*got a plain weight; expected a packed one"):
        hf.load(packed)


REFUSED = {
    "quantised to 3 bits": GPTQ | {"bits": 3},
    "in the marlin format": GPTQ | {"checkpoint_format": "marlin"},
    "packed in int64": GPTQ | {"pack_dtype": "int64"},
    r"settings of their own for .*layers": GPTQ | {"dynamic": {r"+:layers\.0": {"bits": 8}, "-:lm_head": {}}},
    "AWQ quantised to 3 bits": AWQ | {"bits": 3},
    "in the gemv version": AWQ | {"version": "GEMV"},
    "without zero points": AWQ | {"zero_point": False},
    "HQQ by an old version": {"quant_method": "hqq"},
    "in the float-quantized format": COMPRESSED | {"format": "float-quantized"},
    "with a kv_cache_scheme": COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}},
    "to 8 bits of float": COMPRESSED | {"config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}}},
    "and activations": COMPRESSED
    | {"config_groups": {"g": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}}},
}


def test_what_is_not_understood_is_refused(copy):
    folder = copy("llama")
    for message, config in REFUSED.items():
        files.config(folder, quantization_config=config)
        with pytest.raises(CheckpointError, match=f"config.json.*{message}.*original checkpoint"):
            hf.load(folder)


def test_quantised_once_is_enough(saved, tmp_path):
    packed, _ = packers.write(saved("llama"), tmp_path, packers.awq, AWQ, only=ATTENTION)
    with pytest.raises(CheckpointError, match="quantised already"):
        hf.load(packed, quantize="int4")


WRITTEN = {
    "symmetric": (QuantConfig("int4", block_size=16), {"checkpoint_format": "gptq", "sym": True, "group_size": 16}),
    "zero points": (
        QuantConfig("int4", block_size=-1, symmetric=False),
        {"checkpoint_format": "gptq_v2", "sym": False, "group_size": -1},
    ),
    "8 bits": (QuantConfig("int8_blockwise", block_size=8, skip="down_proj"), {"bits": 8, "group_size": 8}),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_gptqs_format_and_is_read_again(name, saved, tmp_path):
    config, told = WRITTEN[name]
    model = hf.load(saved("llama_bias"), "float32", quantize=config)
    writer.save(model, tmp_path / "out", packed=True, shard="20KB")
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "out", "float32").params, model.params)
    found, raw = files.read(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["quantization_config"] | told == raw["quantization_config"]
    for path, module in (("attn/o", "self_attn.o_proj"), ("mlp/up", "mlp.up_proj")):
        right = tree.get(model.params["layers"], path).base.dense()[2]
        parts = {key: found[f"model.layers.2.{module}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
        np.testing.assert_allclose(defined(parts, raw["quantization_config"]), right, rtol=1e-5, atol=1e-6)


def defined(parts, config) -> np.ndarray:
    """The dequantised matrix [in, out], number by number."""
    bits, scales = config["bits"], parts["scales"].astype(np.float64)
    number = lambda word, i: int(np.uint32(word.view(np.uint32) >> np.uint32(bits * i))) % 2**bits  # noqa: E731
    per, out = 32 // bits, np.empty((len(parts["g_idx"]), scales.shape[1]))
    for i, j in np.ndindex(*out.shape):
        group = parts["g_idx"][i]
        zero = number(parts["qzeros"][group, j // per], j % per) + (config["checkpoint_format"] == "gptq")
        out[i, j] = (number(parts["qweight"][i // per, j], i % per) - zero) * scales[group, j]
    return out


def test_what_is_left_out_is_told(saved, tmp_path):
    """To GPTQModel and vLLM by a regex, to transformers by the modules that are quantised."""
    model = hf.load(saved("llama"), quantize=QuantConfig("int4", block_size=16, skip="down_proj"))
    writer.save(model, tmp_path / "out", packed=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (rule,) = config["dynamic"]
    assert config["dynamic"][rule] == {} and rule.startswith("-:")
    assert re.fullmatch(rule[2:], "model.layers.2.mlp.down_proj") and not re.match(
        rule[2:], "model.layers.2.mlp.up_proj"
    )
    assert ["self_attn.q_proj"] in config["modules_in_block_to_quantize"]
    assert ["mlp.down_proj"] not in config["modules_in_block_to_quantize"] and config["lm_head"] is False


def test_what_gptq_cannot_hold_is_not_written(saved, tmp_path):
    packed, _ = packers.write(saved("llama"), tmp_path, packers.hqq, HQQ)
    model = hf.load(packed)
    with pytest.raises(CheckpointError, match=r"float16 zero points.*expected whole zero points.*packed=False"):
        writer.save(model, tmp_path / "out", packed=True)
    writer.save(model, tmp_path / "out")
    np.testing.assert_array_equal(
        hf.load(tmp_path / "out").params["layers"]["mlp"]["up"], model.params["layers"]["mlp"]["up"].dense()
    )


@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_eight_bits_by_output_are_not_written_packed(method, saved, tmp_path):
    """Not even dense, unasked: no format holds them."""
    model = hf.load(saved("llama"), quantize=QuantConfig(method, skip="attn"))
    with pytest.raises(
        CheckpointError, match=rf"model.layers.0.mlp.gate_proj.weight: got EightBit\({method}.*packed=False"
    ):
        writer.save(model, tmp_path / "out", packed=True)
    assert not (tmp_path / "out").exists()
    writer.save(model, tmp_path / "out")
    np.testing.assert_array_equal(
        hf.load(tmp_path / "out").params["layers"]["mlp"]["up"], model.params["layers"]["mlp"]["up"].dense()
    )
