import keras
import numpy as np
import pytest
from tools import (
    LABELS,
    MODELS,
    TEXTS,
    array,
    bert_backbone,
    bert_classifier,
    differences,
    functional_around_backbone,
    predict,
    randomize_adapters,
    sequential,
    values,
    vectors,
)

from keras_dcft import PAPER_RECIPES, DCFTDense, DCFTEinsumDense, enable_dcft, remove_dcft
from keras_dcft.adapter import ADAPTER_VARIABLES
from keras_dcft.layers.base import DCFTLayer
from keras_dcft.paths import walk

# Keras runs TensorFlow graphs through an optimizer that fuses a product with its bias and
# activation, which rounds otherwise than the separate operations; everything else is exact.
SAME = 1e-6 if keras.backend.backend() == "tensorflow" else 0.0


def adapted_layers(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, DCFTLayer)]


def targets_for(model, inputs, seed=3):
    return np.random.default_rng(seed).normal(size=predict(model, inputs).shape)


@pytest.mark.compiled
@pytest.mark.parametrize("kind", MODELS)
def test_start_is_the_base_model(kind):
    make, inputs = MODELS[kind]
    model, inputs = make(), inputs()
    before = predict(model, inputs)
    assert enable_dcft(model, kernel_size=4) is model
    assert np.abs(predict(model, inputs) - before).max() <= SAME
    randomize_adapters(model)
    assert np.abs(predict(model, inputs) - before).max() > 1e-3


def test_start_is_the_base_model_bit_for_bit_outside_of_compiled_graphs():
    model = bert_classifier()
    inputs = model.preprocessor(TEXTS)
    before = array(model(inputs))
    enable_dcft(model, kernel_size=4)
    np.testing.assert_array_equal(array(model(inputs)), before)


@pytest.mark.parametrize("kind", MODELS)
def test_layers_are_reclassed_in_place(kind):
    model = MODELS[kind][0]()
    layers = walk(model)
    weights = {w.path: w for w in model.weights}
    cls = type(model)
    enable_dcft(model, kernel_size=4)
    assert list(walk(model)) == list(layers)
    assert all(walk(model)[path] is layer for path, layer in layers.items())
    assert {type(layer) for layer in adapted_layers(model)} <= {DCFTDense, DCFTEinsumDense}
    assert isinstance(model, cls)
    assert type(model).__name__ == f"DCFT{cls.__name__}"
    assert len(adapted_layers(model)) == len(model.dcft_config["layers"])
    after = {w.path: w for w in model.weights}
    assert len(after) == len(weights) + 3 * len(adapted_layers(model))
    assert all(after[path] is weight for path, weight in weights.items())


def test_adapter_paths_are_unique_and_no_layout_pattern_matches_them():
    model = bert_backbone()
    enable_dcft(model, kernel_size=4)
    paths = [v.path for v in model.trainable_variables]
    assert len(set(paths)) == 3 * 13
    assert "transformer_layer_0/self_attention_layer/query/dcft_a" in paths
    assert not any("kernel" in path or "embeddings" in path for path in paths)


def test_config_is_plain_data():
    model = bert_classifier()
    enable_dcft(model, kernel_size=4, rank=2, dropout=0.1, orthogonality=0.1)
    config = model.dcft_config
    assert {k: config[k] for k in ("rank", "alpha", "dropout", "orthogonality")} == {
        "rank": 2,
        "alpha": 16.0,
        "dropout": 0.1,
        "orthogonality": 0.1,
    }
    assert config == model.backbone.dcft_config
    config["layers"].clear()
    assert model.dcft_config["layers"]


