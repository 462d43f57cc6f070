"""LoRA folders against Hugging Face's own libraries: same logits, same tokens, both ways."""

import json
import re
import warnings

import keras
import keras_hub
import numpy as np
import peft
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from conftest import reads_minilm
from one_backend import only_on
from support.methods import default_preset
from tools import array, writes_transformers

from keras_dcft import (
    activate_dcft,
    dcft_disabled,
    enable_dcft,
    export_to_peft,
    import_from_peft,
    load_dcft_weights,
    merge_dcft,
    remove_dcft,
    save_dcft_weights,
)
from keras_dcft.paths import walk
from keras_dcft.reclassing import matrix_shape_of
from keras_dcft.transformers_names import family_of, modules_of

VOCABULARY = 60
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 36,
    "max_position_embeddings": 32,
    "num_labels": 3,
    "hidden_act": "gelu_new",  # KerasHub's, also for BERT
}
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 36,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**DECODER, "head_dim": 8}
# By name: the class of Transformers without "Config", that of its model, KerasHub's task, and the
# configuration.
FAMILIES = {
    "bert": ("Bert", "BertForSequenceClassification", "BertTextClassifier", ENCODER),
    "roberta": (
        "Roberta",
        "RobertaForSequenceClassification",
        "RobertaTextClassifier",
        {
            **ENCODER,
            "max_position_embeddings": 34,
            "pad_token_id": 1,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu",
        },
    ),
    "distilbert": (
        "DistilBert",
        "DistilBertForSequenceClassification",
        "DistilBertTextClassifier",
        {
            "vocab_size": VOCABULARY,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 36,
            "max_position_embeddings": 32,
            "num_labels": 3,
        },
    ),
    "deberta": (
        "DebertaV2",
        "DebertaV2ForSequenceClassification",
        "DebertaV3TextClassifier",
        {
            **ENCODER,
            "relative_attention": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "type_vocab_size": 0,
            "position_biased_input": False,
            "pooler_hidden_size": 16,
            "hidden_act": "gelu",
            "pooler_hidden_act": "gelu",
        },
    ),
    "albert": (
        "Albert",
        "AlbertForSequenceClassification",
        "AlbertTextClassifier",
        {**ENCODER, "embedding_size": 8, "attention_probs_dropout_prob": 0.0},
    ),
    "vit": (
        "ViT",
        "ViTForImageClassification",
        "ViTImageClassifier",
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 36,
            "image_size": 8,
            "patch_size": 4,
            "layer_norm_eps": 1e-6,
            "num_labels": 3,
        },
    ),
    "gpt2": (
        "GPT2",
        "GPT2LMHeadModel",
        "GPT2CausalLM",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "llama3": (
        "Llama",
        "LlamaForCausalLM",
        "Llama3CausalLM",
        {**DECODER, "tie_word_embeddings": True},
    ),
    "mistral": ("Mistral", "MistralForCausalLM", "MistralCausalLM", DECODER),
    "qwen2": (
        "Qwen2",
        "Qwen2ForCausalLM",
        "QwenCausalLM",
        {**DECODER, "tie_word_embeddings": True},
    ),
    "qwen3": (
        "Qwen3",
        "Qwen3ForCausalLM",
        "Qwen3CausalLM",
        {**GEMMA, "tie_word_embeddings": True},
    ),
    "gemma": ("Gemma", "GemmaForCausalLM", "GemmaCausalLM", GEMMA),
    "gemma2": (
        "Gemma2",
        "Gemma2ForCausalLM",
        "GemmaCausalLM",
        {**GEMMA, "query_pre_attn_scalar": 8},
    ),
    "gemma3": (
        "Gemma3Text",
        "Gemma3ForCausalLM",
        "Gemma3CausalLM",
        {**GEMMA, "query_pre_attn_scalar": 8},
    ),
    "phi3": ("Phi3", "Phi3ForCausalLM", "Phi3CausalLM", DECODER),
}
LANGUAGE_MODELS = [name for name, family in FAMILIES.items() if "CausalLM" in family[2]]


