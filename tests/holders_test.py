"""Whoever holds an adapted layer carries it: other roots, parts, the other order, pickles."""

import multiprocessing
import pickle

import keras
import keras_hub
import numpy as np
import pytest
from tools import (
    LABELS,
    MODELS,
    TEXTS,
    array,
    backbone_inputs,
    bert_backbone,
    bert_classifier,
    compile_task,
    differences,
    functional_around_backbone,
    predict,
    randomize_adapters,
    sequential,
    values,
    vectors,
)

from keras_dcft import (
    dcft_disabled,
    dcft_summary,
    enable_dcft,
    load_dcft_weights,
    merge_dcft,
    remove_dcft,
    save_dcft_weights,
)
from keras_dcft.layers.base import DCFTLayer
from keras_dcft.paths import dcft_layers


@keras.saving.register_keras_serializable("keras_dcft_tests")
class Block(keras.layers.Layer):
    """A user's block without a `build` of its own: its first call builds what is inside."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.attention = keras.layers.MultiHeadAttention(2, 4)
        self.inner = [keras.layers.Dense(width, activation="relu"), keras.layers.Dense(width)]
        self.norm = keras.layers.LayerNormalization()

    def call(self, inputs):
        outputs = self.attention(inputs, inputs)
        for layer in self.inner:
            outputs = layer(outputs)
        return self.norm(outputs)

    def get_config(self):
        return {**super().get_config(), "width": self.width}


@keras.saving.register_keras_serializable("keras_dcft_tests")
class Noted(keras.layers.Dense):
    """A user's layer with attributes of the names that an adapter's settings have."""

    def __init__(self, units, rank=7, alpha="mine", dropout="none", kernel_size="three", **kwargs):
        super().__init__(units, **kwargs)
        self.rank, self.alpha, self.dropout, self.kernel_size = rank, alpha, dropout, kernel_size
        self.scale = self.base_class = self.matrix_shape = self.adapter = "a user's"

    def get_config(self):
        own = {name: getattr(self, name) for name in ("rank", "alpha", "dropout", "kernel_size")}
        return {**super().get_config(), **own}


def sequences(batch=3):
    return np.random.default_rng(2).normal(size=(batch, 5, 12)).astype("float32")


def around_blocks():
    inputs = keras.Input((5, 12))
    encoder = keras_hub.layers.TransformerEncoder(20, 2, name="encoder")
    outputs = Block(8, name="block")(encoder(inputs))
    model = keras.Model(inputs, Noted(6, name="noted")(outputs))
    model.compile("adam", "mse")
    return model


def around_attention():
    inputs = keras.Input((5, 12))
    attention = keras.layers.MultiHeadAttention(2, 4, name="attention")
    model = keras.Model(inputs, keras.layers.Dense(6)(attention(inputs, inputs)))
    model.compile("adam", "mse")
    return model


def head_on(model):
    output = model.output["pooled_output"] if isinstance(model.output, dict) else model.output
    return keras.Model(model.input, keras.layers.Dense(2, name="new_head")(output))


def extractor(name):
    return lambda model: keras.Model(model.input, model.get_layer(name).output)


def embeddings_inputs():
    return {name: backbone_inputs()[name] for name in ("token_ids", "segment_ids")}


def embeddings(model):
    # Without the mask, which they do not use: Keras 3.13 loads no plain model with such an input.
    inputs = {name: model.input[name] for name in embeddings_inputs()}
    return keras.Model(inputs, model.get_layer("embeddings_layer_norm").output)


def inner_backbone(model):
    return next(x for x in model.layers if isinstance(x, keras_hub.models.Backbone))


# Another root of an adapted model: how to make the adapted one, the root, and inputs.
ROOTS = {
    "new head": (bert_backbone, head_on, backbone_inputs),
    "encoder layer": (bert_backbone, extractor("transformer_layer_0"), backbone_inputs),
    "embeddings": (bert_backbone, embeddings, embeddings_inputs),
    "backbone of a larger model": (functional_around_backbone, inner_backbone, backbone_inputs),
    "backbone of a task": (bert_classifier, lambda task: task.backbone, backbone_inputs),
    "through an encoder": (around_blocks, extractor("encoder"), sequences),
    "through an attention": (around_attention, extractor("attention"), sequences),
    "cloned backbone": (bert_backbone, lambda backbone: backbone, backbone_inputs),
    "through a block": (around_blocks, extractor("block"), sequences),
    "head on blocks": (around_blocks, head_on, sequences),
    "sequential": (sequential, lambda model: keras.Sequential(model.layers[:2]), vectors),
}


def root_of(kind):
    make, root, inputs = ROOTS[kind]
    model = enable_dcft(make(), kernel_size=4)
    randomize_adapters(model)
    return model, root(model), inputs()


def shared(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, DCFTLayer)]


@pytest.mark.parametrize("kind", ROOTS)
def test_another_root_comes_back_from_files_clones_and_pickles(kind, tmp_path):
    _, root, inputs = root_of(kind)
    expected = predict(root, inputs)
    root.save(tmp_path / "m.keras")
    restored = [keras.saving.load_model(tmp_path / "m.keras"), pickle.loads(pickle.dumps(root))]
    clone = keras.models.clone_model(root)
    assert list(dcft_layers(clone)) == list(dcft_layers(root))
    clone.set_weights(root.get_weights())
    for how, model in zip(("file", "pickle", "clone"), (*restored, clone)):
        np.testing.assert_array_equal(predict(model, inputs), expected, err_msg=how)
        assert list(dcft_layers(model)) == list(dcft_layers(root))
        names = [v.path.split("/")[-1] for v in root.trainable_variables]
        for _ in range(2):
            assert [v.path.split("/")[-1] for v in model.trainable_variables] == names
            model.trainable = False
            model.trainable = True


@pytest.mark.parametrize("kind", [kind for kind in ROOTS if kind != "embeddings"])
def test_the_verbs_work_on_another_root(kind, tmp_path):
    model, root, inputs = root_of(kind)
    path = tmp_path / "a.dcft.safetensors"
    expected = predict(root, inputs)
    save_dcft_weights(root, path)
    with dcft_disabled(root):
        base = predict(root, inputs)
    assert np.abs(base - expected).max() > 0
    randomize_adapters(root, seed=5)
    load_dcft_weights(root, path)
    np.testing.assert_array_equal(predict(root, inputs), expected)
    lines = []
    dcft_summary(root, print_fn=lines.append)
    assert f"{len(dcft_layers(root))} layer" in lines[0]
    merge_dcft(root)
    assert not shared(root)
    np.testing.assert_allclose(predict(root, inputs), expected, rtol=1e-4, atol=1e-5)
    if not shared(model):
        remove_left_nothing(model)


def remove_left_nothing(model):
    for layer in model._flatten_layers():
        assert not any("dcft" in name for name in vars(layer)), layer
        assert "dcft" not in type(layer).__name__.lower()
        assert layer.trainable
    assert not [v for v in model.weights if hasattr(type(v), "dcft") or "dcft" in v.name]


@pytest.mark.parametrize("kind", ["new head", "encoder layer", "head on blocks"])
def test_a_plain_root_takes_the_file_of_an_adapted_one(kind, tmp_path):
    make, root, inputs = ROOTS[kind]
    model = make()
    plain = root(model)
    weights = plain.get_weights()
    enable_dcft(model, kernel_size=4)
    randomize_adapters(model)
    path = tmp_path / "a.dcft.safetensors"
    save_dcft_weights(plain, path)
    expected = predict(plain, inputs())
    remove_dcft(plain)
    other = root(make())
    other.set_weights(weights)
    trainable = [v.name for v in other.trainable_variables]
    load_dcft_weights(other, path)
    np.testing.assert_array_equal(predict(other, inputs()), expected)
    remove_dcft(other)
    assert [v.name for v in other.trainable_variables] == trainable
    assert differences(weights, other.get_weights()) == [0] * len(weights)


def test_what_was_frozen_before_is_frozen_after_a_root_was_loaded_and_merged(tmp_path):
    model = around_blocks()
    model.get_layer("encoder").trainable = False
    model.get_layer("noted").bias.trainable = False
    expected = [v.name for v in model.trainable_variables]
    enable_dcft(model, kernel_size=4)
    root = keras.Model(model.input, model.output)
    root.save(tmp_path / "m.keras")
    restored = keras.saving.load_model(tmp_path / "m.keras")
    assert len(restored.trainable_variables) == len(root.trainable_variables)
    for merged in (restored, root):
        assert [v.name for v in merge_dcft(merged).trainable_variables] == expected


@keras.saving.register_keras_serializable("keras_dcft_tests")
class Pair(keras.Model):
    """A model of several parts, as a GAN or two towers, that holds them as attributes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.left, self.right = sequential(), sequential()

    def call(self, inputs):
        return self.left(inputs) + self.right(inputs)

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@pytest.mark.parametrize("parts", [("left",), ("left", "right")])
def test_several_parts_below_a_model_of_no_class_of_ours(parts, tmp_path):
    model = Pair()
    base = predict(model, vectors())
    for size, part in enumerate(parts, start=3):
        enable_dcft(getattr(model, part), kernel_size=size, rank=size)
    randomize_adapters(model)
    expected = predict(model, vectors())
    model.save(tmp_path / "m.keras")
    restored = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(predict(restored, vectors()), expected)
    save_dcft_weights(model, tmp_path / "a.dcft.safetensors")
    with dcft_disabled(model):
        np.testing.assert_allclose(predict(model, vectors()), base, rtol=1e-6)
    remove_dcft(model)
    np.testing.assert_array_equal(predict(model, vectors()), base)
    assert len(model.trainable_variables) == 12
    load_dcft_weights(model, tmp_path / "a.dcft.safetensors")
    np.testing.assert_array_equal(predict(model, vectors()), expected)
    assert len(dcft_layers(model)) == 2 * len(parts)


