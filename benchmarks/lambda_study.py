"""What λ does to one-step samples: on a Gaussian, where the answer is exact, and on MNIST.

Trains with λ = 0, 0.25, 1, and risen linearly to 1 at half time, with either tangent and several
seeds, for equal steps; then λ = 0 once more, for as long as the slowest of the others took. Prints
tables, mean and range over the seeds (measures of quality.py on 5,000 one-step samples, the
gradient's mean norm, seconds of one core), and writes lambda.png into --out: the same noise through
the networks of the first seed, a row for each λ, conditional on the left, marginal on the right.

    python benchmarks/lambda_study.py                      # an hour on two cores
    python benchmarks/lambda_study.py --only gaussian      # three minutes

The network has a width of 16, one block a level and self-attention in the lowest. Adam trains it.
A finished run in --out is not repeated, so an interrupted study goes on with the same command.
After a change of the code, delete that folder first. Of the runs that were interrupted it counts
the last seconds only: delete their folders to time them.
"""

import argparse
import contextlib
import csv
import functools
import json
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torchvision.datasets import MNIST
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid, save_image

sys.path.insert(0, str(Path(__file__).parent.parent))

import quality

import meanflow

SCHEDULES = {  # λ as flags of the training scripts
    "0": "--lambda-schedule none",
    "0.25": "--lambda-schedule constant --lambda-max 0.25",
    "1": "--lambda-schedule constant",
    "0 to 1, linear": "--lambda-schedule linear",
}
TANGENTS = "conditional", "marginal"
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
COLUMNS = {  # of a table: the name among the results, the form of their mean and range
    "distance": ("distance", "{:.1f} ({:.1f} to {:.1f})"),
    "recall": ("recall", "{:.2f} ({:.2f} to {:.2f})"),
    "gradient norm": ("grad_norm", "{:.0f} ({:.0f} to {:.0f})"),
    "seconds": ("cpu", "{:.0f}"),
}
SAMPLES = 5_000