class Pair:
    """A random model in a folder of Transformers, and the same as a KerasHub task."""

    def __init__(self, name, folder, **changes):
        config, self.cls, task, arguments = FAMILIES[name]
        arguments = {**arguments, **changes}
        torch.manual_seed(0)
        model = getattr(transformers, self.cls)(
            getattr(transformers, f"{config}Config")(**arguments)
        )
        for parameter in model.parameters():
            # KerasHub reads Mistral's weights in float16.
            parameter.data = (0.3 * torch.randn_like(parameter)).half().float()
        if name == "roberta":  # of which KerasHub leaves out the one token type
            model.roberta.embeddings.token_type_embeddings.weight.data.zero_()
        self.folder = folder / "base"
        model.save_pretrained(self.folder)
        self.task_class = getattr(keras_hub.models, task, None)
        if self.task_class is None:
            pytest.skip(f"this KerasHub has no {task}")
        self.is_classifier = "Classifier" in task
        backbone = {"deberta": deberta, "phi3": phi3}.get(name, self.from_preset)(model)
        head = {"num_classes": 3} if self.is_classifier else {}
        self.task = self.task_class(backbone=backbone, preprocessor=None, **head)
        rng = np.random.default_rng(0)
        if name == "vit" and "vit_encoder/transformer_block_1" not in walk(backbone):
            pytest.skip("this KerasHub has other names for ViT's blocks, whose export is refused")
        if name == "vit":
            self.inputs = rng.normal(size=(2, 8, 8, 3)).astype("float32")
            self.theirs = {"pixel_values": torch.tensor(self.inputs.transpose(0, 3, 1, 2))}
            return
        tokens = rng.integers(3, VOCABULARY, (2, 7))
        mask = np.ones_like(tokens)
        if self.is_classifier:
            mask[0, 5:] = 0
        self.inputs = {"token_ids": tokens, "padding_mask": mask}
        if "segment_ids" in backbone.input:
            self.inputs["segment_ids"] = np.zeros_like(tokens)
        self.theirs = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}

    def from_preset(self, _):
        try:
            return self.task_class.backbone_cls.from_preset(str(self.folder))
        except (KeyError, ValueError, safetensors.SafetensorError) as error:
            if reads_minilm():
                raise
            pytest.skip(
                f"this KerasHub does not read this small {self.cls}: {type(error).__name__}"
            )

    def logits(self):
        """KerasHub's."""
        return array(self.task(self.inputs))

    def transformers_model(self, lora=None):
        """The model of Transformers, alone or with a LoRA folder that fits it in every name."""
        model = getattr(transformers, self.cls).from_pretrained(self.folder)
        if lora is None:
            return model.eval()
        model = peft.PeftModel.from_pretrained(model, lora)
        # Loading again tells what the folder lacks, and what it has too much.
        loaded = model.load_adapter(lora, "again")
        assert not loaded.missing_keys
        assert not loaded.unexpected_keys
        return model.eval()

    def their_logits(self, lora=None):
        with torch.no_grad():
            return self.transformers_model(lora)(**self.theirs).logits.numpy()


def trained(task):
    """A task with random adapters and a random head."""
    rng = np.random.default_rng(1)
    for variable in task.trainable_variables:
        variable.assign(rng.normal(size=variable.shape, scale=0.3))
    return task


