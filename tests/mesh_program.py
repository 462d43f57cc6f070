"""What tests/mesh_test.py runs in a process of its own: everything on meshes of 8 devices.

Arguments: a folder, and the meshes' shapes, such as `2x4`. Each check is done beside the same on
one device of the same process. Prints by mesh what was found as JSON: differences as numbers, else
as bools.
"""

import contextlib
import json
import re
import sys
from pathlib import Path

import jax
import keras
import keras_hub
import numpy as np
from tools import array, randomize_adapters, values

from keras_dcft import (
    AdapterBank,
    activate_dcft,
    dcft_disabled,
    enable_dcft,
    load_dcft_weights,
    merge_dcft,
    remove_dcft,
    save_dcft_weights,
    shard_adapters,
)
from keras_dcft.fingerprints import fingerprint
from keras_dcft.paths import dcft_layers

# Patterns about the base, which match variables of adapters as well, with layouts of other ranks.
HOSTILE = {".*(query|key|value).*dcft.*": (None, "model", "batch"), ".*ffw.*/dcft_[ab]": ("batch",)}
SIZES = {"hidden_dim": 32, "intermediate_dim": 64, "vocabulary_size": 64, "num_layers": 1}
HEADS = {"num_query_heads": 4, "num_key_value_heads": 4}
EXPERTS = {"num_experts": 4, "top_k": 2, "moe_intermediate_dim": 16}
MODELS = {
    "gemma": ("Gemma", {**HEADS, "head_dim": 8}),
    "llama": ("Llama", HEADS),
    "qwen": ("Qwen", HEADS),
    "qwen_moe": ("QwenMoe", {**HEADS, **EXPERTS, "shared_expert_intermediate_dim": 16}),
    "qwen3_moe": ("Qwen3Moe", {**HEADS, **EXPERTS, "head_dim": 8}),
}
# One of its layers has a single output.
KERNEL_SIZES = {"qwen_moe": {"shared_expert_gate_dense": 1, ".*": 4}}
# Each is trained and merged on one mesh, Gemma on two.
KINDS = {
    "8": ["gemma"],
    "2x4": ["gemma", "llama", "qwen3_moe"],
    "4x2": ["qwen", "qwen_moe"],
}
RNG = np.random.default_rng(0)
INPUTS = {
    "token_ids": RNG.integers(1, 64, (8, 6)),
    "padding_mask": np.ones((8, 6), "int32"),
}
TARGETS = RNG.integers(1, 64, (8, 6))


def make(kind):
    keras.utils.set_random_seed(0)
    name, arguments = MODELS[kind]
    backbone = getattr(keras_hub.models, f"{name}Backbone")(**{**SIZES, **arguments})
    return getattr(keras_hub.models, f"{name}CausalLM")(backbone)


def layout_map_of(kind, shape):
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"))
    backbone = getattr(keras_hub.models, f"{MODELS[kind][0]}Backbone")
    layout_map = backbone.get_layout_map(mesh)
    for pattern, axes in HOSTILE.items():
        layout_map[pattern] = axes
    return layout_map


def distribution_of(kind, shape):
    if len(shape) == 1:
        return keras.distribution.DataParallel()
    layout_map = layout_map_of(kind, shape)
    return keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")


