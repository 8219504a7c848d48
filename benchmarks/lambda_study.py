"""What λ does to one-step samples: on a Gaussian, where the answer is exact, and on MNIST.

Trains with λ = 0, 0.25, 0.5, 1, risen linearly or along a cosine to 1 at half time, and fallen from
1 to 0, with either tangent and several seeds, for equal steps; then λ = 0 once more, for as long
as the slowest of the others took. Prints tables, mean and range over the seeds, and writes
assets/lambda.svg (recall and distance against λ) and assets/lambda.png: the same noise through the
networks of the first seed, a row for each λ, conditional on the left, marginal on the right.

    python benchmarks/lambda_study.py                      # 40 minutes on two cores
    python benchmarks/lambda_study.py --only gaussian      # half a minute

Training is that of train_mnist.py with a network of half the width. A finished run in --out is not
repeated, so an interrupted study goes on with the same command.
"""

import argparse
import contextlib
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
import training

SCHEDULES = {  # λ as flags of the training scripts
    "0": "",
    "0.25": "--lambda-schedule constant --lambda-max 0.25",
    "0.5": "--lambda-schedule constant --lambda-max 0.5",
    "1": "--lambda-schedule constant",
    "0 to 1, linear": "--lambda-schedule linear",
    "0 to 1, cosine": "--lambda-schedule cosine",
    "1 to 0, falling": "--lambda-schedule falling",
}
RECIPE = {"batch_size": 64, "lr": 3e-3, "lr_decay": True, "beta2": 0.99, "ema": 0.99}
QUIET = {"log_every": 10_000, "sample_every": 100_000, "checkpoint_every": 100_000}
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
    """Train one network on one thread and return (job, its measures)."""
    (schedule, tangent, seed, steps), data, out = job
    run = folder(out, (schedule, tangent), seed, steps)
    result = run / "quality.json"
    if result.exists():
        return job[0], json.loads(result.read_text())
    torch.set_num_threads(1)
    parser = training.train_parser(None, **RECIPE, **QUIET, out=str(run), class_cond=True)
    flags = f"{SCHEDULES[schedule]} --tangent {tangent} --seed {seed} --steps {steps} --resume"
    args = parser.parse_args(flags.split())
    torch.manual_seed(seed)
    model = meanflow.UNet(channels=1, size=28, patch=2, width=16, classes=10)
    mnist = MNIST(data)
    start = time.process_time()
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        model = training.train(model, mnist.data[:, None], mnist.targets, args)
    seconds = time.process_time() - start
    images, labels = training.draw(model, 5000), torch.arange(5000) % 10
    distance, _, recall, agreement = Quality(data, Path(out, "classifier.pt")).measure(
        images, labels
    )
    save_image(make_grid(images[:30] / 2 + 0.5, 10, 0), run / "grid.png")
    measures = {"seconds": seconds, "distance": distance, "recall": recall, "agreement": agreement}
    result.write_text(json.dumps(measures))
    return job[0], measures


def mean_and_range(values):
    return sum(values) / len(values), min(values), max(values)


def table(title, jobs, results, seeds):
    print(
        f"\n**{title}**\n\n| λ | tangent | steps | seconds | distance | recall | label agreement |"
    )
    print("|---|---|---|---|---|---|---|")
    for schedule, tangent, seed, steps in jobs:
        if seed:
            continue
        runs = [results[schedule, tangent, s, steps] for s in range(seeds)]
        seconds, distance, recall, agreement = (
            mean_and_range([run[name] for run in runs])
            for name in ("seconds", "distance", "recall", "agreement")
        )
        print(f"| {schedule} | {tangent} | {steps} | {seconds[0]:.0f} "
              f"| {distance[0]:.0f} ({distance[1]:.0f} to {distance[2]:.0f}) "
              f"| {recall[0]:.2f} ({recall[1]:.2f} to {recall[2]:.2f}) "
              f"| {agreement[0]:.2f} |", flush=True)  # fmt: skip


