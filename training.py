"""Training for the scripts train_*.py, and drawing from the checkpoints it writes.

AMP, averaged weights, checkpoints, resuming, several processes, faults: what `train` does around
`meanflow.Objective`. A project with a training loop of its own needs only meanflow.py.
"""

import argparse
import math
import os
import pickle
import signal
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from meanflow import LAMBDA_SCHEDULES, Objective, UNet, lambda_schedule, sample

DefaultsShown = argparse.ArgumentDefaultsHelpFormatter
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
CUDA = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
DEVICES = ["cuda", *CUDA, "cpu"] if CUDA else ["cpu"]
FORMAT = "meanflow 4"  # of checkpoints
LABEL_DROPOUT = 0.1  # share of labels that guidance takes away
PATIENCE = 20  # steps in a row without a finite gradient
UNREADABLE = OSError, EOFError, RuntimeError, ValueError, AssertionError, pickle.UnpicklingError
RESUMABLE = {"data", "out", "device", "resume", "compile", "tensorboard"}  # settings that may
RESUMABLE |= {"log_every", "sample_every", "checkpoint_every"}  # change when training goes on


class UserError(ValueError):
    """A mistake of the user's, which scripts show in one line."""


def require(condition, message):
    if not condition:
        raise UserError(message)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")  # without the usage, one line


def run(main):
    """Call main() for a script: what the user can mend ends it with one line and status 2."""
    warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)  # torch's own affair
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
    try:
        main()
    except (ValueError, OSError) as error:
        _Parser().error(error)
    except KeyboardInterrupt:
        sys.exit(130)


