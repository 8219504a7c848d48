"""Two claims of the paper put to the test on MNIST: little data, and stability.

The paper's abstract says that a rising λ trains stably, and well where data are scarce. Here it
meets λ = 0, and a rising λ along the marginal tangent.

- Little data: the same steps on 600, 6,000 and 60,000 images. Distance and recall of 5,000 one-step
  samples against the test images, and the share of samples whose nearest training image is nearer
  than the nearest of as many test images (10,000 at most): about a half if nothing is memorised.
- Stability: the learning rate of the recipe times 1, 3 and 10. How many trainings finish, how large
  the gradient's norm gets in their second half, where the risen λ is 1 (means of ten steps, before
  it is clipped at 20), and the distance.

Prints two tables, mean (range of the seeds), and draws claims.png into --out. The network has a
width of 16, one block a level and self-attention in the lowest; Adam trains it. A finished training
in --out is not repeated: delete that folder after a change of the code. Needs matplotlib.

    python benchmarks/claims_study.py  # 25 minutes on two cores
"""

import argparse
import contextlib
import csv
import functools
import json
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torchvision.datasets import MNIST

sys.path.insert(0, str(Path(__file__).parent.parent))

import quality

import meanflow

CURRICULA = {  # --lambda-schedule and --tangent: (name, colour)
    ("none", "conditional"): ("λ = 0", "#2a7f9e"),
    ("linear", "conditional"): ("rising, conditional (the paper's)", "#d1495b"),
    ("linear", "marginal"): ("rising, marginal", "#edae49"),
}
IMAGES, RATES, TICKS = (600, 6_000, 60_000), (1, 3, 10), (1, 2, 5, 10, 20, 50)
NETWORK = {"patch": 2, "width": 16, "multipliers": (1, 2)}
RECIPE = {  # its own, so that a change of train_mnist.py's leaves the study as it is
    "batch_size": 64,
    "lr": 3e-3,
    "lr_decay": True,
    "beta2": 0.99,
    "ema": 0.99,
    "lambda_warmup": 0.5,
    "device": "cpu",
    "log_every": 10,
    "save_every": 10**6,
}
SAMPLES = 5_000


@dataclass(frozen=True)
class Job:
    schedule: str
    tangent: str
    seed: int
    steps: int
    images: int = 60_000  # drawn evenly over the classes
    rate: int = 1  # times the recipe's learning rate

    def folder(self, out):
        return Path(out, "-".join(map(str, asdict(self).values())))


def drawn_evenly(labels, count, seed):
    """Return the indices of `count` images, as many of each of ten classes, in random order."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if count < len(labels):
        order = torch.cat([order[labels[order] == k][: count // 10] for k in range(10)])
        order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))]
    return order


def memorised(samples, train, test):
    """Return the share of samples whose nearest training image is nearer than the nearest of as
    many test images: about a half if nothing is memorised, though the two are not drawn alike."""
    count = min(len(train), len(test))
    nearest = lambda images: torch.cdist(samples.flatten(1), images[:count].flatten(1)).amin(1)
    return (nearest(train) < nearest(test)).float().mean().item()


@functools.cache  # once in each process, for all that it trains
def quality_of(data, cache):
    return quality.Quality(data, cache)


def train(task):
    """Train one network on one thread and return its job and its measures. A training that does
    not end, since its gradients are not finite, has none."""
    job, data, out, cache = task
    run = job.folder(out)
    result = run / "quality.json"
    if result.exists():
        return job, json.loads(result.read_text())
    torch.set_num_threads(1)
    recipe = RECIPE | {"out": run, "lr": RECIPE["lr"] * job.rate}
    flags = f"--lambda-schedule {job.schedule} --tangent {job.tangent} --resume"
    flags += f" --seed {job.seed} --steps {job.steps}"
    args = meanflow.train_parser("", **recipe).parse_args(flags.split())
    torch.manual_seed(job.seed)
    model = meanflow.UNet(channels=1, size=28, classes=10, **NETWORK)
    mnist = MNIST(data)
    chosen = drawn_evenly(mnist.targets, job.images, job.seed)
    images, labels = mnist.data[chosen, None], mnist.targets[chosen]
    row = {"ended": True}
    try:
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            model = meanflow.train(model, images, labels, args)
    except meanflow.UserError as error:
        if "finite" not in str(error):  # gradients that are not
            raise
        row["ended"] = False
    if row["ended"]:
        samples, classes = meanflow.draw(model, SAMPLES), torch.arange(SAMPLES) % 10
        measured = quality_of(data, cache)
        row |= zip(quality.MEASURES, measured.measure(samples, classes), strict=True)
        row["memorised"] = memorised(samples, quality.as_float(images[:, 0]), measured.test)
        with open(run / "log.csv") as file:
            log = [(int(line["step"]), float(line["grad_norm"])) for line in csv.DictReader(file)]
        half = job.steps // 2 + RECIPE["log_every"]  # rows from here on have no step of the change
        row["largest norm"] = max((norm for step, norm in log if step >= half), default=math.nan)
    result.write_text(json.dumps(row))
    return job, row


def train_all(jobs, args):
    """Return the measures of each job; `args.jobs` processes train at once."""
    quality_of(args.data, args.cache)  # trains the classifiers, if there are none
    tasks, results = [(job, args.data, args.out, args.cache) for job in jobs], {}
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        for job, row in pool.map(train, tasks):
            results[job] = row
            print(f"{len(results)} of {len(tasks)} trainings done", file=sys.stderr, flush=True)
    return results


def cell(runs, name, form):
    """Return the mean and range of a measure over the runs that have it, those that ended."""
    values = [run[name] for run in runs if name in run]
    return form.format(sum(values) / len(values), min(values), max(values)) if values else "-"


def table(title, rows, measures, groups):
    """Print a row for each of `rows` and curriculum; groups: {(curriculum, row): runs}."""
    print(f"\n| {title} | λ |", " | ".join(measures), "| trainings that finished |")
    print("|---" * (3 + len(measures)) + "|")
    for value, (curriculum, (name, _)) in product(rows, CURRICULA.items()):
        runs = groups[curriculum, value]
        cells = [cell(runs, *measure) for measure in measures.values()]
        ended = f"{sum(run['ended'] for run in runs)} of {len(runs)}"
        print(f"| {value:,} | {name} |", " | ".join(cells), f"| {ended} |", flush=True)


def lines(axes, values, groups, measure):
    """Draw a measure against `values`, a line through the means and a dot for each seed."""
    for curriculum, (name, colour) in CURRICULA.items():
        runs = [[run[measure] for run in groups[curriculum, v] if measure in run] for v in values]
        ended = [(v, group) for v, group in zip(values, runs, strict=True) if group]
        means = [sum(group) / len(group) for _, group in ended]
        axes.plot([v for v, _ in ended], means, color=colour, label=name)
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
