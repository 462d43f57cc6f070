import json
import zipfile

import keras
import keras_hub
import numpy as np
import pytest
from tools import (
    LABELS,
    MODELS,
    TEXTS,
    Subclassed,
    array,
    bert_backbone,
    bert_classifier,
    differences,
    predict,
    randomize_adapters,
    values,
)

import keras_dcft
from keras_dcft import enable_dcft
from keras_dcft.models import DCFTModel, carrying_class


def adapted(kind):
    model = MODELS[kind][0]()
    enable_dcft(model, kernel_size=4, rank=2)
    randomize_adapters(model)
    return model


def assert_same_model(restored, model, inputs):
    assert type(restored) is type(model)
    assert restored.dcft_config == model.dcft_config
    np.testing.assert_array_equal(predict(restored, inputs), predict(model, inputs))
    for group in ("trainable_variables", "non_trainable_variables"):
        before, after = getattr(model, group), getattr(restored, group)
        assert [v.name for v in before] == [v.name for v in after]
        weights = [(a, b) for a, b in zip(before, after) if "seed" not in a.path]
        assert all(d == 0 for d in differences(*map(values, zip(*weights))))


@pytest.mark.parametrize("kind", MODELS)
def test_keras_file_brings_everything_back(kind, tmp_path):
    model, inputs = adapted(kind), MODELS[kind][1]()
    model.save(tmp_path / "m.keras")
    restored = keras.saving.load_model(tmp_path / "m.keras")
    assert_same_model(restored, model, inputs)
    trained = restored.trainable_variables
    frozen = [v for v in restored.weights if not any(v is t for t in trained)]
    before, before_frozen = values(trained), values(frozen)
    if kind == "task":
        restored.fit(TEXTS, LABELS, epochs=2, verbose=0)
    elif kind != "backbone":
        restored.fit(inputs, np.ones(predict(model, inputs).shape), epochs=2, verbose=0)
    else:
        return
    assert all(d > 0 for d in differences(before, values(trained)))
    assert all(d == 0 for d in differences(before_frozen, values(frozen)))


@pytest.mark.parametrize("kind", MODELS)
def test_saving_twice_gives_the_same_model(kind, tmp_path):
    model, inputs = adapted(kind), MODELS[kind][1]()
    for name in ("first.keras", "second.keras"):
        model.save(tmp_path / name)
        restored = keras.saving.load_model(tmp_path / name)
        assert_same_model(restored, model, inputs)
        model = restored


@pytest.mark.parametrize("kind", MODELS)
def test_keras_file_holds_no_code(kind, tmp_path):
    adapted(kind).save(tmp_path / "m.keras")
    config = json.loads(zipfile.ZipFile(tmp_path / "m.keras").read("config.json"))
    assert "__lambda__" not in json.dumps(config)
    assert config["registered_name"].startswith("keras_dcft>")


def test_a_functional_model_holding_an_adapted_backbone_comes_back(tmp_path):
    backbone = adapted("backbone")
    outputs = keras.layers.Dense(3)(backbone(backbone.input)["pooled_output"])
    model = keras.Model(backbone.input, outputs)
    model.compile("adam", "mse")
    inputs = MODELS["backbone"][1]()
    model.save(tmp_path / "m.keras")
    restored = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(predict(restored, inputs), predict(model, inputs))
    assert [v.path for v in restored.trainable_variables] == [
        v.path for v in model.trainable_variables
    ]
    assert any(type(x).__name__ == "DCFTBertBackbone" for x in restored.layers)


def test_directly_built_layers_come_back(tmp_path, rng):
    inputs = keras.Input((5, 12))
    x = keras_dcft.DCFTDense(16, activation="relu", dropout=0.1)(inputs)
    x = keras_dcft.DCFTEinsumDense("abc,cde->abde", (None, 2, 8), kernel_size=4)(x)
    model = keras.Model(inputs, x)
    randomize_adapters(model)
    data = rng.normal(size=(3, 5, 12)).astype("float32")
    model.save(tmp_path / "m.keras")
    restored = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(predict(restored, data), predict(model, data))
    assert len(restored.trainable_variables) == 6


