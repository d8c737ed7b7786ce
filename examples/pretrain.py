"""Pretrains a LLaMA from scratch with one optimizer or with several, and compares them.

    python examples/pretrain.py                                     # AdamW and GaLore, a few minutes on two cores
    python examples/pretrain.py --data my.txt                       # on a text of one's own
    python examples/pretrain.py --preset 60m --data texts/ --compare adamw galore
    torchrun --nproc-per-node 2 examples/pretrain.py --preset 130m --data texts/ --dtype bfloat16
    torchrun --nproc-per-node 2 examples/pretrain.py --preset 1b --data texts/ --fsdp

Under torchrun every process has a copy of the model, or with --fsdp a part of it and of the optimizer's state. Ctrl-C
saves; the same command goes on. Beside this file: `corpus.py` makes batches of a text, `optimizers.py` makes
optimizers by name, `report.py` draws the table and the plot, `shared.py` has what the other scripts use as well.
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are built here, nothing is fetched

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from corpus import EMBEDDED, Batches, Corpus, CorpusError, load_corpus
from optimizers import RECIPES, Recipe, held_bytes, projected_matrices, refreshes
from report import write_report
from shared import count, learning_rate, positive, rank, replacing, share, synchronize
from slimstate.optim import Monitor
from slimstate.optim.layer_sampling import LayerSampler

INTERRUPTED = 130  # the shell's exit code for Ctrl-C
PASSES = 8  # over a text that is short for its preset; more teach a model the training text by heart
FEW = 5_000  # held-out tokens, below which a loss says little


@dataclass(frozen=True)
class Preset:
    """A model and how long it trains; `lr` is AdamW's, the other optimizers' are multiples of it."""

    width: int
    mlp: int
    heads: int
    layers: int
    vocab: int
    seq: int
    batch: int
    steps: int
    lr: float
    init: float = 0.02  # standard deviation of the first weights


# From 60m on shapes, batches and steps are those of GaLore's runs. `tiny` is sized for minutes on two cores; its
# learning rate is tuned, the others' are places to start.
PRESETS = {
    "tiny": Preset(128, 352, 4, 3, vocab=1024, seq=128, batch=8, steps=2400, lr=3e-3, init=0.06),
    "9m": Preset(128, 352, 4, 4, vocab=32000, seq=256, batch=128, steps=5_000, lr=3e-3),
    "20m": Preset(256, 688, 4, 4, vocab=32000, seq=256, batch=256, steps=5_000, lr=3e-3),
    "60m": Preset(512, 1376, 8, 8, vocab=32000, seq=256, batch=512, steps=10_000, lr=2.5e-3),
    "130m": Preset(768, 2048, 12, 12, vocab=32000, seq=256, batch=512, steps=20_000, lr=2.5e-3),
    "350m": Preset(1024, 2736, 16, 24, vocab=32000, seq=256, batch=512, steps=60_000, lr=1e-3),
    "1b": Preset(2048, 5461, 32, 24, vocab=32000, seq=256, batch=512, steps=100_000, lr=5e-4),
}


def main() -> int:
    """Trains what the command line asks for; returns the exit code."""
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        with processes(args.device) as device:
            corpus = shared_corpus(args)
            set_schedule(args, corpus)
            for name in args.optimizers:
                if not train(name, args, corpus, device):
                    say(f"saved in {args.out / name}; the same command goes on from there:\n  {command_line()}")
                    return INTERRUPTED
            if process()[0] == 0:
                title = (
                    f"{data_name(args)}: LLaMA {args.preset}, {args.steps:,} steps of {args.batch} x {args.seq} tokens"
                )
                print("\n" + write_report(args.out, args.optimizers, corpus, title))
    except (CorpusError, RunError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


# ---------------------------------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    """The command line, checked, with the preset's values filled in."""
    parser = argparse.ArgumentParser(
        description="Pretrains a LLaMA from scratch with one optimizer or with several, and compares them.",
        epilog="Where no default is given, it is the preset's. Runs found in --out are continued, or kept if finished.",
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="tiny", help="model and schedule (default: tiny)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--optimizer", choices=RECIPES, help="train with this one")
    which.add_argument(
        "--compare", choices=RECIPES, nargs="+", metavar="NAME", help="train with each of these (default: adamw galore)"
    )
    add("--lr", type=positive, help="peak learning rate of every optimizer named")
    add("--rank", type=rank, help="of the bases: a count, or a share of the shorter side (default: 0.25)")
    add("--update-proj-gap", type=count, metavar="STEPS", help="between two refreshes of a basis (default: 200)")
    add("--scale", type=positive, help="of the steps in the subspace (default: 0.25)")

    add("--data", type=Path, nargs="+", metavar="PATH", help="text files and folders of them (.xz, .gz too)")
    add("--vocab", type=vocabulary, help="size of the BPE vocabulary; 'bytes' for none")
    add("--cache", type=Path, metavar="FOLDER", default=Path(".cache"), help="for token ids (default: .cache)")

    add("--steps", type=count, help=f"optimizer steps (default: the preset's, and {PASSES} passes over a shorter text)")
    add("--batch", type=count, help="sequences in a step, of all processes together")
    add("--accumulate", type=count, default=1, metavar="PARTS", help="a batch is done in (default: 1)")
    add("--seq", type=count, help="tokens in a sequence")
    add("--warmup", type=share, default=0.1, help="share of the steps (default: 0.1)")
    add("--clip", type=positive, default=1.0, metavar="NORM", help="largest gradient norm (default: 1)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: float32)")
    add("--seed", type=int, default=0, help="of weights and batches (default: 0)")

    add("--eval-every", type=count, metavar="STEPS", help="on all held-out text (default: a tenth of the steps)")
    add("--save-every", type=count, metavar="STEPS", help="(default: a tenth of the steps)")
    add(
        "--monitor", type=count, metavar="STEPS", help="measure the optimizer every so many steps: monitor.csv and .png"
    )
    add("--out", type=Path, metavar="FOLDER", help="(default: runs/PRESET, or runs/PRESET-NAME of one's own data)")
    add("--fresh", action="store_true", help="start over, whatever is in --out")
    add("--fsdp", action="store_true", help="divide model and state over torchrun's processes (FSDP2)")
    add("--threads", type=count, help="of the CPU (default: torch's)")
    add("--device", help="(default: cuda if there is one, else cpu)")
    args = parser.parse_args()

    args.optimizers = list(dict.fromkeys([args.optimizer] if args.optimizer else args.compare or ["adamw", "galore"]))
    used = {option for name in args.optimizers for option in RECIPES[name].options}
    for option, default in (("rank", 0.25), ("update_proj_gap", 200), ("scale", 0.25)):
        if getattr(args, option) is None:
            setattr(args, option, default)
        elif option not in used:
            parser.error(f"--{option.replace('_', '-')} means nothing to {' and '.join(args.optimizers)}")

    if args.fsdp and "WORLD_SIZE" not in os.environ:
        parser.error("--fsdp divides the model over processes: start them by torchrun --nproc-per-node COUNT")
    if args.fsdp and (whole := [name for name in args.optimizers if not RECIPES[name].sharded]):
        parser.error(f"--fsdp: {' and '.join(whole)} cannot step on a part of a matrix; leave --fsdp out for it")

    preset = PRESETS[args.preset]
    for option in ("vocab", "seq", "batch"):
        if getattr(args, option) is None:
            setattr(args, option, getattr(preset, option))
    own = args.data[0].resolve().name.split(".")[0] if args.data else ""
    args.out = args.out or Path("runs", f"{args.preset}-{own}" if own else args.preset)
    args.data = args.data or [EMBEDDED]
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.batch % (parts := args.accumulate * int(os.environ.get("WORLD_SIZE", 1))):
        parser.error(f"a batch of {args.batch} cannot be split into {parts} equal parts (--accumulate x processes)")
    return args


