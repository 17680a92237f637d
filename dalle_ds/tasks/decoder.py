"""Training of unCLIP's decoder (unCLIP §2.1, App. C)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from dalle_ds.config import DecoderRun
from dalle_ds.data.augment import clip_center_view
from dalle_ds.models.decoder import UnclipDecoder
from dalle_ds.sampling.embedding_to_image import EmbeddingToImage
from dalle_ds.sampling.grid import image_grid, to_pil_images
from dalle_ds.sampling.image_diffusion import DiffusionFacts
from dalle_ds.sampling.prior import prepare_caption
from dalle_ds.tasks.base import Batch, Metrics
from dalle_ds.tasks.embedded import EmbeddedDataTask
from dalle_ds.tasks.image_diffusion import ImageDiffusionTask, to_signed

PREVIEW_ROWS = 6


class DecoderTask(EmbeddedDataTask[DecoderRun], ImageDiffusionTask[DecoderRun]):
    """Learns to denoise images, given their CLIP embeddings and captions."""

    name = "decoder"

    def build_model(self) -> UnclipDecoder:
        return UnclipDecoder(self.run.model, checkpointing=self.run.train.activation_checkpointing)

    @property
    def image_size(self) -> int:  # type: ignore[override]
        return self.run.model.image_size

    def batch_spec(self, rows: int) -> Batch:
        model = self.run.model
        shape = (rows, model.text_len)
        with torch.device("meta"):
            batch = {name: torch.empty(rows, model.embed_dim) for name in ("image_embedding", "text_embedding")}
            batch["image"] = torch.empty(rows, 3, model.image_size, model.image_size)
            batch["key"] = torch.empty(rows, dtype=torch.int64)
            if model.text == "tokens":
                return {**batch, "text": torch.empty(shape, dtype=torch.int64)}
            return {
                **batch,
                "text": torch.empty(*shape, model.text_width),
                "padded": torch.empty(shape, dtype=torch.bool),
            }

    def prepare(self, batch: Batch) -> Batch:
        device = batch["image"].device
        clip = self.clip.to(device) if self.reads_states and "states" not in batch else None
        caption = prepare_caption(self.run.model, batch["text"], batch["text_embedding"], clip, batch.get("states"))
        padded = {} if caption.padded is None else {"padded": caption.padded}
        return {**batch, "image": to_signed(batch["image"]), "text": caption.text, **padded}

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        steps, noise, uniforms = self.random_noise(batch, 2)
        objective = self.run.objective
        dropped = (uniforms[:, 0] < objective.embedding_drop, uniforms[:, 1] < objective.text_drop)
        errors, bits = self._losses(model, batch, steps, noise, *dropped, dropout_seeds=batch["key"])
        loss, metrics = self.total(errors, bits)
        names = ("embedding_dropped", "text_dropped")
        return loss, metrics | {name: rows.float().mean() for name, rows in zip(names, dropped, strict=True)}

    def evaluate(self, model: Callable[..., Any], batch: Batch) -> Metrics:
        """The loss, also without the embedding, without the caption."""
        _, noise, _ = self.random_noise(batch, 2)
        steps, valid = self.spread_timesteps(batch), batch["valid"]
        none = torch.zeros_like(valid, dtype=torch.bool)
        sums = {"count": valid.sum()}
        for name, dropped in (("loss", (none, none)), ("unseen", (~none, none)), ("unread", (none, ~none))):
            errors, bits = self._losses(model, batch, steps, noise, *dropped)
            sums[name] = ((errors + bits) * valid).sum()
        return sums

    def errors_at(self, model: Callable[..., Any], batch: Batch, steps: Tensor, noise: Tensor) -> Tensor:
        none = torch.zeros_like(steps, dtype=torch.bool)
        return self._losses(model, batch, steps, noise, none, none)[0]

    def summarize(self, sums: Metrics) -> dict[str, float]:
        loss, unseen, unread = (float(sums[name] / sums["count"]) for name in ("loss", "unseen", "unread"))
        return {"loss": loss, "embedding_gain": unseen - loss, "caption_gain": unread - loss}

    def _losses(
        self,
        model: Callable[..., Any],
        batch: Batch,
        steps: Tensor,
        noise: Tensor,
        embedding_dropped: Tensor,
        text_dropped: Tensor,
        dropout_seeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        image = batch["image"]
        output = model(
            self.schedule.add_noise(image, noise, steps),
            steps,
            batch["image_embedding"],
            self.caption(batch),
            embedding_dropped=embedding_dropped,
            text_dropped=text_dropped,
            dropout_seeds=dropout_seeds,
        )
        return self.losses(output, image, noise, steps)

    def pipeline(self, model: nn.Module) -> EmbeddingToImage:
        """The plain model, with all that using it needs."""
        objective = self.run.objective
        return EmbeddingToImage(
            cast(UnclipDecoder, model),
            self.tokenizer,
            self.clip if self.reads_states else None,
            self.clip.fingerprint,
            DiffusionFacts(
                objective.schedule, objective.timesteps, objective.predicts, self.run.sampling, x0_error=self.x0_error
            ),
        )

    def preview(self, model: nn.Module, batch: Batch) -> Image.Image:
        """Captions, each with its image, two samples from its embedding and one from the caption alone."""
        pipeline, own = self.pipeline(model), self.validation_images(PREVIEW_ROWS)
        captions, size = [image.caption for image in own], self.run.model.image_size
        embeddings = torch.stack([image.embedding for image in own])
        columns = [[Image.fromarray(clip_center_view(image.dataset.image(image.row), size)) for image in own]]
        for number, given in ((0, embeddings), (1, embeddings), (0, None)):
            numbers = [number] * len(own)
            columns.append(to_pil_images(pipeline.sample(captions, given, seed=self.run.seed, numbers=numbers)))
        titles = ["its own", "its embedding", "again", "caption only"]
        rows = list(zip(captions, zip(*columns, strict=True), strict=True))
        return image_grid(rows, titles=titles, cell=max(64, size))

    def export(self, model: nn.Module, folder: Path) -> None:
        """A folder that `EmbeddingToImage.from_pretrained` reads."""
        self.pipeline(model).save_pretrained(folder)