@pytest.mark.parametrize("kind", MODELS)
def test_one_fit_changes_adapters_and_head_and_nothing_else(kind):
    make, inputs = MODELS[kind]
    model, inputs = make(), inputs()
    enable_dcft(model, kernel_size=4)
    randomize_adapters(model)
    trained = model.trainable_variables
    frozen = [v for v in model.weights if not any(v is t for t in trained)]
    before_trained, before_frozen = values(trained), values(frozen)
    if kind == "task":
        model.fit(TEXTS, LABELS, batch_size=4, epochs=2, verbose=0)
    elif kind == "backbone":
        outputs = {k: np.array(v) for k, v in model.predict(inputs, verbose=0).items()}
        model.compile("adam", "mse")
        rng = np.random.default_rng(0)
        targets = {k: rng.normal(size=v.shape) for k, v in outputs.items()}
        model.fit(inputs, targets, epochs=2, verbose=0)
    else:
        model.fit(inputs, targets_for(model, inputs), epochs=2, verbose=0)
    assert all(d > 0 for d in differences(before_trained, values(trained)))
    assert all(d == 0 for d in differences(before_frozen, values(frozen)))
    names = {v.name for v in trained if v.path.split("/")[0] != "logits"}
    assert names == set(ADAPTER_VARIABLES)


def test_the_head_of_a_task_is_trained_even_if_it_was_frozen():
    model = bert_classifier()
    model.trainable = False
    enable_dcft(model, kernel_size=4)
    heads = [v.path for v in model.trainable_variables if "dcft" not in v.name]
    assert heads == ["logits/kernel", "logits/bias"]


def test_trainable_layers_are_trained_in_full():
    model = bert_backbone()
    enable_dcft(model, kernel_size=4, trainable_layers=["pooled_dense", "layer_norm"])
    paths = [v.path for v in model.trainable_variables if "dcft" not in v.name]
    assert "pooled_dense/kernel" in paths
    assert all("layer_norm" in path or "pooled_dense" in path for path in paths)
    assert not isinstance(model.get_layer("pooled_dense"), DCFTLayer)


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_thaws_however_trainable_is_toggled(kind):
    model = MODELS[kind][0]()
    enable_dcft(model, kernel_size=4)
    expected = {v.path for v in model.trainable_variables}
    for target in [model, *model._flatten_layers(include_self=False)]:
        target.trainable = False
        target.trainable = True
        assert {v.path for v in model.trainable_variables} == expected
    model.trainable = False
    assert model.trainable_variables == []


def test_a_frozen_batch_normalization_keeps_its_statistics():
    model = keras.Sequential(
        [keras.Input((12,)), keras.layers.Dense(8), keras.layers.BatchNormalization()]
    )
    model.compile("adam", "mse")
    enable_dcft(model, kernel_size=4)
    model.trainable = False
    model.trainable = True
    before = values(model.layers[1].weights)
    model.fit(vectors(8), np.ones((8, 8)), epochs=3, verbose=0)
    assert differences(before, values(model.layers[1].weights)) == [0.0] * 4


def test_orthogonality_is_the_papers_regulariser():
    model = sequential()
    enable_dcft(model, kernel_size=4, orthogonality=0.1)
    distance = 0.0
    for layer in adapted_layers(model):
        a, b = array(layer.dcft_a), array(layer.dcft_b)
        distance += np.linalg.norm(a.T @ a - 1) + np.linalg.norm(b @ b.T - 1)
    assert float(sum(model.losses)) == pytest.approx(0.1 / (2 * 2) * distance, rel=1e-5)


# Of the authors' scripts for DeBERTaV3-base: scale and gamma.
SCALES = {
    "cola": (32 / 3, 0.1),
    "mnli": (16 / 3, 0.1),
    "mrpc": (16, 0.1),
    "qnli": (16, 0.1),
    "qqp": (8, 0.1),
    "rte": (16, 0.3),
    "sst2": (8, 0.1),
    "stsb": (16, 0.3),
}


def test_there_is_a_recipe_for_each_task_of_the_paper():
    assert set(PAPER_RECIPES) == set(SCALES)
    sst2 = PAPER_RECIPES["sst2"]
    assert (sst2["learning_rate"], sst2["epochs"], sst2["warmup_steps"]) == (8e-4, 24, 1000)
    assert (sst2["weight_decay"], sst2["head_dropout"], sst2["sequence_length"]) == (0.01, 0, 128)
    assert PAPER_RECIPES["mrpc"]["warmup_share"] == 0.1


