"""Fine-tunes a KerasHub causal language model with DCFT, and shows what that gives.

    python examples/finetune_causal_lm.py                            # small GPT-2, no download
    python examples/finetune_causal_lm.py --preset finetuned/causal_lm/base --kernel-size 4
    python examples/finetune_causal_lm.py --preset gpt2_base_en --text-file notes.md letters.txt

Without a preset it first pre-trains a small GPT-2 on the docstrings of TensorFlow and Matplotlib
and keeps it as the preset `base` in `--output-dir`. What is fine-tuned on is another kind of text:
NumPy's docstrings, or files. It trains through `model.fit` and writes through `model.generate`
before and after; switches the adapters off; loads the adapter file and the `.keras` file again;
merges; and compares perplexities. The backend is chosen as always in Keras:
`KERAS_BACKEND=jax python examples/...`.
"""

import functools
import json
import sys
import time
from pathlib import Path

from support.command_line import (
    LEARNING_RATES,
    OneLineParser,
    add_training_options,
    file_size,
    import_quietly,
    positive_int,
    progress_verbosity,
    run_or_exit,
    with_learning_rate,
)

# A language model predicts with its token embedding: there is no head to train alone.
METHODS = tuple(method for method in LEARNING_RATES if method != "head")


def parse_options(arguments=None):
    parser = OneLineParser("Fine-tunes a KerasHub causal language model with DCFT.")
    add = parser.add_argument
    add("--preset", help="KerasHub preset or folder; without it a small GPT-2 is pre-trained here")
    add("--text-file", nargs="+", default=[], help="UTF-8 files; without them NumPy's docstrings")
    add_training_options(parser, epochs=6, batch_size=8, methods=METHODS)
    text = "without --preset: how often the small GPT-2 goes through the old text"
    add("--pretraining-epochs", type=positive_int, default=2, help=text)
    add("--sequence-length", type=positive_int, default=48, help="tokens in a text")
    prompts = ["Returns the", "Computes the", "Create a"]
    add("--prompt", nargs="+", default=prompts, help="what texts begin with that it writes")
    add("--max-length", type=positive_int, help="tokens to write; without it --sequence-length")
    add("--output-dir", default="finetuned/causal_lm", help="where everything is written")
    options = with_learning_rate(parser.parse_args(arguments))
    if options.max_length is None:
        options.max_length = options.sequence_length
    if options.max_length > options.sequence_length:
        parser.error(
            "argument --max-length: must be at most --sequence-length, "
            f"{options.sequence_length}. Received: {options.max_length}"
        )
    return options


if __name__ == "__main__":
    parse_options()  # so that --help and mistakes need not wait for the imports

import_quietly("keras_hub")

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from support.corpora import docstring_corpus, file_corpus, read_text
from support.methods import apply_method, build_optimizer, linear_decay, load_task
from support.small_gpt2 import small_gpt2

from keras_dcft import dcft_disabled, load_dcft_weights, merge_dcft, save_dcft_weights
from keras_dcft.settings import counted

OLD_LIBRARIES, NEW_LIBRARIES = ("tensorflow", "matplotlib"), ("numpy",)
PRETRAINING = {"batch_size": 8, "learning_rate": 4e-3}
HELD_OUT_TEXTS = 240
TIMED_ROUNDS = 5


def main(arguments=None):
    run_or_exit(run, parse_options(arguments))


