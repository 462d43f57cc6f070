"""DCFT (arXiv 2503.01419) for Keras 3: fine-tuning by deconvolution in a subspace."""

from keras_dcft.bank import AdapterBank
from keras_dcft.budgets import dcft_parameter_table, kernel_size_for_budget
from keras_dcft.callbacks import DCFTCheckpoint
from keras_dcft.file_cards import write_model_card
from keras_dcft.files import load_dcft_weights, read_dcft_notes, save_dcft_weights
from keras_dcft.layers.dense import DCFTDense
from keras_dcft.layers.einsum_dense import DCFTEinsumDense
from keras_dcft.layers.embeddings import DCFTEmbedding, DCFTReversibleEmbedding
from keras_dcft.peft_export import export_to_peft
from keras_dcft.peft_import import import_from_peft
from keras_dcft.recipes import PAPER_RECIPES
from keras_dcft.regularizers import Orthonormality
from keras_dcft.report import dcft_summary
from keras_dcft.schedules import LinearWarmupDecay
from keras_dcft.verbs import (
    activate_dcft,
    convert_to_lora,
    dcft_disabled,
    enable_dcft,
    merge_dcft,
    remove_dcft,
    shard_adapters,
)

__version__ = "0.2.0"

__all__ = [
    "PAPER_RECIPES",
    "AdapterBank",
    "DCFTCheckpoint",
    "DCFTDense",
    "DCFTEinsumDense",
    "DCFTEmbedding",
    "DCFTReversibleEmbedding",
    "LinearWarmupDecay",
    "Orthonormality",
    "activate_dcft",
    "convert_to_lora",
    "dcft_disabled",
    "dcft_parameter_table",
    "dcft_summary",
    "enable_dcft",
    "export_to_peft",
    "import_from_peft",
    "kernel_size_for_budget",
    "load_dcft_weights",
    "merge_dcft",
    "read_dcft_notes",
    "remove_dcft",
    "save_dcft_weights",
    "shard_adapters",
    "write_model_card",
]