def gaussian(lam, tangent, *, steps=3000, batch=1024):
    """Return the standard deviation of one-step samples for data ~ N(0.7, 0.5²), after training
    u(x, r, t) = a(r, t) x + b(r, t), a family that holds the true u, with λ from the start."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def u(x, r, t):
        a, b = net(torch.stack((r, t), 1)).chunk(2, 1)
        return a * x + b

    for _ in range(steps):
        r, t = torch.rand(2, batch).sort(0).values
        x0 = 0.7 + 0.5 * torch.randn(batch, 1)
        x_t, v = meanflow.path(x0, torch.randn_like(x0), t)
        along = meanflow.marginal_velocity(u, x_t, t) if tangent == "marginal" else v
        loss, _ = meanflow.meanflow_loss(u, x_t, v, r, t, lam, direction=along, p=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return meanflow.sample(u, torch.randn(100_000, 1)).std().item()


@dataclass(frozen=True)
class Job:
    schedule: str
    tangent: str
    seed: int
    steps: int
    images: int = 60_000  # drawn evenly over the classes
    rate: int = 1  # times the recipe's learning rate

    def folder(self, out):
        name = "-".join(map(str, asdict(self).values()))
        return Path(out, name.replace(", ", "-").replace(" ", "-"))


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
    parser = meanflow.train_parser("", **recipe)
    flags = f"{SCHEDULES[job.schedule]} --tangent {job.tangent} --resume"
    args = parser.parse_args([*flags.split(), "--seed", str(job.seed), "--steps", str(job.steps)])
    torch.manual_seed(job.seed)
    model = meanflow.UNet(channels=1, size=28, classes=10, **NETWORK)
    mnist = MNIST(data)
    chosen = drawn_evenly(mnist.targets, job.images, job.seed)
    images, labels = mnist.data[chosen, None], mnist.targets[chosen]
    row, start = {"ended": True}, time.process_time()
    try:
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            model = meanflow.train(model, images, labels, args)
    except meanflow.UserError as error:
        if "finite" not in str(error):  # gradients that are not, or weights
            raise
        row["ended"] = False
    row["cpu"] = time.process_time() - start
    if row["ended"]:
        samples, classes = meanflow.draw(model, SAMPLES), torch.arange(SAMPLES) % 10
        measured = quality_of(data, cache)
        row |= zip(quality.MEASURES, measured.measure(samples, classes), strict=True)
        row["memorised"] = memorised(samples, quality.as_float(images[:, 0]), measured.test)
        save_image(make_grid(samples[:30] / 2 + 0.5, 10, 0), run / "grid.png")
        with open(run / "log.csv") as file:
            log = [(int(line["step"]), float(line["grad_norm"])) for line in csv.DictReader(file)]
        norms = [norm for step, norm in log if step > 1]  # a row of one step would count as ten
        row["grad_norm"] = sum(norms) / len(norms)
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


def mean_and_range(values):
    return sum(values) / len(values), min(values), max(values)


def cell(runs, name, form):
    """Return the mean and range of a measure over the runs that have it, those that ended."""
    values = [run[name] for run in runs if name in run]
    return form.format(*mean_and_range(values)) if values else "-"


def table(title, jobs, results):
    """Print a row for each λ, a column for each measure and tangent: mean (range of the seeds)."""
    tangents = [*dict.fromkeys(job.tangent for job in jobs)]
    columns = [(measure, tangent) for measure in COLUMNS for tangent in tangents]
    print(f"\n**{title}**\n")
    print("| λ |", " | ".join(f"{measure}, {tangent}" for measure, tangent in columns), "|")
    print("|---" * (1 + len(columns)) + "|")
    for schedule in dict.fromkeys(job.schedule for job in jobs):
        row = []
        for measure, tangent in columns:
            alike = [job for job in jobs if (job.schedule, job.tangent) == (schedule, tangent)]
            row.append(cell([results[job] for job in alike], *COLUMNS[measure]))
        print(f"| {schedule} |", " | ".join(row), "|", flush=True)


def mnist(args):
    configurations = [(name, tangent) for name in SCHEDULES for tangent in TANGENTS]
    jobs = [Job(*c, seed, args.steps) for seed in range(args.seeds) for c in configurations]
    results = train_all(jobs, args)
    table(f"{args.steps} steps", jobs, results)
    seconds = dict.fromkeys(configurations, 0.0)
    for job in jobs:
        seconds[job.schedule, job.tangent] += results[job]["cpu"]
    longer = round(args.steps * max(seconds.values()) / seconds["0", "conditional"])
    jobs = [Job("0", "conditional", seed, longer) for seed in range(args.seeds)]
    table(f"λ = 0 for as long as the slowest took, {longer} steps", jobs, train_all(jobs, args))
    firsts = [Job(*c, 0, args.steps).folder(args.out) for c in configurations]
    grids = torch.stack([pil_to_tensor(Image.open(folder / "grid.png")) for folder in firsts])
    save_image(make_grid(grids / 255, 2, 16, pad_value=1), Path(args.out, "lambda.png"))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["gaussian", "mnist"])
    parser.add_argument("--data", default="data", help="folder of MNIST")
    parser.add_argument("--out", default="runs/lambda", help="folder for the runs")
    parser.add_argument("--cache", default="runs/quality", help="folder of the classifiers")
    parser.add_argument("--steps", type=int, default=800, help="of each training")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each kind")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once, a core each")
    args = parser.parse_args(argv)
    if args.only != "mnist":
        print("| λ | conditional | marginal |\n|---|---|---|\n| exact | 0.500 | 0.500 |")
        for lam in 0.0, 0.25, 1.0:
            stds = (gaussian(lam, tangent) for tangent in TANGENTS)
            print(f"| {lam} |", " | ".join(f"{std:.3f}" for std in stds), "|", flush=True)
    if args.only != "gaussian":
        mnist(args)


if __name__ == "__main__":
    meanflow.run(main)
