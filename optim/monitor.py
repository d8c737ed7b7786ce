"""What goes on in training: how much of the gradient a basis holds, how far it turns, and how far the weights move."""

import csv
import math
import os
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimstate.ops.weights import widen
from slimstate.projections._base import compute_dtype
from slimstate.projections._bases import decode
from slimstate.projections._blocks import blocks, largest_magnitude

from ._base import Group, State
from ._projected import ProjectedOptimizer, due, matrix_of
from ._sharding import local, part_of, total_

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Monitor"]

Writer = Callable[[int, dict[str, float]], object]

SAMPLE = 4096  # entries of a parameter whose change is measured: about 1 % off in the RMS of Gaussian changes
COLUMNS = ["step", "measure", "of", "value"]

# measure -> the axis of its plot
MEASURES = {
    "captured_own": "energy captured, own batch",
    "captured_next": "energy captured, next batches",
    "residual": "energy left out",
    "overlap": "overlap of a basis with the one before",
    "effective_rank": "effective rank of the projected gradient",
    "basis_age": "steps since the last refresh",
    "update_rms": "RMS of the update",
    "update_per_lr": "RMS of the update / lr",
    "skipped_steps": "steps skipped",
}
LOGARITHMIC = ("update_rms", "update_per_lr")


class Monitor:
    r"""Measures an optimizer while it trains, and changes no bit of what it does.

    At step 1 and every `every` steps it gives each group, by the name :math:`\text{measure}/\text{group}`:

    - `captured_next`: :math:`\|Q^\top G\|_F^2 / \|G\|_F^2` of this step's gradients G, over all matrices of the group
      whose basis Q was made from an earlier batch;
    - `captured_own`: the same of the gradients that bases were made from, over the refreshes since the last report;
    - `residual`: :math:`1 - \|Q^\top G\|_F^2 / \|G\|_F^2`, over all matrices: what GaLoreAdamW leaves out, and what in
      FRUGAL goes to the rule outside;
    - `overlap`: :math:`\|Q_\text{old}^\top Q_\text{new}\|_F^2 / r`, over the refreshes since the last report: 1 for the
      same subspace, r/d on average for independent ones; of columns that are selected, the share that stays;
    - `effective_rank`: of :math:`R = Q^\top G`, with singular values :math:`\sigma_i`, the participation ratio
      :math:`(\sum \sigma_i^2)^2 / \sum \sigma_i^4`, which is k for k equal ones and needs no decomposition; the mean
      over the matrices;
    - `basis_age`: the steps that a basis has been in use beside the one that made it; the mean over the matrices;
    - `update_rms`: :math:`\sqrt{\mathrm{mean}\,(\Delta W)^2}` of all weights of the group that took the step, decay and
      rounding included; of large parameters from 4096 entries, drawn anew each time;
    - `update_per_lr`: the same divided by the group's learning rate: 1 in AdamW's first step, and less in noise; see
      the page on learning rates;
    - `skipped_steps`: how many steps gradients of this group have stopped so far because they were not finite, where
      `nonfinite` is not `propagate`.

    Of a group that has no bases, and of other torch optimizers, there are the two of updates. A measure is left out
    where there was nothing to measure: in the per-layer mode (`in_backward`) gradients are gone but those that bases
    are fitted to, so that `captured_next`, `residual` and `effective_rank` say something of these matrices alone. In
    `GradNormLoRP` G is the gradient of the directions, that of the weights as they are after the step; with error
    feedback G is without what is carried over. If a refresh finds a gradient that cannot be used, the age goes on.

    Between reports nothing waits for the device. What is kept then is four numbers a refresh, and during one step the
    bases that are about to change. A refresh is measured if it is a matrix's last one before a report.

    Of parameters that are divided over processes (DTensor), the values are those of the whole: sums over processes, in
    reports and at refreshes. Make a Monitor in every process then, with writers in the first one only; one that is
    alone waits for ever. Under DistributedDataParallel each process has the same values by itself.

    A copy of the optimizer is not monitored. After `optimizer.load_state_dict` steps are counted on from those of the
    optimizer's state, and until a basis is refreshed its age is what its schedule says.

    Args:
        optimizer: any torch optimizer, before or after its first steps.
        to: who gets the values of a report: the path of a CSV, a `SummaryWriter` or anything else with `add_scalar`, or
            a function of the step and the values. Rows of a CSV that is there already stay, but for those of steps that
            are taken again.
        every: steps between two reports, an int >= 1. Default 50.
        per_matrix: report every parameter too, by the name :math:`\text{measure}/\text{group}/\text{parameter}`.

    Attributes:
        step: how many steps have been counted; may be set.
        values: those of the last report.

    Raises:
        TypeError: for an optimizer that is none, or a writer that is none of these.
        ValueError: if `every` is out of range, or a CSV is of something else.

    Example:
        >>> import torch
        >>> from slimstate.optim import GaLoreAdamW
        >>> model = torch.nn.Linear(16, 8, bias=False)
        >>> optimizer = GaLoreAdamW(model.parameters(), lr=0.01, rank=4)
        >>> monitor = Monitor(optimizer, lambda step, values: print(step, round(values["update_per_lr/group 0"], 1)))
        >>> _ = optimizer.step(lambda: model(torch.eye(16)).square().sum().backward())
        1 0.2
        >>> list(monitor.values)[:2]
        ['captured_own/group 0', 'residual/group 0']
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *to: str | os.PathLike[str] | Writer | Any,
        every: int = 50,
        per_matrix: bool = False,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            advice = "; give the optimizer inside it" if hasattr(optimizer, "optimizer") else ""
            raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}{advice}")
        if not isinstance(every, Integral) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be an int >= 1 (steps), got {every!r}")
        if not isinstance(per_matrix, bool):
            raise ValueError(f"per_matrix must be True or False, got {per_matrix!r}")
        self.every: int = int(every)
        self.per_matrix: bool = per_matrix
        self.values: dict[str, float] = {}
        self._writers: list[Writer] = [_writer(x) for x in to]
        self._resume(optimizer)
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_load_state_dict_post_hook(self._resume),
        ]

    def remove(self) -> None:
        """Stops measuring."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _resume(self, optimizer: torch.optim.Optimizer) -> None:
        steps = map(_own_step, optimizer.state.values())
        self.step = max(steps, default=0) + max(group.get("nonfinite_steps", 0) for group in optimizer.param_groups)
        # Of refreshes since the last report: parameter -> tensors that nobody has waited for.
        self._own: dict[Tensor, Tensor] = {}
        self._overlaps: dict[Tensor, Tensor] = {}
        self._refreshed: dict[Tensor, int] = {}  # parameter -> its own step
        self._places: list[tuple[Group, dict[Tensor, int]]] = []  # as they were at the last report
        # During a step: whose bases may change, and what they were; entries of weights, and which.
        self._due: dict[Tensor, tuple[Group, list[int], Tensor | None, bool]] = {}
        self._sampled: dict[Tensor, tuple[int, Tensor, Tensor | None]] = {}

    def _reports(self, step: int) -> bool:
        return step == 1 or step % self.every == 0

    # Around a step.

    @torch.compiler.disable
    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Keeps what the step is about to change."""
        step = self.step + 1
        self._due = self._about_to_change(optimizer, step) if isinstance(optimizer, ProjectedOptimizer) else {}
        self._sampled, drawn = {}, {}
        for p in _parameters(optimizer) if self._reports(step) else ():
            if (n := local(p).numel()) > SAMPLE and (n, p.device) not in drawn:
                generator = torch.Generator().manual_seed(step)
                drawn[n, p.device] = torch.randint(n, (SAMPLE,), generator=generator).sort().values.to(p.device)
            index, state = drawn.get((n, p.device)), optimizer.state.get(p, {})
            self._sampled[p] = _own_step(state), _entries(p, state, index), index

    def _about_to_change(
        self, optimizer: ProjectedOptimizer, step: int
    ) -> dict[Tensor, tuple[Group, list[int], Tensor | None, bool]]:
        if self._reports(step) or not self._places:
            self._places = [(group, optimizer._places(group)) for group in optimizer.param_groups]
        report, found = 1 if step == 1 else -(-step // self.every) * self.every, {}
        for group, places in self._places:
            gap = group["update_proj_gap"]
            last = report < step + gap  # of the refreshes before the report
            for p, place in places.items():
                state = optimizer.state.get(p, {})
                scheduled = due(_own_step(state) + 1, place, len(places), gap)
                if not scheduled and p in self._refreshed:
                    continue
                counts = _refreshes(state)
                fitted = bool(counts) and all(counts)
                if scheduled or not fitted:
                    found[p] = group, counts, _basis(p, state) if fitted and last else None, last
        return found

    @torch.compiler.disable
    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Measures what has changed, and reports where it is time."""
        self.step += 1
        for p, (group, counts, old, last) in self._due.items():
            assert isinstance(optimizer, ProjectedOptimizer)
            state = optimizer.state.get(p, {})
            now = _refreshes(state)
            if not now or (counts and any(a == b for a, b in zip(now, counts, strict=True))):
                continue
            self._refreshed[p] = _own_step(state)
            if last and p.grad is not None:
                self._own[p] = _energies(optimizer, p, group)
            if old is not None:
                self._overlaps[p] = _overlap(optimizer, p, group, old)
        self._due = {}
        if self._reports(self.step):
            self._report(optimizer)

    def _report(self, optimizer: torch.optim.Optimizer) -> None:
        taken = {p for p in self._sampled if self._took_part(optimizer, p)}
        found: list[tuple[str, str, str, Group, Tensor]] = []
        sums: dict[str, list[float]] = {}
        skipped: dict[str, float] = {}

        def add(measure: str, label: str, name: str, value: float, weight: float) -> None:
            for of in (label, f"{label}/{name}") if self.per_matrix else (label,):
                pair = sums.setdefault(f"{measure}/{of}", [0.0, 0.0])
                pair[0] += value
                pair[1] += weight

        for label, group, names in _labelled(optimizer):
            places = optimizer._places(group) if isinstance(optimizer, ProjectedOptimizer) else {}
            for p, name in names.items():
                fresh = self._refreshed.get(p) == _own_step(optimizer.state.get(p, {}))
                if p in self._own:
                    found.append(("captured_own", label, name, group, self._own[p]))
                if p in places and p in taken and p.grad is not None:
                    assert isinstance(optimizer, ProjectedOptimizer)
                    own = fresh and p in self._own
                    energies = self._own[p] if own else _energies(optimizer, p, group)
                    found.append(("captured_now" if fresh else "captured_next", label, name, group, energies))
                if p in self._overlaps:
                    found.append(("overlap", label, name, group, self._overlaps[p]))
                if p in places and p in taken:
                    add("basis_age", label, name, self._age(optimizer, p, places, group), 1)
                if p in taken:
                    _, before, index = self._sampled[p]
                    change = _change(p, optimizer.state.get(p, {}), before, index)
                    found.append(("update_rms", label, name, group, change))
            if group.get("nonfinite", "propagate") != "propagate":
                skipped[f"skipped_steps/{label}"] = float(group["nonfinite_steps"])

        for (measure, label, name, group, _), values in zip(found, _fetched([x[-1] for x in found]), strict=True):
            if measure == "update_rms":
                squares, n = values
                add(measure, label, name, squares, n)
                if lr := float(group.get("lr") or 0):
                    add("update_per_lr", label, name, squares, n * lr**2)
            elif measure == "overlap":
                add(measure, label, name, *values)
            else:
                captured, energy, unit, ranks, matrices = values
                inside, whole = captured * unit**2, energy * unit**2
                if measure != "captured_now":
                    add(measure, label, name, inside, whole)
                if measure != "captured_own":
                    add("residual", label, name, whole - inside, whole)
                    add("effective_rank", label, name, ranks, matrices)

        self._own, self._overlaps, self._sampled = {}, {}, {}
        present = set(_parameters(optimizer, frozen=True))
        self._refreshed = {p: step for p, step in self._refreshed.items() if p in present}
        values_of = {
            key: math.sqrt(value / weight) if key.startswith("update") else value / weight
            for key, (value, weight) in sums.items()
            if weight != 0
        } | skipped
        order = list(MEASURES)
        self.values = dict(sorted(values_of.items(), key=lambda x: order.index(x[0].partition("/")[0])))
        for write in self._writers:
            write(self.step, self.values)

    def _took_part(self, optimizer: torch.optim.Optimizer, p: Tensor) -> bool:
        state = optimizer.state.get(p, {})
        return _own_step(state) > self._sampled[p][0] if "step" in state else p.grad is not None

    def _age(self, optimizer: torch.optim.Optimizer, p: Tensor, places: Mapping[Tensor, int], group: Group) -> int:
        step, gap = _own_step(optimizer.state[p]), group["update_proj_gap"]
        if p in self._refreshed:
            return step - self._refreshed[p]
        first = 1 + places[p] * gap // len(places)
        return (step - first) % gap if step >= first else step - 1

    @staticmethod
    def plot(path: str | os.PathLike[str]) -> "Figure":
        """Draws the CSV of a Monitor: a panel for each measure, a line for each group, thin ones for its parameters.

        Args:
            path: of the CSV.

        Returns:
            A figure of matplotlib, which has to be installed: `Monitor.plot("run.csv").savefig("run.png")`.

        Raises:
            ValueError: if the file is of something else, or has no values.
        """
        from matplotlib.figure import Figure

        lines: dict[str, dict[str, dict[int, float]]] = {}
        for step, measure, of, value in _rows(Path(path)):
            lines.setdefault(measure, {}).setdefault(of, {})[int(step)] = float(value)
        shown = [measure for measure in MEASURES if measure in lines]
        if not shown:
            raise ValueError(f"{os.fspath(path)} holds no values")
        groups = list(dict.fromkeys(of.partition("/")[0] for of_measure in lines.values() for of in of_measure))
        height = -(-len(shown) // 3)
        figure = Figure(figsize=(11, 0.6 + 2.3 * height), layout="constrained")
        axes = figure.subplots(height, 3, squeeze=False).flat
        drawn = {}
        for axis, measure in zip(axes, shown, strict=False):
            for of, points in lines[measure].items():
                group, _, parameter = of.partition("/")
                style: dict[str, Any] = {"color": f"C{groups.index(group)}"}
                style |= {"alpha": 0.3, "linewidth": 0.7} if parameter else {"linewidth": 1.6}
                steps = sorted(points)
                (line,) = axis.plot(steps, [points[x] for x in steps], **style)
                if not parameter:
                    drawn[group] = line
            axis.set_title(MEASURES[measure], fontsize=10)
            axis.grid(alpha=0.25)
            if measure in LOGARITHMIC:
                axis.set_yscale("log")
            elif measure.startswith(("captured", "residual", "overlap")):
                axis.set_ylim(0, 1.02)
            else:
                axis.set_ylim(bottom=0)
        for axis in list(figure.axes)[len(shown) :]:
            axis.set_visible(False)
        for axis in list(figure.axes)[max(0, len(shown) - 3) : len(shown)]:
            axis.set_xlabel("step")
        figure.legend(drawn.values(), drawn.keys(), loc="outside upper center", ncols=len(drawn), frameon=False)
        return figure


# ------------------------------------------------------------------------------------------------ what is measured


def _energies(optimizer: ProjectedOptimizer, p: Tensor, group: Group) -> Tensor:
    """Of a matrix or a stack: ||R||^2 and ||G||^2 over unit^2, the unit, and the sum of the effective ranks of so many
    matrices that are not zero; (5,), float32. Over all processes that hold parts."""
    projection = optimizer._projection(group)
    matrix = matrix_of(optimizer._entry(p, group, compiling=False), projection, group)
    optimizer._inform([matrix])
    part, gradient = matrix.part, matrix.grad
    if part is not None and part.divides("d"):
        matrix, projection = optimizer._on_rows(matrix, projection)

    def total(axes: str, *tensors: Tensor, largest: bool = False) -> None:
        if part is not None:
            total_([(x, part.groups(axes)) for x in tensors], largest=largest)

    dtype = compute_dtype(p.dtype)
    unit = gradient.new_zeros((), dtype=dtype)
    if gradient.numel():
        unit += largest_magnitude(gradient)  # squares of tiny or huge entries would be lost
    total("bdk", unit, largest=True)
    unit = unit.masked_fill(unit == 0, 1)
    captured, energy, ranks, matrices = (torch.zeros_like(unit) for _ in range(4))
    for j in range(math.prod(matrix.view.lead)):
        m = optimizer._fitted_to(matrix, group, j)
        for s in blocks(m, 1, dtype.itemsize):
            energy += (m[:, s].to(dtype) / unit).square_().sum()
        r = projection.down(m, matrix.member(matrix.basis, j))
        total("d", r)
        r = r / unit
        captured += r.square().sum()
        wide = len(r) <= r.shape[1] or (part is not None and part.divides("k"))
        gram = r @ r.mT if wide else r.mT @ r  # the squares of one are those of the other
        total("k", gram)
        trace = gram.diagonal().sum()
        ranks += torch.where(trace > 0, trace.square() / gram.square_().sum(), 0)
        matrices += trace > 0
    total("bk", captured)
    total("bdk", energy)
    total("b", ranks, matrices)
    return torch.stack([captured, energy, unit, ranks, matrices]).float()


def _overlap(optimizer: ProjectedOptimizer, p: Tensor, group: Group, old: Tensor) -> Tensor:
    """||Q_old^T Q_new||^2 and r, both over a stack; (2,), float32."""
    new, part = _basis(p, optimizer.state[p]), optimizer._part(p, group)
    if new.is_floating_point():
        shared, count = (old.mT @ new).square_().sum(), new[..., 0, :].numel()
    else:
        place = torch.searchsorted(old, new).clamp_(max=max(0, old.shape[-1] - 1))
        shared, count = (old.gather(-1, place) == new).sum(), new.numel()
    both = torch.stack([shared.float(), shared.new_full((), count, dtype=torch.float32)])
    if part is not None:
        total_([(both, part.groups("b"))])
    return both


def _change(p: Tensor, state: State, before: Tensor, index: Tensor | None) -> Tensor:
    """The sum of squares of how far a parameter has moved, from some entries of it, and its size; (2,), float32."""
    n = local(p).numel()
    squares = (_entries(p, state, index) - before).square_().sum().float() * (n / max(1, before.numel()))
    both = torch.stack([squares, squares.new_full((), n)])
    if (part := part_of(p)) is not None:
        total_([(both, part.groups("".join(map(str, range(p.ndim)))))])
    return both


def _entries(p: Tensor, state: State, index: Tensor | None) -> Tensor:
    """Some entries of a weight, or all, in the dtype of arithmetic and with what compensation keeps of them; a copy."""
    x, low = local(p.detach()), state.get("compensation")
    low = None if low is None else local(low)
    if index is not None:
        x, low = x.take(index), None if low is None else low.take(index)
    return widen(x, low, compute_dtype(p.dtype))


def _basis(p: Tensor, state: State) -> Tensor:
    """A copy of the basis, in the dtype of arithmetic, or of the indices."""
    if "index" in state:
        return local(state["index"]).clone()
    scale = state.get("basis_scale")
    return decode(local(state["basis"]), None if scale is None else local(scale), compute_dtype(p.dtype)).clone()


def _refreshes(state: State) -> list[int]:
    """How many bases each matrix of a stack has had; empty before the first step."""
    counts: list[int] = state["refreshes"].view(-1).tolist() if "refreshes" in state else []
    return counts


def _own_step(state: State) -> int:
    return int(state.get("step", 0))  # a number in optimizers of others


def _parameters(optimizer: torch.optim.Optimizer, *, frozen: bool = False) -> Iterable[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"] if frozen or p.requires_grad)


def _labelled(optimizer: torch.optim.Optimizer) -> list[tuple[str, Group, dict[Tensor, str]]]:
    """Each group's label, itself, and the names of its parameters."""
    labelled: dict[str, tuple[Group, dict[Tensor, str]]] = {}
    for i, group in enumerate(optimizer.param_groups):
        label = str(group.get("name", f"group {i}")).replace("/", ".")
        label = f"{label} {i}" if label in labelled else label
        names = group.get("param_names", [f"{j}" for j in range(len(group["params"]))])
        labelled[label] = group, dict(zip(group["params"], names, strict=True))
    return [(label, group, names) for label, (group, names) in labelled.items()]


def _fetched(tensors: list[Tensor]) -> list[list[float]]:
    """The values of vectors that lie on any devices: one transfer from each device."""
    values: dict[int, list[float]] = {}
    for device in dict.fromkeys(x.device for x in tensors):
        places = [i for i, x in enumerate(tensors) if x.device == device]
        flat = iter(torch.cat([tensors[i] for i in places]).tolist())
        values |= {i: [next(flat) for _ in range(len(tensors[i]))] for i in places}
    return [values[i] for i in range(len(tensors))]


# ------------------------------------------------------------------------------------------------ where it goes


def _writer(to: Any) -> Writer:
    if isinstance(to, str | os.PathLike):
        return _Csv(Path(to))
    if hasattr(to, "add_scalar"):

        def write(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                to.add_scalar(name, value, step)

        return write
    if callable(to):
        return to
    raise TypeError(f"values go to a path, a SummaryWriter or a function of step and values, got {type(to).__name__}")


class _Csv:
    """Writes reports to a file, which is closed between them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last: int | None = None
        if path.exists():
            _rows(path)

    def __call__(self, step: int, values: dict[str, float]) -> None:
        new: list[list[Any]] = [[step, *name.split("/", 1), value] for name, value in values.items()]
        over = self.last is None or step <= self.last  # of a run that is begun again or goes on from before
        if over:
            rows = _rows(self.path) if self.path.exists() else []
            new = [list(COLUMNS), *(row for row in rows if int(row[0]) < step), *new]
        with self.path.open("w" if over else "a", newline="") as file:
            csv.writer(file).writerows(new)
        self.last = step


def _rows(path: Path) -> list[list[Any]]:
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    if rows and rows[0] != COLUMNS:
        raise ValueError(f"{path} is no CSV of a Monitor: it begins with {','.join(rows[0])[:40]!r}")
    return rows[1:]