def vocabulary(text: str) -> int:
    """A size, or 0 for bytes."""
    return 0 if text == "bytes" else int(text)


def command_line() -> str:
    """How this run was started, without what would start it over."""
    start = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]] if dist.is_initialized() else ["python"]
    return shlex.join([*start, *(a for a in sys.argv if a != "--fresh")])


# ---------------------------------------------------------------------------------------------------- processes


@contextlib.contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, if it did; yields the device of this one."""
    if "WORLD_SIZE" not in os.environ:
        yield torch.device(device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group(timeout=timedelta(hours=1))  # the others wait while the first one tokenizes
    try:
        yield torch.device(device)
    finally:
        dist.destroy_process_group()


def process() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gathered(x: Any) -> Any:
    """A copy of nested dicts in which the first process has whole tensors, on the CPU, for those that are divided.

    All processes take part; to the others it returns None in their place.
    """
    if isinstance(x, dict):
        return {key: gathered(value) for key, value in x.items()}
    if not isinstance(x, DTensor):
        return x
    whole = x.full_tensor()
    return whole.cpu() if process()[0] == 0 else None


def say(text: str) -> None:
    """Prints from the first process only, without breaking a progress bar."""
    if process()[0] == 0:
        tqdm.write(text, file=sys.stderr)


def over_processes(x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The sum (or maximum) of a tensor over the processes."""
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


