"""What λ does to one-step samples: on a Gaussian, where the answer is exact, and on MNIST.

Trains with λ = 0, 0.25, 0.5, 1, risen linearly or along a cosine to 1 at half time, and fallen from
1 to 0, with either tangent and several seeds, for equal steps; then λ = 0 once more, for as long
as the slowest of the others took. Prints tables, mean and range over the seeds (measures of
quality.py on 5,000 one-step samples, the gradient's mean norm, seconds of one core), and writes
assets/lambda.svg (recall and distance against λ) and assets/lambda.png: the same noise through the
networks of the first seed, a row for each λ, conditional on the left, marginal on the right.

    python benchmarks/lambda_study.py                      # 50 minutes on two cores
    python benchmarks/lambda_study.py --only gaussian      # a minute

Training is that of train_mnist.py with a network of half the width, fewer steps and a shorter EMA.
A finished run in --out is not repeated, so an interrupted study goes on with the same command.
"""

import argparse
import contextlib
import csv
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn
from torchvision.datasets import MNIST
from torchvision.io import read_image
from torchvision.utils import make_grid, save_image

sys.path.insert(0, str(Path(__file__).parent.parent))

from quality import Quality

import meanflow
import train_mnist

SCHEDULES = {  # λ as flags of the training scripts
    "0": "--lambda-max 0",
    "0.25": "--lambda-schedule constant --lambda-max 0.25",
    "0.5": "--lambda-schedule constant --lambda-max 0.5",
    "1": "--lambda-schedule constant",
    "0 to 1, linear": "--lambda-schedule linear",
    "0 to 1, cosine": "--lambda-schedule cosine",
    "1 to 0, falling": "--lambda-schedule falling",
}
RECIPE = {"device": "cpu", "ema": 0.99}
RECIPE |= {"log_every": 10**6, "save_every": 10**6}
MEASURES = {  # of a table: the name among the results, the form of their mean and range
    "distance": ("distance", "{:.1f} ({:.1f} to {:.1f})"),
    "recall": ("recall", "{:.2f} ({:.2f} to {:.2f})"),
    "gradient norm": ("grad_norm", "{:.0f} ({:.0f} to {:.0f})"),
    "seconds": ("cpu", "{:.0f}"),
}
COLOURS = {"conditional": "#d1495b", "marginal": "#2a7f9e"}
ASSETS = Path(__file__).parent.parent / "assets"


