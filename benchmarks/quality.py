"""How good MNIST samples are: Fréchet distances, precision, recall and label agreement.

Two small classifiers, trained once in a few minutes and kept in --cache, turn images into 128
features each. The first pools: it sees which strokes there are, but hardly where. The second has
strides and a fully connected layer instead, so that it also sees where each speck of noise sits.

On 10,000 samples and the 10,000 test images: the Fréchet distance between their features, for each
classifier (their scales differ); by the first one precision and recall (Kynkäänniemi et al. 2019,
arXiv:1904.06991), the share of samples within the test images' neighbourhoods (3 nearest) and the
reverse, and for a class-conditional model the share of samples in which it sees the label asked
for. The last row is the floor: training images instead of samples.

    python benchmarks/quality.py runs/mnist/checkpoint.pt
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import MNIST

sys.path.insert(0, str(Path(__file__).parent.parent))

import meanflow
import train_mnist

FEATURES = 128
MEASURES = {"distance": "{:.1f}", "second distance": "{:.0f}", "precision": "{:.2f}"}
MEASURES |= {"recall": "{:.2f}", "label agreement": "{:.2f}"}


def pooling_classifier():
    layers = []
    for inputs, outputs in (1, 32), (32, 64), (64, FEATURES):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(FEATURES, 10))


def strided_classifier():
    layers = []
    for inputs, outputs in (1, 32), (32, 64):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(64 * 7 * 7, FEATURES), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(FEATURES, 10))


def as_float(images):
    return images[:, None].float() / 127.5 - 1


def train_classifier(model, images, labels, *, epochs=3, batch=128):
    """Train a classifier of uint8 (N, 28, 28) on randomly shifted images."""
    model.train()
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        i = torch.randint(len(images), (batch,))
        shift = torch.randint(-2, 3, (2,)).tolist()
        loss = F.cross_entropy(model(as_float(images[i]).roll(shift, (2, 3))), labels[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def load_classifier(make, file, train):
    """Return the classifier that is kept in the file, after training it if there is none."""
    torch.manual_seed(0)
    model = make()
    if not file.exists():
        train_classifier(model, train.data, train.targets)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


@torch.no_grad()
def look(classifier, images):
    """Return features (N, 128) and classes (N,) of images (N, 1, 28, 28) in [-1, 1]."""
    parts = images.clamp(-1, 1).split(500)
    features = torch.cat([classifier[:-1](part) for part in parts])
    return features, classifier[-1](features).argmax(1)


class Quality:
    """The measure: what two classifiers, kept in the folder `cache`, see in the test images."""

    def __init__(self, data, cache):
        train, test = train_mnist.mnist(data), MNIST(data, train=False)
        self.train, self.test = as_float(train.data[: len(test.data)]), as_float(test.data)
        self.first = load_classifier(pooling_classifier, Path(cache, "pooling.pt"), train)
        self.second = load_classifier(strided_classifier, Path(cache, "strided.pt"), train)
        self.real, classes = look(self.first, self.test)
        self.second_real, second_classes = look(self.second, self.test)
        correct = (seen == test.targets for seen in (classes, second_classes))
        self.accuracies = [each.float().mean().item() for each in correct]

    def measure(self, images, labels):
        """Return the MEASURES in their order; agreement is nan without labels (N,)."""
        features, classes = look(self.first, images)
        second_features, _ = look(self.second, images)
        agreement = float("nan") if labels is None else (classes == labels).float().mean().item()
        distances = frechet(features, self.real), frechet(second_features, self.second_real)
        return *distances, covered(features, self.real), covered(self.real, features), agreement


def frechet(a, b):
    """Fréchet distance of the Gaussians with the means and covariances of a and b, (N, D)."""
    a, b = a.double(), b.double()
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt()
    trace = a.var(0).sum() + b.var(0).sum() - 2 * roots.sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + trace).item()


def covered(points, support, k=3):
    """Return the share of points in a ball around one of `support` that holds its k nearest."""
    radius = torch.cat([torch.cdist(part, support).kthvalue(k + 1).values
                        for part in support.split(500)])  # fmt: skip
    inside = [(torch.cdist(part, support) <= radius).any(1) for part in points.split(500)]
    return torch.cat(inside).float().mean().item()


def print_row(name, measures):
    columns = zip(MEASURES.values(), zip(*measures, strict=True), strict=True)
    cells = (" / ".join(form.format(value) for value in column) for form, column in columns)
    print(f"| {name} |", " | ".join(cells), "|", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", nargs="+", help="what train_mnist.py wrote")
    parser.add_argument("--data", default="data", help="folder of MNIST")
    parser.add_argument("--cache", default="runs/quality", help="folder of the classifiers")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], help="of the sampler")
    parser.add_argument("--num", type=int, default=10_000, help="number of samples")
    args = parser.parse_args(argv)
    models = [meanflow.load_model(file) for file in args.checkpoint]
    quality = Quality(args.data, args.cache)
    correct = " and ".join(f"{share:.2%}" for share in quality.accuracies)
    print(f"The classifiers name {correct} of the test images.\n")
    steps = " / ".join(map(str, args.steps))
    print(f"| {steps} steps |", " | ".join(MEASURES), "|\n" + "|---" * (1 + len(MEASURES)) + "|")
    for file, model in zip(args.checkpoint, models, strict=True):
        labels = torch.arange(args.num) % model.classes if model.classes else None
        drawn = (meanflow.draw(model, args.num, steps=steps) for steps in args.steps)
        print_row(file, [quality.measure(images, labels) for images in drawn])
    print_row("training images", [quality.measure(quality.train, None)])


if __name__ == "__main__":
    meanflow.run(main)
