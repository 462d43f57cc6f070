"""Pages have the figures that were measured."""

import ast
import itertools
import json
import math
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT

from keras_dcft.transformers_names import FAMILIES

RESULTS = ROOT / "benchmarks" / "results"


def test_the_page_on_many_adapters_has_the_benchmarks_tables():
    page = (ROOT / "docs" / "many-adapters.md").read_text()
    program = [sys.executable, ROOT / "benchmarks" / "bank.py", "--report"]
    tables = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    assert len(tables.strip().split("\n\n")) == 3
    for table in tables.strip().split("\n\n"):
        assert table in page


def test_the_readme_has_its_figures():
    readme = " ".join((ROOT / "README.md").read_text().split())
    runs = json.loads((RESULTS / "bank.json").read_text())
    by_backend = {run["backend"]: run for run in runs if run["model"] == "predict"}
    tensorflow, jax, torch = (
        f"{by_backend[backend]['ratio to one']['bank']['median']:.2f}"
        for backend in ("tensorflow", "jax", "torch")
    )
    ratios = {
        (run["backend"], run["model"], run["device"].split()[0], method): (
            f"{of_method['ratio to floor']['median']:.2f}"
        )
        for run in json.loads((RESULTS / "training_step.json").read_text())
        for method, of_method in run["methods"].items()
    }
    dcft, lora = "DCFT, kernel size 8, rank 1", "Keras LoRA, rank 1"
    of_dcft, of_lora = (
        [ratios[backend, "minilm", "2", method] for backend in ("tensorflow", "jax", "torch")]
        for method in (dcft, lora)
    )
    on_cpu = "{} (TensorFlow), {} (JAX) and {} (PyTorch), Keras's LoRA".format(*of_dcft)
    assert f"{on_cpu} {{}}, {{}} and {{}};".format(*of_lora) in readme
    wide = [ratios["torch", "wide", "NVIDIA", method] for method in (dcft, lora)]
    assert f"with PyTorch {wide[0]}, Keras's LoRA {wide[1]}." in readme
    assert f"take {tensorflow} (TensorFlow), {jax} (JAX) and {torch} (PyTorch) times" in readme


def test_the_page_has_the_load_test():
    page = " ".join((ROOT / "docs" / "many-adapters.md").read_text().split())
    run = json.loads((RESULTS / "serving.jsonl").read_text().splitlines()[-1])
    assert run["wrong"] == run["errors"] == 0
    for number in (run["right"], run["not there"], run["adapters added and removed"]):
        assert f"{number:,}" in page


def test_the_page_on_transformers_lists_every_layer():
    page = (ROOT / "docs" / "transformers.md").read_text()
    for name, family in FAMILIES.items():
        part = page.partition(f"\n**{name}**")[2].partition("\n**")[0]
        rows = [line for line in part.splitlines() if line.startswith("| `")]
        expected = []
        for module, paths in family.modules.items():
            paths = (paths,) if isinstance(paths, str) else paths
            expected.append(f"| `{module}` | {', '.join(f'`{path}`' for path in paths)} |")
        assert rows == expected
        assert f"begin with `{family.prefix}`" in part
        for task, head in family.heads.items():
            assert f"`{task}`" in part
            assert all(f"`{module}` is `{path}`" in part for module, path in head.items())


@pytest.mark.parametrize(
    ("program", "function"),
    [("strategy_worker", "train"), ("ddp_worker", "train"), ("ddp_worker", "shard_base")],
)
def test_the_page_on_devices_has_the_loops_that_the_tests_run(program, function):
    page = (ROOT / "docs" / "devices.md").read_text()
    text = (ROOT / "tests" / f"{program}.py").read_text()
    (found,) = (node for node in ast.parse(text).body if getattr(node, "name", None) == function)
    assert f"```python\n{ast.get_source_segment(text, found)}\n```" in page