def losses(model, steps=3):
    model.compile(
        optimizer=keras.optimizers.Adam(0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    fitted = model.fit(INPUTS, TARGETS, batch_size=8, epochs=steps, shuffle=False, verbose=0)
    return fitted.history["loss"]


def outputs(model):
    """In one piece and not by `predict`, which would compile something for each model."""
    return array(model(INPUTS))


def difference(ours, others):
    """The largest difference of tensors or lists of them, against the largest number."""
    pairs = list(zip(*map(jax.tree.leaves, (ours, others)), strict=True))
    largest = max(np.abs(b).max() for _, b in pairs)
    return float(max(np.abs(np.subtract(a, b)).max() for a, b in pairs) / largest)


def base_of(model):
    return [v for v in model.weights if "dcft" not in v.name]


def adapters_of(model):
    return [v for v in model.weights if "dcft" in v.name]


def lie_alike(variables, shardings):
    pairs = zip(variables, shardings, strict=True)
    return all(v.value.sharding.is_equivalent_to(s, len(v.shape)) for v, s in pairs)


def are_whole(variables):
    return all(
        v.value.sharding.is_fully_replicated and len(v.value.sharding.device_set) == 8
        for v in variables
    )


def sizes_in(function, *arguments):
    """The shapes of all tensors in what one device runs of a compiled function."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return {
        tuple(sorted(map(int, found.split(",")))) for found in re.findall(r"\[([\d,]+)\]", text)
    }


def forms_whole(layer):
    """Whether a device forms an increment of full size where the layer's increment is compiled."""
    adapter = layer.dcft_adapter

    def increment(*factors):
        return layer.dcft_increment_of(layer, factors, 1.0)

    factors = [v.value for v in adapter.variables.values()]
    found = sizes_in(increment, *factors)
    shape = tuple(sorted(layer.dcft_frozen_weight().shape))
    return shape in found or tuple(sorted(adapter.matrix_shape)) in found


class Held:
    """The most bytes on the first device at once, looked at whenever a variable gets a value."""

    def __enter__(self):
        self.original = keras.Variable.assign
        self.before, self.most = self.now(), 0

        def assign(variable, value):
            result = self.original(variable, value)
            self.most = max(self.most, self.now() - self.before)
            return result

        keras.Variable.assign = assign
        return self

    def __exit__(self, *error):
        keras.Variable.assign = self.original

    @staticmethod
    def now():
        first = jax.devices()[0]
        shards = [s.data for x in jax.live_arrays() for s in x.addressable_shards]
        return sum({id(s): s.nbytes for s in shards if s.devices() == {first}}.values())


def check_training(kind, distribution, seen):
    """Enabling inside and after the scope, training, increments, fingerprints, merging."""
    kernel_size = KERNEL_SIZES.get(kind, 4)
    one = enable_dcft(make(kind), kernel_size, rank=2)
    randomize_adapters(one)
    expected = losses(one)
    with distribution.scope():
        model = make(kind)
        base = base_of(model)
        buffers, shardings = [v.value for v in base], [v.value.sharding for v in base]
        enable_dcft(model, kernel_size, rank=2)
    seen["enabling moves no weight"] = all(v.value is b for v, b in zip(base, buffers))
    seen["adapters are whole everywhere"] = are_whole(adapters_of(model))
    with distribution.scope():
        randomize_adapters(model)
        found = losses(model)
    seen["losses"] = difference(found, expected)
    seen["losses move"] = len(set(expected)) == len(expected)
    seen["adapters"] = difference(values(adapters_of(model)), values(adapters_of(one)))
    seen["the base lies as before training"] = lie_alike(base, shardings)
    seen["adapters stay whole"] = are_whole(adapters_of(model))
    layers, in_one = dcft_layers(model), dcft_layers(one)
    increments = {path: layer.dcft_increment() for path, layer in layers.items()}
    is_sharded = {
        path: not layer.dcft_frozen_weight().value.sharding.is_fully_replicated
        for path, layer in layers.items()
    }
    seen["some weights are in parts"] = any(is_sharded.values())
    seen["increments lie as their weights"] = all(
        increments[path].sharding.is_equivalent_to(
            layer.dcft_frozen_weight().value.sharding, increments[path].ndim
        )
        for path, layer in layers.items()
        if is_sharded[path]
    )
    seen["increments"] = difference(
        list(map(array, increments.values())),
        [array(layer.dcft_increment()) for layer in in_one.values()],
    )
    # Of the layers that lie alike, one.
    ways = {
        (layer.dcft_frozen_weight().shape, str(layer.dcft_frozen_weight().value.sharding)): path
        for path, layer in layers.items()
    }
    if kind in ("gemma", "qwen3_moe"):  # einsum and dense layers, and experts
        cut = [path for path in ways.values() if is_sharded[path]]
        seen["no device forms an increment"] = not any(forms_whole(layers[path]) for path in cut)
        seen["one device alone does"] = all(forms_whole(in_one[path]) for path in ways.values())
    prints = [[fingerprint(layer) for layer in of_model.values()] for of_model in (layers, in_one)]
    seen["fingerprints"] = difference(*prints)
    return one, model, shardings


def check_merging(one, model, shardings, distribution, seen):
    expected = outputs(one)
    merge_dcft(one)
    with distribution.scope():
        adapted = outputs(model)
        merge_dcft(model)
        seen["merged outputs"] = difference(outputs(model), adapted)
    seen["outputs"] = difference(adapted, expected)
    seen["the merged base lies as the base"] = lie_alike(model.weights, shardings)
    seen["merged weights"] = difference(values(model.weights), values(one.weights))


def check_after_the_scope(distribution, seen):
    with distribution.scope():
        model = make("gemma")
    base = base_of(model)
    buffers = [v.value for v in base]
    enable_dcft(model, 4, rank=2, dropout=0.1)
    randomize_adapters(model)
    seen["enabling after the scope moves no weight"] = all(
        v.value is b for v, b in zip(base, buffers)
    )
    seen["and makes adapters whole everywhere"] = are_whole(adapters_of(model))
    remove_dcft(model)
    seen["removing moves none either"] = all(v.value is b for v, b in zip(base, buffers))


def check_trained_in_full(distribution, seen):
    """Sharded layers that are trained in full, with another adapter, and switched off."""
    found = []
    for scope in (contextlib.nullcontext(), distribution.scope()):
        with scope:
            model = make("gemma")
            named = {"trainable_layers": "ffw_linear$"}
            enable_dcft(model, 4, rank=2, **named)
            full = [v for v in model.trainable_variables if "dcft" not in v.name]
            shardings = [v.value.sharding for v in full]
            base = outputs(model)
            trained = losses(model)
            after = outputs(model)
            with dcft_disabled(model):
                off = outputs(model)
            enable_dcft(model, 8, name="other", **named)
            activate_dcft(model, "other")
            other = outputs(model)
            stay = lie_alike(full, shardings)
            whole = [v.value.sharding for v in adapters_of(model)]
            activate_dcft(model, "default")
            stay = stay and lie_alike(full, shardings)
            found.append([trained, after, off, other, outputs(model)])
    seen["trained in full, switched off, another adapter"] = difference(*reversed(found))
    *_, after, off, other, again = found[1]
    seen["switched off"] = difference(off, base)
    seen["the other begins as the base"] = difference(other, base)
    seen["the first comes back"] = difference(again, after)
    seen["what is trained in full lies as before"] = stay
    seen["another adapter is whole everywhere"] = all(s.is_fully_replicated for s in whole)
    seen["training shows"] = difference(after, base) > 1e-3


def check_files(folder, distribution, seen):
    """Written on the mesh and read on one device, and back."""
    keras.utils.set_random_seed(0)

    def adapted():
        model = enable_dcft(make("gemma"), 4, rank=2)
        randomize_adapters(model)
        return model

    on_mesh, on_one = distribution.scope, contextlib.nullcontext
    ways = {"mesh to one": (on_mesh, on_one), "one to mesh": (on_one, on_mesh)}
    for way, (writing, reading) in ways.items():
        path = folder / way.replace(" ", "_")
        path.mkdir()
        with writing():
            model = adapted()
            model.save(path / "model.keras")
            model.backbone.save_to_preset(str(path / "preset"))
            save_dcft_weights(model, path / "model.dcft.safetensors")
            expected = outputs(model)
            merge_dcft(model).save(path / "merged.keras")
        total = sum(v.value.nbytes for v in model.weights)
        with reading():
            plain = make("gemma")
            with Held() as held_by_adapter:
                load_dcft_weights(plain, path / "model.dcft.safetensors")
            with Held() as held:
                loaded = keras.saving.load_model(path / "model.keras")
            merged = keras.saving.load_model(path / "merged.keras")
            preset = keras_hub.models.Backbone.from_preset(str(path / "preset"))
            for name, found in {
                "adapter file": plain,
                "keras file": loaded,
                "preset": type(loaded).dcft_base_class(preset),
                "merged": merged,
            }.items():
                seen[f"{way}: {name}"] = difference(outputs(found), expected)
            if reading is on_mesh:
                lie = [v.value.sharding for v in base_of(plain)]
                seen[f"{way}: lies as made there"] = lie_alike(base_of(loaded), lie)
                seen[f"{way}: adapters are whole"] = are_whole(adapters_of(loaded))
                largest = max(v.value.nbytes for v in loaded.weights)
                own = sum(
                    s.data.nbytes
                    for v in loaded.variables
                    for s in v.value.addressable_shards
                    if s.device == jax.devices()[0]
                )
                seen[f"{way}: bytes"] = [held_by_adapter.most, held.most, own, largest, total]


def check_sharded_adapters(shape, folder, seen):
    layout_map = layout_map_of("gemma", shape)
    distribution = keras.distribution.ModelParallel(layout_map=layout_map)
    one = enable_dcft(make("gemma"), 4, rank=2)
    randomize_adapters(one)
    with distribution.scope():
        model = enable_dcft(make("gemma"), 4, rank=2)
        randomize_adapters(model)
        shard_adapters(layout_map, model)
        specs = {
            v.path: list(v.value.sharding.spec)
            for v in adapters_of(model)
            if not v.value.sharding.is_fully_replicated
        }
        found = losses(model)
        save_dcft_weights(model, folder / "sharded.dcft.safetensors")
        model.save(folder / "sharded.keras")
        again = keras.saving.load_model(folder / "sharded.keras")
        plain = load_dcft_weights(make("gemma"), folder / "sharded.dcft.safetensors")
        expected = outputs(model)
        layer = next(iter(dcft_layers(model).values()))
        seen["no device forms an increment of sharded factors"] = not forms_whole(layer)
        for name, of_file in {"keras file": again, "adapter file": plain}.items():
            seen[f"sharded, {name}"] = difference(outputs(of_file), expected)
            seen[f"sharded, {name} lies so"] = lie_alike(
                adapters_of(of_file), [v.value.sharding for v in adapters_of(model)]
            )
    seen["sharded losses"] = difference(found, losses(one))
    seen["sharded adapters"] = difference(values(adapters_of(model)), values(adapters_of(one)))
    seen["where A and B of query and output lie"] = [
        [specs.get(f"decoder_block_0/attention/{layer}/dcft_{factor}") for factor in "ab"]
        for layer in ("query", "attention_output")
    ]


def check_bank(distribution, folder, seen):
    found = []
    for scope in (contextlib.nullcontext(), distribution.scope()):
        with scope:
            model = make("gemma").backbone
            enable_dcft(model, 4, rank=2)
            randomize_adapters(model)
            path = folder / "bank.dcft.safetensors"
            save_dcft_weights(model, path)
            remove_dcft(model)
            with AdapterBank(model, {"mine": path}) as bank:
                found.append(bank.predict(INPUTS, adapters=["mine", None] * 4))
    seen["bank"] = difference(*reversed(found))


def check_generating(distribution, seen):
    found = []
    for scope in (contextlib.nullcontext(), distribution.scope()):
        with scope:
            model = enable_dcft(make("gemma"), 4, rank=2)
            randomize_adapters(model)
            prompts = {k: np.array(v) for k, v in INPUTS.items()}
            prompts["padding_mask"][:, 3:] = 0
            found.append(array(model.generate(prompts, stop_token_ids=None)["token_ids"]))
    seen["generated tokens are the same"] = bool(np.array_equal(*found))


def check(mesh, folder):
    shape, seen = tuple(map(int, mesh.split("x"))), {}
    for kind in KINDS[mesh]:
        distribution, of_kind = distribution_of(kind, shape), {}
        trained = check_training(kind, distribution, of_kind)
        check_merging(*trained, distribution, of_kind)
        seen.update({f"{kind}: {name}": value for name, value in of_kind.items()})
    distribution = distribution_of("gemma", shape)
    if mesh == "2x4":
        check_files(folder, distribution, seen)
        check_after_the_scope(distribution, seen)
        check_trained_in_full(distribution, seen)
        check_bank(distribution, folder, seen)
        check_generating(distribution, seen)
        check_sharded_adapters(shape, folder, seen)
    return seen


def main(folder, *meshes):
    seen = {}
    for mesh in meshes:
        path = Path(folder) / mesh
        path.mkdir()
        seen[mesh] = check(mesh, path)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