class Interruption:
    """Turns the first Ctrl-C or SIGTERM into a request to save and stop; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> "Interruption":
        self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, *_: object) -> None:
        self.received = True
        self.__exit__()

    def asked(self, device: torch.device) -> bool:
        """Whether any process was interrupted: all have to stop at the same step."""
        if not dist.is_initialized():
            return self.received
        return bool(over_processes(torch.tensor(int(self.received), device=device), dist.ReduceOp.MAX))


# ---------------------------------------------------------------------------------------------------- training


class RunError(Exception):
    """A run cannot be started or continued; the message says why and what to do."""


@dataclass
class Progress:
    """How far a run is, and what was measured on the way."""

    step: int = 0
    seconds: float = 0.0  # without evaluations
    losses: list[float] = field(default_factory=list)  # of every step
    step_seconds: list[float] = field(default_factory=list)  # in optimizer.step()
    refreshed: list[int] = field(default_factory=list)  # bases computed in it
    state_bytes: int = 0  # the most so far
    matrix_state_bytes: int = 0  # of it, for the matrices that low-rank optimizers project
    evaluations: list[dict[str, float]] = field(default_factory=list)  # step, loss

    def add(self, loss: float, step_seconds: float, refreshed: int, seconds: float) -> None:
        """Counts one step."""
        self.step += 1
        self.seconds += seconds
        self.losses.append(loss)
        self.step_seconds.append(step_seconds)
        self.refreshed.append(refreshed)


@dataclass
class Run:
    """What is saved of one optimizer's training, in a folder of its own.

    `checkpoint.pt` holds all that it takes to go on, `run.json` what the report is made of.
    """

    folder: Path
    settings: dict[str, Any]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    sampler: LayerSampler | None = None
    progress: Progress = field(default_factory=Progress)

    def load(self) -> None:
        """Goes on from the checkpoint, if there is one.

        Raises:
            RunError: if it belongs to other settings, or cannot be read.
        """
        file = self.folder / "checkpoint.pt"
        for left in self.folder.glob(".*.*.*"):  # by a process that was killed while it saved
            left.unlink(missing_ok=True)
        if not file.exists():
            return
        advice = "choose another --out, or --fresh to start over"
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
            theirs = saved["settings"]
        except Exception as error:  # whatever a damaged file makes of the unpickler
            raise RunError(f"{file} is not a checkpoint of this script ({error}); {advice}") from error
        different = [
            f"{key} {theirs.get(key)} there, {self.settings.get(key)} here"
            for key in sorted(theirs.keys() | self.settings.keys())
            if theirs.get(key) != self.settings.get(key)
        ]
        if different:
            raise RunError(f"{file} belongs to a run with other settings ({'; '.join(different)}); {advice}")
        # Whole tensors, of which each process takes its part: by however many they were saved.
        set_model_state_dict(self.model, saved["model"], options=StateDictOptions(full_state_dict=True))
        if self.sampler is not None:
            self.sampler.load_state_dict(saved["sampler"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["rng"])
        self.progress = Progress(**saved["progress"])

    def save(self) -> None:
        """Writes both files, each of them whole or not at all.

        Raises:
            RunError: if they cannot be written, for want of space, say.
        """
        model, optimizer = gathered(self.model.state_dict()), gathered(self.optimizer.state_dict())
        if process()[0] > 0:
            return
        checkpoint = {
            "settings": self.settings,
            "model": model,
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "sampler": self.sampler.state_dict() if self.sampler is not None else None,
            "rng": torch.get_rng_state(),
            "progress": asdict(self.progress),
        }
        record = {"settings": self.settings, "progress": asdict(self.progress)}
        try:
            # The checkpoint last: a run that it says is finished would never write the other file again.
            with replacing(self.folder / "run.json") as stream:
                stream.write(json.dumps(record).encode())
            with replacing(self.folder / "checkpoint.pt") as stream:
                torch.save(checkpoint, stream)
        except (OSError, RuntimeError) as error:  # torch's writer makes its own of a full disk
            raise RunError(f"{self.folder} cannot be written ({error}); the last checkpoint there is whole") from error


def train(name: str, args: argparse.Namespace, corpus: Corpus, device: torch.device) -> bool:
    """Trains with one optimizer, or goes on where that was interrupted.

    Returns:
        False if it was interrupted; everything is saved then.
    """
    settings = run_settings(name, args, corpus)
    torch.manual_seed(args.seed)
    model, recipe = make_model(args, corpus.vocab, device), RECIPES[name]
    if args.fsdp:
        shard(model, recipe)
    matrices = projected_matrices(model)
    optimizer = recipe.build(model, settings["lr"], args)
    sampler = recipe.sampler(model, optimizer, args) if recipe.sampler else None
    scheduler = LambdaLR(optimizer, lambda step: learning_rate(step, args.steps, args.warmup))
    run = Run(args.out / name, settings, model, optimizer, scheduler, sampler)
    if not args.fresh:
        run.load()
    progress = run.progress
    number, world = process()
    begins = {0: "begins", args.steps: "is finished"}.get(progress.step, f"goes on at step {progress.step:,}")
    say(
        f"{name} {begins}: {sum(p.numel() for p in model.parameters()):,} weights, lr {settings['lr']:g}, "
        f"{args.steps:,} steps of {args.batch} x {args.seq} tokens, {device.type}, processes: {world}"
        f"{', each with a part of the model' if args.fsdp else ''}"
    )

    if args.monitor:
        run.folder.mkdir(parents=True, exist_ok=True)
        Monitor(optimizer, *[run.folder / "monitor.csv"] * (number == 0), every=args.monitor)

    batches = Batches(corpus.train, args.seq, args.batch, args.seed)
    parallel = model
    if world > 1 and not args.fsdp:
        parallel = DistributedDataParallel(model, find_unused_parameters=sampler is not None)
    bar = tqdm(
        total=args.steps,
        initial=progress.step,
        desc=name,
        unit="step",
        disable=number > 0,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    with bar, Interruption() as interruption:
        while progress.step < args.steps:
            started = time.perf_counter()
            parts = [x[number::world].to(device).chunk(args.accumulate) for x in batches(progress.step)]
            loss = backward(parallel, list(zip(*parts, strict=True)))
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if not norm.isfinite():
                raise RunError(f"{name}: the gradient of step {progress.step + 1:,} is not finite; lower --lr")
            seconds, refreshed = timed_step(optimizer, device)
            progress.state_bytes = max(progress.state_bytes, held_bytes(optimizer))
            progress.matrix_state_bytes = max(progress.matrix_state_bytes, held_bytes(optimizer, matrices))
            if sampler is not None:
                sampler.step()
            scheduler.step()
            optimizer.zero_grad()
            progress.add(loss, seconds, refreshed, time.perf_counter() - started)

            bar.update()
            bar.set_postfix_str(
                f"loss {statistics.fmean(progress.losses[-20:]):.3f}, "
                f"{progress.step * args.batch * args.seq / progress.seconds:,.0f} tokens/s, "
                f"state {progress.state_bytes / 1e6:.2f} MB",
                refresh=False,
            )
            stop, done = interruption.asked(device), progress.step == args.steps
            if done or (progress.step % args.eval_every == 0 and not stop):
                progress.evaluations.append({"step": progress.step, "loss": evaluate(model, corpus.valid, args)})
                say(f"{name} step {progress.step:,}: held-out loss {progress.evaluations[-1]['loss']:.4f}")
            if done or stop or progress.step % args.save_every == 0:
                run.save()
            if stop:
                return False
    if args.monitor and number == 0:
        Monitor.plot(run.folder / "monitor.csv").savefig(run.folder / "monitor.png", dpi=100)
    return True


def run_settings(name: str, args: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    """All that the result of a run depends on: a checkpoint is continued only under the same."""
    preset, recipe = PRESETS[args.preset], RECIPES[name]
    return {
        "optimizer": name,
        "lr": args.lr or preset.lr * recipe.lr_factor,
        **{option: getattr(args, option) for option in recipe.options},
        **{key: getattr(preset, key) for key in ("width", "mlp", "heads", "layers", "init")},
        **{key: getattr(args, key) for key in ("seq", "batch", "steps", "warmup", "clip", "dtype", "seed")},
        "vocab": corpus.vocab,
        "text": corpus.digest,
    }


def make_model(args: argparse.Namespace, vocab: int, device: torch.device) -> nn.Module:
    """A LLaMA with random weights."""
    preset = PRESETS[args.preset]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=preset.width,
        intermediate_size=preset.mlp,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        max_position_embeddings=args.seq,
        initializer_range=preset.init,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).to(device)


def shard(model: nn.Module, recipe: Recipe) -> None:
    """Divides a model over all processes, block by block, so that a step of the optimizer sends as little as can be."""
    mesh = init_device_mesh(next(model.parameters()).device.type, (process()[1],))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, shard_placement_fn=recipe.placement)


def shared_corpus(args: argparse.Namespace) -> Corpus:
    """The corpus; the first process tokenizes, the others find it in the cache."""
    number, world = process()
    if number > 0:
        dist.barrier()
    started = time.perf_counter()
    say(f"reading {data_name(args)}")
    corpus, skipped = load_corpus(args.data, args.vocab, args.cache)
    if world > 1 and number == 0:
        dist.barrier()
    if skipped:
        what = "1 file is" if len(skipped) == 1 else f"{len(skipped)} files are"
        say(f"left out: {what} not UTF-8 text, such as {skipped[0]}")
    say(
        f"{len(corpus.train):,} tokens to train on, {len(corpus.valid):,} held out, vocabulary "
        f"{corpus.vocab:,}, {corpus.bytes_per_token:.2f} bytes a token ({time.perf_counter() - started:.1f} s)"
    )
    return corpus


def data_name(args: argparse.Namespace) -> str:
    """Where the text comes from, in short."""
    first, *more = args.data
    return f"{first.name} and {len(more)} more" if more else first.name


def set_schedule(args: argparse.Namespace, corpus: Corpus) -> None:
    """Fills in what depends on how long the text is."""
    if args.steps is None:
        args.steps = PRESETS[args.preset].steps
        enough = max(1, PASSES * len(corpus.train) // (args.batch * args.seq))
        if enough < args.steps:
            say(f"a short text: {enough:,} steps, {PASSES} passes, for the preset's {args.steps:,} (see --steps)")
            args.steps = enough
    if len(corpus.valid) < FEW:
        say(f"only {len(corpus.valid):,} tokens are held out: differences of a few percent between losses mean nothing")
    args.eval_every = args.eval_every or math.ceil(args.steps / 10)
    args.save_every = args.save_every or math.ceil(args.steps / 10)


def loss_sum(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy of a batch, in float32."""
    logits = model(input_ids=inputs).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