def test_a_task_put_around_an_adapted_backbone(tmp_path):
    backbone = enable_dcft(bert_backbone(), kernel_size=4)
    randomize_adapters(backbone)
    example = bert_classifier()
    task = keras_hub.models.BertTextClassifier(
        backbone=backbone, num_classes=2, preprocessor=example.preprocessor, dropout=0.0
    )
    task.fit(TEXTS, LABELS, verbose=0)
    expected = predict(task, TEXTS)
    preset = str(tmp_path / "preset")
    task.save_to_preset(preset)
    for cls in (keras_hub.models.BertTextClassifier, keras_hub.models.TextClassifier):
        restored = cls.from_preset(preset)
        np.testing.assert_array_equal(predict(restored, TEXTS), expected)
        names = [v.name for v in restored.trainable_variables]
        assert names == [v.name for v in task.trainable_variables]
    task.save(tmp_path / "m.keras")
    restored = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(predict(restored, TEXTS), expected)
    assert predict(
        keras_hub.models.TextClassifier.from_preset(preset, num_classes=3), TEXTS
    ).shape == (len(TEXTS), 3)


@keras.saving.register_keras_serializable("keras_dcft_tests")
class OwnClassifier(keras_hub.models.BertTextClassifier):
    """A user's own task."""


def test_a_users_own_task_comes_back(tmp_path):
    task = bert_classifier()
    own = OwnClassifier(
        backbone=task.backbone, num_classes=2, preprocessor=task.preprocessor, dropout=0.0
    )
    base = predict(own, TEXTS)
    enable_dcft(own, kernel_size=4)
    own.fit(TEXTS, LABELS, verbose=0)
    expected = predict(own, TEXTS)
    own.save(tmp_path / "m.keras")
    restored = keras.saving.load_model(tmp_path / "m.keras")
    assert isinstance(restored, OwnClassifier)
    np.testing.assert_array_equal(predict(restored, TEXTS), expected)
    for removed in (remove_dcft(restored), remove_dcft(own)):
        assert type(removed) is OwnClassifier
        np.testing.assert_array_equal(predict(removed, TEXTS), base)


