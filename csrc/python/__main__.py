# SPDX-License-Identifier: Apache-2.0
"""The command line: ``slimstate plan`` says whether training fits, before anything is allocated."""

import argparse
import json
import re
import sys
from ast import literal_eval
from collections.abc import Sequence
from typing import Any

EXAMPLES = """examples:
  slimstate plan llama-7b --dtype bfloat16
  slimstate plan llama-7b --dtype bfloat16 --optimizer GaLoreAdamW --rank 1024 --moment-dtype 8bit --per-layer
  slimstate plan config.json --dtype bfloat16 --budget 24GB
  slimstate plan llama3-8b --optimizer AdamW --active 2 --embeddings freeze --json
"""
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the command line says.

    Args:
        arguments: without the program's name; None takes those that it was called with.

    Returns:
        0; 1 if nothing fits into a budget; 2, with the reason on stderr, for arguments that are wrong.
    """
    parser = argparse.ArgumentParser(prog="slimstate", description="Memory-efficient optimizers for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    planning = commands.add_parser(
        "plan",
        help="the memory that training takes: weights, gradients, optimizer state; not activations",
        description="Plans the memory of training, by group and in total, before anything is allocated. Without "
        "--optimizer all are compared; with --budget the settings are found that fit. Activations are not planned. "
        "GB is 1e9 bytes, GiB 2^30.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_arguments(planning)
    args = parser.parse_args(arguments)
    try:
        return _plan(args)
    except (ValueError, TypeError, NotImplementedError, ModuleNotFoundError) as error:
        print(f"slimstate plan: {error}", file=sys.stderr)
        return 2


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="a preset (an unknown one lists them), or the path of a config.json of transformers")
    add("--optimizer", help="one of slimstate.optim")
    add("--rank", type=_number, help="of projected matrices: a count, or a share such as 0.25")
    add("--moment-dtype", help="float32, bfloat16, param, 8bit or 8bit-companded")
    add("--basis-dtype", help="bfloat16 or 8bit")
    add("--set", nargs="+", type=_setting, default=[], metavar="KEY=VALUE", help="further settings of the optimizer")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: the model's)")
    add("--embeddings", default="dense", help="dense (the default), projected or freeze")
    add("--frozen", nargs="+", default=[], metavar="PATTERN", help="names of parameters that get no gradient")
    add("--per-layer", action="store_true", help="project gradients during the backward pass (in_backward)")
    add("--active", type=int, metavar="N", help="layers that LISA or OwLore keeps awake at a time")
    add("--layers", metavar="PATH", help="where these layers are, such as model.layers")
    add("--state-policy", default="drop", help="of sleeping layers: drop (the default), keep or offload")
    add("--ddp", action="store_true", help="count the buckets of DistributedDataParallel")
    add("--budget", type=_size, metavar="SIZE", help="such as 24GB or 22.5GiB: find the settings that fit")
    add("--most", type=int, default=5, help="how many of those to show (default: 5)")
    add("--json", action="store_true", help="bytes for machines")


def _plan(args: argparse.Namespace) -> int:
    import torch  # slow, and not for --help

    from slimstate.optim import memory
    from slimstate.optim._models import model_of

    options: dict[str, Any] = {
        key: getattr(args, key) for key in ("embeddings", "frozen", "active", "layers", "state_policy", "ddp")
    }
    options["dtype"] = None if args.dtype is None else getattr(torch, args.dtype)
    options |= {"per_layer": True} if args.per_layer else {}
    settings = {key: x for key in ("rank", "moment_dtype", "basis_dtype") if (x := getattr(args, key)) is not None}
    settings |= dict(args.set)
    if args.optimizer is None and (own := settings.keys() - {"rank"}):
        raise ValueError(f"{min(own)} is a setting of one optimizer: name it with --optimizer")
    model = model_of(args.model)
    if args.budget is not None:
        found = memory.fitting(model, args.budget, args.optimizer, most=args.most, **options, **settings)
        _print_fitting(found, args.budget, args.json)
        return 0 if found else 1
    if args.optimizer is not None:
        planned = memory.plan(model, args.optimizer, **options, **settings)
        print(json.dumps(planned.to_dict(), indent=1) if args.json else planned)
        return 0
    plans = memory.compare(model, **options, **settings)
    if args.json:
        print(json.dumps([planned.to_dict() for planned in plans], indent=1))
    else:
        print(memory.comparison(plans))
    return 0


def _print_fitting(found: list[tuple[Any, Any]], budget: int, as_json: bool) -> None:
    from slimstate.optim.memory import markdown_table, size_text

    if as_json:
        print(
            json.dumps([planned.to_dict() | {"percent_behind": choice.behind} for choice, planned in found], indent=1)
        )
        return
    if not found:
        print(f"Nothing fits into {size_text(budget)}. Fewer bytes: a lower --rank, --dtype bfloat16, --active 2.")
        return
    rows = [
        (planned.optimizer, size_text(planned.total), size_text(budget - planned.total), _behind(choice.behind))
        for choice, planned in found
    ]
    header = ("fits, best quality first", "takes", "left for activations", "loss behind AdamW's")
    print(markdown_table(header, rows))
    print(
        "\nOrder: the held-out loss of a model of 0.87 M weights at rank 1/4 (docs/benchmarks/pretrain.md), float32 "
        "before 8-bit moments;\nlower ranks were not measured, and come last. Activations are not planned: they must "
        "fit into what is left."
    )


def _behind(percent: float | None) -> str:
    return "not measured" if percent is None else f"{percent:.1f} %"


def _number(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+) *([a-zA-Z]+)", text)
    if found is None or found[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"must be a number and one of B, MB, GB, MiB, GiB, got {text!r}")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, got {text!r}")
    try:
        return key, literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


if __name__ == "__main__":
    raise SystemExit(main())