def long_trainings_page():
    """The page's text in one line, and its tables' rows by task and method, as lists of cells."""
    page = (ROOT / "docs" / "long_training.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    rows = [row for row in rows if len(row) == 10 and row[0] in ("sst2", "xquad", "rte")]
    return " ".join(page.split()), {(row[0], row[1]): row for row in rows}


def test_the_text_on_long_trainings_has_the_figures_of_its_table():
    page, rows = long_trainings_page()
    scores = {key: [cell.split()[0] for cell in row[4:8]] for key, row in rows.items()}

    def lead(task, one, other, column=-1):
        return 100 * (float(scores[task, one][column]) - float(scores[task, other][column]))

    eight, two, lora = "DCFT, kernel size 8", "DCFT, kernel size 2", "LoRA, rank 1"
    few, half = "LoRA, rank 1, query and value", "LoRA, rank 1, last three blocks"
    said = (
        f"leads kernel size 8 by {lead('sst2', lora, eight):.1f} points after 5,000 steps, "
        f"by {lead('sst2', lora, eight, 0):.1f} after 625",
        f"LoRA on query and value is {lead('sst2', few, eight):.1f} points ahead",
        f"which is {lead('sst2', lora, two):.1f} points behind LoRA of rank 1 with half of its "
        f"numbers, DCFT is {lead('sst2', two, half):.1f} ahead",
        f"LoRA of rank 1 leads kernel size 8 by {lead('xquad', lora, eight):.0f} points and "
        f"kernel size 2 by {lead('xquad', lora, two):.1f}",
        f"level ({scores['xquad', eight][-1]} and {scores['xquad', few][-1]}, seeds",
        f"LoRA in three blocks by {lead('xquad', two, half):.1f} points",
        f"kernel size 8 has {rows['rte', eight][7]}, LoRA of rank 1 {rows['rte', lora][7]},",
        f"one seed, kernel size 2 with {rows['rte', two][7]} the highest",
    )
    assert [text for text in said if text not in page] == []


@pytest.mark.parametrize("task", ["sst2", "xquad"])
def test_best_rates_have_neighbours_on_both_sides(task):
    _, rows = long_trainings_page()
    for method, row in ((method, row) for (of, method), row in rows.items() if of == task):
        best, tried = row[3].replace(" one class", "").rstrip(")").split(" (")
        rates = [float(rate) for rate in tried.split(", ")]
        assert rates[0] < float(best) < rates[-1], method
        assert row[9] == "3" or method == "full fine-tuning", method


def test_the_text_on_what_else_the_numbers_buy_has_the_figures_of_its_tables():
    page, rows = long_trainings_page()
    reported, validation = (
        {key: row[column].split()[0] for key, row in rows.items()} for column in (7, 8)
    )
    dcft = {size: f"DCFT, kernel size {size}" for size in (8, 12, 4, 2)}
    few = {
        "Uni-LoRA": "Uni-LoRA, rank 4, 7,648 numbers",
        "LoRA": "LoRA, rank 1, query and value",
        "VeRA": "VeRA, rank 256, query and value",
        "LoRA-XS": "LoRA-XS, rank 14",
        "FourierFT": "FourierFT, query and value, 637 entries each",
    }
    sst2, xquad = (
        {short: reported[task, name] for short, name in (dcft | few).items()}
        for task in ("sst2", "xquad")
    )
    uni = "Uni-LoRA, rank 4, 21,268 numbers"
    by_size = [validation["sst2", name] for name in dcft.values()]
    fourier = "FourierFT, query and value, 1,772 entries each"
    said = (
        f"on SST-2 Uni-LoRA has {sst2['Uni-LoRA']}, LoRA on query and value {sst2['LoRA']}, "
        f"VeRA {sst2['VeRA']}, DCFT {sst2[8]} (kernel size 8) and {sst2[12]} (12), "
        f"FourierFT {sst2['FourierFT']}, LoRA-XS {sst2['LoRA-XS']}",
        f"on XQuAD kernel size 12 has {xquad[12]}, Uni-LoRA {xquad['Uni-LoRA']}, "
        f"LoRA-XS {xquad['LoRA-XS']}, kernel size 8 {xquad[8]}, "
        f"LoRA on query and value {xquad['LoRA']}, VeRA {xquad['VeRA']}, "
        f"FourierFT {xquad['FourierFT']}",
        f"Uni-LoRA has {reported['sst2', uni]} on SST-2, "
        f"kernel size 2 {sst2[2]}, FourierFT {reported['sst2', fourier]}; "
        f"on XQuAD kernel size 2 has {xquad[2]}, Uni-LoRA {reported['xquad', uni]}, "
        f"LoRA-XS {reported['xquad', 'LoRA-XS, rank 24']}, "
        f"FourierFT {reported['xquad', fourier]}, "
        f"VeRA {reported['xquad', 'VeRA, rank 16']}",
        f"ahead on XQuAD ({rows['xquad', uni][4]} and {rows['xquad', dcft[2]][4]} after 1/8 of the "
        f"steps), not on SST-2 ({rows['sst2', uni][4]} and {rows['sst2', dcft[2]][4]})",
        f"{', '.join(by_size[:3])} and {by_size[3]} for kernel sizes 8, 12, 4 and 2",
    )
    assert [text for text in said if text not in page] == []
    for task in ("sst2", "xquad"):
        for ahead, behind in (
            (few["Uni-LoRA"], [few[short] for short in ("LoRA-XS", "VeRA", "FourierFT")]),
            (uni, ["LoRA-XS, rank 24", "VeRA, rank 16", fourier]),
        ):
            # What docs/choices.md says of them.
            assert reported[task, ahead] > max(reported[task, name] for name in behind)


def test_the_text_on_other_forms_has_the_figures_of_the_lines():
    page, _ = long_trainings_page()
    lines = [json.loads(x) for x in (RESULTS / "long_training.jsonl").read_text().splitlines()]
    # A sweep that was cut off and went on has a score twice; the later counts.
    scores = {
        (*(line[x] for x in ("task", "method", "learning_rate", "seed")), line["step"]): line
        for line in lines
    }
    steps = {"sst2": (625, 1250, 2500, 5000), "xquad": (188, 375, 750, 1500)}

    def means(task, method, rate, shares, seeds=(0, 1, 2), of="validation"):
        """Scores after these shares of the steps: 8 is an eighth."""
        by_share = dict(zip((8, 4, 2, 1), steps[task]))
        of_seeds = [
            [scores[task, method, rate, seed, by_share[x]][of]["score"] for seed in seeds]
            for x in shares
        ]
        return [f"{sum(of_share) / len(of_share):.3f}" for of_share in of_seeds]

    def of_rates(form, rates=(0.001, 0.002, 0.004)):
        return ", ".join(means("sst2", form, rate, (1,), (0,))[0] for rate in rates)

    def unseen(form, rate):
        return means("sst2", form, rate, (1,), of="reported")[0]

    def xquad_alone(form, rate):
        return means("xquad", form, rate, (1,), (0,))[0]

    def seeds_of(form, rate, of="validation"):
        """The mean at the end and what seeds differ by."""
        of_seeds = [scores["sst2", form, rate, x, 5000][of]["score"] for x in range(3)]
        return statistics.mean(of_seeds), statistics.stdev(of_seeds)

    def spread(form, rate):
        mean, deviation = seeds_of(form, rate)
        return f"{mean:.3f} ± {deviation:.3f}"

    def lead_over_seeds(form, other, rate, of):
        (mean, deviation), (other_mean, other_deviation) = (
            seeds_of(x, rate, of) for x in (form, other)
        )
        return (mean - other_mean) / math.hypot(deviation, other_deviation)

    eight, two = "DCFT, kernel size 8", "DCFT, kernel size 2"
    faster, both, end = f"{eight}, B's rate x 4", (0, 1), (1,)
    way, filters = (8, 4, 2), f"{eight}, rank 3, a filter each"
    four, more = f"{eight}, rank 4", f"{eight}, rank 4, a filter each"
    zero, root = f"{eight}, B from zero", f"{eight}, rank 4, scale by root"
    rates = (0.0005, 0.001, 0.002, 0.004)
    [ours] = means("sst2", faster, 0.002, end, both)
    [default] = means("sst2", eight, 0.002, end, both)
    [ours_xquad] = means("xquad", faster, 0.002, end, both)
    [default_xquad] = means("xquad", eight, 0.004, end, both)
    half, last = means("xquad", eight, 0.002, (2, 1), (0,))
    our_half, our_last = means("xquad", faster, 0.002, (2, 1), (0,))
    said = (
        f"on SST-2 (2e-3 also) {ours}, the default {default}, on XQuAD (4e-3) {ours_xquad}, "
        f"the default {default_xquad}",
        f"1/2: {', '.join(means('sst2', faster, 0.002, way))}; the default "
        f"{', '.join(means('sst2', eight, 0.002, way))})",
        f"({', '.join(means('xquad', faster, 0.002, way))}; the default "
        f"{', '.join(means('xquad', eight, 0.004, way))})",
        f"({half}, this with seed 0 {our_half}; at the end {last} and {our_last})",
        f"ends at {means('sst2', filters, 0.002, end)[0]} on SST-2 and, two seeds, at "
        f"{means('xquad', filters, 0.002, end, both)[0]} on XQuAD",
        f"at {means('sst2', two, 0.001, end)[0]} and {means('xquad', two, 0.001, end)[0]}. With",
        f"seed 0 rank 3 so has {of_rates(filters)} on SST-2 at 1e-3, 2e-3 and 4e-3. Rank 4",
        f"it has {of_rates(more)}, with the one filter {of_rates(four)}. At 8e-3",
        f"at its best rate, it is {spread(more, 0.004)} and {spread(four, 0.002)}; but",
        f"on the sentences that no choice looks at {unseen(more, 0.004)} and {unseen(four, 0.002)}",
        f"has {spread(two, 0.001)} and, there, {unseen(two, 0.001)}",
        f"it ends at {of_rates(zero, (0.000125, 0.00025, 0.0005))} on SST-2 at 1.25e-4, 2.5e-4 and",
        f"the default at {means('sst2', eight, 0.002, end, (0,))[0]} at its best rate. With three",
        f"the steps, at {means('sst2', zero, 0.001, (4,), (0,))[0]}, where it has "
        f"{means('sst2', zero, 0.0005, (4,), (0,))[0]} at 5e-4",
        f"this ends at {of_rates(faster, (0.00025, *rates))}, the default, from 5e-4 on, at "
        f"{of_rates(eight, rates)}. With three seeds",
        f"it ends at {spread(faster, 0.001)}, the default at {spread(eight, 0.002)}: no lead",
        f"(with seed 0 level with 5e-4) it is {spread(zero, 0.00025)}, the default "
        f"{spread(eight, 0.002)}. At 1e-3",
        f"it ends at {of_rates(root)} on SST-2, without it at {of_rates(four)}, with",
        f"three seeds at 2e-3 it is {spread(root, 0.002)} against {spread(four, 0.002)}, more",
        f"and {unseen(root, 0.002)} against {unseen(four, 0.002)} on the sentences that no choice",
        f"level with kernel size 2 ({spread(two, 0.001)}). On XQuAD",
        f"it ends at {xquad_alone(root, 0.002)}, without it at {xquad_alone(four, 0.002)}, the "
        f"default at {xquad_alone(eight, 0.002)}, kernel",
        f"size 2, at its best rate, at {xquad_alone(two, 0.001)}. In",
    )
    assert scores["sst2", more, 0.008, 0, 5000]["validation"]["predicted"] == 1  # "one class"
    # "More than the seeds differ by", and on the unseen sentences "less than they differ by".
    assert lead_over_seeds(root, four, 0.002, "validation") > 1
    assert 0 < lead_over_seeds(root, four, 0.002, "reported") < 1
    assert [text for text in said if text not in page] == []


def test_uni_lora_leads_its_rivals_and_some_by_no_more_than_the_seeds():
    _, rows = long_trainings_page()
    rivals = {
        "Uni-LoRA, rank 4, 7,648 numbers": (
            "LoRA-XS, rank 14",
            "VeRA, rank 256, query and value",
            "FourierFT, query and value, 637 entries each",
        ),
        "Uni-LoRA, rank 4, 21,268 numbers": (
            "LoRA-XS, rank 24",
            "VeRA, rank 16",
            "FourierFT, query and value, 1,772 entries each",
        ),
    }
    within = []
    for task, uni in itertools.product(("sst2", "xquad"), rivals):
        ours, spread = map(float, rows[task, uni][7].split(" ± "))
        for rival in rivals[uni]:
            theirs, their_spread = map(float, rows[task, rival][7].split(" ± "))
            assert theirs < ours, (task, rival)  # "have lower means than Uni-LoRA"
            within.append(ours - theirs <= math.hypot(spread, their_spread))
    assert any(within)  # "some of the differences are no larger than the seeds'"
    assert not all(within)


def test_the_page_on_choices_has_the_figures_of_the_long_trainings():
    _, rows = long_trainings_page()
    scores = {key: float(row[7].split()[0]) for key, row in rows.items()}
    page = " ".join((ROOT / "docs" / "choices.md").read_text().split())
    eight, two, lora = "DCFT, kernel size 8", "DCFT, kernel size 2", "LoRA, rank 1"
    uni = "Uni-LoRA, rank 4, 21,268 numbers"
    on_sst2, on_xquad = (
        {name: scores[task, name] for name in (eight, two, lora)} for task in ("sst2", "xquad")
    )
    said = (
        f"On SST-2 it is {100 * (on_sst2[lora] - on_sst2[two]):.1f} points behind that LoRA",
        f"on XQuAD {100 * (on_xquad[lora] - on_xquad[two]):.1f}, with half",
        f"Uni-LoRA, which is not in this package, is level with it "
        f"(SST-2: {scores['sst2', uni]:.3f} and {on_sst2[two]:.3f}, "
        f"XQuAD: {scores['xquad', uni]:.3f} and {on_xquad[two]:.3f})",
        f"kernel size 12 has {scores['xquad', 'DCFT, kernel size 12']:.3f}, Uni-LoRA "
        f"{scores['xquad', 'Uni-LoRA, rank 4, 7,648 numbers']:.3f}, "
        f"size 8 {on_xquad[eight]:.3f}, LoRA on query and value "
        f"{scores['xquad', 'LoRA, rank 1, query and value']:.3f}",
        f"{on_sst2[eight]:.3f} to {scores['sst2', 'Uni-LoRA, rank 4, 7,648 numbers']:.3f}",
        f"{100 * (on_sst2[lora] - on_sst2[eight]):.1f} points behind LoRA of rank 1 on SST-2 and "
        f"{100 * (on_xquad[lora] - on_xquad[eight]):.0f} on XQuAD",
    )
    for text in said:
        assert text in page, text
