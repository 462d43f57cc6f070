"""What several test files use: small models, and looking at tensors as arrays."""

import keras
import keras_hub
import numpy as np
from keras import ops

VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "good",
    "bad",
    "film",
    "very",
    "##s",
]
TEXTS = ["a good film", "a bad film", "very good", "very very bad films"] * 4
LABELS = np.array([1, 0, 1, 0] * 4)


predicts_eagerly = False


def run_eagerly(is_eager=True):
    """Lets TensorFlow trace and compile nothing, or as users have it; other backends train as ever.

    Then `predict` below leaves the loop over batches out on TensorFlow and JAX, which takes longer
    than these models. On JAX it computes operation by operation, which JAX compiles once for all
    models in which they have these shapes.
    """
    global predicts_eagerly
    predicts_eagerly = is_eager and keras.backend.backend() != "torch"
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.run_functions_eagerly(is_eager)


def array(tensor):
    return np.array(ops.convert_to_numpy(tensor))


def bert_backbone():
    return keras_hub.models.BertBackbone(
        vocabulary_size=len(VOCABULARY),
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=36,
        max_sequence_length=12,
        dropout=0.0,
    )


def bert_classifier():
    """A tiny BERT classifier with its preprocessor, compiled from birth as all tasks are."""
    tokenizer = keras_hub.models.BertTokenizer(vocabulary=VOCABULARY)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=8)
    return keras_hub.models.BertTextClassifier(
        backbone=bert_backbone(), num_classes=2, preprocessor=preprocessor, dropout=0.0
    )


def gpt2_backbone(vocabulary_size, length):
    return keras_hub.models.GPT2Backbone(
        vocabulary_size=vocabulary_size,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=24,
        max_sequence_length=length,
    )


def language_model():
    """A GPT-2 of letters, compiled and with a preprocessor, for prompts of its own."""
    tokens = [*"_abcdefghijklmnopqrstuvwxyzĠ", "th", "<|endoftext|>"]
    tokenizer = keras_hub.models.GPT2Tokenizer(
        vocabulary={token: number for number, token in enumerate(tokens)}, merges=["t h"]
    )
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=64)
    model = keras_hub.models.GPT2CausalLM(
        backbone=gpt2_backbone(len(tokens), 64), preprocessor=preprocessor
    )
    model.compile(sampler="greedy")
    return model


def writes_transformers(backbone, folder) -> bool:
    """Whether this KerasHub writes models of this kind for Transformers; into a new folder."""
    if not hasattr(backbone, "export_to_transformers"):
        return False
    try:
        backbone.export_to_transformers(str(folder))
    except ValueError as error:
        if "not implemented" not in str(error):
            raise
        return False
    return True


def compile_task(task):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    task.compile(optimizer=keras.optimizers.Adam(0.01), loss=loss, metrics=None)


def task_losses(task, steps=3):
    losses = []
    for _ in range(steps):
        task.reset_metrics()
        losses.append(float(task.train_on_batch(TEXTS, LABELS, return_dict=True)["loss"]))
    return losses


def step_losses(model, inputs, targets, steps=3):
    """The losses of some more training steps, each by itself."""
    losses = []
    for _ in range(steps):
        model.reset_metrics()  # Keras 3.13 gives the mean over all steps since
        losses.append(float(model.train_on_batch(inputs, targets)))
    return losses


def sequential():
    model = keras.Sequential(
        [
            keras.Input((12,)),
            keras.layers.Dense(20, activation="relu"),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(9),
        ]
    )
    model.compile("adam", "mse")
    return model


def functional_around_backbone():
    backbone = bert_backbone()
    outputs = keras.layers.Dense(9, name="head")(backbone(backbone.input)["pooled_output"])
    model = keras.Model(backbone.input, outputs)
    model.compile("adam", "mse")
    return model


