"""Keras's harness for layers, told how many variables of each kind a DCFT layer has."""


class Harness:
    def run_layer_test(self, cls, init_kwargs, **expected):
        trainable = expected.pop("expected_num_trainable_weights")
        frozen = expected.pop("expected_num_non_trainable_weights", 0)
        if "kernel_regularizer" in init_kwargs:  # what is frozen is not penalized
            expected["expected_num_losses"] = 0
        scales = 6 if "float8" in str(init_kwargs.get("dtype")) else 0
        super().run_layer_test(
            cls,
            init_kwargs,
            expected_num_trainable_weights=3 + scales,
            expected_num_non_trainable_weights=trainable - scales + frozen,
            **expected,
        )
