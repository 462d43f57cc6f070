"""AdapterBank: each row of a batch with an adapter of its own."""

import gc
import pickle
import threading

import keras
import keras_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from named_test import Counted, change
from one_backend import only_on
from tools import MODELS, array, language_model, predict, sequential, values, vectors

from keras_dcft import (
    AdapterBank,
    DCFTDense,
    activate_dcft,
    enable_dcft,
    increments,
    load_dcft_weights,
    remove_dcft,
    save_dcft_weights,
)

ROWS = ("2", None, "0", "1")


def files(model, folder, count=3, **arguments):
    """Adapter files for a model, which then has the last of them, and the names of the files."""
    enable_dcft(model, **{"kernel_size": 3, **arguments})
    paths = {}
    for number in range(count):
        change(model, number)
        paths[str(number)] = folder / f"{number}.dcft.safetensors"
        save_dcft_weights(model, paths[str(number)])
    return paths


def alone(model, inputs, folder, call=predict, **arguments):
    """The files, and what is predicted with each adapter alone; None is the base."""
    expected = {None: call(model, inputs)}
    paths = files(model, folder, **arguments)
    for name, path in paths.items():
        load_dcft_weights(model, path)
        expected[name] = call(model, inputs)
    return paths, expected


def first(outputs):
    return keras.tree.flatten(outputs)[0]


def assert_rows(outputs, expected, rows=ROWS, atol=1e-5):
    assert len(first(outputs)) == len(rows)
    for number, name in enumerate(rows):
        for found, of_all in zip(keras.tree.flatten(outputs), keras.tree.flatten(expected[name])):
            np.testing.assert_allclose(found[number], of_all[number], atol=atol, rtol=1e-5)


CASES = [
    ("task", {"trainable_layers": "layer_norm|pooled_dense", "rank": 2}),
    ("backbone", {"target_layers": "query|value|tok", "alpha": 4.0}),
    ("sequential", {"trainable_layers": "dense_1|norm"}),
    ("subclassed", {}),
    ("functional_around_backbone", {"trainable_layers": "head"}),
]


@pytest.mark.parametrize(("kind", "arguments"), CASES, ids=[kind for kind, _ in CASES])
def test_each_row_has_its_own_adapter(kind, arguments, tmp_path):
    model, inputs = MODELS[kind][0](), MODELS[kind][1]()
    if kind == "task":
        inputs = inputs[: len(ROWS)]
    paths, expected = alone(model, inputs, tmp_path, **arguments)
    plain = remove_dcft(pickle.loads(pickle.dumps(model)))
    for base in (model, plain):
        before = values(base.weights), predict(base, inputs), [dict(vars(x)) for x in base.layers]
        with AdapterBank(base, paths) as adapters:
            assert_rows(adapters.predict(inputs, ROWS), expected)
            assert_rows(adapters.predict(inputs, ROWS, batch_size=3), expected)
            # The model itself is what it was, and so is what it saves.
            np.testing.assert_array_equal(first(predict(base, inputs)), first(before[1]))
            again = pickle.loads(pickle.dumps(base))
            np.testing.assert_array_equal(first(predict(again, inputs)), first(before[1]))
        assert [dict(vars(x)) for x in base.layers] == before[2]
        for old, new in zip(before[0], values(base.weights)):
            np.testing.assert_array_equal(old, new)


