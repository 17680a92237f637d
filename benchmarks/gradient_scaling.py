"""Why DALL·E scales gradients per residual block: the same training in fp32, with one loss scale, and with one per block.

python benchmarks/gradient_scaling.py --json scaling.json --plot scaling.png

The norms of activation gradients fall from earlier to later blocks, in large models by more than the 40 binary orders of
magnitude that fp16 has (DALL·E §2.4). A network that trains in minutes has a spread of some 16, so this one is given the
rest by a change of units, which leaves the function and its gradients as they are: the last linear layer of block i has
p · weight and p · bias for parameters, p a power of two, and its result is divided by p in the same dtype. Activation
gradients in the block are 1/p, weight gradients of that layer likewise. p rises over the first blocks and then stays.
In fp32 the units change no bit of the loss (tests/benchmarks/test_gradient_scaling.py).

Three runs have the same initial weights, batches and optimizer:

- fp32;
- fp16 with one scale, by the rule and the constants of torch.amp.GradScaler: 2^16 at first, halved and the update skipped
  when a gradient is not finite, doubled after 2,000 updates without that;
- fp16 with `GradientScales`, one for each residual block.

The paper's first scale, growth, backoff, window, greatest scale, and skipping of whole updates are kept. What differs is:

- Scales *settle* before the first update: gradients are computed, no weight is changed, and a scale doubles in 2 passes
  and may be divided in each. The paper's scales have 430,000 updates to find their places, with constants that move them
  by no more than 1 in log2 in 250 updates. The one scale gets the same passes.
- After that the block scales are divided by `HEADROOM`. Gradients of the first updates grow faster than the paper's
  window lets scales fall, and each update skipped on the way would delay this run beside the others by half a per cent.
- The least scale is 2^-8 instead of 2^7, which gradients of the first blocks, here in the smallest units, need.

Last, fixed scales are tried one after another on the weights that fp32 training begins and ends with: a single one would
have to be small enough for the first blocks throughout, and large enough for the last blocks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measure import check_flags
from rich import print
from rich.box import SIMPLE_HEAD
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dalle_ds.cli import parse_options, run_launcher
from dalle_ds.config import DalleConfig, ScalingConfig
from dalle_ds.errors import ConfigError
from dalle_ds.models import Dalle
from dalle_ds.nn.layers import Linear
from dalle_ds.optim import decay_groups
from dalle_ds.precision import BranchPrecision, GradientScales

RUNS = ("fp32", "one scale", "block scales")
VOCABULARY = 32
TEXT_LEN = 4
SMOOTHED = 20
"""Updates that a loss is averaged over."""
SETTLING = ScalingConfig(doubling_updates=2, window=0, min_log2=-8.0)
TRAINING = ScalingConfig(min_log2=-8.0)
HEADROOM = 4.0


@dataclass(frozen=True)
class Options:
    """Train one small deep transformer three times."""

    steps: int = 200
    """Updates."""
    depth: int = 24
    """Attention layers, each followed by an MLP."""
    width: int = 16
    """d_model."""
    heads: int = 2
    """Attention heads."""
    grid: int = 4
    """Image codes along each side."""
    batch: int = 128
    """Sequences per update."""
    lr: float = 2e-3
    """Peak learning rate; 30 updates of warm-up, then a half cosine down to 0."""
    seed: int = 0
    """Of the initial weights and of the data."""
    settle: int = 40
    """Passes in which scales move before the first update."""
    first_unit: int = -13
    """log2 of the first block's unit p."""
    last_unit: int = 14
    """log2 of the unit of the last blocks."""
    rise: int = 8
    """Blocks over which the unit rises."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    json: str | None = None
    """File that the figures are written to."""
    plot: str | None = None
    """File that the plots are written to, .png or .svg."""


class Scales(Protocol):
    """What the two ways of scaling have in common."""

    scales: list[float]
    """One for each block."""

    def precision(self, block: int, dtype: torch.dtype) -> BranchPrecision:
        """What block number `block` computes with."""

    def update(self, nonfinite: Collection[int], applied: bool) -> None:
        """Take note of one update and the blocks whose gradients were not finite."""


class LossScale:
    """One scale for all blocks, by the rule of torch.amp.GradScaler and its constants."""

    growth_interval = 2_000

    def __init__(self, blocks: int, device: torch.device, first_log2: float = 16.0) -> None:
        self.scales = [2.0**first_log2] * blocks
        self._factor = torch.full((1,), self.scales[0], device=device)
        self._clean = 0

    def precision(self, block: int, dtype: torch.dtype) -> BranchPrecision:
        """The same for every block; follows the scale."""
        return BranchPrecision(dtype, self._factor)

    def update(self, nonfinite: Collection[int], applied: bool) -> None:
        """Halve the scale if there was any block whose gradients were not finite."""
        factor = 1.0
        self._clean = 0 if nonfinite else self._clean + 1
        if nonfinite:
            factor = 0.5
        elif self._clean == self.growth_interval:
            factor, self._clean = 2.0, 0
        self.scales = [factor * scale for scale in self.scales]
        self._factor.fill_(self.scales[0])


class Unit(nn.Module):
    """Parametrization of a parameter: p times what is trained."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, parameter: Tensor) -> Tensor:
        """p · parameter."""
        return self.p * parameter