def test_a_backbone_of_a_larger_adapted_model_gives_a_preset(tmp_path):
    _, backbone, inputs = root_of("backbone of a larger model")
    expected = predict(backbone, inputs)
    backbone.save_to_preset(str(tmp_path / "preset"))
    restored = keras_hub.models.Backbone.from_preset(str(tmp_path / "preset"))
    np.testing.assert_array_equal(predict(restored, inputs), expected)
    assert list(dcft_layers(restored)) == list(dcft_layers(backbone))


@pytest.mark.parametrize("kind", ["task", "backbone", "functional_around_backbone"])
def test_lora_is_refused_before_anything_is_frozen(kind):
    model = enable_dcft(MODELS[kind][0](), kernel_size=4)
    backbone = next(x for x in model._flatten_layers() if isinstance(x, keras_hub.models.Backbone))
    before = [(v.path, v.trainable) for v in model.variables]
    with pytest.raises(ValueError, match="cannot have LoRA as well"):
        backbone.enable_lora(4)
    assert [(v.path, v.trainable) for v in model.variables] == before


@pytest.mark.parametrize("kind", MODELS)
def test_models_and_their_layers_are_pickled(kind):
    model, inputs = enable_dcft(MODELS[kind][0](), kernel_size=4), MODELS[kind][1]()
    randomize_adapters(model)
    restored, cls = pickle.loads(pickle.dumps((model, type(model))))
    assert cls is type(restored) is type(model)
    np.testing.assert_array_equal(predict(restored, inputs), predict(model, inputs))
    if kind in ("task", "backbone"):
        return
    for layer in model.layers:
        same = pickle.loads(pickle.dumps(layer))
        assert type(same) is type(layer)
        assert differences(values(layer.weights), values(same.weights)) == [0] * len(layer.weights)