def test_a_call_is_that_of_the_model(tmp_path):
    model, inputs = MODELS["backbone"][0](), MODELS["backbone"][1]()
    paths, expected = alone(model, inputs, tmp_path)
    with AdapterBank(model, paths) as adapters:
        assert_rows(keras.tree.map_structure(array, adapters(inputs, ROWS)), expected)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_base(mode, tmp_path):
    layers = [keras.layers.Dense(16, "relu"), keras.layers.EinsumDense("ab,bcd->acd", (4, 4))]
    model = keras.Sequential([keras.Input((16,)), *layers])
    model.quantize(mode)
    inputs = vectors(width=16)
    paths, expected = alone(model, inputs, tmp_path, kernel_size=4)
    for base in (model, remove_dcft(pickle.loads(pickle.dumps(model)))):
        with AdapterBank(base, paths) as adapters:
            assert_rows(adapters.predict(inputs, ROWS), expected)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_files_and_rows_in_low_precision(policy, tmp_path):
    """Rows are nearer to each adapter alone than that is to float32."""
    if policy == "mixed_float16" and keras.backend.backend() == "jax":
        pytest.skip("JAX has no attention in float16 on CPUs, for the plain model neither")
    make, inputs = MODELS["backbone"][0], MODELS["backbone"][1]()
    exact = make()
    keras.config.set_dtype_policy(policy)
    try:
        model = make()
        for variable, of_exact in zip(model.weights, exact.weights, strict=True):
            of_exact.assign(np.asarray(array(variable), "float32"))
        paths, expected = alone(model, inputs, tmp_path, trainable_layers="pooled_dense")
        with AdapterBank(model, paths) as adapters:
            outputs = adapters.predict(inputs, ROWS)
    finally:
        keras.config.set_dtype_policy("float32")
    in_float32 = {None: predict(exact, inputs)}
    for name, path in paths.items():
        in_float32[name] = predict(load_dcft_weights(exact, path), inputs)

    def difference(ours, others):
        """Of the rows, root mean square."""
        return np.sqrt(np.mean(np.square(np.subtract(ours, others, dtype="float32"))))

    one_by_one, exactly = (
        np.stack([first(of_all[name])[number] for number, name in enumerate(ROWS)])
        for of_all in (expected, in_float32)
    )
    assert difference(first(outputs), one_by_one) < difference(one_by_one, exactly)
    of_base, of_adapter = (first(in_float32[name]) for name in (None, next(iter(paths))))
    assert np.abs(of_adapter - of_base).max() > 0.2


def test_reversible_embeddings_and_all_normalizations(tmp_path):
    table = keras.layers.ReversibleEmbedding(20, 9, logit_soft_cap=3.0, name="table")
    inputs = keras.Input((5,), dtype="int32")
    x = table(inputs)
    x = keras.layers.EinsumDense("btd,ndh->btnh", (None, 3, 4), name="heads")(x)
    x = keras.layers.EinsumDense("btnh,nhd->btd", (None, 9), activation="tanh", name="back")(x)
    for number, norm in enumerate(
        (
            keras.layers.LayerNormalization(),
            keras.layers.BatchNormalization(),
            keras.layers.GroupNormalization(3),
            keras.layers.RMSNormalization(),
        )
    ):
        norm.name = f"norm_{number}"
        x = norm(x)
    model = keras.Model(inputs, table(x, reverse=True))
    tokens = np.random.default_rng(0).integers(0, 20, (4, 5))
    arguments = {"target_layers": "table|heads|back", "trainable_layers": "norm"}
    paths, expected = alone(model, tokens, tmp_path, **arguments)
    with AdapterBank(model, paths) as adapters:
        assert_rows(adapters.predict(tokens, ROWS), expected, atol=3e-5)


def gpt2(sampler, num_layers):
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=20,
        num_layers=num_layers,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=24,
        max_sequence_length=10,
        dropout=0.0,
    )
    model = keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    model.compile(sampler=sampler)
    tokens = np.tile(np.random.default_rng(0).integers(1, 20, (1, 10)), (4, 1))
    mask = np.tile(np.arange(10) < 4, (4, 1))
    return model, {"token_ids": tokens.astype("int32"), "padding_mask": mask.astype("int32")}


def generate(model, inputs, output="token_ids"):
    # Where it draws, it is from the same numbers.
    model.sampler = model.sampler.from_config(model.sampler.get_config())
    model.generate_function = None
    return model.generate(inputs, stop_token_ids=None)[output]


