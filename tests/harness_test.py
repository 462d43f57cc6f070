"""Keras's test harness for layers on our classes."""

from harness import Harness
from keras.src import testing

from keras_dcft import DCFTDense, DCFTEinsumDense, DCFTEmbedding, DCFTReversibleEmbedding


class EmbeddingTest(Harness, testing.TestCase):
    def test_embedding_layers(self):
        for cls in (DCFTEmbedding, DCFTReversibleEmbedding):
            self.run_layer_test(
                cls,
                {"input_dim": 14, "output_dim": 13, "kernel_size": 4, "rank": 2},
                input_shape=(2, 3),
                input_dtype="int32",
                expected_output_shape=(2, 3, 13),
                expected_num_trainable_weights=1,
                expected_num_losses=0,
                supports_masking=False,
                run_mixed_precision_check=cls is DCFTEmbedding,
                assert_built_after_instantiation=False,
            )


class AdapterTest(Harness, testing.TestCase):
    def test_dense_layers_with_every_setting(self):
        settings = {"kernel_size": 3, "rank": 2, "alpha": 2.0, "dropout": 0.1}
        self.run_layer_test(
            DCFTDense,
            {"units": 10, "activation": "relu", **settings, "orthogonality": 0.1},
            input_shape=(2, 5, 8),
            expected_output_shape=(2, 5, 10),
            expected_num_trainable_weights=2,
            expected_num_seed_generators=1,
            expected_num_losses=2,
            supports_masking=True,
        )
        self.run_layer_test(
            DCFTEinsumDense,
            {"equation": "abc,cde->abde", "output_shape": (5, 3, 4), "bias_axes": "de"} | settings,
            input_shape=(2, 5, 8),
            expected_output_shape=(2, 5, 3, 4),
            expected_num_trainable_weights=2,
            expected_num_seed_generators=1,
            expected_num_losses=0,
            supports_masking=False,  # as EinsumDense
        )