def _predict_in_a_child(model, inputs, queue):
    queue.put((type(model).__name__, predict(model, inputs)))


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="one backend's processes suffice")
def test_models_go_to_other_processes(tmp_path):
    model = enable_dcft(sequential(), kernel_size=4)
    randomize_adapters(model)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_predict_in_a_child, args=(model, vectors(), queue))
    child.start()
    name, found = queue.get(timeout=300)
    child.join()
    assert name == "DCFTSequential"
    np.testing.assert_allclose(found, predict(model, vectors()), rtol=1e-6)


def test_attributes_of_a_users_layer_are_its_own(tmp_path):
    model = around_blocks()
    layer = model.get_layer("noted")
    before, config = dict(vars(layer)), layer.get_config()
    base = predict(model, sequences())
    enable_dcft(model, kernel_size=4, rank=2, dropout=0.1)
    randomize_adapters(model)
    own = ("rank", "alpha", "dropout", "kernel_size", "scale", "base_class", "matrix_shape")
    assert [getattr(layer, name) for name in own] == [before[name] for name in own]
    model.save(tmp_path / "m.keras")
    restored = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(predict(restored, sequences()), predict(model, sequences()))
    same = pickle.loads(pickle.dumps(layer))
    for found in (layer, restored.get_layer("noted"), same):
        plain = found.get_config()["model"]["config"]
        assert {name: plain[name] for name in own[:3]} == {name: config[name] for name in own[:3]}
    for removed in (remove_dcft(restored), remove_dcft(model)):
        np.testing.assert_array_equal(predict(removed, sequences()), base)
        found = removed.get_layer("noted")
        assert type(found) is Noted
        assert found.get_config() == config
        assert not any("dcft" in name for name in vars(found))


def test_a_compiled_task_around_it_survives_merging_its_backbone():
    task = bert_classifier()
    compile_task(task)
    enable_dcft(task.backbone, kernel_size=4)
    randomize_adapters(task)
    expected = predict(task, TEXTS)
    merge_dcft(task.backbone)
    assert type(task) is keras_hub.models.BertTextClassifier
    np.testing.assert_allclose(predict(task, TEXTS), expected, rtol=1e-4, atol=1e-5)
    before = array(task.backbone.get_layer("pooled_dense").kernel)
    task.fit(TEXTS, LABELS, verbose=0)
    assert np.abs(array(task.backbone.get_layer("pooled_dense").kernel) - before).max() > 0


def with_one_dropout():
    inputs = keras.Input((12,))
    dropped = keras.layers.Dropout(0.5)(inputs)
    return [keras.Model(inputs, keras.layers.Dense(9)(dropped)) for _ in range(2)]


def with_one_preprocessor():
    tasks = [bert_classifier() for _ in range(2)]
    tasks[1].preprocessor = tasks[0].preprocessor
    return tasks


@pytest.mark.parametrize(
    ("make", "inputs"),
    [(with_one_dropout, vectors()), (with_one_preprocessor, TEXTS[:4])],
    ids=["dropout", "preprocessor"],
)
def test_models_that_share_no_weights_have_nothing_to_do_with_each_other(make, inputs, tmp_path):
    first, second = make()
    base = predict(second, inputs)
    enable_dcft(first, kernel_size=4)
    assert not hasattr(second, "dcft_config")
    np.testing.assert_array_equal(predict(second, inputs), base)
    enable_dcft(second, kernel_size=2, name="legal")
    randomize_adapters(second)
    assert list(first.dcft_adapters) == ["default"]
    assert list(second.dcft_adapters) == ["legal"]
    expected = predict(second, inputs)
    save_dcft_weights(second, tmp_path / "a.dcft.safetensors")
    second.save(tmp_path / "a.keras")
    remove_dcft(first)
    np.testing.assert_array_equal(predict(second, inputs), expected)
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    np.testing.assert_array_equal(predict(loaded, inputs), expected)
    assert list(loaded.dcft_adapters) == ["legal"]
    remove_dcft(second)
    np.testing.assert_array_equal(predict(second, inputs), base)
    load_dcft_weights(second, tmp_path / "a.dcft.safetensors")
    np.testing.assert_array_equal(predict(second, inputs), expected)
