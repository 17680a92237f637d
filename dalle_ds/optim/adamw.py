"""AdamW as DALL·E has it: variances clipped by value, moments in 16 bits (App. B.2, D)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from dalle_ds.config import OptimConfig
from dalle_ds.errors import CheckpointError, ConfigError
from dalle_ds.precision.codecs import FLOAT_0_6_10, FLOAT_1_6_9

CHUNK = 2**18
"""Elements updated at a time where no fused kernel does it, so that what is in between stays in a CPU's cache."""
CHUNK_ON_GPU = 2**26
"""The same there, where memory for what is in between is all that limits it: 256 MiB for each of a few tensors."""

MOST_REST = 0.25
"""Share by which 16-bit variances may differ from what they average without a warning: a β2 of 0.998."""

_MOMENTS = ("exp_avg", "exp_avg_sq")
_ADDED: dict[str, Any] = {"second_moment_clip": None, "moments": "fp32"}
"""What a parameter group has here and not in torch's AdamW, and that which makes it torch's AdamW."""


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay and corrected bias, on any device, alone or in DeepSpeed's hands.

    As torch's `AdamW` and by its fused kernel, unless a group asks for one of these:

    - `second_moment_clip`: the running variance is clipped by value once it has taken in the new gradient, before it is used
      in the parameters or stored (5 in DALL·E App. B.2). None does not clip.
    - `moments="16-bit"`: the running mean is stored in format 1-6-9, the running variance in 0-6-10 (App. D), together 4
      bytes per parameter in place of 8. Arithmetic is fp32.

    The clip and 16-bit moments cost passes over memory. A clip costs none while it is known not to bind (`updating`).

    State of a parameter: "step", fp32 (), updates made; "exp_avg" and "exp_avg_sq" in the parameter's shape, int16 codes or
    numbers of the parameter's type; "index", its place among the tensors that were updated, by which random rounding tells
    them apart; "ceiling", which no element of "exp_avg_sq" is greater than.

    Args:
        params: parameters, or groups of them with settings of their own.
        lr, betas, eps, weight_decay: as in torch.
        second_moment_clip, moments: as above, for groups that do not say.
        stochastic_rounding: round 16-bit moments at random, without bias, instead of to the nearest value. The noise depends
            on `seed`, on the parameter's step count and its index, and on nothing else: what goes on from a checkpoint
            rounds as if it had never stopped, and replicas of a tensor on several processes round alike.
        seed: of the noise.

    Raises:
        ConfigError: a setting out of range; later, by `step`, what cannot be updated: complex or sparse gradients, or 16-bit
            moments of parameters that are not fp32.
    """

    _updated: frozenset[int] | None = None
    """Identities of the parameter groups that `step` updates; None updates all."""
    _gradient_bound: float | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        second_moment_clip: float | None = None,
        moments: Literal["fp32", "16-bit"] = "fp32",
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        self.stochastic_rounding = stochastic_rounding
        self.seed = seed
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            **_ADDED,
            "second_moment_clip": second_moment_clip,
            "moments": moments,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; what it does not set is as in the constructor."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient, in the groups as they are now.

        Args:
            closure: computes the loss and gradients first, as in torch.

        Returns:
            What `closure` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if self._updated is None or id(group) in self._updated:
                self._update(group)
        return loss

    @contextmanager
    def updating(self, groups: Collection[int] | None = None, *, gradient_bound: float | None = None) -> Iterator[None]:
        """Within, `step` updates these parameter groups alone: what belongs to the others stays as it is.

        DeepSpeed calls `step` without arguments; what was decided for one step reaches it through this and ends with it.

        Args:
            groups: their numbers; None updates all.
            gradient_bound: the caller's promise that no element of a gradient is greater, such as the gradients' norm; None
                promises nothing. A running variance is an average of squares: where none of them exceeds
                `second_moment_clip`, it does not bind, but for rounding.
        """
        # Not numbers: ZeRO-1 and 2 put one group after the other in the place of all.
        self._updated = None if groups is None else frozenset(id(self.param_groups[number]) for number in groups)
        self._gradient_bound = gradient_bound
        try:
            yield
        finally:
            self._updated = self._gradient_bound = None

    def _update(self, group: dict[str, Any]) -> None:
        bound = self._gradient_bound
        square = bound**2 if bound is not None and math.isfinite(bound) else math.inf
        clip = math.inf if group["second_moment_clip"] is None else group["second_moment_clip"]
        fused: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self._state(parameter, group["moments"] == "16-bit")
            ceiling = max(state["ceiling"], square)
            # The fused kernel takes no notice of strides.
            is_alike = parameter.stride() == parameter.grad.stride() == state["exp_avg"].stride()
            if group["moments"] == "fp32" and ceiling <= clip and is_alike:
                fused.append((parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]))
            else:
                self._update_in_chunks(parameter, state, group)
            state["ceiling"] = min(ceiling, clip)
        if fused:
            beta1, beta2 = group["betas"]
            parameters, gradients, means, variances, steps = map(list, zip(*fused, strict=True))
            adamw(
                parameters,
                gradients,
                means,
                variances,
                [],
                steps,
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _state(self, parameter: Tensor, in_16_bits: bool) -> dict[str, Any]:
        """The parameter's state, made on its first update."""
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse or gradient.is_complex():
            kind = "sparse" if gradient.is_sparse else "complex"
            raise ConfigError(f"AdamW needs real, dense gradients, found {kind} ones: keep such parameters out of it")
        if in_16_bits and parameter.dtype != torch.float32:
            raise ConfigError(
                f'moments="16-bit" needs fp32 parameters or shards, found {parameter.dtype}: set moments fp32, or a ZeRO '
                "stage of 1 or more, which updates fp32 shards"
            )
        state = self.state[parameter]
        if not state:
            # DeepSpeed may have made empty states of tensors that are yet to be updated.
            index = 1 + max((other["index"] for other in self.state.values() if "index" in other), default=-1)
            self.begin(parameter, "16-bit" if in_16_bits else "fp32", step=0, index=index, ceiling=0.0)
        elif (state["exp_avg"].dtype == torch.int16) != in_16_bits:
            raise ConfigError(
                f"moments={'16-bit' if in_16_bits else 'fp32'} was set for a parameter whose moments are stored otherwise: "
                "set it before the first update"
            )
        return state

    def begin(self, parameter: Tensor, moments: str, *, step: int, index: int, ceiling: float) -> dict[str, Any]:
        """Make a parameter's state as it is after `step` updates, but for the moments, which are 0: the caller's to fill.

        Args:
            moments: the setting of the parameter's group.
            step, index, ceiling: as in the state.

        Returns:
            The state.
        """
        in_16_bits = moments == "16-bit"
        state = self.state[parameter]
        state["step"] = torch.full((), float(step), device=_home_of_step(parameter, in_16_bits))
        for name in _MOMENTS:
            if name in state:
                state[name].zero_()
            else:
                state[name] = torch.zeros_like(parameter, dtype=torch.int16 if in_16_bits else parameter.dtype)
        state.update(index=index, ceiling=ceiling)
        return state

    def _update_in_chunks(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """The update by operations on whole chunks; with 16-bit moments, from codes to codes."""
        state["step"] += 1
        # A CPU tensor where moments are 16-bit. Otherwise a GPU is waited for, in the rare updates whose clip may bind.
        step = int(state["step"].item())
        generator = None
        if self.stochastic_rounding and group["moments"] == "16-bit":
            key = hashlib.blake2b(f"{self.seed} {step} {state['index']}".encode(), digest_size=8)
            generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(key.digest(), "big") >> 1)
        gradient = parameter.grad
        assert gradient is not None
        tensors = (parameter.detach(), gradient, state["exp_avg"], state["exp_avg_sq"])
        if not all(tensor.is_contiguous() for tensor in tensors):
            _update_piece(*tensors, step, group, generator)
            return
        size = CHUNK if parameter.device.type == "cpu" else CHUNK_ON_GPU
        chunks = (tensor.view(-1).split(size) for tensor in tensors)
        for parameter, gradient, mean, variance in zip(*chunks, strict=True):
            _update_piece(parameter, gradient, mean, variance, step, group, generator)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs; torch's own lacks what subclasses add."""
        return {**super().__getstate__(), "stochastic_rounding": self.stochastic_rounding, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`, of this class or of torch's AdamW, bit for bit.

        As in torch, groups take the settings that were saved, but for `moments`, which stay; a setting that the saved groups
        do not have stays too.

        Raises:
            CheckpointError: the saved moments are fp32 where the group's are 16-bit, or the other way round.
        """
        kept = [{name: group[name] for name in _ADDED} for group in self.param_groups]
        saved: dict[Any, dict[str, Any]] = state_dict["state"]
        for number, (group, saved_group) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            for key in saved_group["params"]:
                _check_format(number, group["moments"], saved.get(key, {}))
        # torch converts whatever belongs to an fp32 parameter to fp32, codes too, so that it does not get to see moments.
        rest = {
            key: {name: value for name, value in state.items() if name not in _MOMENTS} for key, state in saved.items()
        }
        super().load_state_dict({**state_dict, "state": rest})
        for group, settings, saved_group in zip(self.param_groups, kept, state_dict["param_groups"], strict=True):
            for name, value in settings.items():
                if name not in saved_group or name != "second_moment_clip":
                    group[name] = value
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for index, (parameter, key) in enumerate(zip(parameters, keys, strict=True)):
            if saved.get(key):
                self._put(parameter, saved[key], index)

    def _put(self, parameter: Tensor, saved: dict[str, Any], index: int) -> None:
        """Complete a parameter's state with copies of saved moments, where `_state` would have made them."""
        state = self.state[parameter]
        in_16_bits = saved["exp_avg"].dtype == torch.int16
        dtype = torch.int16 if in_16_bits else parameter.dtype
        for name in _MOMENTS:
            if saved[name].shape != parameter.shape:
                raise CheckpointError(
                    f"the checkpoint's {name} of tensor {index} has shape {tuple(saved[name].shape)}, the tensor "
                    f"{tuple(parameter.shape)}: resume on as many processes, with the model and ZeRO stage it was saved from"
                )
            state[name] = torch.empty_like(parameter, dtype=dtype).copy_(saved[name])
        state["step"] = torch.as_tensor(saved["step"]).to(
            _home_of_step(parameter, in_16_bits), torch.float32, copy=True
        )
        state.setdefault("index", index)
        state.setdefault("ceiling", math.inf)


def rounding_warning(optim: OptimConfig) -> str | None:
    """What to tell who has chosen 16-bit moments whose variances cannot follow the squares of gradients; None else."""
    if optim.moments != "16-bit" or optim.stochastic_rounding:
        return None
    # A variance rests where an update changes it by less than half a step, which is at most this share of it.
    rest = 2.0 ** -(FLOAT_0_6_10.significand_bits + 1) / (1 - optim.beta2)
    if rest < MOST_REST:
        return None
    return (
        f"optim.moments=16-bit with optim.beta2={optim.beta2}: rounded to the nearest value, a variance may rest "
        f"{min(rest, 1):.0%} above what it averages; set optim.stochastic_rounding True"
    )


def _update_piece(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    variance: Tensor,
    step: int,
    group: dict[str, Any],
    generator: torch.Generator | None,
) -> None:
    """Update tensors of one shape in place; `step` counts from 1."""
    beta1, beta2 = group["betas"]
    clip = group["second_moment_clip"]
    in_16_bits = mean.dtype == torch.int16
    gradient = gradient.float()
    m = FLOAT_1_6_9.decode(mean) if in_16_bits else mean.float()
    m.lerp_(gradient, 1 - beta1)
    v = FLOAT_0_6_10.decode(variance) if in_16_bits else variance.float()
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    if clip is not None:
        v.clamp_(max=clip)
    # m / (1 − β1^t) / (√(v / (1 − β2^t)) + ε), with the corrections gathered into two numbers.
    correction = math.sqrt(1 - beta2**step)
    rate = group["lr"] * correction / (1 - beta1**step)
    if in_16_bits:
        FLOAT_1_6_9.encode(m, generator=generator, out=mean)
        FLOAT_0_6_10.encode(v, generator=generator, out=variance)
    else:
        _write(m, mean)
        _write(v, variance)
    divisor = (v.sqrt_() if in_16_bits else v.sqrt()).add_(group["eps"] * correction)
    weights = parameter.float()
    if group["weight_decay"]:
        weights.mul_(1 - group["lr"] * group["weight_decay"])
    _write(weights.addcdiv_(m, divisor, value=-rate), parameter)


def _write(numbers: Tensor, to: Tensor) -> None:
    """Store fp32 numbers that may have been worked out where they belong already."""
    if numbers is not to:
        to.copy_(numbers)


def _home_of_step(parameter: Tensor, in_16_bits: bool) -> torch.device:
    """Where a step count lies: beside the parameter, as the fused kernel wants it, or where no GPU is waited for."""
    return torch.device("cpu") if in_16_bits else parameter.device


def _check(group: dict[str, Any]) -> None:
    """Refuse settings of a parameter group that cannot work."""
    for name in ("lr", "eps", "weight_decay"):
        if isinstance(group[name], Tensor) or not group[name] >= 0:
            raise ConfigError(f"AdamW's {name} must be a number that is not negative, found {group[name]}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ConfigError(f"AdamW's betas must lie in [0, 1), found {group['betas']}")
    clip = group["second_moment_clip"]
    if clip is not None and not clip > 0:
        raise ConfigError(f"AdamW's second_moment_clip must be positive, found {clip}: None does not clip")
    if group["moments"] not in ("fp32", "16-bit"):
        raise ConfigError(f'AdamW\'s moments must be "fp32" or "16-bit", found {group["moments"]!r}')
    if group["moments"] == "16-bit" and clip is not None and clip > FLOAT_0_6_10.max:
        raise ConfigError(
            f"AdamW's second_moment_clip={clip} is beyond what 16-bit moments hold, {FLOAT_0_6_10.max}: lower it, set it to "
            "None, or set moments fp32"
        )


def _check_format(number: int, moments: str, state: dict[str, Any]) -> None:
    """Refuse saved moments that are not what a group stores."""
    if not state:
        return
    stored = "16-bit" if state["exp_avg"].dtype == torch.int16 else "fp32"
    if stored != moments:
        raise CheckpointError(
            f"the checkpoint's Adam moments of parameter group {number} are {stored}, but its setting is moments={moments}: "
            "set optim.moments to what the run began with, or begin a new run"
        )