@pytest.mark.parametrize("kind", MODELS)
def test_weights_files_round_trip(kind, tmp_path):
    model, inputs = adapted(kind), MODELS[kind][1]()
    expected = predict(model, inputs)
    model.save_weights(tmp_path / "m.weights.h5")
    randomize_adapters(model, seed=7)
    assert np.abs(predict(model, inputs) - expected).max() > 0
    model.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(predict(model, inputs), expected)


def test_what_is_saved_as_the_kernel_is_the_base_kernel(tmp_path):
    model = adapted("sequential")
    layer = model.layers[0]
    assert np.abs(array(layer.kernel) - array(layer._kernel)).max() > 0
    store = {}
    layer.save_own_variables(store)
    np.testing.assert_array_equal(array(store["0"]), array(layer._kernel))
    assert set(store) == {"0", "1", "dcft_a", "dcft_b", "dcft_filter"}


def test_a_base_checkpoint_leaves_the_adapter_as_it_is():
    layer = adapted("sequential").layers[0]
    adapter = values([layer.dcft_a, layer.dcft_b, layer.dcft_filter])
    layer.load_own_variables({"0": np.ones((12, 20)), "1": np.ones(20)})
    assert np.all(array(layer._kernel) == 1)
    assert differences(adapter, values([layer.dcft_a, layer.dcft_b, layer.dcft_filter])) == [0] * 3


def test_an_adapted_checkpoint_does_not_load_into_a_plain_layer():
    layer = adapted("sequential").layers[0]
    store = {}
    layer.save_own_variables(store)
    plain = keras.layers.Dense(20)
    plain.build((None, 12))
    with pytest.raises(ValueError, match="expected 2 variables"):
        plain.load_own_variables(store)


def test_presets_bring_live_adapters_back(tmp_path):
    model = bert_classifier()
    enable_dcft(model, kernel_size=4)
    model.fit(TEXTS, LABELS, epochs=1, verbose=0)
    randomize_adapters(model)
    preset = str(tmp_path / "preset")
    model.save_to_preset(preset)
    for cls in (keras_hub.models.BertTextClassifier, keras_hub.models.TextClassifier):
        restored = cls.from_preset(preset)
        assert_same_model(restored, model, TEXTS)
        assert isinstance(restored, keras_hub.models.BertTextClassifier)
    inputs = model.preprocessor(TEXTS)
    for cls in (keras_hub.models.BertBackbone, keras_hub.models.Backbone):
        backbone = cls.from_preset(preset)
        assert type(backbone) is type(model.backbone)
        assert_same_model(backbone, model.backbone, inputs)


def test_preset_loads_in_another_dtype_and_with_a_new_head(tmp_path):
    model = bert_classifier()
    enable_dcft(model, kernel_size=4)
    randomize_adapters(model)
    preset = str(tmp_path / "preset")
    model.save_to_preset(preset)
    low = keras_hub.models.Backbone.from_preset(preset, dtype="bfloat16")
    layer = low.get_layer("pooled_dense")
    assert (layer._kernel.dtype, layer.dcft_a.dtype) == ("bfloat16", "float32")
    other = keras_hub.models.TextClassifier.from_preset(preset, num_classes=5)
    assert predict(other, TEXTS).shape == (len(TEXTS), 5)
    np.testing.assert_array_equal(
        array(other.backbone.get_layer("pooled_dense").dcft_a),
        array(model.backbone.get_layer("pooled_dense").dcft_a),
    )


