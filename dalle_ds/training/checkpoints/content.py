"""What a checkpoint consists of, and how an engine goes on from one.

A checkpoint belongs to the model, not to the processes that wrote it: `tensors/` has every parameter's fp32 weights, Adam's
moments, average and error-feedback buffer under the parameter's name in the plain model, and any number of processes, cut in
any way, can go on from it. `state.json` has everything else, and `manifest.json` says what all files are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_ds.errors import CheckpointError
from dalle_ds.optim import AdamW, LearningRate, WeightAverage
from dalle_ds.parallel import Mesh
from dalle_ds.parsing import parse_json
from dalle_ds.precision import GradientScales
from dalle_ds.resilience.rollback import Guard
from dalle_ds.training.checkpoints.storage import Index, LocalShards, matrix_size
from dalle_ds.training.replicas import ReplicaReduction
from dalle_ds.training.zero_state import MasterWeights

FORMAT = 3
"""Of checkpoints. Those of format 2 had no manifest; those before had no number, and were of use to one layout only."""
STATE_NAME = "state.json"
TENSORS_NAME = "tensors"
WEIGHT, AVERAGE, ERROR = "weight", "average", "error"
MOMENTS = ("exp_avg", "exp_avg_sq")


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What the run said of itself when it wrote a checkpoint, but for tensors.

    CheckpointError where it cannot be read, or is of another format.
    """
    try:
        state: dict[str, Any] = parse_json((checkpoint / STATE_NAME).read_bytes())
        missing = {"step", "identity", "layout", "learning_rate"} - set(state if isinstance(state, dict) else ())
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint {checkpoint} cannot be read: {error}; delete it to resume from an older one"
        ) from error
    if state.get("format") != FORMAT:
        raise other_version(checkpoint, state.get("format"))
    return state


def other_version(checkpoint: Path, found: Any) -> CheckpointError:
    """What to say of a checkpoint of format `found`, which is not this version's."""
    return CheckpointError(
        f"the checkpoint {checkpoint} was written by {'an earlier' if found is None else 'another'} version of dalle_ds, "
        "whose checkpoints this one cannot read: end the run with that version, or name a new --run_dir"
    )