def state_of(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def assign(backbone, state, module_prefix, others):
    """Weights by the names of the modules, and all others by paths of layers."""
    layers = walk(backbone)
    family = family_of(backbone)
    for module, paths in modules_of(family.modules, layers).items():
        kernel = state[f"{module_prefix}{module}.weight"]
        if "embed" in module:
            layers[paths[0]].embeddings.assign(kernel)
            continue
        row = 0
        for path in paths:
            variable = layers[path].kernel
            columns = matrix_shape_of(layers[path])[1]
            variable.assign(kernel[row : row + columns].T.reshape(variable.shape))
            row += columns
            if layers[path].bias is not None:
                bias = state[f"{module_prefix}{module}.bias"]
                layers[path].bias.assign(bias.reshape(layers[path].bias.shape))
    for path, names in others.items():
        layers[path].set_weights([state[module_prefix + name] for name in names])
    return backbone


def deberta(model):
    """KerasHub reads no DeBERTa of Transformers itself."""
    backbone = keras_hub.models.DebertaV3Backbone(
        vocabulary_size=VOCABULARY,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=36,
        max_sequence_length=32,
        bucket_size=8,
    )

    def norm(name):
        return [f"{name}.LayerNorm.weight", f"{name}.LayerNorm.bias"]

    others = {"embeddings_layer_norm": norm("embeddings")}
    for n in range(2):
        layer = f"disentangled_attention_encoder_layer_{n}"
        module = f"encoder.layer.{n}"
        others[f"{layer}/self_attention_layer_norm"] = norm(f"{module}.attention.output")
        others[f"{layer}/feedforward_layer_norm"] = norm(f"{module}.output")
    state = state_of(model)
    backbone.relative_embeddings.set_weights(
        [
            state["deberta.encoder.rel_embeddings.weight"],
            *(state[f"deberta.{name}"] for name in norm("encoder")),
        ]
    )
    return assign(backbone, state, "deberta.", others)


def phi3(model):
    """KerasHub reads no Phi-3 of Transformers itself."""
    backbone = keras_hub.models.Phi3Backbone(
        vocabulary_size=VOCABULARY,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=16,
        intermediate_dim=36,
        max_sequence_length=32,
    )
    others = {"sequence_output_layernorm": ["norm.weight"]}
    for n in range(2):
        layer, module = f"transformer_layer_{n}", f"layers.{n}"
        others[f"{layer}/pre_attention_layernorm"] = [f"{module}.input_layernorm.weight"]
        others[f"{layer}/post_attention_layernorm"] = [f"{module}.post_attention_layernorm.weight"]
    state = state_of(model)
    backbone.token_embedding.reverse_embeddings.assign(state["lm_head.weight"].T)
    return assign(backbone, state, "model.", others)


def generated(task, tokens):
    """The tokens that KerasHub generates greedily after these."""
    length = tokens.shape[1]
    padding = ((0, 0), (0, 5))
    prompts = {
        "token_ids": np.pad(tokens, padding),
        "padding_mask": np.pad(np.ones_like(tokens), padding),
    }
    task.compile(sampler="greedy")
    if isinstance(
        task, getattr(keras_hub.models, "Gemma3CausalLM", ())
    ):  # whose `generate` needs a preprocessor
        outputs = task.generate_step(prompts, stop_token_ids=None)
    else:
        outputs = task.generate(prompts, stop_token_ids=None)
    return array(outputs["token_ids"])[:, length:]


def generated_there(model, inputs):
    model.generation_config.eos_token_id = None
    outputs = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return outputs.numpy()[:, inputs["input_ids"].shape[1] :]


# What a layer's weights are called and how they lie has nothing to do with the backend: all of it
# on PyTorch, and elsewhere an encoder, a decoder and a model of pictures.
IS_TORCH = keras.backend.backend() == "torch"
FAMILIES_HERE = [name for name in FAMILIES if IS_TORCH or name in ("bert", "gpt2", "vit")]


@pytest.mark.parametrize("name", FAMILIES_HERE)
def test_an_adapter_computes_the_same_in_transformers(name, tmp_path):
    pair = Pair(name, tmp_path)
    base = pair.logits()
    trained(enable_dcft(pair.task, kernel_size=3))
    expected = pair.logits()
    export_to_peft(pair.task, tmp_path / "lora")
    np.testing.assert_allclose(pair.their_logits(tmp_path / "lora"), expected, atol=1e-4)
    assert np.abs(expected - base).max() > 100e-4
    if name in LANGUAGE_MODELS:
        theirs = generated_there(pair.transformers_model(tmp_path / "lora"), pair.theirs)
        np.testing.assert_array_equal(generated(pair.task, pair.inputs["token_ids"]), theirs)
    plain = remove_dcft(pair.task)
    import_from_peft(plain, tmp_path / "lora")
    assert set(plain.dcft_config["layers"].values()) == {1}
    np.testing.assert_allclose(pair.logits(), expected, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES_HERE)
def test_a_lora_of_peft_computes_the_same_here(name, tmp_path):
    pair = Pair(name, tmp_path)
    export_to_peft(enable_dcft(pair.task, kernel_size=3), tmp_path / "names")
    remove_dcft(pair.task)
    names = json.loads((tmp_path / "names" / "adapter_config.json").read_text())
    model = trained_by_peft(
        pair,
        r=3,
        lora_alpha=6,
        target_modules=names["target_modules"],
        modules_to_save=names["modules_to_save"],
        fan_in_fan_out=names["fan_in_fan_out"],
        rank_pattern={"0." + names["target_modules"][0].rpartition("0.")[2]: 5},
        use_rslora=name in ("bert", "gpt2"),
    )
    model.save_pretrained(tmp_path / "lora")
    with torch.no_grad():
        expected = model(**pair.theirs).logits.numpy()
    base = pair.logits()
    assert import_from_peft(pair.task, tmp_path / "lora") is pair.task
    np.testing.assert_allclose(pair.logits(), expected, atol=1e-4)
    assert np.abs(expected - base).max() > 100e-4


def trained_by_peft(pair, **settings):
    """Transformers' model with a LoRA whose values are random, as if it had been trained."""
    config = peft.LoraConfig(**settings)
    model = peft.get_peft_model(pair.transformers_model(), config).eval()
    for key, parameter in model.named_parameters():
        if "lora_" in key or "modules_to_save" in key:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model


# What is adapted in the layers, sizes and names that a folder may have.
CASES = {
    "a few layers": {"target_layers": "_1/.*(query|value)$"},
    "several sizes": {"kernel_size": {"query|key": 2, "": 3}},
    "several ranks": {"rank": 2, "kernel_size": {"feedforward|ffw": 1, "": 4}},
    "embeddings": {"target_layers": "token_embedding|query|value"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "name", ["bert", "gpt2", "llama3", "mistral", "gemma"] if IS_TORCH else ["bert"]
)
def test_any_choice_of_layers_fits(name, case, tmp_path):
    pair = Pair(name, tmp_path)
    trained(enable_dcft(pair.task, **{"kernel_size": 3, **CASES[case]}))
    expected = pair.logits()
    export_to_peft(pair.task, tmp_path / "lora")
    np.testing.assert_allclose(pair.their_logits(tmp_path / "lora"), expected, atol=1e-4)
    import_from_peft(remove_dcft(pair.task), tmp_path / "lora")
    np.testing.assert_allclose(pair.logits(), expected, atol=1e-5)


def test_what_stands_in_a_folder(tmp_path):
    pair = Pair("bert", tmp_path)
    trained(enable_dcft(pair.task, kernel_size=3, rank=2, dropout=0.1))
    export_to_peft(pair.task, tmp_path / "lora", base="someone/bert")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/bert"
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (6, 6, {})
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    assert config["lora_dropout"] == 0.1
    assert config["target_modules"] == ["query", "key", "value", "dense"]
    tensors = safetensors.numpy.load_file(tmp_path / "lora" / "adapter_model.safetensors")
    prefix = "base_model.model."
    query = f"{prefix}bert.encoder.layer.0.attention.self.query.lora_"
    layer = walk(pair.task.backbone)["transformer_layer_0/self_attention_layer/query"]
    product = tensors[f"{query}B.weight"] @ tensors[f"{query}A.weight"]
    increment = array(layer.dcft_increment()).reshape(16, 16)
    np.testing.assert_allclose(product.T, increment, atol=1e-6)
    np.testing.assert_array_equal(
        tensors[f"{prefix}classifier.weight"], array(pair.task.layers[-1].kernel).T
    )
    assert len(tensors) == 2 * (2 * 6 + 1) + 2


def test_a_head_beside(tmp_path):
    pair = Pair("bert", tmp_path)
    trained(enable_dcft(pair.task, kernel_size=3))
    export_to_peft(pair.task, tmp_path / "lora", head="separate")
    weights = safetensors.numpy.load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert all(".lora_" in key for key in weights)
    model = pair.transformers_model(tmp_path / "lora")
    head = safetensors.torch.load_file(tmp_path / "lora" / "head.safetensors")
    assert not model.base_model.model.load_state_dict(head, strict=False).unexpected_keys
    with torch.no_grad():
        np.testing.assert_allclose(model(**pair.theirs).logits, pair.logits(), atol=1e-4)
    export_to_peft(pair.task, tmp_path / "lora")
    assert not (tmp_path / "lora" / "head.safetensors").exists()


def test_a_backbone_alone(tmp_path):
    pair = Pair("bert", tmp_path)
    backbone = trained(enable_dcft(pair.task.backbone, kernel_size=3))
    export_to_peft(backbone, tmp_path / "lora")
    model = transformers.BertModel.from_pretrained(pair.folder)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    with torch.no_grad():
        theirs = model(**pair.theirs).pooler_output
    ours = array(backbone(pair.inputs)["pooled_output"])
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    import_from_peft(remove_dcft(backbone), tmp_path / "lora")
    np.testing.assert_allclose(array(backbone(pair.inputs)["pooled_output"]), ours, atol=1e-5)


def test_several_adapters(tmp_path):
    pair = Pair("bert", tmp_path)
    task = trained(enable_dcft(pair.task, kernel_size=3))
    enable_dcft(task, kernel_size=4, name="legal", target_layers="query")
    with pytest.raises(ValueError, match="'default', 'legal'"):
        export_to_peft(task, tmp_path / "lora")
    trained(activate_dcft(task, "legal"))
    expected = pair.logits()
    activate_dcft(task, "default")
    export_to_peft(task, tmp_path / "lora", "legal")
    np.testing.assert_allclose(pair.their_logits(tmp_path / "lora"), expected, atol=1e-4)
    with pytest.raises(ValueError, match="Received: name='legal'"):
        import_from_peft(task, tmp_path / "lora", "legal")
    before = pair.logits()
    import_from_peft(task, tmp_path / "lora", "again")
    np.testing.assert_array_equal(pair.logits(), before)
    activate_dcft(task, "again")
    np.testing.assert_allclose(pair.logits(), expected, atol=1e-5)
    save_dcft_weights(task, tmp_path / "again.dcft.safetensors", name="again")
    load_dcft_weights(remove_dcft(task), tmp_path / "again.dcft.safetensors")
    np.testing.assert_allclose(pair.logits(), expected, atol=1e-5)


def test_what_was_trained_is_written_while_it_is_switched_off(tmp_path):
    pair = Pair("llama3", tmp_path)
    trained(enable_dcft(pair.task, kernel_size=3))
    expected = pair.logits()
    with dcft_disabled(pair.task):
        export_to_peft(pair.task, tmp_path / "lora")
    np.testing.assert_allclose(pair.their_logits(tmp_path / "lora"), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["distilbert", "gpt2", "phi3"] if IS_TORCH else ["gpt2"])
def test_round_trips_merge_to_the_same_base(name, tmp_path):
    pair = Pair(name, tmp_path)
    trained(enable_dcft(pair.task, kernel_size=3, rank=2))
    export_to_peft(pair.task, tmp_path / "lora")
    save_dcft_weights(pair.task, tmp_path / "a.dcft.safetensors")
    merged = [array(v) for v in merge_dcft(pair.task).weights]
    other = Pair(name, tmp_path)
    import_from_peft(other.task, tmp_path / "lora")
    for ours, theirs in zip(merged, merge_dcft(other.task).weights):
        np.testing.assert_allclose(ours, array(theirs), atol=1e-6)


def test_quantized_bases_keep_their_adapter(tmp_path):
    pair = Pair("bert", tmp_path)
    trained(enable_dcft(pair.task, kernel_size=3))
    export_to_peft(pair.task, tmp_path / "lora")
    pair.task.backbone.quantize("int8")
    export_to_peft(pair.task, tmp_path / "quantized")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("lora", "quantized")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_several_ranks_are_warned_of(tmp_path):
    pair = Pair("gpt2", tmp_path)
    enable_dcft(pair.task, kernel_size=3)
    with pytest.warns(UserWarning, match="several ranks, 3, 9"):
        export_to_peft(pair.task, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (9, 9)
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert set(config["rank_pattern"].values()) == {3}


def test_large_ranks_are_warned_of(tmp_path):
    pair = Pair("bert", tmp_path)
    enable_dcft(pair.task, kernel_size=16, target_layers="query")
    enable_dcft(pair.task, kernel_size=16, rank=2, target_layers="query", name="large")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export_to_peft(pair.task, tmp_path / "16", "default")
    with pytest.warns(UserWarning, match="up to 32.*--max-lora-rank 32"):
        export_to_peft(pair.task, tmp_path / "32", "large")


def around(backbone):
    features = backbone(backbone.input)["pooled_output"]
    return keras.Model(backbone.input, keras.layers.Dense(3)(features))


def with_trained_norms(pair):
    return enable_dcft(pair.task, kernel_size=3, trainable_layers="layer_norm")


def with_a_bias_by_hand(pair):
    enable_dcft(pair.task, kernel_size=3)
    pair.task.backbone.get_layer("pooled_dense").bias.trainable = True
    return pair.task


def diverged(pair):
    enable_dcft(pair.task, kernel_size=3)
    pair.task.backbone.get_layer("pooled_dense").dcft_a.assign(np.full((6, 1), np.nan))
    return pair.task


def masked(pair):
    task = keras_hub.models.BertMaskedLM(backbone=pair.task.backbone, preprocessor=None)
    return enable_dcft(task, kernel_size=3)


REFUSED = {
    "a plain model": (lambda pair: pair.task, "Call `enable_dcft"),
    "another architecture": (
        lambda pair: enable_dcft(keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])),
        "KerasHub task or backbone of a family",
    ),
    "a head of one's own": (
        lambda pair: enable_dcft(around(pair.task.backbone), kernel_size=3),
        "KerasHub task or backbone of a family",
    ),
    "a head of one's own around an adapted backbone": (
        lambda pair: around(enable_dcft(pair.task.backbone, kernel_size=3)),
        "pass the backbone",
    ),
    "layers trained in full": (with_trained_norms, "trained in full.*layer_norm"),
    "a bias trained by hand": (with_a_bias_by_hand, "trained in full.*pooled_dense/1.bias"),
    "a head that Transformers has otherwise": (masked, "Pass `model.backbone`"),
    "a diverged adapter": (diverged, "NaN or infinity in 'bert_backbone/pooled_dense/dcft_a'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_in_a_folder_is_refused(case, tmp_path):
    make, message = REFUSED[case]
    model = make(Pair("bert", tmp_path))
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        export_to_peft(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_bad_arguments(tmp_path):
    pair = Pair("bert", tmp_path)
    enable_dcft(pair.task, kernel_size=3)
    with pytest.raises(ValueError, match="Received: head='none'"):
        export_to_peft(pair.task, tmp_path / "lora", head="none")
    with pytest.raises(FileNotFoundError, match="Make the parent folder first"):
        export_to_peft(pair.task, tmp_path / "no" / "lora")
    with pytest.raises(TypeError, match=r"must be a keras\.Model"):
        import_from_peft("bert", tmp_path / "lora")
    with pytest.raises(FileNotFoundError):
        import_from_peft(remove_dcft(pair.task), tmp_path / "lora")


def changed(**settings):
    def change(config, tensors):
        config.update(settings)

    return change


def without(part):
    def change(config, tensors):
        for key in [key for key in tensors if part in key]:
            del tensors[key]

    return change


def renamed(old, new):
    def change(config, tensors):
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def replaced(part, value):
    def change(config, tensors):
        key = next(key for key in tensors if part in key)
        tensors[key] = value(tensors[key])

    return change


BROKEN = {
    "another kind": (changed(peft_type="LOHA"), "peft_type='LOHA'"),
    "DoRA": (changed(use_dora=True), "use_dora=True"),
    "biases": (changed(bias="lora_only"), "bias='lora_only'"),
    "biases of LoRA": (changed(lora_bias=True), "lora_bias=True"),
    "parameters": (changed(target_parameters=["a"]), "target_parameters="),
    "what a later PEFT has": (changed(use_something="new"), "use_something='new'"),
    "a changed base": (changed(init_lora_weights="pissa_niter_4"), "changes the base"),
    "another rank": (changed(r=5), "rank 5 for .*the weights have 3 and 3"),
    "no B": (without("query.lora_B"), "A alone of the LoRA of '.*query'"),
    "no layer": (without("layer.1.attention.self.key"), "'encoder.layer.1.attention.self.key'"),
    "no head": (without("classifier"), "incomplete.*'classifier' among `modules_to_save`"),
    "no rank": (changed(r=None), "`r` must be a number above 0.*r=None"),
    "no alpha": (changed(lora_alpha="16"), "`lora_alpha` must be.*lora_alpha='16'"),
    "a pattern that is none": (changed(rank_pattern={"(": 3}), r"'\(' is no regular expression"),
    "excluded that are none": (changed(exclude_modules="("), r"'\(' is no regular expression"),
    "targets that are none": (changed(target_modules="("), r"'\(' is no regular expression"),
    "a convolution": (replaced("lora_A", lambda a: a[..., None, None]), "as of a convolution"),
    "float8": (replaced("lora_A", lambda a: a.astype("int8")), "in I8"),
    "no head's bias": (without("classifier.bias"), "only 'classifier.weight'"),
    "no LoRA": (without("lora_"), "incomplete|no module"),
    "more layers": (renamed("layer.1.", "layer.7."), "layer.7"),
    "another family": (renamed("self.query", "self.q_proj"), "q_proj"),
    "another head": (renamed("classifier", "score"), "'score.(weight|bias)'"),
    "another width": (replaced("lora_A", lambda a: a[:, :-1]), "15 inputs"),
    "NaN": (replaced("lora_B", lambda a: a * np.nan), "NaN or infinity in '.*lora_B"),
    "another number of classes": (
        replaced("classifier.weight", lambda a: a[:-1]),
        "trained/logits/0.kernel",
    ),
}


@pytest.mark.parametrize("case", [*BROKEN, "no JSON", "no safetensors"])
def test_folders_that_do_not_fit_are_refused(case, tmp_path):
    pair = Pair("bert", tmp_path)
    before, kind = pair.logits(), type(pair.task)
    folder = tmp_path / "lora"
    export_to_peft(trained(enable_dcft(pair.task, kernel_size=3)), folder)
    pair.task = Pair("bert", tmp_path).task
    pair.task.layers[-1].set_weights([np.ones((16, 3)), np.ones(3)])
    before = pair.logits()
    config_path, weights_path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if case == "no JSON":
        config_path.write_text("[1]")
        message = "damaged"
    elif case == "no safetensors":
        weights_path.write_bytes(weights_path.read_bytes()[:-100])
        message = "damaged"
    else:
        change, message = BROKEN[case]
        config = json.loads(config_path.read_text())
        tensors = safetensors.numpy.load_file(weights_path)
        change(config, tensors)
        config_path.write_text(json.dumps(config))
        tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
        safetensors.numpy.save_file(tensors, weights_path)
    with pytest.raises(ValueError, match=message):
        import_from_peft(pair.task, folder)
    assert type(pair.task) is kind
    np.testing.assert_array_equal(pair.logits(), before)


def test_weights_of_torchs_own_format_are_named(tmp_path):
    pair = Pair("bert", tmp_path)
    export_to_peft(enable_dcft(pair.task, kernel_size=3), tmp_path / "lora")
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"adapter_model\.bin alone"):
        import_from_peft(remove_dcft(pair.task), tmp_path / "lora")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folders_in_low_precision(dtype, tmp_path):
    pair = Pair("llama3", tmp_path)
    model = trained_by_peft(pair, r=3, target_modules=["q_proj", "down_proj"])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    with torch.no_grad():
        expected = model(**pair.theirs).logits.numpy()
    model.to(dtype).save_pretrained(tmp_path / "lora")
    tensors = safetensors.torch.load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    if dtype == torch.bfloat16:  # the base's weights, too, have other values in it
        for variable in pair.task.weights:
            variable.assign(torch.tensor(array(variable)).to(dtype).float().numpy())
    import_from_peft(pair.task, tmp_path / "lora")
    np.testing.assert_allclose(pair.logits(), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "mistral", "gemma"])
def test_embeddings_that_peft_writes_beside_are_compared(name, tmp_path):
    pair = Pair(name, tmp_path)
    embeddings = "word_embeddings" if name == "bert" else "embed_tokens"
    query = "query" if name == "bert" else "q_proj"
    # Tied ones may not be adapted on one side alone; PEFT writes them whenever it is told to.
    targets = [query] if name == "gemma" else [query, embeddings]
    head = ["classifier"] if name == "bert" else None
    model = trained_by_peft(pair, r=2, target_modules=targets, modules_to_save=head)
    with torch.no_grad():
        expected = model(**pair.theirs).logits.numpy()
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    path = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    [key] = [key for key in tensors if embeddings in key and "lora" not in key]
    assert name == "gemma" or key.endswith(f"{embeddings}.base_layer.weight")
    tensors[key] += 0.1
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "adapter_config.json").write_bytes(
        (tmp_path / "lora" / "adapter_config.json").read_bytes()
    )
    safetensors.numpy.save_file(tensors, changed / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"into the base that it was trained on.*{embeddings}"):
        import_from_peft(pair.task, changed)
    import_from_peft(pair.task, tmp_path / "lora")
    np.testing.assert_allclose(pair.logits(), expected, atol=1e-4)


def test_names_of_an_older_transformers(tmp_path):
    pair = Pair("vit", tmp_path)
    trained(enable_dcft(pair.task, kernel_size=3))
    expected = pair.logits()
    folder = tmp_path / "lora"
    export_to_peft(pair.task, folder)
    older = {
        r"layers\.(\d+)\.attention\.(q|k|v)_proj": r"encoder.layer.\1.attention.attention.\2",
        r"layers\.(\d+)\.attention\.o_proj": r"encoder.layer.\1.attention.output.dense",
        r"layers\.(\d+)\.mlp\.fc1": r"encoder.layer.\1.intermediate.dense",
        r"layers\.(\d+)\.mlp\.fc2": r"encoder.layer.\1.output.dense",
        r"attention\.attention\.q\.": "attention.attention.query.",
        r"attention\.attention\.k\.": "attention.attention.key.",
        r"attention\.attention\.v\.": "attention.attention.value.",
    }
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    for pattern, name in older.items():
        tensors = {re.sub(pattern, name, key): value for key, value in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = ["query", "key", "value", "dense"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    import_from_peft(remove_dcft(pair.task), folder)
    np.testing.assert_allclose(pair.logits(), expected, atol=1e-5)


def test_peft_would_merge_tied_embeddings_twice(tmp_path):
    pair = Pair("llama3", tmp_path)
    trained(enable_dcft(pair.task, kernel_size=3, target_layers="token_embedding|query"))
    with pytest.warns(UserWarning, match="adds the increment to the one weight twice"):
        export_to_peft(pair.task, tmp_path / "lora")
    merged = pair.transformers_model(tmp_path / "lora").merge_and_unload()
    with torch.no_grad():
        assert np.abs(merged(**pair.theirs).logits.numpy() - pair.logits()).max() > 0.1


def classifier(pair, **arguments):
    return pair.task_class(
        backbone=pair.task.backbone, preprocessor=None, num_classes=3, **arguments
    )


def test_heads_that_transformers_has_not(tmp_path):
    pair = Pair("roberta", tmp_path)
    wide = classifier(pair, hidden_dim=20)
    with pytest.raises(ValueError, match=r"Received: .*hidden_dim=20"):
        export_to_peft(enable_dcft(wide, kernel_size=3), tmp_path / "lora")
    pair = Pair("bert", tmp_path)
    task = enable_dcft(classifier(pair, activation="softmax"), kernel_size=3)
    with pytest.warns(UserWarning, match="gives logits, without the 'softmax' of 'logits'"):
        export_to_peft(task, tmp_path / "lora")
    task.quantize("int8")
    with pytest.raises(ValueError, match=r"quantize `model\.backbone` instead"):
        export_to_peft(task, tmp_path / "quantized")
    assert not (tmp_path / "quantized").exists()


def test_a_gemma_that_sees_is_refused(tmp_path):
    vision = {
        "image_size": 16,
        "patch_size": 4,
        "num_heads": 2,
        "hidden_dim": 8,
        "num_layers": 1,
        "intermediate_dim": 8,
        "output_dim": 16,
        "pool_size": 2,
    }
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=30,
        image_size=16,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=24,
        head_dim=8,
        vision_encoder=keras_hub.layers.Gemma3VisionEncoder(**vision)
        if hasattr(keras_hub.layers, "Gemma3VisionEncoder")
        else pytest.importorskip(
            "keras_hub.src.models.gemma3.gemma3_vision_encoder"
        ).Gemma3VisionEncoder(**vision),
    )
    enable_dcft(backbone, kernel_size=2, target_layers="query")
    with pytest.raises(ValueError, match="Gemma 3 of text alone"):
        export_to_peft(backbone, tmp_path / "lora")


def test_a_users_own_file_is_not_deleted(tmp_path):
    pair = Pair("bert", tmp_path)
    enable_dcft(pair.task, kernel_size=3)
    folder = tmp_path / "lora"
    folder.mkdir()
    safetensors.numpy.save_file({"mine": np.ones(3, "float32")}, folder / "head.safetensors")
    export_to_peft(pair.task, folder)
    assert (folder / "head.safetensors").exists()


def test_an_export_that_fails_leaves_the_folder_as_it_was(tmp_path):
    pair = Pair("bert", tmp_path)
    folder = tmp_path / "lora"
    export_to_peft(trained(enable_dcft(pair.task, kernel_size=3)), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "head.safetensors").mkdir()
    pair.task.layers[-1].bias.assign(np.ones(3))
    with pytest.raises(IsADirectoryError):
        export_to_peft(pair.task, folder, head="separate")
    (folder / "head.safetensors").rmdir()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_tied_embeddings_are_adapted_on_both_sides_or_not_at_all(tmp_path):
    pair = Pair("llama3", tmp_path)
    model = trained_by_peft(pair, r=2, target_modules=["q_proj", "embed_tokens"])
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    with pytest.raises(ValueError, match="one weight for its input and its output"):
        import_from_peft(pair.task, tmp_path / "lora")


# Of Gemma, KerasHub exports models with one key and value head alone, and Gemma 2 as Gemma.
AT_HOME = {"gpt2": {}, "llama3": {}, "mistral": {}, "qwen2": {}, "gemma3": {}} | {
    "gemma": {"num_key_value_heads": 1, "head_dim": 4}
}


@pytest.mark.parametrize("name", AT_HOME if IS_TORCH else ["gpt2"])
def test_a_merged_model_goes_home_to_transformers(name, tmp_path):
    pair = Pair(name, tmp_path, **AT_HOME[name])
    if not writes_transformers(pair.task.backbone, tmp_path / "plain"):
        pytest.skip(f"this KerasHub writes no {pair.cls} for Transformers")
    enable_dcft(pair.task, kernel_size=3, target_layers="token_embedding|query|value|output")
    trained(pair.task)
    expected = pair.logits()
    pair.folder = tmp_path / "home"
    with pytest.raises(ValueError, match="Call `merge_dcft"):
        pair.task.export_to_transformers(str(pair.folder))
    with pytest.raises(ValueError, match="Call `merge_dcft"):
        pair.task.backbone.export_to_transformers(str(pair.folder))
    assert not pair.folder.exists()
    merge_dcft(pair.task).export_to_transformers(str(pair.folder))
    np.testing.assert_allclose(pair.their_logits(), expected, atol=1e-4)


@pytest.mark.real
@only_on("torch")
def test_real_weights(tmp_path):
    preset = str(default_preset())
    task = keras_hub.models.BertTextClassifier.from_preset(preset, num_classes=2)
    trained(enable_dcft(task, kernel_size=8))
    for variable in task.trainable_variables:
        variable.assign(0.1 * variable)
    inputs = task.preprocessor(["it was a great film", "a bad one, alas", "what a day"])
    expected = array(task(inputs))
    export_to_peft(task, tmp_path / "lora")
    model = transformers.BertForSequenceClassification.from_pretrained(
        preset, num_labels=2, hidden_act="gelu_new"
    )
    model = peft.PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor(array(inputs["token_ids"])).long(),
            attention_mask=torch.tensor(array(inputs["padding_mask"])).long(),
        ).logits
    np.testing.assert_allclose(theirs, expected, atol=1e-4)
    import_from_peft(remove_dcft(task), tmp_path / "lora")
    np.testing.assert_allclose(array(task(inputs)), expected, atol=1e-4)
