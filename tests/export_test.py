"""What `model.export` writes is loaded by the format's own runtime and computes the same."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from math import prod

import keras
import numpy as np
import pytest
from one_backend import only_on
from tools import VOCABULARY, array, bert_classifier, randomize_adapters

from keras_dcft import AdapterBank, enable_dcft, merge_dcft, save_dcft_weights
from keras_dcft.layers.base import DCFTKernel

BACKEND = keras.backend.backend()
ROWS, LENGTH = 3, 5
# What only moves a tensor, or takes part of it.
LAYOUT = {"ReadVariableOp", "Identity", "StopGradient", "Transpose", "Reshape", "Cast", "to"}
LAYOUT |= {"detach", "view", "permute", "reshape", "stablehlo.transpose", "stablehlo.reshape"}
LAYOUT |= {"IdentityN", "XlaCallModule", "func.call"}  # on JAX they return the weights as well

pytestmark = pytest.mark.compiled


def functional():
    """A dense, an einsum and an embedding layer, all of them adapted; no two of one size."""
    inputs = keras.Input((LENGTH,), dtype="int32", name="token_ids")
    x = keras.layers.Embedding(50, 24, name="table")(inputs)
    x = keras.layers.EinsumDense("btd,dnh->btnh", (None, 4, 9), bias_axes="nh", name="heads")(x)
    x = keras.layers.Reshape((LENGTH, 36))(x)
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.Dense(20, activation="relu", name="hidden")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(7, name="logits")(x))


def task():
    model = bert_classifier()
    model.preprocessor = None
    return model


def token_ids():
    return np.random.default_rng(1).integers(0, len(VOCABULARY), (ROWS, LENGTH), "int32")


def task_inputs():
    padding_mask = np.arange(LENGTH) < np.array([[LENGTH], [3], [4]])
    return {
        "token_ids": token_ids(),
        "segment_ids": np.zeros((ROWS, LENGTH), "int32"),
        "padding_mask": padding_mask.astype("int32"),
    }


MODELS = {"functional": (functional, token_ids), "task": (task, task_inputs)}
TARGETS = ["table|token_embedding$", "heads|hidden|logits|query|value|dense"]


def with_values(kind):
    keras.utils.set_random_seed(0)
    model = enable_dcft(MODELS[kind][0](), kernel_size=4, rank=2, target_layers=TARGETS)
    randomize_adapters(model)
    return model


def tensorflow_outputs(path, inputs):
    import tensorflow as tf

    model = tf.saved_model.load(path)
    return model.serve(inputs).numpy()


def onnx_outputs(path, inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    if not isinstance(inputs, dict):
        inputs = {session.get_inputs()[0].name: inputs}
    return session.run(None, inputs)[0]


def litert_outputs(path, inputs):
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(model_path=path).get_signature_runner()
    if not isinstance(inputs, dict):
        inputs = {next(iter(run.get_input_details())): inputs}
    return next(iter(run(**inputs).values()))


def openvino_outputs(path, inputs):
    import openvino

    # Some CPUs would compute in bfloat16.
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(path, "CPU", exact)
    return model(inputs)[0]


def torch_outputs(path, inputs):
    import torch

    inputs = keras.tree.map_structure(torch.from_numpy, inputs)
    return torch.export.load(path).module()(inputs).detach().numpy()


def tensorflow_tensors(path):
    import tensorflow as tf

    graph = tf.saved_model.load(path).serve.concrete_functions[0].graph
    for operation in graph.get_operations():
        if operation.type == "XlaCallModule":
            yield from stablehlo_tensors(operation.get_attr("module"))
        for tensor in operation.outputs:
            if tensor.shape.rank is not None:
                yield operation.type, tuple(tensor.shape)


def stablehlo_tensors(module):
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    found = []

    def look(operation):
        types = [result.type for result in operation.results]
        found.extend((operation.name, tuple(t.shape)) for t in types if hasattr(t, "shape"))
        return ir.WalkResult.ADVANCE

    with ir.Context() as context:
        stablehlo.register_dialect(context)
        stablehlo.deserialize_portable_artifact(context, module).operation.walk(look)
    return found


def onnx_tensors(path):
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    of_result = {output: node.op_type for node in graph.node for output in node.output}
    for weight in graph.initializer:
        yield "weight", tuple(weight.dims)
    for value in graph.value_info:
        dimensions = value.type.tensor_type.shape.dim
        yield of_result.get(value.name), tuple(x.dim_value or None for x in dimensions)


def litert_tensors(path):
    from ai_edge_litert.interpreter import Interpreter

    for details in Interpreter(model_path=path).get_tensor_details():
        yield "any", tuple(details["shape_signature"])


def openvino_tensors(path):
    import openvino

    for operation in openvino.Core().read_model(path).get_ops():
        for output in operation.outputs():
            shape = output.get_partial_shape()
            yield (
                operation.get_type_name(),
                tuple(x.get_length() if x.is_static else None for x in shape),
            )


def torch_tensors(path):
    import torch

    for node in torch.export.load(path).graph.nodes:
        if hasattr(node.meta.get("val"), "shape"):
            name = getattr(node.target, "overloadpacket", node.target)
            yield getattr(name, "__name__", str(name)), tuple(node.meta["val"].shape)


@dataclasses.dataclass(frozen=True)
class Format:
    file: str  # its name, with the ending that Keras asks for
    runtime: str  # the package that runs it
    outputs: Callable  # of a path and inputs
    tensors: Callable  # of a path: the operation and the shape of each tensor


FORMATS = {
    "tf_saved_model": Format("model", "tensorflow", tensorflow_outputs, tensorflow_tensors),
    "onnx": Format("model.onnx", "onnxruntime", onnx_outputs, onnx_tensors),
    "litert": Format("model.tflite", "ai_edge_litert", litert_outputs, litert_tensors),
    "openvino": Format("model.xml", "openvino", openvino_outputs, openvino_tensors),
    "torch": Format("model.pt2", "torch", torch_outputs, torch_tensors),
}


@pytest.fixture(params=FORMATS)
def export_format(request):
    pytest.importorskip(FORMATS[request.param].runtime)
    return request.param


def write(model, inputs, export_format, folder):
    # By default Keras leaves the length of a KerasHub task open, and on PyTorch takes it for 1.
    # There the exported model is for the rows of the signature; jax2onnx merges no open axes.
    is_open = BACKEND == "tensorflow" or (BACKEND == "jax" and export_format != "onnx")
    by_name = inputs if isinstance(inputs, dict) else {"token_ids": inputs}
    specs = {
        name: keras.InputSpec(shape=(None if is_open else ROWS, LENGTH), dtype="int32", name=name)
        for name in by_name
    }
    signature = [specs if isinstance(inputs, dict) else specs["token_ids"]]
    path = str(folder / FORMATS[export_format].file)
    model.export(path, format=export_format, input_signature=signature, verbose=False)
    return path


def exported(model, kind, export_format, folder):
    """The path of an exported model; skips the test where Keras exports no plain one."""
    inputs = MODELS[kind][1]()
    try:
        return write(model, inputs, export_format, folder)
    except Exception as error:
        plain = MODELS[kind][0]()
        plain.trainable = (
            False  # as an adapted model's base is, without which PyTorch's tracer fails
        )
        try:
            write(plain, inputs, export_format, folder)
        except Exception as of_plain:
            reason = f"{type(of_plain).__name__}: {of_plain}".splitlines()[0]
            pytest.skip(f"nor does Keras export the plain model: {reason}")
        raise error


def check_outputs(model, kind, export_format, folder):
    inputs = MODELS[kind][1]()
    expected = model.predict(inputs, verbose=0)
    path = exported(model, kind, export_format, folder)
    outputs = FORMATS[export_format].outputs(path, inputs)
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-5)
    return path, outputs


def test_outputs_and_the_factored_form_are_kept(export_format, tmp_path):
    model = with_values("functional")
    path, _ = check_outputs(model, "functional", export_format, tmp_path)
    assert_factored(model, path, export_format, tmp_path)


@only_on("torch")  # a merged model is a plain one
def test_outputs_of_a_merged_model(export_format, tmp_path):
    check_outputs(merge_dcft(with_values("functional")), "functional", export_format, tmp_path)


def test_outputs_of_a_model_with_a_bank(export_format, tmp_path):
    model = with_values("functional")
    expected = model.predict(token_ids(), verbose=0)
    path = tmp_path / "other.dcft.safetensors"
    save_dcft_weights(model, path)
    randomize_adapters(model, seed=1)
    with AdapterBank(model, {"other": path}) as bank:
        of_bank = bank.predict(token_ids(), adapters=["other"] * ROWS)
        _, outputs = check_outputs(model, "functional", export_format, tmp_path)
    np.testing.assert_allclose(of_bank, expected, rtol=0, atol=1e-5)
    assert np.abs(outputs - of_bank).max() > 1e-2


def test_outputs_of_a_task(export_format, tmp_path):
    if export_format == "openvino" and keras.backend.backend() != "torch":
        pytest.skip("what OpenVINO computes is shown by the functional model on every backend")
    check_outputs(with_values("task"), "task", export_format, tmp_path)


def test_adapters_show_in_the_outputs():
    for kind, (_, inputs) in MODELS.items():
        model = with_values(kind)
        outputs = model.predict(inputs(), verbose=0)
        randomize_adapters(model, seed=1)
        assert np.abs(model.predict(inputs(), verbose=0) - outputs).max() > 1e-3


def assert_factored(model, path, export_format, folder):
    """Asserts that thin factors are there, and nothing of a kernel's size that a plain model lacks.

    Some formats fold what is made of weights alone into one constant, so the second is not enough.
    """
    (folder / "plain").mkdir()
    path_of_plain = exported(functional(), "functional", export_format, folder / "plain")
    plain, adapted = (list(FORMATS[export_format].tensors(p)) for p in (path_of_plain, path))
    names = {prod(shape): layer.name for layer, shape in matrices(model)}
    of_plain, of_adapted = (
        Counter(
            names[known_size(shape)]
            for operation, shape in tensors
            if known_size(shape) in names and operation not in LAYOUT
        )
        for tensors in (plain, adapted)
    )
    assert of_adapted <= of_plain
    shapes = {shape for _, shape in adapted}
    for layer, (rows, columns) in matrices(model):
        is_table = layer.name == "table"  # of whose input side a lookup makes some rows alone
        width = 16 if BACKEND == "torch" and not is_table else 8
        for side in (columns,) if is_table else (rows, columns):
            assert {(side, width), (width, side)} & shapes, layer.name


def matrices(model):
    names = ("table", "heads", "hidden", "logits")
    return [(x, x.dcft_adapter.matrix_shape) for x in map(model.get_layer, names)]


def known_size(shape):
    return prod(shape) if all(x is not None and x > 0 for x in shape) else 0


def test_the_search_finds_what_is_not_factored(export_format, tmp_path, monkeypatch):
    if export_format == "openvino" and keras.backend.backend() != "torch":
        pytest.skip("OpenVINO's files are searched in the same way on every backend")

    def call(layer, inputs, training=None):
        outputs = layer._dcft_product(inputs, layer.kernel) + layer.bias
        return layer.activation(outputs)

    model = with_values("functional")
    expected = array(model(token_ids()))
    monkeypatch.setattr(DCFTKernel, "call", call)
    np.testing.assert_allclose(array(model(token_ids())), expected, rtol=0, atol=1e-5)
    path = exported(model, "functional", export_format, tmp_path)
    with pytest.raises(AssertionError):
        assert_factored(model, path, export_format, tmp_path)