SAMPLERS = {
    "greedy": keras_hub.samplers.GreedySampler,
    "top_k": lambda: keras_hub.samplers.TopKSampler(k=3, seed=5),
    "beam": lambda: keras_hub.samplers.BeamSampler(num_beams=3),
}


@pytest.mark.parametrize(
    ("sampler", "num_layers"),
    [
        ("greedy", 2),
        pytest.param("top_k", 1, marks=only_on("torch", "jax")),
        pytest.param("beam", 1, marks=only_on("torch", "tensorflow")),
    ],
)
def test_each_prompt_has_its_own_adapter(sampler, num_layers, tmp_path):
    model, inputs = gpt2(SAMPLERS[sampler](), num_layers)
    paths, expected = alone(model, inputs, tmp_path, call=generate, alpha=4.0)
    expected = {name: array(tokens) for name, tokens in expected.items()}
    assert len({of_one.tobytes() for of_one in expected.values()}) > 2
    model.sampler = model.sampler.from_config(model.sampler.get_config())
    with AdapterBank(model, paths) as adapters:
        outputs = adapters.generate(inputs, ROWS, stop_token_ids=None)
        model.compile(sampler=SAMPLERS["top_k"]())
        again = adapters.generate(inputs, ROWS, stop_token_ids=None)
        sampled = generate(load_dcft_weights(model, paths["1"]), inputs)
    assert_rows(array(outputs["token_ids"]), expected)
    np.testing.assert_array_equal(array(again["token_ids"])[3], array(sampled)[3])


def test_an_encoder_and_decoder(tmp_path):
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 24}
    backbone = keras_hub.models.T5Backbone(vocabulary_size=20, dropout=0.0, **sizes)
    rng = np.random.default_rng(0)
    shape, inputs = (4, 6), {}
    for side in ("encoder", "decoder"):
        inputs[f"{side}_token_ids"] = rng.integers(1, 20, shape).astype("int32")
        inputs[f"{side}_padding_mask"] = np.ones(shape, "int32")

    def call(model, inputs):
        return model.predict(inputs, verbose=0)

    paths, expected = alone(backbone, inputs, tmp_path, call=call, alpha=2.0)
    with AdapterBank(backbone, paths) as adapters:
        assert_rows(adapters.predict(inputs, ROWS), expected, atol=1e-4)


def test_a_decoder_generates_beside_its_encoder(tmp_path):
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 24}
    backbone = keras_hub.models.BartBackbone(20, max_sequence_length=10, dropout=0.0, **sizes)
    model = keras_hub.models.BartSeq2SeqLM(backbone=backbone, preprocessor=None)
    model.compile(sampler="greedy")
    rng = np.random.default_rng(0)
    inputs = {
        "encoder_token_ids": np.tile(rng.integers(1, 20, 6), (4, 1)),
        "encoder_padding_mask": np.ones((4, 6)),
        "decoder_token_ids": np.tile(rng.integers(1, 20, 10), (4, 1)),
        "decoder_padding_mask": np.tile(np.arange(10) < 3, (4, 1)),
    }
    inputs = {name: value.astype("int32") for name, value in inputs.items()}

    def call(model, inputs):
        return array(generate(model, inputs, output="decoder_token_ids"))

    paths, expected = alone(model, inputs, tmp_path, call=call, alpha=30.0)
    assert len({of_one.tobytes() for of_one in expected.values()}) > 2
    with AdapterBank(model, paths) as adapters:
        outputs = adapters.generate(inputs, ROWS, stop_token_ids=None)
    assert_rows(array(outputs["decoder_token_ids"]), expected)


