"""Two claims of the paper put to the test on MNIST: little data, and stability.

The paper's abstract says that a rising λ trains stably, and well where data are scarce. Here it
meets λ = 0, and a rising λ along the marginal tangent.

- Little data: the same steps on 600, 6,000 and 60,000 images. Distance and recall of 5,000 one-step
  samples against the test images, and the share of samples whose nearest training image is nearer
  than the nearest of as many test images (10,000 at most): about a half if nothing is memorised.
- Stability: the learning rate of the recipe times 1, 3 and 10. How many trainings finish, how large
  the gradient's norm gets in their second half, where the risen λ is 1 (means of ten steps, before
  it is clipped at 20), and the distance.

Prints two tables, mean (range of the seeds), and draws claims.png into --out. Network and recipe
are those of lambda_study.py. A finished training in --out is not repeated. Needs matplotlib.

    python benchmarks/claims_study.py  # two hours on two cores
"""

import argparse
import sys
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent.parent))

from lambda_study import Job, cell, mean_and_range, train_all

import meanflow

CURRICULA = {  # λ and tangent: (name, colour, line)
    ("0", "conditional"): ("λ = 0", "#2a7f9e", "-"),
    ("0 to 1, linear", "conditional"): ("rising, conditional (the paper's)", "#d1495b", "-"),
    ("0 to 1, linear", "marginal"): ("rising, marginal", "#edae49", "-"),
}
IMAGES, RATES, TICKS = (600, 6_000, 60_000), (1, 3, 10), (1, 2, 5, 10, 20, 50)


def table(title, rows, measures, groups):
    """Print a row for each of `rows` and curriculum; groups: {(curriculum, row): runs}."""
    print(f"\n| {title} | λ |", " | ".join(measures), "| trainings that finished |")
    print("|---" * (3 + len(measures)) + "|")
    for value, (curriculum, (name, *_)) in product(rows, CURRICULA.items()):
        runs = groups[curriculum, value]
        cells = [cell(runs, *measure) for measure in measures.values()]
        ended = f"{sum(run['ended'] for run in runs)} of {len(runs)}"
        print(f"| {value:,} | {name} |", " | ".join(cells), f"| {ended} |", flush=True)


def lines(axes, values, groups, measure):
    """Draw a measure against `values`, a line through the means and a dot for each seed."""
    for curriculum, (name, colour, line) in CURRICULA.items():
        runs = [[run[measure] for run in groups[curriculum, v] if measure in run] for v in values]
        ended = [(v, group) for v, group in zip(values, runs, strict=True) if group]
        means = [mean_and_range(group)[0] for _, group in ended]
        axes.plot([v for v, _ in ended], means, line, color=colour, label=name)
        for value, group in ended:
            axes.plot([value] * len(group), group, "o", color=colour, markersize=4)
    axes.set(xscale="log", xticks=values)
    axes.set_xticklabels([f"{value:,}" for value in values])
    axes.set_xticks([], minor=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data", help="folder of MNIST")
    parser.add_argument("--out", default="runs/claims", help="folder for the runs")
    parser.add_argument("--cache", default="runs/quality", help="folder of the classifiers")
    parser.add_argument("--steps", type=int, default=500, help="of each training")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each kind")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once, a core each")
    args = parser.parse_args(argv)

    def jobs_of(curriculum, **options):
        return [Job(*curriculum, seed, args.steps, **options) for seed in range(args.seeds)]

    by_images = {(c, n): jobs_of(c, images=n) for c, n in product(CURRICULA, IMAGES)}
    by_rate = {(c, rate): jobs_of(c, rate=rate) for c, rate in product(CURRICULA, RATES)}
    jobs = [job for group in (*by_images.values(), *by_rate.values()) for job in group]
    jobs = dict.fromkeys(jobs)  # the whole data at the recipe's rate are in both
    results = train_all(sorted(jobs, key=lambda job: job.seed), args)
    few = {key: [results[job] for job in group] for key, group in by_images.items()}
    stable = {key: [results[job] for job in group] for key, group in by_rate.items()}

    whole, hundredths = "{:.0f} ({:.0f} to {:.0f})", "{:.2f} ({:.2f} to {:.2f})"
    shared = {"distance": ("distance", whole), "recall": ("recall", hundredths)}
    measures = shared | {"nearer": ("memorised", hundredths)}
    table("images", IMAGES, measures, few)
    measures = shared | {"norm": ("largest norm", whole)}
    table("learning rate, times", RATES, measures, stable)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    lines(left, IMAGES, few, "distance")
    left.set(xlabel="training images", ylabel="distance of one-step samples", ylim=(0, None))
    lines(right, RATES, stable, "largest norm")
    right.set(xlabel="learning rate, times the recipe's", ylabel="largest gradient norm")
    right.set(yscale="log", yticks=TICKS, yticklabels=map(str, TICKS))
    right.set_yticks([], minor=True)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2,
                  frameon=False)  # fmt: skip
    figure.savefig(Path(args.out, "claims.png"), dpi=130)


if __name__ == "__main__":
    meanflow.run(main)