@pytest.mark.parametrize("task", SCALES)
def test_the_papers_recipes(task):
    model = sequential()
    enable_dcft(model, kernel_size=4, **PAPER_RECIPES[task]["arguments"])
    scale, gamma = SCALES[task]
    assert model.dcft_config["orthogonality"] == gamma
    for layer in adapted_layers(model):
        assert layer.dcft_settings.scale == pytest.approx(scale)
        assert (
            layer.dcft_settings.factor_initializer.stddev
            == layer.dcft_settings.filter_initializer.stddev
            == 0.02
        )
    starts = [array(layer.dcft_filter) for layer in adapted_layers(model)]
    assert np.abs(starts[0] - starts[1]).max() > 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_half_way_leaves_the_model_as_it_was(error):
    model = sequential()
    before = [
        (type(layer), layer.trainable, [w.path for w in layer.weights]) for layer in model.layers
    ]
    calls = []

    class FailsTheSecondTime(keras.initializers.Initializer):
        def __call__(self, shape, dtype=None):
            calls.append(shape)
            if len(calls) == 3:
                raise error("out of luck")
            return keras.ops.zeros(shape, dtype)

        def clone(self):
            return self

    cls, flags = type(model), [v.trainable for v in model.weights]
    with pytest.raises(error, match="out of luck"):
        enable_dcft(model, kernel_size=4, factor_initializer=FailsTheSecondTime())
    after = [
        (type(layer), layer.trainable, [w.path for w in layer.weights]) for layer in model.layers
    ]
    assert after == before
    assert type(model) is cls
    assert [v.trainable for v in model.weights] == flags
    assert len(model.trainable_variables) == 6
    enable_dcft(model, kernel_size=4)
    assert len(model.trainable_variables) == 6


@pytest.mark.filterwarnings("error:The quantized weights of:UserWarning")
def test_a_warning_that_is_an_error_leaves_the_task_as_it_was():
    task = bert_classifier()
    task.preprocessor.tokenizer("build it: Keras asks for that before quantizing")
    task.quantize("int8")
    before = [(type(layer), layer.trainable) for layer in task._flatten_layers()]
    with pytest.raises(UserWarning, match="cannot be trained"):
        enable_dcft(task, kernel_size=4)
    assert [(type(layer), layer.trainable) for layer in task._flatten_layers()] == before


