"""How much of the spread of v, given x_t, the mean over images or points leaves.

v differs from its mean E[v | x_t] over all the data; so does the mean of v over the images at hand,
only less. Prints E||mean at hand - E[v | x_t]||² / E||v - E[v | x_t]||² for the two moons of
pictures.py (2,560 points at hand) and the digits of train_mnist.py (the 106 of a label among 1,056
images), and the digits' E||v - E[v | x_t]||². Where that is zero, the mean has nothing to do.

    python benchmarks/spread.py  # a minute; needs matplotlib, as pictures.py does
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import pictures

import meanflow
import train_mnist


def spread(data, count, t, samples=100):
    """Return what the mean over `count` of the data leaves of the spread of v, and the spread."""
    data = data[torch.randperm(len(data))]
    x0, t = data[:samples], torch.full((samples,), t).double()
    x_t, v = meanflow.path(x0, torch.randn_like(x0), t)

    def mean_over(first):
        return meanflow.mean_velocity(x_t, t, v, x0, None, (data[samples:first], None))

    exact = mean_over(len(data))
    return [(z - exact).square().sum(1).mean().item() for z in (mean_over(count), v)]


def main():
    torch.manual_seed(0)
    points = pictures.moons(20_000).double()
    images, labels = train_mnist.digits()
    images = images.flatten(1).double() / 127.5 - 1
    print("| t | moons: left | digits: left | of |\n|---|---|---|---|")
    for t in 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95:
        left, whole = spread(points, 2560, t)
        by_digit = [spread(images[labels == digit], 106, t) for digit in range(10)]
        digits_left, digits_whole = map(sum, zip(*by_digit, strict=True))
        share = f"{digits_left / digits_whole:.2f}" if digits_whole > 0.1 else "-"
        print(f"| {t} | {left / whole:.3f} | {share} | {digits_whole / 10:.1f} |", flush=True)


if __name__ == "__main__":
    main()
