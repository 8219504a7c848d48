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

import train_mnist


def mean_velocity(x_t, t, images):
    """Return E[v | x_t] for data that are one of the images (M, D), all equally likely."""
    square = torch.cdist(x_t, (1 - t) * images).square()
    x0 = (-square / (2 * t**2)).softmax(1) @ images
    return (x_t - x0) / t


def spread(data, count, t, samples=100):
    """Return what the mean over `count` of the data leaves of the spread of v, and the spread."""
    at_hand = data[torch.randint(len(data), (count,))]
    x0 = at_hand[:samples]
    x1 = torch.randn_like(x0)
    x_t = (1 - t) * x0 + t * x1
    exact = mean_velocity(x_t, t, data)
    left, whole = mean_velocity(x_t, t, at_hand) - exact, x1 - x0 - exact
    return left.square().sum(1).mean().item(), whole.square().sum(1).mean().item()


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
