"""Draw assets/mnist-10k.png: 1,000 training images of each digit of MNIST, as one grey sheet.

A hundred images of 28x28 pixels in each of a hundred rows, ten rows of zeros first, then ten of
ones and so on, so that labels follow from the place. The numbers of the images in MNIST's training
set, in the order of the sheet, are in assets/mnist-10k.txt.

    python benchmarks/digits.py --data data
"""

import argparse
import sys
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_mnist

ASSETS = Path(__file__).parent.parent / "assets"
ABOUT = """\
mnist-10k.png holds 10,000 of the 60,000 training images of MNIST by Yann LeCun and Corinna Cortes,
CC BY-SA 3.0 (https://creativecommons.org/licenses/by-sa/3.0/), drawn by benchmarks/digits.py with
seed 0. Their numbers in the training set, counted from 0, a row of the sheet in a line:
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data", help="folder of MNIST")
    mnist = train_mnist.mnist(parser.parse_args().data)
    order = torch.randperm(len(mnist.data), generator=torch.Generator().manual_seed(0))
    chosen = torch.cat([order[mnist.targets[order] == digit][:1000] for digit in range(10)])
    rows = mnist.data[chosen].view(100, 100, 28, 28)
    sheet = to_pil_image(rows.transpose(1, 2).reshape(1, 2800, 2800))
    sheet.save(ASSETS / "mnist-10k.png", optimize=True)
    lines = [" ".join(map(str, row)) for row in chosen.view(100, 100).tolist()]
    (ASSETS / "mnist-10k.txt").write_text(ABOUT + "\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
