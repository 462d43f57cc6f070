"""The other forms of increments that long trainings compare are what their papers say."""

import sys
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_dcft import enable_dcft
from keras_dcft.paths import dcft_layers

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

if keras.config.backend() != "jax":
    pytest.skip("long trainings are JAX's", allow_module_level=True)

import long_training
import rivals
from rivals import FilterPerRank, FourierFT, LoRAXS, UniLoRA, VeRA, replace_adapters


@pytest.fixture
def backbone(monkeypatch):
    monkeypatch.setattr(rivals, "LARGEST", 32)
    return keras_hub.models.BertBackbone(50, 1, 2, 16, 32, dropout=0.0, max_sequence_length=16)


def increment_of(layer):
    left, right = layer.dcft_adapter.thin_factors("float32")
    return ops.convert_to_numpy(ops.matmul(left, right))


def trained(backbone):
    return sum(int(np.prod(v.shape)) for v in backbone.trainable_variables)


# Six kernels of 16 x 16, 16 x 32 and 32 x 16, with the pooler's.
LORA_NUMBERS = 5 * 32 + 2 * 48


@pytest.mark.parametrize(
    ("form", "sizes", "numbers"),
    [
        (LoRAXS, {"rank": 3}, 7 * 9),
        (VeRA, {"rank": 3}, 7 * 3 + 6 * 16 + 32),
        (UniLoRA, {"numbers": 40, "rank": 2}, 40),
        (FourierFT, {"numbers": 5, "scale": 140.0}, 7 * 5),
    ],
)
def test_a_form_trains_its_numbers_and_its_increment_is_what_the_layer_adds(
    backbone, form, sizes, numbers, rng
):
    enable_dcft(backbone, 1)
    replace_adapters(backbone, form, **sizes)
    assert trained(backbone) == numbers
    for variable in backbone.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    layer = next(
        x for p, x in dcft_layers(backbone).items() if p.endswith("feedforward_output_dense")
    )
    inputs = rng.normal(size=(3, layer.dcft_adapter.matrix_shape[0])).astype("float32")
    plain = inputs @ np.array(layer.dcft_frozen_weight()) + np.array(layer.bias)
    expected = plain + inputs @ increment_of(layer)
    np.testing.assert_allclose(layer(inputs), expected, atol=1e-4 * abs(expected).max())


def test_lora_xs_is_between_singular_vectors(backbone):
    enable_dcft(backbone, 1)
    replace_adapters(backbone, LoRAXS, rank=16)
    layer = dcft_layers(backbone)["transformer_layer_0/feedforward_intermediate_dense"]
    layer.dcft_adapter.core.assign(np.eye(16))
    np.testing.assert_allclose(increment_of(layer), layer.dcft_frozen_weight(), atol=1e-6)


def test_vera_starts_at_zero_with_factors_that_all_layers_share(backbone):
    enable_dcft(backbone, 1)
    replace_adapters(backbone, VeRA, rank=3)
    forms = [layer.dcft_adapter for layer in dcft_layers(backbone).values()]
    assert len({id(form.left) for form in forms}) == 1
    assert not any(increment_of(form.layer).any() for form in forms)


def test_the_matrix_of_uni_loras_hash_has_orthonormal_columns(backbone):
    enable_dcft(backbone, 1)
    replace_adapters(backbone, UniLoRA, numbers=40, rank=2)
    forms = [layer.dcft_adapter for layer in dcft_layers(backbone).values()]
    assert sum(form.places.shape[0] for form in forms) == 2 * LORA_NUMBERS
    vector = np.arange(1.0, 41.0)
    forms[0].vector.assign(vector)
    # Looking up keeps lengths.
    factors = [
        np.concatenate([np.ravel(f) for f in form.thin_factors("float32")]) for form in forms
    ]
    np.testing.assert_allclose(
        np.linalg.norm(np.concatenate(factors)), np.linalg.norm(vector), rtol=1e-5
    )


def test_fourier_ft_is_the_real_part_of_a_sparse_spectrum(backbone):
    enable_dcft(backbone, 1)
    replace_adapters(backbone, FourierFT, numbers=5, scale=140.0)
    layer = dcft_layers(backbone)["transformer_layer_0/feedforward_intermediate_dense"]
    form = layer.dcft_adapter
    spectrum = np.zeros(form.matrix_shape)
    spectrum[tuple(np.array(form.places).T)] = form.entries
    # The same waves as in a kernel of 768 x 768 at this scale.
    rows, columns = form.matrix_shape
    waves = 140 / 768**2 * rows * columns * np.fft.ifft2(spectrum).real
    np.testing.assert_allclose(increment_of(layer), waves, rtol=1e-4, atol=1e-8)


def test_a_filter_for_each_rank_is_a_sum_of_deconvolutions(backbone, rng):
    enable_dcft(backbone, 4, rank=2)
    replace_adapters(backbone, FilterPerRank)
    layer = dcft_layers(backbone)["transformer_layer_0/feedforward_intermediate_dense"]
    form = layer.dcft_adapter
    form.filters.assign(rng.normal(size=form.filters.shape))
    a, b, filters = np.array(form.a), np.array(form.b), np.array(form.filters)
    expected = sum(np.kron(np.outer(a[:, i], b[i]), filters[i]) for i in range(2))
    np.testing.assert_allclose(increment_of(layer), form.settings.scale * expected, atol=1e-6)


def test_asking_for_another_method_where_it_is_not_run_is_an_error(monkeypatch, capsys):
    arguments = ["--data", "none", "--tasks", "rte", "--methods", "VeRA, rank 16"]
    monkeypatch.setattr(sys, "argv", ["long_training.py", *arguments])
    with pytest.raises(SystemExit):
        long_training.main()
    assert "other methods and forms are run on sst2 and xquad" in capsys.readouterr().err


@pytest.mark.parametrize(("gain", "leads"), [(0.0, False), (0.004, False), (0.02, True)])
def test_a_form_is_run_on_the_second_task_if_it_leads_on_the_first(gain, leads):
    two = "DCFT, kernel size 2"
    measured = [
        line for line in long_training.lines_of(long_training.RESULTS) if line["task"] == "sst2"
    ]
    form = "DCFT, kernel size 8, rank 3, a filter each"
    lines = [line for line in measured if line["method"] in long_training.REFERENCES]
    for line in [line for line in lines if line["method"] == two]:
        score = line["validation"]["score"] + gain
        validation = line["validation"] | {"score": score}
        lines.append(
            line | {"method": form, "trainable_parameters": 23_714, "validation": validation}
        )
    assert long_training.leads(form, lines) == leads
    one_seed = [line for line in lines if line["method"] != form or line["seed"] == 0]
    assert not long_training.leads(form, one_seed)
    assert not long_training.leads("DCFT, kernel size 8, B from zero", lines)