def _number(kind, low, high=math.inf):
    """Return the argparse type of finite numbers from low to high, both included."""

    def number(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, got {text}")
        return value

    return number


COUNT, STEPS, POSITIVE = _number(int, 1), _number(int, 0), _number(float, 1e-12)
SEED = _number(int, 0, 2**63 - 1)
SHARE, DECAY = _number(float, 0, 1), _number(float, 0, 1 - 1e-9)


def train_parser(description, **defaults):
    """Return the command line of a training script, which may set defaults of its own."""
    parser = _Parser(description=description, formatter_class=DefaultsShown)
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    normal = {"type": float, "nargs": 2, "metavar": ("MEAN", "STD")}
    flag("--data", default="data", help="folder of the data set, downloaded there if absent")
    flag("--out", default="runs", help="folder for checkpoint.pt, log.csv and pictures")
    flag("--steps", type=COUNT, default=100_000, help="training steps")
    flag("--batch-size", type=COUNT, default=64, help="images per step, over all processes")
    flag("--lr", type=POSITIVE, default=1e-3, help="peak learning rate of Adam")
    flag("--lr-warmup", type=STEPS, help="steps in which it rises; without it a 50th of all")
    flag("--lr-decay", action=switch, default=False, help="let it fall to 0 along a cosine")
    flag("--beta2", type=DECAY, default=0.999, help="decay of Adam's second moment")
    flag("--clip", type=POSITIVE, default=20.0, help="largest norm of the gradient")
    flag("--ema", type=DECAY, default=0.999, help="decay of the averaged weights, per step")
    flag("--lambda-schedule", choices=LAMBDA_SCHEDULES, help="curriculum of λ; without it λ = 0")
    flag("--lambda-max", type=SHARE, help="largest λ; without it 1; 0 for λ = 0")
    flag("--lambda-warmup", type=STEPS, help="steps in which λ changes; without it a 4th of all")
    flag("--tangent", choices=("conditional", "marginal", "mixed"), default="mixed",
         help="direction of du/dt; mixed is marginal where λ > 0, else conditional")  # fmt: skip
    flag("--jump-share", type=SHARE, default=0.25, help="share of samples with r < t")
    flag("--t-logit", **normal, default=[-0.4, 1.0], help="normal draws of logit(t)")
    flag("--r-logit", **normal, help="of logit(r), clipped to t; without it sorted draws of t")
    flag("--p", type=_number(float, 0), default=0.75, help="power p of the weight (||e||² + c)^-p")
    flag("--c", type=POSITIVE, default=1e-3, help="offset c of the weight")
    flag("--class-cond", action=switch, default=False, help="condition on the labels")
    flag(
        "--guidance",
        type=_number(float, 0),
        default=1.0,
        help="guidance ω that is learned; 1 is off",
    )
    flag("--seed", type=SEED, default=0, help="seed of all random numbers")
    flag("--device", choices=DEVICES, default=DEVICES[0], help="device to train on")
    flag("--amp", choices=PRECISIONS, help="network's precision; without it float32 on a CPU")
    flag("--compile", action=switch, help="compile the loss, by default on a GPU only")
    flag("--resume", action="store_true", help="go on from the checkpoint in --out, if any")
    flag("--tensorboard", action="store_true", help="write TensorBoard's files as well")
    flag("--log-every", type=COUNT, default=20, help="steps per row of log.csv and progress line")
    flag("--sample-every", type=COUNT, default=500, help="steps between pictures of samples")
    flag("--checkpoint-every", type=COUNT, default=500, help="steps between checkpoints")
    parser.set_defaults(**defaults)
    return parser


def load_dataset(dataset, data):
    """Return torchvision's training set `dataset` in the folder `data`, downloaded if not there.

    It arrives whole or not at all. Raises ValueError where there is neither data nor network.
    """
    try:
        return dataset(data)
    except UNREADABLE:  # or not there
        folder = Path(data).absolute()
    parent = next(parent for parent in (folder, *folder.parents) if parent.exists())
    with tempfile.TemporaryDirectory(prefix=".download-", dir=parent) as temporary:
        try:
            dataset(temporary, download=True)
        except UNREADABLE as error:
            what = f"no complete {dataset.__name__} in {folder} and no download"
            raise UserError(f"{what}: copy it there or name its folder with --data") from error
        for file in [file for file in Path(temporary).rglob("*") if file.is_file()]:
            target = folder / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    return dataset(data)


@contextmanager
def _replacing(file):
    """Yield a temporary name, which replaces `file` when all has gone well."""
    temporary = Path(file).with_name(f".{Path(file).name}")
    try:
        yield temporary
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"cannot write {file}: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def draw(model, num, *, steps=1, seed=0):
    """Return `num` images (num, C, H, W) of a UNet from fixed noise, its labels taken in turn."""
    x1 = torch.randn(num, *model.shape, generator=torch.Generator().manual_seed(seed))
    x1 = x1.to(next(model.parameters()).device)
    y = torch.arange(num, device=x1.device) % model.classes if model.classes else None
    batches = ((x1[i : i + 500], None if y is None else y[i : i + 500]) for i in range(0, num, 500))
    return torch.cat([sample(model, x, steps=steps, y=labels) for x, labels in batches])


def save_images(images, file):
    """Write images (B, C, H, W) in [-1, 1] into one PNG, ten in a row."""
    from torchvision.utils import save_image

    with _replacing(file) as temporary:
        save_image(images, temporary, nrow=10, normalize=True, value_range=(-1, 1))


def load_checkpoint(file):
    """Return the dict that `train` saved. Raises ValueError for a missing or another file."""
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or "damaged, or another kind of file"
        raise UserError(f"cannot read a checkpoint from {file}: {reason}") from error
    known = isinstance(checkpoint, dict) and checkpoint.get("format") == FORMAT
    require(known, f"{file} is not a checkpoint of this version of meanflow.py")
    return checkpoint


def load_model(file):
    """Return the UNet with the averaged weights that `train` saved."""
    checkpoint = load_checkpoint(file)
    model = UNet(**checkpoint["unet"])
    model.load_state_dict(checkpoint["ema"])
    return model.eval()


def train(model, images, labels, args, *, flip=False):
    """Train the UNet `model`; write checkpoint.pt, log.csv and pictures into args.out.

    images  uint8 (N, C, H, W)
    labels  int64 (N,), or None for an unconditional model
    args    settings, from `train_parser`
    flip    mirror each image with probability 1/2
    Under torchrun each process takes its part of the batch. Returns the model with the averaged
    weights, in eval mode. Raises ValueError for what the user can mend, and SystemExit after a
    SIGINT or SIGTERM, once the checkpoint is written.
    """
    args = argparse.Namespace(**vars(args))
    with _processes(args) as (rank, world), _signals() as caught, ExitStack() as at_end:
        lam = _settle(args, world)
        _check_data(model, images, labels, args)
        checkpoint = Path(args.out, "checkpoint.pt")
        run = _Run(model, args, world)
        at_end.callback(delattr, run, "objective")  # see _processes
        if args.resume and checkpoint.exists():
            run.resume(checkpoint)
        _agree_on_start(run.step, world, args)
        log = _Log(run, rank)
        images, labels = images.to(args.device), None if labels is None else labels.to(args.device)
        n = args.batch_size // world
        while run.step < args.steps:
            torch.manual_seed(hash((args.seed, run.step, rank)))  # leaves no state to resume
            i = torch.randint(len(images), (n,), device=args.device)
            x0, y = images[i].float() / 127.5 - 1, None if labels is None else labels[i]
            if flip:
                x0 = torch.where(torch.rand_like(x0[:, :1, :1, :1]) < 0.5, x0.flip(3), x0)
            if args.guidance != 1:
                y = torch.where(torch.rand(n, device=args.device) < LABEL_DROPOUT, -1, y)
            now = lam(run.step)
            run.update(x0, now, y)

            intervals = args.log_every, args.sample_every, args.checkpoint_every
            logs, draws, saves = (run.step % n == 0 or run.step == args.steps for n in intervals)
            stop = _agree(caught, world, logs, args.device)
            if logs or saves or stop:
                log.write(now)
            if (saves or stop) and rank == 0:
                run.save(checkpoint)
            if draws:
                log.draw(f"step-{run.step:06}.png")
            if stop and rank == 0:
                print(f"\nstopped after step {run.step}; the same command with --resume goes on")
            if stop:
                raise SystemExit(128 + stop)
        log.draw("samples.png", 40, steps=(1, 2, 4))
        return run.average.module.eval()


def _settle(args, world):
    """Fill in settings that depend on others, refuse what cannot be, return the schedule of λ."""
    alone = args.lambda_schedule is None and (args.lambda_max, args.lambda_warmup) != (None, None)
    require(not alone, "--lambda-max and --lambda-warmup need a --lambda-schedule")
    if args.lr_warmup is None:
        args.lr_warmup = args.steps // 50
    if args.lambda_schedule and args.lambda_warmup is None:
        args.lambda_warmup = args.steps // 4
    for flag, value in ("--lr-warmup", args.lr_warmup), ("--lambda-warmup", args.lambda_warmup):
        require((value or 0) <= args.steps, f"{flag} {value} is beyond --steps {args.steps}")
    for flag, pair in ("--t-logit", args.t_logit), ("--r-logit", args.r_logit):
        require(not pair or pair[1] >= 0, f"{flag} {pair}: the standard deviation is below 0")
    cpu, size, share = args.device == "cpu", args.batch_size, args.jump_share
    if args.amp is None:
        bf16 = not cpu and torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = "off" if cpu else "bf16" if bf16 else "fp16"
    args.compile = not cpu if args.compile is None else args.compile
    require(args.amp != "fp16" or not cpu, "--amp fp16 needs a GPU; --amp bf16 does not")
    require(size % world == 0, f"--batch-size {size} does not divide by {world} processes")
    some = share == 0 or round(share * (size // world)) > 0
    require(some, f"--jump-share {share} of {size // world} images per process is not one")
    require(not args.tensorboard or find_spec("tensorboard"), "--tensorboard: it is not installed")
    old = any(Path(args.out, name).exists() for name in ("checkpoint.pt", "log.csv"))
    require(args.resume or not old, f"{args.out} holds a run: --resume it, or name another --out")
    if args.lambda_schedule is None:
        return lambda_schedule("constant", warmup=0, maximum=0.0)
    maximum = 1.0 if args.lambda_max is None else args.lambda_max
    return lambda_schedule(args.lambda_schedule, warmup=args.lambda_warmup, maximum=maximum)


def _check_data(model, images, labels, args):
    fit = images.dtype == torch.uint8 and images.shape[1:] == model.shape
    require(fit, f"images must be uint8 (N, *{model.shape}), got {tuple(images.shape)}")
    require(args.guidance == 1 or labels is not None, "--guidance needs labels: --class-cond")
    number = 0 if labels is None else len(labels)
    require((number == 0) == (model.classes == 0), f"{number} labels, {model.classes} classes")
    if number:
        low, high = int(labels.min()), int(labels.max())
        fit = low >= 0 and high < model.classes
        require(fit, f"labels go from {low} to {high}, the model has {model.classes} classes")


@contextmanager
def _processes(args):
    """Join the processes that torchrun started, if it did; yield the rank and their number.

    By the end DistributedDataParallel must be gone: if it were the last to hold the process group,
    the group's threads would wait for Python's lock while it waits for them (seen on torch 2.11).
    """
    if "LOCAL_RANK" not in os.environ:
        yield 0, 1
        return
    cuda = args.device.startswith("cuda")
    if cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    if joined := not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        if joined:
            dist.destroy_process_group()


@contextmanager
def _signals():
    """Yield a list that the numbers of SIGINT and SIGTERM are appended to when they come."""
    caught, note = [], lambda number, frame: caught.append(number)
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _agree_on_start(step, world, args):
    """Refuse to go on from different checkpoints, as several machines do without a shared --out."""
    if world > 1:
        steps = torch.tensor([step, -step], device=args.device)
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        high, low = steps.tolist()
        require(high == -low, f"processes resume at steps {-low} to {high}: share one --out")


def _agree(caught, world, due, device):
    """Return the signal that came, or 0; several processes must agree, and do so when due."""
    stop = torch.tensor(max(caught, default=0))
    if world > 1 and due:
        dist.all_reduce(stop := stop.to(device), dist.ReduceOp.MAX)
    return int(stop) if world == 1 or due else 0


class _Run:
    """A training under way: what a checkpoint holds, an update of it, and its log."""

    def __init__(self, model, args, world):
        self.model, self.args, self.world = model.to(args.device).train(), args, world
        self.step, self.seconds, self.recent, self.lost = 0, 0.0, [], 0
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
        self.optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, args.beta2), fused=True)
        self.scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.amp == "fp16")
        self.parts = {"model": model, "ema": self.average.module}
        self.parts |= {"optimizer": self.optimizer, "scaler": self.scaler}
        names = "jump_share", "t_logit", "r_logit", "guidance", "p", "c"
        self.objective = Objective(model, **{name: getattr(args, name) for name in names})
        if args.compile:
            torch._dynamo.config.optimize_ddp = False  # it would split the graph within the JVP
            self.objective.compile(dynamic=False)
        if world > 1:
            self.objective = nn.parallel.DistributedDataParallel(self.objective)

    def update(self, x0, lam, y):
        """Take a step; Adam leaves the weights alone if the gradient is not finite."""
        args = self.args
        if args.compile and (lam > 0 or args.lambda_schedule in ("linear", "cosine")):
            lam = torch.full((), lam, device=x0.device)  # a number would be compiled in
        tangent = args.tangent
        if tangent == "mixed":  # with λ = 0 the conditional one is right, and the cheaper
            tangent = "marginal" if torch.is_tensor(lam) or lam > 0 else "conditional"
        with torch.autocast(x0.device.type, PRECISIONS[args.amp], enabled=args.amp != "off"):
            loss, err = self.objective(x0, lam, y, tangent=tangent)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), args.clip)
        self.optimizer.found_inf = (~norm.isfinite()).float()  # then fused Adam changes nothing
        decay = (1 + math.cos(math.pi * self.step / args.steps)) / 2 if args.lr_decay else 1.0
        rise = min(1.0, (self.step + 1) / max(1, args.lr_warmup))
        self.optimizer.param_groups[0]["lr"] = args.lr * rise * decay
        self.optimizer.step()
        self.scaler.update()
        self.average.update_parameters(self.model)
        self.step += 1
        jumps = round(args.jump_share * len(x0))  # the samples with r < t, which come first
        means = loss.detach(), err[jumps:].mean(), err[:jumps].mean(), norm
        self.recent.append(torch.stack(means))  # on the device, which is not waited for

    def save(self, file):
        finite = all(p.isfinite().all() for p in self.model.parameters())
        require(finite, f"weights are not finite after step {self.step}; {file} is an earlier one")
        about = {"format": FORMAT, "unet": self.model.config, "args": vars(self.args)}
        about |= {"step": self.step, "seconds": self.seconds}
        with _replacing(file) as temporary:
            torch.save(about | {k: part.state_dict() for k, part in self.parts.items()}, temporary)

    def resume(self, file):
        checkpoint = load_checkpoint(file)
        was = checkpoint["args"] | checkpoint["unet"]
        now = vars(self.args) | self.model.config
        for name in sorted(was.keys() - RESUMABLE - (set() if self.args.lr_decay else {"steps"})):
            flag = name.replace("_", "-")
            message = f"{flag} was {was[name]} in {file}, now it is {now.get(name)}"
            require(was[name] == now.get(name), f"{message}: give the old one")
        try:
            for name, part in self.parts.items():
                part.load_state_dict(checkpoint[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{file} is damaged: {str(error).splitlines()[0]}") from error
        self.step, self.seconds = checkpoint["step"], checkpoint["seconds"]
        self.average.n_averaged.fill_(self.step)  # at 0 the first update would copy the weights


class _Log:
    """log.csv, the progress line and, if asked for, TensorBoard; only the first process writes."""

    COLUMNS = ("step", "loss", "err_flow", "err_jump", "lambda", "grad_norm", "skipped",
               "images_per_second", "seconds")  # fmt: skip

    def __init__(self, run, rank):
        args, self.file, self.board = run.args, Path(run.args.out) / "log.csv", None
        self.run, self.writes, self.mark = run, rank == 0, time.perf_counter()
        if not self.writes:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        rows = self.file.read_text().splitlines(keepends=True)[1:] if self.file.exists() else []
        rows = [row for row in rows if row[-1] == "\n" and int(row.split(",")[0]) <= run.step]
        with _replacing(self.file) as temporary:
            temporary.write_text(",".join(self.COLUMNS) + "\n" + "".join(rows))
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(args.out, purge_step=run.step + 1)

    def write(self, lam):
        """Write means over the steps since the last row; raise ValueError if all goes wrong."""
        run, args, steps = self.run, self.run.args, torch.stack(self.run.recent)
        good = steps[:, 3].isfinite()
        means = steps[good].mean(0)
        if run.world > 1:
            dist.all_reduce(means)
        for finite in good.tolist():
            run.lost = 0 if finite else run.lost + 1
        loss, flow, jump, norm = (means / run.world).tolist()
        now = time.perf_counter()
        pace, self.mark, run.recent = (now - self.mark) / len(steps), now, []
        run.seconds += pace * len(steps)
        speed, left = args.batch_size / pace, round((args.steps - run.step) * pace)
        row = run.step, loss, flow, jump, lam, norm, int((~good).sum()), speed, run.seconds
        if self.writes:
            with open(self.file, "a") as file:
                print(*(f"{value:.8g}" for value in row), sep=",", file=file)
            line = f"{run.step}/{args.steps}  err {flow:.4f} (r = t) {jump:.4f} (r < t)  "
            line += f"λ {lam:.2f}  {speed:.0f} images/s  {left // 60}:{left % 60:02} left "
            print(line, end="\033[K\r" if sys.stdout.isatty() and left else "\n", flush=True)
        for name, value in zip(self.COLUMNS, row, strict=True) if self.board else ():
            self.board.add_scalar(name, value, run.step)
        lost = f"no finite gradient in {run.lost} steps up to step {run.step}"
        require(run.lost < PATIENCE, f"{lost}; the checkpoint in {args.out} is good")

    def draw(self, name, num=80, steps=(1,)):
        """Write a picture of `num` samples in each number of steps."""
        if not self.writes:
            return
        model, seed = self.run.average.module, self.run.args.seed
        images = torch.cat([draw(model, num, steps=n, seed=seed) for n in steps])
        save_images(images, self.file.with_name(name))
        if self.board:
            self.board.add_images("samples", images.clamp(-1, 1) / 2 + 0.5, self.run.step)


def main():
    """Draw samples from a checkpoint, into one PNG or into a folder with one for each."""
    parser = _Parser(description=main.__doc__, formatter_class=DefaultsShown)
    parser.add_argument("checkpoint", help="file that training wrote")
    parser.add_argument("--steps", type=COUNT, default=1, help="network evaluations per image")
    parser.add_argument("--num", type=COUNT, default=80, help="number of images")
    parser.add_argument("--out", default="samples.png", help="a .png for a grid, or a folder")
    parser.add_argument("--seed", type=SEED, default=0, help="seed of the noise")
    parser.add_argument("--device", choices=DEVICES, default=DEVICES[0], help="device to draw on")
    args = parser.parse_args()
    model, out = load_model(args.checkpoint).to(args.device), Path(args.out)
    images = draw(model, args.num, steps=args.steps, seed=args.seed)
    grid = out.suffix.lower() == ".png"
    (out.parent if grid else out).mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate([images] if grid else images):
        save_images(picture, out if grid else out / f"{i:06}.png")
