import keras
import keras_hub
import pytest
from backbones.vision import dinov2
from tools import bert_backbone, sequential

from keras_dcft import dcft_summary, enable_dcft
from keras_dcft.paths import keras_paths, listed, naming, select, shortened, walk


def numbered(first=1):
    """A model whose layers `dense` and `dense_1` Keras calls `dense_1` and `dense_2`."""
    for _ in range(first):
        keras.layers.Dense(1)
    return sequential()


def choose(model, pattern, argument="target_layers"):
    layers = walk(model)
    return select(argument, pattern, layers, layers)


def around(layer):
    return keras.Sequential([keras.Input((12,)), keras.Sequential([keras.Input((12,)), layer])])


def test_the_names_of_keras_by_path():
    model = numbered()
    inner = keras.Sequential([keras.Input((12,)), keras.layers.Dense(3)], name="inner")
    outer = keras.Model(model.inputs, inner(model.inputs[0]))
    names = keras_paths({**walk(model), **walk(outer)})
    assert names["dense"] == "dense_1"
    assert names["inner/dense"] == "inner/dense_3"
    assert listed(["dense"], walk(model)) == "'dense' (Keras calls it 'dense_1')"


def test_a_name_copied_from_the_summary_never_means_another_layer():
    model = numbered()
    with pytest.raises(ValueError, match="not names that Keras gives") as raised:
        enable_dcft(model, kernel_size=4, target_layers="^dense_1$")
    message = str(raised.value)
    assert message.endswith(
        "Received: '^dense_1$', by path 'dense_1' (Keras calls it 'dense_2'), "
        "by Keras's name 'dense' (Keras calls it 'dense_1')."
    )
    assert "for what Keras calls so write `target_layers=['^dense$']`" in message
    assert "`target_layers=lambda layer: layer.name in ['dense_2']`" in message
    assert not any("dcft" in v.name for v in model.weights)
    by_function = enable_dcft(
        model, kernel_size=4, target_layers=lambda layer: layer.name in ["dense_2"]
    )
    assert list(by_function.dcft_config["layers"]) == ["dense_1"]


@pytest.mark.parametrize("argument", ["target_layers", "exclude_layers", "trainable_layers"])
@pytest.mark.parametrize("pattern", ["^dense_2$", "dense_1", ["^dense$", "_2$"]])
def test_every_argument_with_patterns_is_looked_at(argument, pattern):
    with pytest.raises(ValueError, match=f"`{argument}` takes layers' paths"):
        enable_dcft(numbered(), kernel_size=4, **{argument: pattern})


def test_sizes_by_pattern_are_looked_at():
    with pytest.raises(ValueError, match="`kernel_size` takes layers' paths"):
        enable_dcft(numbered(), kernel_size={"^dense_1$": 2, ".*": 4})
    model = enable_dcft(numbered(), kernel_size={"^dense$": 4, "^dense_1$": 2})
    assert model.dcft_config["layers"] == {"dense": 4, "dense_1": 2}


def test_the_names_of_holders_count():
    keras.Sequential()
    layer = keras.layers.Dense(3, name="head")
    keras.layers.Dense(1)
    model = around(layer)
    holder = model.layers[0].name
    assert holder != "sequential"
    with pytest.raises(ValueError, match=f"Received: '{holder}/head', by path no layer"):
        choose(model, f"{holder}/head")
    assert choose(model, "^sequential/head$") == ["sequential/head"]


@pytest.mark.parametrize("pattern", ["^dense$", "dense", ".*", "^dense(_1)?$", "e_1$|se$"])
def test_what_matches_no_other_layer_by_name_is_taken(pattern):
    model = numbered(20)
    assert "dense" in choose(model, pattern)


@pytest.mark.parametrize(
    "pattern", ["query", "^encoder/", ".*", "norm$", "layers?_0/.*(key|value)"]
)
def test_the_name_of_a_backbone_in_front_of_its_layers_is_no_name_of_theirs(pattern):
    model, other = (
        keras_hub.models.DINOV2Backbone(**dinov2(), name=name)
        for name in (None, "dino_v2_backbone")
    )
    assert any(layer.name == "dino_v2_backbone_encoder" for layer in other.layers)
    assert choose(other, pattern) == choose(model, pattern)


def test_code_for_messages_selects_what_it_names():
    model = numbered(1)
    layers = walk(model)
    for path in ("dense", "dense_1"):
        assert choose(model, eval(naming([path], layers))) == [path]
    assert naming(["dense"], layers) == "['^dense$']"
    layers["other"] = keras.layers.Dense(3, name="dense_2")
    assert naming(["dense_1"], layers) == "lambda layer: layer in [...]"


def test_the_table_shows_the_names_of_keras():
    printed = []
    dcft_summary(enable_dcft(numbered(6), kernel_size=4), print_fn=printed.append)
    assert "dense (Keras: dense_6)" in printed[0]
    assert "dense_1 (Keras: dense_7)" in printed[0]
    dcft_summary(enable_dcft(bert_backbone(), kernel_size=4), print_fn=printed.append)
    assert "Keras:" not in printed[1]


def convolutional():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, name="stem"),
            keras.layers.Flatten(),
            keras.layers.Dense(4),
        ]
    )


@pytest.mark.parametrize("argument", ["target_layers", "exclude_layers"])
def test_a_layer_that_exists_and_cannot_be_adapted_is_named_with_its_type(argument):
    message = "matches 'stem' of type Conv2D, which exists but is not adaptable"
    with pytest.raises(ValueError, match=message):
        enable_dcft(convolutional(), kernel_size=2, **{argument: ["dense", "^stem$"]})


def test_a_layer_without_weights_cannot_be_trained():
    with pytest.raises(ValueError, match="'flatten' of type Flatten, which exists but has no"):
        enable_dcft(convolutional(), kernel_size=2, trainable_layers="flatten")


def test_a_layer_that_is_not_adapted_has_no_kernel_size():
    sizes = {"dense_1": 2, "dense": 4}
    with pytest.raises(ValueError, match="'dense_1' of type Dense, which exists but is not adapt"):
        enable_dcft(sequential(), kernel_size=sizes, exclude_layers="dense_1")


def test_long_texts_keep_both_ends():
    assert shortened("a" * 100 + "b" * 100, 20) == "a" * 10 + " ... " + "b" * 10
    assert shortened("short") == "short"