def test_layers_that_see_windows_and_what_is_no_whole_row(tmp_path):
    class Windows(keras.Model):
        def __init__(self, order):
            super().__init__()
            self.dense, self.order = keras.layers.Dense(12), order

        def call(self, inputs):
            by_window = ops.reshape(inputs, (-1, 2, 6))
            if self.order == "windows first":
                by_window = ops.reshape(ops.transpose(by_window, (1, 0, 2)), (-1, 6))
            outputs = self.dense(ops.reshape(by_window, (-1, 6)))
            if self.order == "rows mixed":
                outputs = outputs + ops.mean(outputs)
            if self.order == "windows first":
                outputs = ops.transpose(ops.reshape(outputs, (2, -1, 12)), (1, 0, 2))
            return ops.reshape(outputs, (-1, 24))

    for order, refusal in (
        ("rows first", None),
        ("windows first", "the inputs of its layer 'dense'"),
        ("rows mixed", "its outputs"),
    ):
        model = Windows(order)
        model(vectors())
        paths, expected = alone(model, vectors(), tmp_path)
        with AdapterBank(model, paths) as adapters:
            if refusal is None:
                assert_rows(adapters.predict(vectors(), ROWS), expected)
                continue
            for _ in range(2):
                with pytest.raises(ValueError, match=refusal):
                    adapters.predict(vectors(), ROWS)
            # One row is a batch of its own.
            of_one = {"1": predict(load_dcft_weights(model, paths["1"]), vectors(1))}
            assert_rows(adapters.predict(vectors(1), ["1"]), of_one, ["1"])


class Reads(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(12)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, inputs):
        return ops.matmul(inputs, self.dense.kernel)


def test_weights_that_are_read_and_not_called_are_refused(tmp_path):
    model = keras.Sequential([keras.Input((12,)), Reads()])
    adapters = AdapterBank(model, files(model, tmp_path))
    with pytest.raises(ValueError, match="layers that it does not call, 'reads/dense'"):
        adapters.predict(vectors(), ROWS)


def test_what_cannot_have_a_value_for_each_row_is_refused(tmp_path):
    layers = [keras.layers.Conv1D(4, 2, name="conv"), keras.layers.Dense(8)]
    model = keras.Sequential([keras.Input((6, 3)), *layers])
    paths = files(model, tmp_path, trainable_layers="conv")
    with pytest.raises(ValueError, match="Received: 'conv' of type Conv1D"):
        AdapterBank(model, paths)
    assert not any("_dcft_diverted" in vars(layer) for layer in model.layers)


@pytest.mark.compiled
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch traces nothing")
def test_nothing_is_traced_anew_when_adapters_come_and_go(tmp_path):
    layers = [keras.layers.Dense(16), Counted(), keras.layers.Dense(4)]
    model = keras.Sequential([keras.Input((12,)), *layers])
    paths, expected = alone(model, vectors(), tmp_path)
    remove_dcft(model)
    with AdapterBank(model, {"0": paths["0"]}, capacity=1) as adapters:
        adapters.predict(vectors(), ["0", None, None, "0"])
        before = Counted.calls
        for name in ("1", "2"):
            adapters.add(name, paths[name])
        assert_rows(adapters.predict(vectors(), ROWS), expected)
        adapters.remove("0")
        adapters.add("other", paths["0"])
        rows = ["other", "2", None, "other"]
        assert_rows(adapters.predict(vectors(), rows), {**expected, "other": expected["0"]}, rows)
        assert Counted.calls == before


def test_it_is_a_collection(tmp_path):
    model = sequential()
    paths = files(model, tmp_path)
    adapters = AdapterBank(model)
    assert len(adapters) == 0
    np.testing.assert_array_equal(
        adapters.predict(vectors(), [None] * 4), predict(remove_dcft(model), vectors())
    )
    for name, path in paths.items():
        adapters.add(name, path)
    adapters.remove("1")
    assert (len(adapters), list(adapters)) == (2, ["0", "2"])
    assert ("0" in adapters, "1" in adapters) == (True, False)
    assert repr(adapters) == f"<AdapterBank of model '{model.name}', 2 adapters>"
    adapters.close()
    adapters.close()
    assert "closed" in repr(adapters)