def run(options, **size):
    """All of the work; `size` is that of the small GPT-2, as `small_gpt2` takes it."""
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    texts = {path: read_text(path) for path in options.text_file}
    old = docstring_corpus(OLD_LIBRARIES, options.seed)
    preset = options.preset or pretrained_preset(output_dir / "base", old, options, size)
    model = load_base(preset, options)
    if texts:
        # The start token takes one place.
        length = options.sequence_length - 1
        new = file_corpus(texts, model.preprocessor.tokenizer, length)
    else:
        new = docstring_corpus(NEW_LIBRARIES, options.seed)
    held_out = {"old": old.held_out[:HELD_OUT_TEXTS], "new": new.held_out[:HELD_OUT_TEXTS]}
    print(
        f"\nOld text: {old.name}, {len(held_out['old'])} held out.\n"
        f"New text: {new.name}, {len(new.train)} to train on, {len(held_out['new'])} held out."
    )

    measure = functools.partial(measurements, held_out=held_out, options=options)
    measured = {"base": measure(model)}
    training = fine_tune(model, new.train, options)
    measured[options.method] = measure(model)
    tokens_per_second = {options.method: generation_speed(model, options)}

    files = [output_dir / "model.keras"]
    model.save(files[0])
    reloaded = load_task(files[0])
    compile_model(reloaded)
    measured["reloaded"] = measure(reloaded)
    if options.method == "dcft":
        with dcft_disabled(model):
            measured["switched off"] = measure(model)
        files.append(output_dir / "adapter.dcft.safetensors")
        save_dcft_weights(model, files[1])
        measured["adapter file"] = measure(load_dcft_weights(load_base(preset, options), files[1]))
        measured["merged"] = measure(merge_dcft(reloaded))
        tokens_per_second["merged"] = generation_speed(reloaded, options)

    results = {
        **vars(options),
        **training,
        "backend": keras.backend.backend(),
        "preset": str(preset),
        "old_text": old.name,
        "new_text": new.name,
        "train_examples": len(new.train),
        "held_out_examples": {kind: len(texts) for kind, texts in held_out.items()},
        "tokens_per_second": tokens_per_second,
        "measured": measured,
    }
    files.append(output_dir / "results.json")
    files[-1].write_text(json.dumps(results, indent=2) + "\n")
    report(results, files)
    check(results)


def pretrained_preset(folder: Path, corpus, options, size) -> Path:
    """Trains a small GPT-2 from scratch on a corpus and saves it as a preset."""
    keras.utils.set_random_seed(options.seed)
    model = small_gpt2(corpus.train, options.sequence_length, **size)
    epochs = options.pretraining_epochs
    print(
        f"Pre-training a GPT-2 of {model.count_params():,} parameters, vocabulary "
        f"{model.backbone.vocabulary_size}, on {len(corpus.train):,} {corpus.name}, for "
        f"{counted(epochs, 'epoch')}. By default that takes three to five minutes on two CPU "
        f"cores, and once: --preset {folder} starts there.",
        flush=True,
    )
    train(model, corpus.train, epochs, seed=options.seed, **PRETRAINING)
    model.save_to_preset(folder)
    return folder


def load_base(preset, options):
    """The causal language model of a preset, checked to be long enough for what is asked."""
    keras.utils.set_random_seed(options.seed)
    try:
        model = keras_hub.models.CausalLM.from_preset(str(preset))
    except ValueError as error:
        raise ValueError(f"--preset {preset}: {error}") from error
    longest = getattr(model.backbone, "max_sequence_length", options.sequence_length)
    if options.sequence_length > longest:
        raise ValueError(
            f"--sequence-length: {preset} reads at most {longest} tokens. "
            f"Received: {options.sequence_length}"
        )
    prompt_length = max(prompt_lengths(model, options.prompt))
    if prompt_length >= options.max_length:
        raise ValueError(
            f"--prompt: must have fewer tokens than --max-length, {options.max_length}. "
            f"Received: one of {prompt_length}"
        )
    model.preprocessor.sequence_length = options.sequence_length
    compile_model(model)
    return model


def prompt_lengths(model, prompts) -> list:
    """The tokens in each prompt, the start token among them."""
    return [len(tokens) + 1 for tokens in model.preprocessor.tokenizer(prompts)]


def compile_model(model, learning_rate=0.0):
    """Adam, sampling among the likeliest tokens, and a perplexity that leaves padding out."""
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[keras_hub.metrics.Perplexity(from_logits=True, name="perplexity")],
        sampler=keras_hub.samplers.TopKSampler(k=5, seed=0),
    )


