"""Training of the diffusion prior (unCLIP §2.2, App. C)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.config import PriorRun, from_dict
from dalle_ds.diffusion import NoiseSchedule, ScoreMoments, noise_schedule, simple_loss, step_grid
from dalle_ds.models.latents import EmbeddingScaling
from dalle_ds.models.prior import DiffusionPrior
from dalle_ds.parallel import WHOLE, Mesh, TensorGroup
from dalle_ds.parsing import parse_json
from dalle_ds.sampling.prior import PriorSampling, prepare_caption
from dalle_ds.sampling.text_to_embedding import PARTS_NAME, DiffusionTextToEmbedding
from dalle_ds.tasks.base import Batch, Metrics, row_noise
from dalle_ds.tasks.initial import initial_facts
from dalle_ds.tasks.text_to_embedding import TextToEmbeddingTask

VALIDATION_DRAWS = 8
"""Timesteps at which each validation row is noised, evenly spread."""


class PriorTask(TextToEmbeddingTask[PriorRun]):
    """Minimizes ‖f(noised z_i, t, caption) − z_i‖² (unCLIP §2.2): the prior predicts the clean embedding."""

    name = "prior"
    analytic: dict[str, Any] | None = None
    """What `measure` found for Analytic-DPM."""

    def __init__(self, run: PriorRun) -> None:
        super().__init__(run)
        self.grid = self.schedule.on(step_grid(run.objective.analytic_steps, len(self.schedule)))

    @cached_property
    def scaling_of_embeddings(self) -> EmbeddingScaling:
        """Between CLIP's embeddings and those that are noised."""
        objective = self.run.objective
        if self.initial_space:
            return EmbeddingScaling(self.initial_space["shift"], self.initial_space["factor"])
        if objective.embeddings == "standardized":
            return EmbeddingScaling.standardized(self.moments)
        return EmbeddingScaling.constant(self.run.model.embed_dim, objective.scale)

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """Of the noise."""
        return noise_schedule(self.run.objective.schedule, self.run.objective.timesteps)

    def parts(self) -> dict[str, str]:
        standardized = self.run.objective.embeddings == "standardized" and not self.run.init
        return {**super().parts(), **(self.embeddings() if standardized else {})}

    def build_model(self, tensor: TensorGroup = WHOLE) -> DiffusionPrior:
        return DiffusionPrior(self.run.model, checkpointing=self.run.train.activation_checkpointing, tensor=tensor)

    @property
    def resblock_count(self) -> int:
        return 2 * self.run.model.depth

    def batch_spec(self, rows: int) -> Batch:
        model, tokens = self.run.model, self.run.model.text == "tokens"
        shape = (rows, model.text_len)
        with torch.device("meta"):
            batch = {name: torch.empty(rows, model.embed_dim) for name in ("image_embedding", "text_embedding")}
            batch["key"] = torch.empty(rows, dtype=torch.int64)
            if tokens:
                return {**batch, "text": torch.empty(shape, dtype=torch.int64)}
            return {
                **batch,
                "text": torch.empty(*shape, model.text_width),
                "padded": torch.empty(shape, dtype=torch.bool),
            }

    def prepare(self, batch: Batch) -> Batch:
        scaling, text = self.scaling_of_embeddings, batch["text_embedding"]
        image = scaling.scale(batch["image_embedding"])
        clip = self.clip.to(image.device) if self.reads_states and "states" not in batch else None
        caption = prepare_caption(self.run.model, batch["text"], text, clip, batch.get("states"), scaling)
        padded = {} if caption.padded is None else {"padded": caption.padded}
        return {**batch, "image_embedding": image, "text_embedding": caption.embedding, "text": caption.text, **padded}

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        objective, clean = self.run.objective, batch["image_embedding"]
        draws = objective.draws_per_row
        uniforms, noise = row_noise(batch["key"], draws, clean.shape[1], clean.device)
        dropped = uniforms[:, 0] < objective.text_drop
        # Evenly spread over the schedule: each is uniform by itself, and their mean varies less.
        shares = (uniforms[:, 1:] + torch.arange(draws, device=clean.device)) / draws
        steps = (shares * len(self.schedule)).long().clamp(max=len(self.schedule) - 1)
        losses = self._losses(model, batch, steps, noise, dropped)
        return losses.mean(), {"dropped": dropped.float().mean()}

    def evaluate(self, model: Callable[..., Any], batch: Batch) -> Metrics:
        """The loss at evenly spread timesteps, and how close the expected embedding, which is what the model makes of noise
        alone, comes to the true one."""
        clean, valid, count = batch["image_embedding"], batch["valid"], len(self.schedule)
        _, noise = row_noise(batch["key"], VALIDATION_DRAWS, clean.shape[1], clean.device)
        steps = (torch.arange(VALIDATION_DRAWS, device=clean.device) * count + count // 2) // VALIDATION_DRAWS
        losses = self._losses(model, batch, steps.expand(len(clean), -1), noise)
        last = torch.full((len(clean), 1), count - 1, device=clean.device)
        expected = model(self.caption(batch), noise[:, :1], last)[:, 0]
        true, found = map(self.scaling_of_embeddings.unscale, (clean, expected.float()))
        text = batch["text_embedding"]
        text = text if self.run.model.text == "karlo" else self.scaling_of_embeddings.unscale(text)
        return {
            "count": valid.sum(),
            "loss": (losses.mean(dim=1) * valid).sum(),
            "cosine": (F.cosine_similarity(found, true) * valid).sum(),
            "text_cosine": (F.cosine_similarity(text, true) * valid).sum(),
        }

    def _losses(
        self, model: Callable[..., Any], batch: Batch, steps: Tensor, noise: Tensor, dropped: Tensor | None = None
    ) -> Tensor:
        """(B, K) mean squared errors at (B, K) steps under (B, K, embed_dim) noise."""
        clean = batch["image_embedding"][:, None].expand_as(noise).flatten(0, 1)
        noised = self.schedule.add_noise(clean, noise.flatten(0, 1), steps.flatten()).view_as(noise)
        seeds = batch["key"] if dropped is not None else None
        predicted = model(self.caption(batch), noised, steps, dropped=dropped, dropout_seeds=seeds)
        return simple_loss(predicted.flatten(0, 1), clean).view(steps.shape)

    def summarize(self, sums: Metrics) -> dict[str, float]:
        return {name: float(sums[name] / sums["count"]) for name in ("loss", "cosine", "text_cosine")}

    @torch.no_grad()
    def measure(self, model: Callable[..., Any], batches: Iterator[Batch], mesh: Mesh) -> None:
        """Γ of Analytic-DPM on the grid of `objective.analytic_steps`: on the same rows and noise in any layout."""
        objective, grid = self.run.objective, self.grid
        found, seen = ScoreMoments(grid), 0
        rows = -(-objective.analytic_rows // self.run.train.batch_size) * self.run.train.batch_size
        while seen < rows // mesh.size("data"):
            batch = next(batches)
            clean = batch["image_embedding"]
            _, noise = row_noise(batch["key"], len(grid), clean.shape[1], clean.device)
            places = torch.arange(len(grid), device=clean.device).expand(len(clean), -1)
            repeated = clean[:, None].expand_as(noise).flatten(0, 1)
            x = grid.add_noise(repeated, noise.flatten(0, 1), places.flatten())
            predicted = model(self.caption(batch), x.view_as(noise), grid.timesteps.to(clean.device)[places])
            found.add(places.flatten(), x, predicted.flatten(0, 1))
            seen += len(clean)
        found.sums = mesh.sum(found.sums).cpu()
        gamma, error = found.mean()
        self.analytic = {
            "grid": objective.analytic_steps,
            "gamma": gamma.tolist(),
            "standard_error": error.tolist(),
            "rows": rows,
            "data_variance": self.scaling_of_embeddings.variance(self.moments),
        }

    def recall(self, export: Path) -> None:
        self.analytic = parse_json((export / PARTS_NAME).read_bytes())["analytic"]

    @cached_property
    def sampling(self) -> PriorSampling | None:
        """Of the model that the run begins with, which goes on with it."""
        found = initial_facts(self.run.init).get("sampling") if self.run.init else None
        return None if found is None else from_dict(PriorSampling, found, self.run.init)

    def pipeline(self, model: nn.Module) -> DiffusionTextToEmbedding:
        objective = self.run.objective
        return DiffusionTextToEmbedding(
            cast(DiffusionPrior, model),
            self.clip,
            self.tokenizer,
            self.scaling_of_embeddings,
            objective.schedule,
            objective.timesteps,
            self.analytic,
            self.sampling,
        )