def test_a_bank_that_nobody_closed_lets_go_of_the_model(tmp_path):
    model = sequential()
    adapters = AdapterBank(model, files(model, tmp_path))
    adapters.predict(vectors(), ROWS)
    assert any("call" in vars(layer) for layer in model.layers)
    del adapters
    gc.collect()
    assert not any("call" in vars(layer) for layer in model.layers)


def test_closing_while_it_predicts_is_an_error_and_no_other_answer(tmp_path):
    model = sequential()
    paths, expected = alone(model, vectors(), tmp_path)
    adapters, begun, seen = AdapterBank(model, paths), threading.Event(), []
    model_inputs, rows = np.tile(vectors(), (500, 1)), ROWS * 500

    def call():
        try:
            adapters.predict(vectors(), ROWS)
            begun.set()
            seen.append(adapters.predict(model_inputs, rows, batch_size=2))
        except ValueError as error:
            seen.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    assert begun.wait(60)
    adapters.close()
    thread.join()
    (outcome,) = seen
    if isinstance(outcome, str):
        assert "this one is closed" in outcome
    else:  # it was through before
        assert_rows(outcome, {n: np.tile(x, (500, 1)) for n, x in expected.items()}, rows)


def test_two_banks_of_one_model(tmp_path):
    model = sequential()
    (tmp_path / "a").mkdir()
    paths, expected = alone(model, vectors(), tmp_path / "a")
    remove_dcft(model)
    others, of_others = alone(model, vectors(), tmp_path, kernel_size=2)
    with AdapterBank(model, paths) as one:
        with AdapterBank(model, others) as other:
            assert_rows(other.predict(vectors(), ROWS), of_others)
            assert_rows(one.predict(vectors(), ROWS), expected)
        assert_rows(one.predict(vectors(), ROWS), expected)


def test_a_batch_sees_one_state_of_the_bank(tmp_path):
    model = sequential()
    paths, expected = alone(model, vectors(), tmp_path)
    adapters = AdapterBank(model, paths)
    errors, stop = [], threading.Event()

    def call():
        try:
            while not stop.is_set():
                assert_rows(adapters.predict(vectors(), ROWS, batch_size=1), expected)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(30):
            adapters.add(f"new {number}", paths[str(number % 3)])
            if number > 3:
                adapters.remove(f"new {number - 3}")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    adapters.close()
    if errors:
        raise errors[0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b, p: b.add("0", p["0"]), ValueError, "`name` must be a new one"),
        (lambda b, p: b.add("", p["0"]), TypeError, "Received: name=''"),
        (lambda b, p: b.add("x", p["0"].parent / "no.dcft.safetensors"), OSError, "no.dcft"),
        (lambda b, p: b.add("x", p["finer"]), ValueError, "The file has layers={'dense': 2"),
        (lambda b, p: b.add("x", p["head"]), ValueError, "The file has layers={'dense': 3}"),
        (lambda b, p: b.add("x", p["other"]), ValueError, "put it into another bank"),
        (lambda b, p: b.remove("x"), ValueError, "Received: 'x'; the bank has '0', '1'"),
        (lambda b, p: b.predict(vectors(), ["x"] * 4), ValueError, "Received: 'x'; the bank has"),
        (lambda b, p: b.predict(vectors(), ["0"] * 3), ValueError, "each of the 4 rows"),
        (lambda b, p: b(vectors(), ["0"] * 5), ValueError, "Received: 5 adapters"),
        (lambda b, p: b.predict(vectors(), "0"), TypeError, "must be a list"),
        (lambda b, p: b.generate(["a"], ["0"]), TypeError, "for KerasHub tasks"),
    ],
)
def test_errors_change_nothing(call, error, message, tmp_path):
    model = sequential()
    paths, expected = alone(model, vectors(), tmp_path)
    remove_dcft(model)
    for name, arguments in {
        "finer": {"kernel_size": 2},
        "head": {"trainable_layers": "dense_1", "kernel_size": 3},
    }.items():
        enable_dcft(model, **arguments)
        paths[name] = tmp_path / f"{name}.dcft.safetensors"
        save_dcft_weights(model, paths[name])
        remove_dcft(model)
    other = keras.Sequential([keras.Input((12,)), DCFTDense(7, kernel_size=3)])
    paths["other"] = tmp_path / "other.dcft.safetensors"
    save_dcft_weights(other, paths["other"])
    with AdapterBank(model, {name: paths[name] for name in "012"}) as adapters:
        with pytest.raises(error, match=message):
            call(adapters, paths)
        assert_rows(adapters.predict(vectors(), ROWS), expected)
    for use in (lambda: adapters.predict(vectors(), ROWS), lambda: adapters.add("x", paths["0"])):
        with pytest.raises(ValueError, match="this one is closed"):
            use()