def fine_tune(model, texts, options) -> dict:
    """Trains what the method adds; returns what that was and the seconds that `fit` took."""
    base_parameters = model.count_params()
    apply_method(model, options.method, options.kernel_size, options.rank)
    trainable = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    print(
        f"Method {options.method} on the {keras.backend.backend()} backend: {trainable:,} "
        f"trainable parameters, {100 * trainable / base_parameters:.3f} % of the base's "
        f"{base_parameters:,}.",
        flush=True,
    )
    settings = options.epochs, options.batch_size, options.learning_rate
    seconds = train(model, texts, *settings, options.seed)
    return {
        "base_parameters": base_parameters,
        "trainable_parameters": trainable,
        "training_seconds": round(seconds, 1),
    }


def train(model, texts, epochs, batch_size, learning_rate, seed) -> float:
    """Trains with Adam and a linear decay; returns the seconds that `fit` took."""
    dataset = tf.data.Dataset.from_tensor_slices(texts).shuffle(len(texts), seed=seed)
    dataset = dataset.batch(batch_size)
    compile_model(model, linear_decay(learning_rate, epochs * len(dataset)))
    build_optimizer(model)
    start = time.perf_counter()
    model.fit(dataset, epochs=epochs, shuffle=False, verbose=progress_verbosity())
    return time.perf_counter() - start


def measurements(model, held_out, options) -> dict:
    """The perplexity of each kind of held-out text, and what the model writes."""
    perplexity = {kind: perplexity_of(model, texts) for kind, texts in held_out.items()}
    return {"perplexity": perplexity, "texts": write(model, options)}


def perplexity_of(model, texts) -> float:
    """The model's perplexity on texts."""
    inputs, labels, weights = model.preprocessor(texts)
    # KerasHub's own `evaluate` would compile the tokenizer, which takes seconds each time.
    metrics = keras.Model.evaluate(
        model, inputs, labels, sample_weight=weights, batch_size=32, verbose=0, return_dict=True
    )
    return metrics["perplexity"]


def write(model, options) -> list:
    """What the model writes, drawn with the same random numbers each time."""
    state = model.sampler.seed_generator.state
    state.assign(keras.ops.zeros(state.shape, state.dtype))
    return model.generate(options.prompt, max_length=options.max_length)


def generation_speed(model, options) -> float:
    """New tokens a second for all prompts at once, when `generate` is compiled."""
    write = functools.partial(
        model.generate, options.prompt, max_length=options.max_length, stop_token_ids=None
    )
    write()
    start = time.perf_counter()
    for _ in range(TIMED_ROUNDS):
        write()
    seconds = (time.perf_counter() - start) / TIMED_ROUNDS
    tokens = sum(options.max_length - n for n in prompt_lengths(model, options.prompt))
    return round(tokens / seconds, 1)


def report(results, files):
    """Prints perplexities, what was written before and after, speeds and files."""
    method, measured = results["method"], results["measured"]
    print(f"\n{'Held-out perplexity':<22}{'old text':>10}{'new text':>10}    writes like")
    for name, found in measured.items():
        old, new = found["perplexity"].values()
        like = next(other for other in measured if measured[other]["texts"] == found["texts"])
        print(f"  {name:<20}{old:>10.2f}{new:>10.2f}    {like}")
    for before, after in zip(measured["base"]["texts"], measured[method]["texts"]):
        print(f"\nbefore  {before!r}\nafter   {after!r}")
    epochs = counted(results["epochs"], "epoch")
    print(f"\nTraining    {results['training_seconds']:.0f} s for {epochs}")
    for name, speed in results["tokens_per_second"].items():
        print(f"Writing     {speed:,.0f} tokens/s, {name}")
    for file in files:
        print(f"Written     {file} ({file_size(file)})")


def check(results):
    """Ends the program if a model that should be the base or the fine-tuned one is not."""
    measured = results["measured"]
    for name, found in measured.items():
        expected = measured["base" if name in ("base", "switched off") else results["method"]]
        for kind, perplexity in found["perplexity"].items():
            # Keras merges its LoRA into the kernels when it saves, which rounds, as merging does.
            if abs(perplexity / expected["perplexity"][kind] - 1) > 1e-3:
                sys.exit(f"error: {name}: the perplexity is not what it was.")


if __name__ == "__main__":
    main()