def curve(jobs, results, seeds, file):
    """Draw recall and distance against a constant λ, the mean and the range of the seeds."""
    colours, parts = {"conditional": "#d1495b", "marginal": "#2a7f9e"}, []
    constant = [name for name in SCHEDULES if " " not in name]
    for panel, (measure, title) in enumerate((("recall", "recall"), ("distance", "distance"))):
        left, bottom, width, height = 60 + 330 * panel, 220, 250, 170
        top = max(results[job][measure] for job in jobs if job[0] in constant)
        scale = 0.25 if measure == "recall" else 250
        top = scale * -(-top // scale)
        place = lambda lam, y: (left + width * lam, bottom - height * y / top)  # noqa: B023
        parts.append(f'<text x="{left}" y="34" font-weight="bold">{title}</text>')
        for k in range(round(top / scale) + 1):
            _, y = place(0, k * scale)
            parts.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#8886"/>')
            parts.append(
                f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{k * scale:g}</text>'
            )
        for name in constant:
            x, _ = place(float(name), 0)
            parts.append(f'<text x="{x}" y="{bottom + 20}" text-anchor="middle">{name}</text>')
        parts.append(
            f'<text x="{left + width / 2}" y="{bottom + 40}" text-anchor="middle">λ</text>'
        )
        for tangent, colour in colours.items():
            line = []
            for name in constant:
                runs = [results[job][measure] for job in jobs if job[:2] == (name, tangent)]
                mean, low, high = (place(float(name), y) for y in mean_and_range(runs))
                line.append("{:.1f} {:.1f}".format(*mean))
                parts.append(
                    f'<path d="M{low[0]:.1f} {low[1]:.1f}V{high[1]:.1f}" stroke="{colour}"/>'
                )
            path = "M" + "L".join(line)
            parts.append(f'<path d="{path}" stroke="{colour}" stroke-width="2" fill="none"/>')
    for i, (tangent, colour) in enumerate(colours.items()):
        parts.append(f'<text x="{150 + 90 * i}" y="34" fill="{colour}">{tangent}</text>')
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 270" font-size="13" '
    head += 'font-family="sans-serif" fill="#777">'
    file.write_text("\n".join([head, *parts, "</svg>\n"]))


def mnist(args):
    configurations = [(name, tangent) for name in SCHEDULES for tangent in meanflow.TANGENTS]
    Quality(args.data, Path(args.out, "classifier.pt"))  # trains the classifier, once
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        measure = lambda jobs: dict(
            pool.map(train, [(job, args.data, args.out) for job in jobs], chunksize=1)
        )
        jobs = [(*c, seed, args.steps) for seed in range(args.seeds) for c in configurations]
        results = measure(jobs)
        table(f"{args.steps} steps", jobs, results, args.seeds)
        curve(jobs, results, args.seeds, ASSETS / "lambda.svg")
        seconds = dict.fromkeys(configurations, 0)
        for job, measures in results.items():
            seconds[job[:2]] += measures["seconds"] / args.seeds
        longer = round(args.steps * max(seconds.values()) / seconds["0", "conditional"], -1)
        jobs = [("0", "conditional", seed, int(longer)) for seed in range(args.seeds)]
        table("λ = 0 for as long as the slowest took", jobs, measure(jobs), args.seeds)
    grids = [
        read_image(str(folder(args.out, c, 0, args.steps) / "grid.png")) for c in configurations
    ]
    picture = make_grid(torch.stack(grids) / 255, 2, 16, pad_value=1)
    save_image(picture, ASSETS / "lambda.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["gaussian", "mnist"])
    parser.add_argument("--data", default="data", help="folder of MNIST")
    parser.add_argument("--out", default="runs/lambda", help="folder for the runs")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once, a core each")
    args = parser.parse_args()
    if args.only != "mnist":
        print("| λ | conditional | marginal |\n|---|---|---|\n| exact | 0.500 | 0.500 |")
        for lam in 0.0, 0.25, 0.5, 1.0:
            stds = (gaussian(lam, tangent) for tangent in meanflow.TANGENTS)
            print(f"| {lam} |", " | ".join(f"{std:.3f}" for std in stds), "|", flush=True)
    if args.only != "gaussian":
        mnist(args)


if __name__ == "__main__":
    main()
