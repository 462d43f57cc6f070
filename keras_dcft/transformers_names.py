"""What Hugging Face's Transformers calls the layers of KerasHub's models.

As matrices (contracted axes, output axes) the weights are the same on both sides, rotary embeddings
included. A module of Transformers has the weight of one layer, or those of several, the columns of
one behind those of another.
"""

import dataclasses

import keras

from keras_dcft.hub import is_task, keras_hub


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture on both sides.

    Attributes:
        modules: dict of modules of the backbone to the path of a layer, or a tuple of them; `{n}`
            counts from 0, `{following}` from 1.
        prefix: what modules have before them in a model with a head.
        task_type: PEFT's name for what such a model does.
        heads: dict of KerasHub's tasks, by class name, to dicts of modules to layer paths.
        has_transposed_weights: bool, whether modules hold (in, out) as Keras does (`Conv1D`).
        older_modules: dict, `modules` as they were called before Transformers 5, where otherwise.
    """

    modules: dict
    prefix: str
    task_type: str
    heads: dict
    has_transposed_weights: bool = False
    older_modules: dict = dataclasses.field(default_factory=dict)


OUTPUT_MODULE = "lm_head"  # of a language model; its weight is often that of the input embeddings


def _within(module, path, names) -> dict:
    """Names below a module and below a layer path."""
    return {f"{module}.{name}": f"{path}/{below}" for name, below in names.items()}


def _encoder(module, path, query, output="attention_output") -> dict:
    return _within(
        module,
        path,
        {
            **{
                f"attention.{query.format(name)}": f"self_attention_layer/{name}"
                for name in ("query", "key", "value")
            },
            "attention.output.dense": f"self_attention_layer/{output}",
            "intermediate.dense": "feedforward_intermediate_dense",
            "output.dense": "feedforward_output_dense",
        },
    )


_DECODER_MLP = {
    "mlp.gate_proj": "feedforward_gate_dense",
    "mlp.up_proj": "feedforward_intermediate_dense",
    "mlp.down_proj": "feedforward_output_dense",
}
_LLAMA = {
    "embed_tokens": "token_embedding",
    **_within(
        "layers.{n}",
        "transformer_layer_{n}",
        {
            "self_attn.q_proj": "self_attention/query",
            "self_attn.k_proj": "self_attention/key",
            "self_attn.v_proj": "self_attention/value",
            "self_attn.o_proj": "self_attention/attention_output",
            **_DECODER_MLP,
        },
    ),
}
_GEMMA = {
    "embed_tokens": "token_embedding",
    **_within(
        "layers.{n}",
        "decoder_block_{n}",
        {
            "self_attn.q_proj": "attention/query",
            "self_attn.k_proj": "attention/key",
            "self_attn.v_proj": "attention/value",
            "self_attn.o_proj": "attention/output",
            "mlp.gate_proj": "ffw_gating",
            "mlp.up_proj": "ffw_gating_2",
            "mlp.down_proj": "ffw_linear",
        },
    ),
}


def _decoder(modules, task) -> Family:
    return Family(modules, "model.", "CAUSAL_LM", {task: {}})


# By KerasHub's backbone; a subclass is of the family of its base.
FAMILIES = {
    "BertBackbone": Family(
        {
            "embeddings.word_embeddings": "token_embedding",
            "embeddings.token_type_embeddings": "segment_embedding",
            **_encoder("encoder.layer.{n}", "transformer_layer_{n}", "self.{}"),
            "pooler.dense": "pooled_dense",
        },
        "bert.",
        "SEQ_CLS",
        {"BertTextClassifier": {"classifier": "logits"}},
    ),
    "RobertaBackbone": Family(
        {
            "embeddings.word_embeddings": "embeddings/token_embedding",
            **_encoder("encoder.layer.{n}", "transformer_layer_{n}", "self.{}"),
        },
        "roberta.",
        "SEQ_CLS",
        {
            "RobertaTextClassifier": {
                "classifier.dense": "pooled_dense",
                "classifier.out_proj": "logits",
            }
        },
    ),
    "DistilBertBackbone": Family(
        {
            "embeddings.word_embeddings": "token_and_position_embedding/token_embedding",
            **_within(
                "transformer.layer.{n}",
                "transformer_layer_{n}",
                {
                    "attention.q_lin": "self_attention_layer/query",
                    "attention.k_lin": "self_attention_layer/key",
                    "attention.v_lin": "self_attention_layer/value",
                    "attention.out_lin": "self_attention_layer/attention_output",
                    "ffn.lin1": "feedforward_intermediate_dense",
                    "ffn.lin2": "feedforward_output_dense",
                },
            ),
        },
        "distilbert.",
        "SEQ_CLS",
        {"DistilBertTextClassifier": {"pre_classifier": "pooled_dense", "classifier": "logits"}},
    ),
    "DebertaV3Backbone": Family(
        {
            "embeddings.word_embeddings": "token_embedding",
            **_encoder(
                "encoder.layer.{n}", "disentangled_attention_encoder_layer_{n}", "self.{}_proj"
            ),
        },
        "deberta.",
        "SEQ_CLS",
        {"DebertaV3TextClassifier": {"pooler.dense": "pooled_dense", "classifier": "logits"}},
    ),
    "AlbertBackbone": Family(
        {
            "embeddings.word_embeddings": "token_embedding",
            "embeddings.token_type_embeddings": "segment_embedding",
            "encoder.embedding_hidden_mapping_in": "embedding_projection",
            **_within(
                "encoder.albert_layer_groups.{n}.albert_layers.0",
                "group_{n}_inner_layer_0",
                {
                    "attention.query": "self_attention_layer/query",
                    "attention.key": "self_attention_layer/key",
                    "attention.value": "self_attention_layer/value",
                    "attention.dense": "self_attention_layer/attention_output",
                    "ffn": "feedforward_intermediate_dense",
                    "ffn_output": "feedforward_output_dense",
                },
            ),
            "pooler": "pooled_dense",
        },
        "albert.",
        "SEQ_CLS",
        {"AlbertTextClassifier": {"classifier": "logits"}},
    ),
    "ViTBackbone": Family(
        _within(
            "layers.{n}",
            "vit_encoder/transformer_block_{following}",
            {
                "attention.q_proj": "mha/query",
                "attention.k_proj": "mha/key",
                "attention.v_proj": "mha/value",
                "attention.o_proj": "mha/attention_output",
                "mlp.fc1": "mlp/dense",
                "mlp.fc2": "mlp/dense_1",
            },
        ),
        "vit.",
        "FEATURE_EXTRACTION",
        {"ViTImageClassifier": {"classifier": "predictions"}},
        older_modules=_within(
            "encoder.layer.{n}",
            "vit_encoder/transformer_block_{following}",
            {
                "attention.attention.query": "mha/query",
                "attention.attention.key": "mha/key",
                "attention.attention.value": "mha/value",
                "attention.output.dense": "mha/attention_output",
                "intermediate.dense": "mlp/dense",
                "output.dense": "mlp/dense_1",
            },
        ),
    ),
    "GPT2Backbone": Family(
        {
            "wte": "token_embedding",
            "h.{n}.attn.c_attn": (
                "transformer_layer_{n}/self_attention/query",
                "transformer_layer_{n}/self_attention/key",
                "transformer_layer_{n}/self_attention/value",
            ),
            "h.{n}.attn.c_proj": "transformer_layer_{n}/self_attention/attention_output",
            "h.{n}.mlp.c_fc": "transformer_layer_{n}/feedforward_intermediate_dense",
            "h.{n}.mlp.c_proj": "transformer_layer_{n}/feedforward_output_dense",
        },
        "transformer.",
        "CAUSAL_LM",
        {"GPT2CausalLM": {}},
        has_transposed_weights=True,
    ),
    "LlamaBackbone": Family(
        _LLAMA, "model.", "CAUSAL_LM", {"LlamaCausalLM": {}, "Llama3CausalLM": {}}
    ),
    "MistralBackbone": _decoder(_LLAMA, "MistralCausalLM"),
    "QwenBackbone": _decoder(_LLAMA, "QwenCausalLM"),
    "Qwen3Backbone": _decoder(_LLAMA, "Qwen3CausalLM"),
    "GemmaBackbone": _decoder(_GEMMA, "GemmaCausalLM"),
    "Gemma3Backbone": _decoder(_GEMMA, "Gemma3CausalLM"),
    "Phi3Backbone": _decoder(
        {
            "embed_tokens": "token_embedding",
            "layers.{n}.self_attn.qkv_proj": (
                "transformer_layer_{n}/attention/query",
                "transformer_layer_{n}/attention/key",
                "transformer_layer_{n}/attention/value",
            ),
            "layers.{n}.self_attn.o_proj": "transformer_layer_{n}/attention/output",
            "layers.{n}.mlp.gate_up_proj": (
                "transformer_layer_{n}/feedforward_gate_dense",
                "transformer_layer_{n}/feedforward_intermediate_dense",
            ),
            "layers.{n}.mlp.down_proj": "transformer_layer_{n}/feedforward_output_dense",
        },
        "Phi3CausalLM",
    ),
}


def family_of(backbone) -> Family:
    """The family of a KerasHub backbone; raises ValueError if there is none."""
    for name, family in FAMILIES.items():
        cls = getattr(keras_hub and keras_hub.models, name, None)
        if cls is not None and isinstance(backbone, cls):
            if getattr(backbone, "vision_encoder", None) is not None:
                raise ValueError(
                    "`model` must be a Gemma 3 of text alone: that with a vision encoder has other "
                    f"names in Transformers. Received: model '{backbone.name}'"
                )
            return family
    raise ValueError(
        "`model` must be a KerasHub task or backbone of a family whose names in Transformers are "
        f"known: {', '.join(FAMILIES)}. Received: model '{backbone.name}' of type "
        f"{type(backbone).__name__}"
    )


def modules_of(names, layers) -> dict:
    """The modules of a backbone, each with the paths of its layers.

    Args:
        names: dict, the `modules` of its `Family`, or those of an older Transformers.
        layers: dict of its layers by path.
    """
    modules = {}
    for module, templates in names.items():
        templates = (templates,) if isinstance(templates, str) else templates
        for n in range(len(layers)):
            paths = tuple(template.format(n=n, following=n + 1) for template in templates)
            if not all(path in layers for path in paths):
                break
            modules[module.format(n=n)] = paths
            if "{n}" not in module:
                break
    return modules


def head_of(model, family) -> dict:
    """The modules of a task's head, each with the path of its layer; none for a backbone.

    Raises:
        ValueError: if Transformers has no such head.
    """
    if not is_task(model):
        return {}
    for name, modules in family.heads.items():
        cls = getattr(keras_hub.models, name, None)
        if cls is not None and isinstance(model, cls):
            _check_head(model, modules)
            return modules
    raise ValueError(
        "`model` must be a backbone or a task that Transformers has with the same head: "
        f"{', '.join(family.heads)}. Pass `model.backbone` to leave the head out. Received: model "
        f"'{model.name}' of type {type(model).__name__}"
    )


def _check_head(model, modules):
    # A ViT's other pooling is in its class of tasks, not in its weights.
    if getattr(model, "pooling", "token") != "token":
        raise ValueError(
            "`model` must take the class token, as its model in Transformers does. Received: "
            f"model '{model.name}' with pooling={model.pooling!r}"
        )
    width = model.backbone.hidden_dim if len(modules) > 1 else None
    if width is not None and model.hidden_dim not in (None, width):
        raise ValueError(
            "`model` must have a head whose hidden layer is as wide as the backbone, as its model "
            f"in Transformers has: {width}. Received: model '{model.name}' with "
            f"hidden_dim={model.hidden_dim}"
        )
    for path in modules.values():
        mode = model.get_layer(path).quantization_mode
        if mode is not None:
            raise ValueError(
                "The head must be in floating point, as it is trained in full: quantize "
                f"`model.backbone` instead. Received: model '{model.name}', whose '{path}' has "
                f"quantization_mode={mode!r}"
            )


def has_tied_output(model, family) -> bool:
    """Whether a model's input embeddings are the weight of a language model's output as well."""
    if family.task_type != "CAUSAL_LM" or not is_task(model):
        return False
    return bool(getattr(model.backbone.token_embedding, "tie_weights", True))


def is_embedding(layer) -> bool:
    """Whether a layer looks up rows of its weight."""
    return isinstance(layer, keras.layers.Embedding)