def last_layer(block: nn.Module) -> Linear:
    """The linear layer that ends a block's branch."""
    return block.attention.out if hasattr(block, "attention") else block.down


def units(options: Options) -> list[float]:
    """p of every block."""
    span = options.last_unit - options.first_unit
    return [2.0 ** round(options.first_unit + span * min(1, i / options.rise)) for i in range(2 * options.depth)]


def build(options: Options, with_units: bool = True) -> Dalle:
    """The model; all that these options describe have the same initial weights."""
    torch.manual_seed(options.seed)
    config = DalleConfig(
        width=options.width,
        depth=options.depth,
        heads=options.heads,
        text_len=TEXT_LEN,
        grid=options.grid,
        text_vocab=VOCABULARY,
        image_vocab=VOCABULARY,
        attention=("full",) * options.depth,
    )
    model = Dalle(config).to(options.device)
    for block, p in zip(model.blocks, units(options), strict=True):
        if with_units:
            layer = last_layer(block)
            parametrize.register_parametrization(layer, "weight", Unit(p))
            parametrize.register_parametrization(layer, "bias", Unit(p))
            layer.register_forward_hook(lambda module, inputs, output, p=p: output * (1 / p))
    return model


class Data:
    """Captions of random tokens, and codes that are looked up from them in random tables."""

    def __init__(self, options: Options) -> None:
        self.options = options
        generator = torch.Generator().manual_seed(options.seed)
        self.tables = torch.randint(0, VOCABULARY, (3, VOCABULARY, options.grid**2), generator=generator)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """(batch, 4) text and (batch, grid²) codes; `number` may be negative."""
        generator = torch.Generator().manual_seed((self.options.seed + 1) * 10**6 + number)
        text = torch.randint(0, VOCABULARY, (self.options.batch, TEXT_LEN), generator=generator)
        codes = (self.tables[0][text[:, 0]] + self.tables[1][text[:, 1]]) % VOCABULARY
        codes[:, 1::2] = self.tables[2][text[:, 2]][:, 1::2]
        return text.to(self.options.device), codes.to(self.options.device)


@dataclass
class Pass:
    """What one backward pass leaves behind; lists have an entry for each block."""

    loss: float
    """Image loss, in nats per code."""
    nonfinite: list[int]
    """Blocks with a parameter gradient that is not finite."""
    activation_zeros: list[float]
    """Zeros among the activation gradients that enter the branch, a fraction."""
    weight_zeros: list[float]
    """Zeros among the gradients of the weight matrices, a fraction."""
    norms: list[float]
    """Norm of the activation gradients that enter the branch, in its unit, without the scale."""