@dataclass(frozen=True)
class TrainedTensors:
    """The tensors that training changes."""

    weights: MasterWeights
    optimizer: AdamW
    average: WeightAverage | None = None
    replicas: ReplicaReduction | None = None

    def load(self, checkpoint: Path, mesh: Mesh) -> None:
        """Put a checkpoint's tensors into an engine, fresh or not, of any layout. Collective.

        What the optimizer's parameter groups say (rates, decay, formats of moments) stays as it is.

        Raises:
            CheckpointError: a file is missing or broken, or it is of another model, on some process.
        """
        # A run that has just begun to compress has none of them in the checkpoint, and starts with zeros.
        errors = {} if self.replicas is None else self.replicas.errors()
        for buffer in errors.values():
            buffer.zero_()
        failure: CheckpointError | None = None
        try:
            self._read(Index(checkpoint / TENSORS_NAME), errors)
        except CheckpointError as error:
            failure = CheckpointError(
                f"the checkpoint {checkpoint} cannot be loaded: {error}; delete it to resume from an older one"
            )
            failure.__cause__ = error
        failed = int(mesh.sum(torch.tensor(int(failure is not None)), "world"))
        if failed:
            raise failure or CheckpointError(f"{failed} other processes could not read the checkpoint; they say why")
        self.weights.publish()
        if self.replicas is not None:
            self.replicas.load_error_feedback(errors)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _read(self, index: Index, errors: Mapping[str, Tensor]) -> None:
        self._begin_states(index)
        shards = self.local_shards(
            {name: buffer for name, buffer in errors.items() if f"{ERROR}/{name}" in index.tensors}
        )
        for name, stored in index.parameters.items():
            if stored["step"] == 0:  # never updated, though others are that share its shard here
                for kind in MOMENTS:
                    shards.pop(f"{kind}/{name}", None)
        index.read(shards)

    def local_shards(self, errors: Mapping[str, Tensor]) -> dict[str, LocalShards]:
        """What this process has of every tensor of a checkpoint; `errors` are `ReplicaReduction.errors`."""
        kinds: dict[str, Sequence[Tensor | None]] = {WEIGHT: self.weights.shards}
        for name in MOMENTS:
            kinds[name] = [self.optimizer.state.get(shard, {}).get(name) for shard in self.weights.shards]
        if self.average is not None:
            kinds[AVERAGE] = self.average.averages
        found: dict[str, LocalShards] = {}
        for shard in self.weights.param_shards:
            runs = {kind: shard.of(tensor) for kind, each in kinds.items() if (tensor := each[shard.shard]) is not None}
            if shard.name in errors:
                runs[ERROR] = errors[shard.name]
            for kind, run in runs.items():
                found[f"{kind}/{shard.name}"] = LocalShards(matrix_size(shard.whole), shard.slices(run))
        return found

    def parameters(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint keeps of every parameter besides tensors: its shape, and of Adam's state all but the moments."""
        known: dict[int, dict[str, Any]] = {}
        for number, shard in enumerate(self.weights.shards):
            state = self.optimizer.state.get(shard, {})
            known[number] = {
                "moments": self._group(number)["moments"],
                "step": int(state.get("step", 0)),
                "ceiling": state.get("ceiling", 0.0),
                "index": state.get("index"),
            }
        return {shard.name: {"shape": list(shard.whole), **known[shard.shard]} for shard in self.weights.param_shards}

    def _group(self, number: int) -> dict[str, Any]:
        """The optimizer's parameter group of a shard."""
        return self.optimizer.param_groups[self.weights.group_of[number]]

    def _begin_states(self, index: Index) -> None:
        """Make Adam's states, which a fresh engine has none of, and check that the checkpoint is of this model."""
        held: list[list[dict[str, Any]]] = [[] for _ in self.weights.shards]
        for param_shard in self.weights.param_shards:
            stored = index.parameters.get(param_shard.name)
            if stored is None or tuple(stored["shape"]) != param_shard.whole:
                found = "it has none" if stored is None else f"its has shape {tuple(stored['shape'])}"
                raise CheckpointError(f"the model's {param_shard.name} has shape {param_shard.whole}, and {found}")
            held[param_shard.shard].append(stored)
        # Random rounding tells shards apart by their indices. These are kept where every shard of this process finds one of
        # its own, as all do in the layout that they come from.
        indices = [{stored["index"] for stored in parameters if stored["step"] > 0} for parameters in held]
        found_any = [found for found in indices if found]
        kept = sum(map(len, found_any)) == len(set().union(*found_any)) == len(found_any)
        for number, (shard, parameters) in enumerate(zip(self.weights.shards, held, strict=True)):
            moments = self._group(number)["moments"]
            wrong = next((stored["moments"] for stored in parameters if stored["moments"] != moments), None)
            if wrong is not None:
                raise CheckpointError(f"its moments are {wrong}, not {moments}: set optim.moments to {wrong}")
            step = max((stored["step"] for stored in parameters), default=0)
            if step == 0:
                self.optimizer.state.pop(shard, None)  # not updated yet
                continue
            ceiling = max(stored["ceiling"] for stored in parameters)
            own_index = next(iter(indices[number])) if kept else number
            self.optimizer.begin(shard, moments, step=step, index=own_index, ceiling=ceiling)


@dataclass(frozen=True)
class TrainState:
    """All that training changes."""

    engine: Any
    tensors: TrainedTensors
    learning_rate: LearningRate
    scales: GradientScales | None
    guard: Guard

    def load(self, checkpoint: Path, state: Mapping[str, Any], mesh: Mesh) -> None:
        """Put everything back to where a checkpoint was written; `state` is what `load_state` returns of it. Collective."""
        self.tensors.load(checkpoint, mesh)
        # DeepSpeed's count of updates, by which its profiler and its monitors go.
        self.engine.global_steps = state["step"]
        self.learning_rate.load_state_dict(state["learning_rate"])
        if self.scales is not None and state["scales"] is not None:
            self.scales.load_state_dict(state["scales"])
        self.guard.load_state_dict(state["guard"])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps besides tensors."""
        return {
            "learning_rate": self.learning_rate.state_dict(),
            "scales": None if self.scales is None else self.scales.state_dict(),
            "guard": self.guard.state_dict(),
        }