def test_a_model_that_was_adapted_since_is_refused(tmp_path):
    model = sequential()
    paths = files(model, tmp_path, target_layers="^dense$", trainable_layers="norm")
    remove_dcft(model)
    with AdapterBank(model, paths) as adapters:
        enable_dcft(model, kernel_size=2)
        with pytest.raises(ValueError, match="adapted after it was opened"):
            adapters.predict(vectors(), ROWS)
        remove_dcft(model)
        adapters.predict(vectors(), ROWS)


def test_the_models_other_adapters_say_nothing(tmp_path):
    model = sequential()
    paths, expected = alone(model, vectors(), tmp_path)
    enable_dcft(model, kernel_size=3, name="other")
    activate_dcft(model, "other")
    change(model, 9)
    with AdapterBank(model, paths) as adapters:
        assert_rows(adapters.predict(vectors(), ROWS), expected)


@only_on("torch")
def test_texts_go_to_any_tokenizer(tmp_path):
    model = language_model()
    texts = np.array(["good", "bad", "this", "that"])
    paths, expected = alone(model, list(texts), tmp_path)
    remove_dcft(model)
    with AdapterBank(model, paths) as adapters:
        for inputs in (texts, texts.astype("S"), list(texts), tuple(texts)):
            assert_rows(adapters.predict(inputs, ROWS), expected)


@settings(max_examples=8)
@given(st.data())
def test_products_by_row_are_those_with_the_increments(data):
    rows, d = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    samples, rank = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 3))
    sizes = [data.draw(st.integers(d, 13)) for _ in range(2)]
    rng = np.random.default_rng(0)
    a, b = increments.subspace_shape(*sizes, d)
    shapes = ((rows, a, rank), (rows, rank, b), (rows, d, d))
    factors = [ops.convert_to_tensor(rng.normal(size=x).astype("float32")) for x in shapes]
    full = [array(increments.dcft_increment(*of_row, *sizes, 0.5)) for of_row in zip(*factors)]
    inputs = rng.normal(size=(rows, samples, sizes[0])).astype("float32")
    found = increments.products_by_row(ops.convert_to_tensor(inputs), *factors, sizes[1], 0.5)
    np.testing.assert_allclose(array(found), inputs @ np.stack(full), atol=1e-3, rtol=1e-4)
    indices = rng.integers(0, sizes[0], (rows, samples))
    found = increments.looked_up_by_row(ops.convert_to_tensor(indices), *factors, sizes[1], 0.5)
    expected = np.stack([of_row[i] for of_row, i in zip(full, indices)])
    np.testing.assert_allclose(array(found), expected, atol=1e-3, rtol=1e-4)


def test_an_adapter_takes_the_memory_of_its_numbers(tmp_path):
    model = sequential()
    paths = files(model, tmp_path, count=1)
    trained = sum(np.prod(v.shape) for v in model.trainable_variables)
    with AdapterBank(model, paths, capacity=10) as adapters:
        assert adapters._table.shape == (11, trained)