@keras.saving.register_keras_serializable("keras_dcft_tests")
class Subclassed(keras.Model):
    """A user's own model: layers in attributes, some of them without a name of their own."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.first = keras.layers.Dense(width, activation="relu")
        self.second = keras.layers.EinsumDense("bi,ijk->bjk", (4, 5), bias_axes="jk")

    def call(self, inputs):
        return self.second(self.first(inputs))

    def get_config(self):
        return {**super().get_config(), "width": self.width}


def subclassed():
    model = Subclassed(20)
    model(vectors())  # builds it, as the first batch would
    model.compile("adam", "mse")
    return model


def backbone_inputs(batch=4, length=8):
    rng = np.random.default_rng(1)
    return {
        "token_ids": rng.integers(0, len(VOCABULARY), (batch, length)),
        "segment_ids": np.zeros((batch, length), "int32"),
        "padding_mask": np.ones((batch, length), "int32"),
    }


def vectors(batch=4, width=12):
    return np.random.default_rng(1).normal(size=(batch, width)).astype("float32")


# Every kind of model that the package promises to adapt: how to make it, and inputs for it.
MODELS = {
    "task": (bert_classifier, lambda: TEXTS[:4]),
    "backbone": (bert_backbone, backbone_inputs),
    "functional_around_backbone": (functional_around_backbone, backbone_inputs),
    "sequential": (sequential, vectors),
    "subclassed": (subclassed, vectors),
}


def predict(model, inputs):
    """What a model predicts.

    Texts become tokens before, by the task's own preprocessor: TensorFlow would trace that for each
    call, which takes thirty times as long as all the rest.
    """
    preprocessor = getattr(model, "preprocessor", None) if isinstance(inputs, list) else None
    runs_eagerly = model.run_eagerly
    model.run_eagerly = runs_eagerly or predicts_eagerly
    if preprocessor is not None:
        inputs = keras.utils.unpack_x_y_sample_weight(preprocessor(inputs))[0]
        inputs = keras.tree.map_structure(array, inputs)
        model.preprocessor = None
    try:
        if predicts_eagerly:
            outputs = model.predict_on_batch(inputs)
        else:
            outputs = model.predict(inputs, verbose=0)
    finally:
        model.run_eagerly = runs_eagerly
        if preprocessor is not None:
            model.preprocessor = preprocessor
    return outputs["pooled_output"] if isinstance(outputs, dict) else outputs


def randomize_adapters(model, seed=0, scale=0.3):
    """Gives every adapter variable values of a size that shows in the outputs."""
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        if variable.name.startswith("dcft_"):
            variable.assign(rng.normal(size=variable.shape, scale=scale))


def values(variables):
    return [array(v) for v in variables]


def differences(before, after):
    return [float(np.abs(a - b).max()) for a, b in zip(before, after)]


def outputs_and_gradients(layer, inputs, cotangent, names):
    """A layer's outputs, and the gradients of `sum(outputs * cotangent)` by its variables."""
    backend = keras.backend.backend()
    variables = [getattr(layer, name) for name in names]
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            outputs = layer(inputs)
            loss = ops.sum(outputs * cotangent)
        return array(outputs), values(tape.gradient(loss, [v.value for v in variables]))
    if backend == "jax":
        import jax

        fixed = [v.value for v in layer.non_trainable_variables]

        def loss(trainable):
            outputs, _ = layer.stateless_call(trainable, fixed, inputs)
            return ops.sum(outputs * cotangent), outputs

        found, outputs = jax.jit(jax.grad(loss, has_aux=True))(
            [v.value for v in layer.trainable_variables]
        )
        by_id = {id(v): g for v, g in zip(layer.trainable_variables, found)}
        return array(outputs), values([by_id[id(v)] for v in variables])
    for variable in variables:
        variable.value.grad = None
    outputs = layer(inputs)
    ops.sum(outputs * ops.convert_to_tensor(cotangent)).backward()
    return array(outputs.detach()), values([v.value.grad for v in variables])


@keras.saving.register_keras_serializable("keras_dcft_tests")
class Tied(keras.Model):
    """Two layers with one kernel, and one layer that is called twice."""

    def __init__(self, equations=("bi,ij->bj", "bi,ij->bj"), **kwargs):
        super().__init__(**kwargs)
        self.equations = equations
        self.first, self.second = (
            keras.layers.EinsumDense(equation, (12,)) for equation in equations
        )
        self.last = keras.layers.Dense(12)

    def build(self, input_shape):
        for layer in (self.first, self.second, self.last):
            layer.build(input_shape)
        with_own_kernel = self.second._kernel
        self.second._untrack_variable(with_own_kernel)
        self.second._tracker.unlock()
        self.second._kernel = self.first._kernel
        self.second._tracker.lock()
        self.built = True

    def call(self, inputs):
        return self.last(self.last(self.second(self.first(inputs))))

    def get_config(self):
        return {**super().get_config(), "equations": list(self.equations)}


def tied(**arguments):
    model = Tied(**arguments)
    model.build((None, 12))
    model(vectors())
    return model