@keras.saving.register_keras_serializable("keras_dcft_tests")
class WithOptionalBranch(keras.Model):
    """A model with a layer that only some calls use and build."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.always = keras.layers.Dense(12)
        self.sometimes = keras.layers.Dense(12)

    def call(self, inputs, branch=False):
        outputs = self.always(inputs)
        return self.sometimes(outputs) if branch else outputs


@pytest.mark.parametrize("toggled", ["before", "after"])
def test_a_layer_that_is_built_later_stays_frozen_until_removed(toggled):
    model = WithOptionalBranch()
    model(vectors())
    with pytest.warns(UserWarning, match="left frozen instead of adapted: 'dense_1'"):
        enable_dcft(model, kernel_size=4)

    def toggle():
        model.trainable = False
        model.trainable = True
        model.sometimes.trainable = True

    for step in (toggle, lambda: model(vectors(), branch=True))[
        :: 1 if toggled == "before" else -1
    ]:
        step()
    assert model.sometimes.built
    assert [v.name for v in model.trainable_variables] == list(ADAPTER_VARIABLES)
    remove_dcft(model)
    assert type(model.sometimes) is keras.layers.Dense
    assert len(model.trainable_variables) == 4


# --- models that were used before ---


def train_step_is_right(model, inputs, targets):
    """A fit after enabling changes what is trained, leaves the base, and predict sees it."""
    randomize_adapters(model)
    trained = model.trainable_variables
    frozen = [v for v in model.weights if not any(v is t for t in trained)]
    before, before_frozen = values(trained), values(frozen)
    prediction = predict(model, inputs)
    model.fit(inputs, targets, epochs=2, verbose=0)
    assert all(d > 0 for d in differences(before, values(trained)))
    assert all(d == 0 for d in differences(before_frozen, values(frozen)))
    assert np.abs(predict(model, inputs) - prediction).max() > 0
    return np.abs(predict(model, inputs) - array_of_call(model, inputs)).max()


def array_of_call(model, inputs):
    outputs = model(inputs)
    return array(outputs["pooled_output"] if isinstance(outputs, dict) else outputs)


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("kind", "used"),
    [
        ("functional_around_backbone", "predict and fit"),
        ("sequential", "predict"),
        ("subclassed", "fit"),
    ],
)
def test_a_used_model_trains_and_predicts_rightly(kind, used):
    make, inputs = MODELS[kind]
    model, inputs = make(), inputs()
    targets = np.ones(array_of_call(model, inputs).shape)
    if "predict" in used:
        predict(model, inputs)
    if "fit" in used:
        model.fit(inputs, targets, epochs=2, verbose=0)
    enable_dcft(model, kernel_size=4)
    assert train_step_is_right(model, inputs, targets) < 1e-5


@pytest.mark.compiled
def test_a_used_task_trains_and_predicts_rightly():
    model = bert_classifier()
    model.fit(TEXTS, LABELS, batch_size=4, verbose=0)
    before = predict(model, TEXTS)
    enable_dcft(model, kernel_size=4)
    assert np.abs(predict(model, TEXTS) - before).max() <= SAME
    frozen = [v for v in model.backbone.weights if "dcft" not in v.name]
    before_frozen = values(frozen)
    model.fit(TEXTS, LABELS, batch_size=4, epochs=3, verbose=0)
    assert all(d == 0 for d in differences(before_frozen, values(frozen)))
    assert np.abs(predict(model, TEXTS) - before).max() > 0


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="about TensorFlow's tracing")
@pytest.mark.compiled
@pytest.mark.parametrize("first_step", ["fit", "train_on_batch"])
def test_the_first_step_is_traced_once(first_step):
    traced = []
    layers = [keras.layers.Dense(9), keras.layers.Lambda(lambda x: traced.append(x) or x)]
    model = enable_dcft(keras.Sequential([keras.Input((12,)), *layers]), kernel_size=4)
    with pytest.raises(ValueError, match="compile"):
        getattr(model, first_step)(vectors(), np.ones((4, 9)))
    model.compile("adam", "mse", jit_compile=False)
    traced.clear()
    getattr(model, first_step)(vectors(), np.ones((4, 9)))
    assert len(traced) == 1


@pytest.mark.compiled
def test_a_model_compiled_around_a_backbone_sees_that_it_was_adapted():
    model = functional_around_backbone()
    inputs = MODELS["functional_around_backbone"][1]()
    targets = targets_for(model, inputs)
    model.fit(inputs, targets, verbose=0)
    backbone = next(x for x in model.layers if type(x).__name__ == "BertBackbone")
    enable_dcft(backbone, kernel_size=4)
    assert train_step_is_right(model, inputs, targets) < 1e-5


def test_the_optimizer_keeps_its_settings_and_the_model_its_compilation():
    model = sequential()
    optimizer = keras.optimizers.AdamW(0.0123, weight_decay=0.2)
    optimizer.exclude_from_weight_decay(var_names=["dcft_a"])
    model.compile(optimizer, "mae", metrics=["mse"], jit_compile=False)
    targets = np.ones((4, 9))
    model.fit(vectors(), targets, verbose=0)
    model.optimizer.learning_rate = 0.05
    enable_dcft(model, kernel_size=4)
    layer = model.layers[0]
    model.optimizer.build(model.trainable_variables)
    assert not model.optimizer._use_weight_decay(layer.dcft_a)
    assert model.optimizer._use_weight_decay(layer.dcft_b)
    assert isinstance(model.optimizer, keras.optimizers.AdamW)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.05)
    assert model.optimizer.weight_decay == 0.2
    history = model.fit(vectors(), targets, verbose=0).history
    assert set(history) == {"loss", "mse"}
    assert len(model.optimizer.variables) < 2 * 6 + 4
    saved = model.get_compile_config()
    assert saved["optimizer"]["config"]["learning_rate"] == pytest.approx(0.05)


def test_loss_scaling_survives():
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(8, dtype="mixed_float16")])
    # Keras wraps the optimizer by itself only if the whole model has the policy.
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)), "mse")
    model.fit(vectors(), np.ones((4, 8)), verbose=0)
    enable_dcft(model, kernel_size=4)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    loss = model.fit(vectors(), np.ones((4, 8)), epochs=2, verbose=0).history["loss"]
    assert np.isfinite(loss).all()


@pytest.mark.compiled
@pytest.mark.filterwarnings("error:A layer's `trainable` state has changed")
def test_no_warning_tells_the_user_to_compile_again():
    model = sequential()
    enable_dcft(model, kernel_size=4)
    model.fit(vectors(), np.ones((4, 9)), verbose=0)


def test_a_bad_initializer_changes_nothing():
    model = sequential()
    before = [(type(x), x.trainable, len(x.weights)) for x in model.layers]
    with pytest.raises(ValueError, match="nonsense"):
        enable_dcft(model, kernel_size=4, factor_initializer="nonsense")
    assert [(type(x), x.trainable, len(x.weights)) for x in model.layers] == before
    assert len(model.trainable_variables) == 6


def test_a_batch_normalization_stays_frozen_when_each_layer_is_toggled(tmp_path):
    model = keras.Sequential(
        [keras.Input((12,)), keras.layers.Dense(8), keras.layers.BatchNormalization()]
    )
    model.compile("adam", "mse")
    enable_dcft(model, kernel_size=4)
    for layer in model.layers:
        layer.trainable = True
    model.save(tmp_path / "m.keras")
    for adapted in (model, keras.saving.load_model(tmp_path / "m.keras")):
        before = values(adapted.layers[1].weights)
        adapted.fit(vectors(8), np.ones((8, 8)), epochs=3, verbose=0)
        assert differences(before, values(adapted.layers[1].weights)) == [0.0] * 4
    remove_dcft(model)
    assert type(model.layers[1]) is keras.layers.BatchNormalization
    model.fit(vectors(8), np.ones((8, 8)), verbose=0)
    assert all(d > 0 for d in differences(before, values(model.layers[1].weights)))


def test_texts_go_through_a_tasks_own_predict():
    task = enable_dcft(bert_classifier(), kernel_size=4)
    randomize_adapters(task)
    np.testing.assert_allclose(task.predict(TEXTS, verbose=0), predict(task, TEXTS), atol=1e-5)


def test_a_task_is_reclassed_when_its_backbone_is_adapted(tmp_path):
    task = bert_classifier()
    enable_dcft(task.backbone, kernel_size=4)
    randomize_adapters(task)
    assert type(task).__name__ == "DCFTBertTextClassifier"
    expected = predict(task, TEXTS)
    task.save_to_preset(str(tmp_path / "preset"))
    restored = type(task).dcft_base_class.from_preset(str(tmp_path / "preset"))
    np.testing.assert_array_equal(predict(restored, TEXTS), expected)
    remove_dcft(task.backbone)
    assert type(task).__name__ == "BertTextClassifier"


def test_a_clone_of_an_adapted_functional_model_works():
    model = enable_dcft(functional_around_backbone(), kernel_size=4)
    clone = keras.models.clone_model(model)
    inputs = MODELS["functional_around_backbone"][1]()
    assert predict(clone, inputs).shape == (4, 9)
    repr(clone)
    clone.trainable = True