def backward(model: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> float:
    """Leaves the gradient of the mean loss over all parts and processes; returns that loss."""
    tokens = sum(targets.numel() for _, targets in parts)
    total = torch.zeros((), device=parts[0][0].device)
    for i, (inputs, targets) in enumerate(parts):
        # Gradients are exchanged once, with the last part.
        last = i == len(parts) - 1
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        wait = isinstance(model, DistributedDataParallel) and not last
        with model.no_sync() if wait else contextlib.nullcontext():
            loss = loss_sum(model, inputs, targets) / tokens
            loss.backward()
        total += loss.detach()
    return over_processes(total).item() / process()[1]


def timed_step(optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[float, int]:
    """Steps; returns the seconds that it took, and how many bases were computed in it."""
    before = refreshes(optimizer)
    synchronize(device)
    started = time.perf_counter()
    optimizer.step()
    synchronize(device)
    return time.perf_counter() - started, refreshes(optimizer) - before


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor, args: argparse.Namespace) -> float:
    """The mean loss over all held-out tokens; every process takes a share of the windows."""
    number, world = process()
    device = next(model.parameters()).device
    whole = (len(tokens) - 1) // args.seq * args.seq  # the rest makes a shorter window
    rows = max(1, 4096 // args.seq)
    inputs, targets = (x.view(-1, args.seq).split(rows) for x in (tokens[:whole], tokens[1 : whole + 1]))
    windows = [*zip(inputs, targets, strict=True), (tokens[None, whole:-1], tokens[None, whole + 1 :])]
    windows = [(inputs, targets) for inputs, targets in windows if inputs.numel()]
    model.eval()
    total = torch.zeros((), device=device, dtype=torch.float64)
    for i in range(number, len(windows) + number, world):  # as many for each: a sharded model is gathered together
        inputs, targets = windows[min(i, len(windows) - 1)]
        loss = loss_sum(model, inputs.to(device).long(), targets.to(device).long())
        total += loss if i < len(windows) else 0
    model.train()
    return over_processes(total).item() / (len(tokens) - 1)


if __name__ == "__main__":
    sys.exit(main())