def test_backbone_preset_gives_a_task(tmp_path):
    backbone = bert_backbone()
    enable_dcft(backbone, kernel_size=4)
    randomize_adapters(backbone)
    preset = str(tmp_path / "preset")
    backbone.save_to_preset(preset)
    task = keras_hub.models.BertTextClassifier.from_preset(preset, num_classes=3, preprocessor=None)
    assert task.dcft_config == backbone.dcft_config
    assert "pooled_dense/dcft_a" in [v.path for v in task.trainable_variables]
    inputs = MODELS["backbone"][1]()
    np.testing.assert_array_equal(predict(task.backbone, inputs), predict(backbone, inputs))


def test_every_keras_hub_backbone_and_task_has_a_class():
    def subclasses(cls):
        for subclass in cls.__subclasses__():
            yield subclass
            yield from subclasses(subclass)

    # Some that are not exported are imported later, if at all, and are then made when met.
    exported = set(filter(callable, vars(keras_hub.models).values()))
    plain = [
        cls
        for base in (keras_hub.models.Backbone, keras_hub.models.Task)
        for cls in subclasses(base)
        if cls in exported
    ]
    assert len(plain) > 100
    for cls in plain:
        if issubclass(cls, keras_hub.models.Task) and cls.backbone_cls is None:
            continue
        made = carrying_class(cls, is_part=True)
        assert issubclass(made, cls)
        assert keras.saving.get_registered_object(f"keras_dcft>DCFT{cls.__name__}") is made
        if issubclass(cls, keras_hub.models.Task):
            assert made.backbone_cls is carrying_class(cls.backbone_cls, is_part=True)
            assert hasattr(made, "generate") == hasattr(cls, "generate")


def test_one_made_class_per_class_and_all_saved_under_one_name():
    made = carrying_class(Subclassed, is_part=True)
    assert made is carrying_class(Subclassed, is_part=True)
    assert issubclass(made, Subclassed)
    assert keras.saving.get_registered_name(made) == "keras_dcft>DCFTModel"
    assert issubclass(keras.saving.get_registered_object("keras_dcft>DCFTModel"), keras.Model)
    assert keras.saving.get_registered_name(DCFTModel) == "keras_dcft>DCFTModel"


def test_reading_the_config_leaves_the_model_as_it_was():
    model = adapted("functional_around_backbone")
    before = [(type(layer), layer.trainable) for layer in model._flatten_layers()]
    config = model.get_config()
    assert [(type(layer), layer.trainable) for layer in model._flatten_layers()] == before
    assert config["model"]["class_name"] == "Functional"


def test_a_config_for_another_architecture_is_refused():
    config = adapted("backbone").get_config()
    config["num_layers"] = 1
    with pytest.raises(ValueError, match=r"does not have: .*transformer_layer_1"):
        carrying_class(keras_hub.models.BertBackbone, is_part=True).from_config(config)


@pytest.mark.real
def test_real_minilm_trains_and_comes_back_from_a_preset(tmp_path):
    from support.methods import default_preset

    model = keras_hub.models.BertTextClassifier.from_preset(str(default_preset()), num_classes=2)
    model.preprocessor.sequence_length = 16
    texts = ["a gripping, beautiful film", "a dull and lifeless mess"] * 8
    before = predict(model, texts)
    enable_dcft(model)
    assert np.abs(predict(model, texts) - before).max() < 1e-6
    adapters = [v for v in model.trainable_variables if v.name.startswith("dcft_")]
    assert sum(int(np.prod(v.shape)) for v in adapters) == 7648
    model.optimizer.learning_rate = 5e-3
    frozen = [v for v in model.backbone.weights if not v.trainable]
    before_frozen = values(frozen)
    losses = model.fit(texts, LABELS, batch_size=8, epochs=6, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert all(d == 0 for d in differences(before_frozen, values(frozen)))
    model.save_to_preset(str(tmp_path / "preset"))
    restored = keras_hub.models.TextClassifier.from_preset(str(tmp_path / "preset"))
    assert_same_model(restored, model, texts)