def gaussian(lam, tangent, *, steps=3000, batch=1024):
    """Return the standard deviation of one-step samples for data ~ N(0.7, 0.5²), after training
    u(x, r, t) = a(r, t) x + b(r, t), a family that holds the true u, with λ from the start."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def u(x, r, t):
        a, b = net(torch.stack((r, t), 1)).chunk(2, 1)
        return a * x + b

    for _ in range(steps):
        r, t = torch.rand(2, batch).sort(0).values
        x0 = 0.7 + 0.5 * torch.randn(batch, 1)
        loss, _ = meanflow.meanflow_loss(u, x0, lam, r=r, t=t, tangent=tangent, p=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return meanflow.sample(u, torch.randn(100_000, 1)).std().item()


def folder(out, configuration, seed, steps):
    name = "-".join([*configuration, str(seed), str(steps)])
    return Path(out, name.replace(", ", "-").replace(" ", "-"))


def train(job):
    """Train one network on one thread and return the configuration and its measures."""
    (schedule, tangent, seed, steps), data, out = job
    run = folder(out, (schedule, tangent), seed, steps)
    result = run / "quality.json"
    if not result.exists():
        torch.set_num_threads(1)
        parser = meanflow.train_parser("", **train_mnist.RECIPE | RECIPE | {"out": str(run)})
        flags = f"{SCHEDULES[schedule]} --tangent {tangent} --seed {seed} --steps {steps} --resume"
        flags += f" --lambda-warmup {steps // 2}"
        args = parser.parse_args(flags.split())
        torch.manual_seed(seed)
        network = train_mnist.NETWORK | {"width": 16}
        model = meanflow.UNet(channels=1, size=28, classes=10, **network)
        mnist = MNIST(data)
        start = time.process_time()
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            model = meanflow.train(model, mnist.data[:, None], mnist.targets, args)
        seconds = time.process_time() - start
        images, labels = meanflow.draw(model, 5000), torch.arange(5000) % 10
        measures = Quality(data, Path(out, "classifier.pt")).measure(images, labels)
        save_image(make_grid(images[:30] / 2 + 0.5, 10, 0), run / "grid.png")
        names = "cpu", "distance", "precision", "recall", "agreement"
        result.write_text(json.dumps(dict(zip(names, (seconds, *measures), strict=True))))
    with open(run / "log.csv") as file:
        *_, log = csv.DictReader(file)  # means over the training, but for an interrupted one
    return job[0], json.loads(result.read_text()) | {k: float(v) for k, v in log.items()}


def mean_and_range(values):
    return sum(values) / len(values), min(values), max(values)


def table(title, jobs, results):
    """Print a row for each λ, a column for each measure and tangent: mean (range of the seeds)."""
    tangents = [*dict.fromkeys(tangent for _, tangent, *_ in jobs)]
    columns = [(measure, tangent) for measure in MEASURES for tangent in tangents]
    print(f"\n**{title}**\n")
    print("| λ |", " | ".join(f"{measure}, {tangent}" for measure, tangent in columns), "|")
    print("|---" * (1 + len(columns)) + "|")
    for schedule in dict.fromkeys(job[0] for job in jobs):
        row = []
        for measure, tangent in columns:
            name, form = MEASURES[measure]
            runs = [results[job][name] for job in jobs if job[:2] == (schedule, tangent)]
            row.append(form.format(*mean_and_range(runs)))
        print(f"| {schedule} |", " | ".join(row), "|", flush=True)


def curve(results, file):
    """Draw recall and distance against a constant λ, the mean and the range of the seeds."""
    constant = [name for name in SCHEDULES if " " not in name]
    svg = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 270" font-size="13" '
           'font-family="sans-serif" fill="#777">']  # fmt: skip
    write = lambda x, y, text, more="": svg.append(
        f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="middle" {more}>{text}</text>'
    )
    width, height, bottom = 250, 170, 220
    for left, measure in (60, "recall"), (390, "distance"):
        top = 1.05 * max(run[measure] for job, run in results.items() if job[0] in constant) or 1
        tick = next(k for e in range(-3, 4) for k in (10**e, 2 * 10**e, 5 * 10**e) if 5 * k > top)
        place = lambda lam, value: (left + width * lam, bottom - height * value / top)  # noqa: B023
        write(left + width / 2, 30, f"{measure} of one-step samples", 'font-weight="bold"')
        write(left + width / 2, bottom + 40, "λ")
        for value in (k * tick for k in range(int(top / tick) + 1)):
            x, y = place(0, value)
            svg.append(f'<path d="M{x} {y:.1f}h{width}" stroke="#888" opacity=".4"/>')
            write(x - 20, y + 4, f"{value:g}")
        for name in constant:
            write(left + width * float(name), bottom + 20, name)
        for i, (tangent, colour) in enumerate(COLOURS.items()):
            write(left + width * (i + 1) / 3, 50, tangent, f'style="fill:{colour}"')
            line = []
            for name in constant:
                runs = [run[measure] for job, run in results.items() if job[:2] == (name, tangent)]
                (x, y), (_, low), (_, high) = (place(float(name), v) for v in mean_and_range(runs))
                line.append(f"{x:.1f} {y:.1f}")
                svg.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{colour}"/>')
            svg.append(f'<path d="M{"L".join(line)}" stroke="{colour}" fill="none"/>')
    file.write_text("\n".join([*svg, "</svg>\n"]))


def mnist(args):
    configurations = [(name, tangent) for name in SCHEDULES for tangent in COLOURS]
    Quality(args.data, Path(args.out, "classifier.pt"))  # trains the classifier, once
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        measure = lambda jobs: dict(pool.map(train, [(job, args.data, args.out) for job in jobs]))
        jobs = [(*c, seed, args.steps) for seed in range(args.seeds) for c in configurations]
        results = measure(jobs)
        table(f"{args.steps} steps", jobs, results)
        curve(results, ASSETS / "lambda.svg")
        seconds = {c: sum(results[job]["cpu"] for job in jobs if job[:2] == c)
                   for c in configurations}  # fmt: skip
        longer = round(args.steps * max(seconds.values()) / seconds["0", "conditional"])
        jobs = [("0", "conditional", seed, longer) for seed in range(args.seeds)]
        table(f"λ = 0 for as long as the slowest took, {longer} steps", jobs, measure(jobs))
    grids = [read_image(folder(args.out, c, 0, args.steps) / "grid.png") for c in configurations]
    save_image(make_grid(torch.stack(grids) / 255, 2, 16, pad_value=1), ASSETS / "lambda.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["gaussian", "mnist"])
    parser.add_argument("--data", default="data", help="folder of MNIST")
    parser.add_argument("--out", default="runs/lambda", help="folder for the runs")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once, a core each")
    args = parser.parse_args()
    if args.only != "mnist":
        print("| λ | conditional | marginal |\n|---|---|---|\n| exact | 0.500 | 0.500 |")
        for lam in 0.0, 0.25, 0.5, 1.0:
            stds = (gaussian(lam, tangent) for tangent in COLOURS)
            print(f"| {lam} |", " | ".join(f"{std:.3f}" for std in stds), "|", flush=True)
    if args.only != "gaussian":
        mnist(args)


if __name__ == "__main__":
    main()