class Probe:
    """Runs passes of a model and looks at the gradients that enter its blocks."""

    def __init__(self, model: Dalle) -> None:
        self.model = model
        self.entering: dict[int, Tensor] = {}
        for number, block in enumerate(model.blocks):
            # Before the hook that divides by the unit: the gradient of what the layer itself returned.
            last_layer(block).register_forward_hook(lambda *call, i=number: self._watch(i, call[-1]), prepend=True)

    def run(self, text: Tensor, codes: Tensor, scales: Scales | None) -> Pass:
        """Forward and backward; gradients are in the model's parameters afterwards."""
        self.model.zero_grad()
        output = self.model(text, codes, logits=False)
        output.loss.backward()
        blocks = self.model.blocks
        factors = [1.0] * len(blocks) if scales is None else scales.scales
        gradients = [[parameter.grad for parameter in block.parameters()] for block in blocks]
        matrices = [[gradient for gradient in of_block if gradient.dim() == 2] for of_block in gradients]
        entering = [self.entering[number] for number in range(len(blocks))]
        return Pass(
            loss=float(output.image_loss.detach()),
            nonfinite=[i for i, found in enumerate(gradients) if not all(bool(g.isfinite().all()) for g in found)],
            activation_zeros=[zeros([gradient]) for gradient in entering],
            weight_zeros=[zeros(found) for found in matrices],
            norms=[float(g.float().norm()) / factor for g, factor in zip(entering, factors, strict=True)],
        )

    def _watch(self, number: int, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: self.entering.__setitem__(number, gradient))


def zeros(tensors: list[Tensor]) -> float:
    """The fraction of elements that are 0."""
    return sum(int((tensor == 0).sum()) for tensor in tensors) / sum(tensor.numel() for tensor in tensors)


@dataclass
class Run:
    """One training run."""

    losses: list[float] = field(default_factory=list)
    """Image loss of every update's batch, nats per code."""
    skipped: list[int] = field(default_factory=list)
    """Updates that were skipped."""
    scales_log2: list[list[float]] = field(default_factory=list)
    """Of every block, before each pass, those that settle the scales included."""
    activation_zeros: list[float] = field(default_factory=list)
    """Of every block, mean over the second half of the updates."""
    weight_zeros: list[float] = field(default_factory=list)
    """Likewise."""
    norms: list[float] = field(default_factory=list)
    """Of the activation gradients that enter every block's branch, in its unit; likewise."""


def use_scales(model: Dalle, scales: Scales) -> None:
    """Compute the model's blocks in fp16."""
    for number, block in enumerate(model.blocks):
        block.use(scales.precision(number, torch.float16))


def make_scales(name: str, options: Options) -> LossScale | GradientScales | None:
    """As a run begins with them, before they settle."""
    device = torch.device(options.device)
    if name == "one scale":
        return LossScale(2 * options.depth, device)
    return GradientScales(SETTLING, 2 * options.depth, 1, device) if name == "block scales" else None


def settle(scales: LossScale | GradientScales, probe: Probe, data: Data, run: Run) -> None:
    """Let scales find their places while no weight changes."""
    for number in range(data.options.settle):
        run.scales_log2.append([math.log2(scale) for scale in scales.scales])
        scales.update(probe.run(*data.batch(-1 - number), scales).nonfinite, applied=True)
    if isinstance(scales, GradientScales):
        settled = [max(scale / HEADROOM, 2.0**TRAINING.min_log2) for scale in scales.scales]
        scales.config = TRAINING
        scales.load_state_dict(
            {**scales.state_dict(), "scales": settled, "updates": 0, "last_backoff": [None] * len(settled)}
        )


def train(name: str, options: Options) -> tuple[Run, Dalle]:
    """One of `RUNS`."""
    model, data, run = build(options), Data(options), Run()
    probe, scales = Probe(model), make_scales(name, options)
    if scales is not None:
        use_scales(model, scales)
        settle(scales, probe, data, run)
    optimizer = torch.optim.AdamW(decay_groups(model, 0.045), lr=options.lr, betas=(0.9, 0.96))
    passes = []
    for update in track(range(options.steps), description=f"{name:12}", transient=True):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1, (update + 1) / 30) * math.cos(math.pi / 2 * update / options.steps) ** 2
        if scales is not None:
            run.scales_log2.append([math.log2(scale) for scale in scales.scales])
        passes.append(probe.run(*data.batch(update), scales))
        nonfinite = passes[-1].nonfinite
        if scales is not None:
            scales.update(nonfinite, applied=not nonfinite)
        if nonfinite:
            run.skipped.append(update)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), 4.0)
            optimizer.step()
    run.losses = [made.loss for made in passes]
    for kind in ("activation_zeros", "weight_zeros", "norms"):
        setattr(run, kind, block_means([getattr(made, kind) for made in passes[options.steps // 2 :]]))
    return run, model


def block_means(rows: list[list[float]]) -> list[float]:
    """Mean of each column, over the rows that are finite if there are any."""
    finite = [row for row in rows if all(map(math.isfinite, row))] or rows
    return [sum(column) / len(finite) for column in zip(*finite, strict=True)]


def late(values: list[float]) -> float:
    """Mean over the second half of the blocks."""
    half = values[len(values) // 2 :]
    return sum(half) / len(half)


@dataclass(frozen=True)
class FixedScale:
    """One scale for all blocks, tried on one batch with the weights that fp32 training begins and ends with."""

    log2: int
    overflowing_first: float
    """Fraction of the blocks with gradients that are not finite, at the initial weights; any of them has the update
    skipped."""
    overflowing_last: float
    """The same at the trained weights."""
    late_activation_zeros: float
    """In the second half of the blocks, at the trained weights."""
    late_weight_zeros: float
    """Likewise."""


def fixed_scales(trained: Dalle, options: Options) -> Iterator[FixedScale]:
    """Every second power of two from far too small to far too large."""
    initial, last, batch = build(options), build(options), Data(options).batch(options.steps)
    last.load_state_dict(trained.state_dict())
    probes = [Probe(initial), Probe(last)]
    for log2 in range(-8, 29, 2):
        scales = LossScale(len(initial.blocks), torch.device(options.device), log2)
        for probe in probes:
            use_scales(probe.model, scales)
        passes = [probe.run(*batch, scales) for probe in probes]
        overflowing = [len(made.nonfinite) / len(initial.blocks) for made in passes]
        yield FixedScale(log2, *overflowing, late(passes[1].activation_zeros), late(passes[1].weight_zeros))


def smooth(losses: list[float]) -> list[float]:
    """Means over `SMOOTHED` updates, or all of them where there are fewer."""
    count = min(SMOOTHED, len(losses))
    return [sum(losses[i : i + count]) / count for i in range(len(losses) - count + 1)]


def deviation(run: Run, reference: Run) -> float:
    """Largest difference of smoothed losses, as a fraction of the reference's."""
    pairs = zip(smooth(run.losses), smooth(reference.losses), strict=True)
    return max(abs(loss / expected - 1) for loss, expected in pairs)


def show(runs: dict[str, Run], fixed: list[FixedScale]) -> None:
    """Tables on the screen."""
    columns = ("run", "last loss", "beside fp32", "at most", "skipped", "dY = 0", "dW = 0")
    table = Table(*columns, title="zeros in the second half of the blocks", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    reference = runs["fp32"]
    expected = smooth(reference.losses)[-1]
    for name, run in runs.items():
        last = smooth(run.losses)[-1]
        losses = (f"{last:.4f}", f"{last / expected - 1:+.2%}", f"{deviation(run, reference):.2%}")
        shares = (f"{late(run.activation_zeros):.1%}", f"{late(run.weight_zeros):.1%}")
        table.add_row(name, *losses, str(len(run.skipped)), *shares)
    print(table)
    columns = ("fixed scale", "blocks overflowing: first", "last", "dY = 0", "dW = 0")
    table = Table(*columns, title="one fixed scale, weights of fp32", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in fixed:
        shares = (row.overflowing_first, row.overflowing_last, row.late_activation_zeros, row.late_weight_zeros)
        table.add_row(f"2^{row.log2}", *(f"{share:.1%}" for share in shares))
    print(table)


def plot(runs: dict[str, Run], options: Options, path: str) -> None:
    """Four panels: losses, zeros, norms, scales."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    losses, shares, norms, scales = figure.subplots(2, 2).flatten()
    for name, run in runs.items():
        losses.plot(smooth(run.losses), label=name, linestyle="--" if name == "block scales" else "-")
    titled(losses, f"image loss, mean of {SMOOTHED} updates", "update")
    for (name, run), color in zip(list(runs.items())[1:], ("C1", "C2"), strict=True):
        shares.plot(run.activation_zeros, color=color, label=f"{name}: activation gradients")
        shares.plot(run.weight_zeros, color=color, linestyle=":", label=f"{name}: weight gradients")
    shares.set_ylim(-0.05, 1.5)  # room for the legend
    titled(shares, "fraction of zeros among a block's fp16 gradients", "residual block")
    shares.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)
    plot_norms(norms, runs, options)
    plot_scales(scales, runs, options)
    figure.savefig(path, dpi=120)


def plot_norms(axis: Axes, runs: dict[str, Run], options: Options) -> None:
    """Norms of activation gradients in fp32, over the blocks."""
    found = runs["fp32"].norms
    axis.semilogy(found, base=2, label="in the blocks' units", color="C0")
    natural = [norm * p for norm, p in zip(found, units(options), strict=True)]
    axis.semilogy(natural, base=2, label="without units", color="C0", linestyle=":")
    elements = options.batch * (TEXT_LEN + options.grid**2) * options.width
    scale = runs["one scale"].scales_log2[-1][0]
    lost = 2.0 ** (-25 - scale) * elements**0.5
    axis.axhline(lost, color="C1", linestyle="--", label=f"root mean square 2^-25 at one scale of 2^{scale:.0f}")
    titled(axis, "norm of the activation gradients that enter a block, fp32", "residual block")


def plot_scales(axis: Axes, runs: dict[str, Run], options: Options) -> None:
    """Scales over the updates, as the paper's Fig. 12."""
    rows = runs["block scales"].scales_log2
    updates = range(-options.settle, options.steps)
    for number, series in enumerate(zip(*rows, strict=True)):
        ends = {0: "first block", len(rows[0]) - 1: "last block"}
        axis.plot(
            updates, series, color=colormaps["viridis"](number / len(rows[0])), linewidth=0.8, label=ends.get(number)
        )
    axis.plot(updates, [row[0] for row in runs["one scale"].scales_log2], "C1--", label="one scale")
    axis.axvspan(-options.settle, 0, color="0.93")
    axis.set_ylim(bottom=axis.get_ylim()[0] - 5)  # room for the legend
    titled(axis, "log2 of the scales, a line for each block; shaded: before the first update", "update")
    axis.legend(fontsize=8, frameon=False, loc="lower right", ncols=3)


def titled(axis: Axes, title: str, x: str) -> None:
    """The finish of a panel."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)


def check(options: Options) -> None:
    """Refuse, before anything is trained, what would fail after it."""
    check_flags(options, "steps", "depth", "width", "heads", "grid", "batch", "rise")
    if options.settle < 0:
        raise ConfigError(f"--settle must not be negative, found {options.settle}")
    path = None if options.plot is None else Path(options.plot)
    if path is not None and (path.suffix not in (".png", ".svg") or not path.parent.is_dir()):
        raise ConfigError(f"--plot must be a .png or .svg file in a folder that exists, found {options.plot}")


def figures(runs: dict[str, Run], fixed: list[FixedScale], options: Options) -> dict[str, Any]:
    """What is written as JSON."""
    written = {}
    for name, run in runs.items():
        summary = {
            "largest_deviation": deviation(run, runs["fp32"]),
            "late_activation_zeros": late(run.activation_zeros),
            "late_weight_zeros": late(run.weight_zeros),
        }
        written[name] = summary | asdict(run)
    chosen = {name: value for name, value in asdict(options).items() if name not in ("json", "plot")}
    return {"options": chosen, "units": units(options), "runs": written, "fixed": [asdict(row) for row in fixed]}


def finite(figure: Any) -> Any:
    """`figure` with None in place of numbers that JSON does not have."""
    if isinstance(figure, dict):
        return {name: finite(value) for name, value in figure.items()}
    if isinstance(figure, list):
        return [finite(value) for value in figure]
    return None if isinstance(figure, float) and not math.isfinite(figure) else figure


def main() -> None:
    """Train, show, write."""
    options = parse_options(Options)
    check(options)
    trained = {name: train(name, options) for name in RUNS}
    runs = {name: run for name, (run, _) in trained.items()}
    fixed = list(fixed_scales(trained["fp32"][1], options))
    show(runs, fixed)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(finite(figures(runs, fixed, options)), indent=1) + "\n")
    if options.plot is not None:
        plot(runs, options, options.plot)


if __name__ == "__main__":
    run_launcher(main)
