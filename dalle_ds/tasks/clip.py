"""Training of CLIP (arXiv 2103.00020 §2; unCLIP App. C)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from dalle_ds.config import ClipRun, SharpnessConfig
from dalle_ds.data import ClipSamples, PairDataset
from dalle_ds.errors import ConfigError
from dalle_ds.models.clip import LARGEST_SCALE, Clip
from dalle_ds.nn.contrastive import contrastive_logits
from dalle_ds.parallel import Mesh
from dalle_ds.parallel.peers import ALONE, Peers
from dalle_ds.sampling.grid import image_grid, to_pil_images
from dalle_ds.tasks.base import Batch, ContrastiveTask, Metrics, Outputs, Samples
from dalle_ds.text.clip_tokenizer import ClipTokenizer

PREVIEW_MATCHES = 4
RECALLS = (1, 5, 10)
COLLAPSED = 0.01
"""Mean of 1 − cosine over pairs of embeddings below which they are all but the same."""


class ClipTask(ContrastiveTask[ClipRun]):
    """Maximizes the similarity of images and their own captions, relative to that with all others of the batch.

    Raises:
        ConfigError: no tokenizer, or the tokenizer or the model to begin with does not fit the model's shape.
    """

    name = "clip"

    def __init__(self, run: ClipRun) -> None:
        super().__init__(run)
        # Its weights are not kept: they are needed once, and not at all where a run goes on.
        initial = Clip.from_pretrained(run.init) if run.init else None
        known = None
        if initial is not None:
            known, self.initial_fingerprint = initial.tokenizer, initial.fingerprint
        if not run.tokenizer and known is None:
            raise ConfigError("--tokenizer is missing: name a tokenizer's file")
        start, end = run.model.start, run.model.end
        tokenizer = ClipTokenizer.load(run.tokenizer, start=start, end=end) if run.tokenizer else known
        assert tokenizer is not None
        self.tokenizer: ClipTokenizer = tokenizer
        if known is not None and self.tokenizer.fingerprint != known.fingerprint:
            raise ConfigError(
                f"the tokenizer {run.tokenizer} is not that of the CLIP in {run.init}, whose tokens would mean other things: "
                "leave --tokenizer out"
            )

    def build_model(self) -> Clip:
        tokenizer = getattr(self, "tokenizer", None)  # a task that is only planned has none
        return Clip(self.run.model, tokenizer=tokenizer, checkpointing=self.run.train.activation_checkpointing)

    def residual_blocks(self, model: nn.Module) -> list[nn.Module]:
        clip = cast(Clip, model)
        return [*clip.vision_model.encoder.layers, *clip.text_model.encoder.layers]

    @property
    def sharpness(self) -> SharpnessConfig | None:
        return None if self.run.sharpness.rho is None else self.run.sharpness

    def check_layout(self, mesh: Mesh, micro_batch: int, precision: str) -> None:
        super().check_layout(mesh, micro_batch, precision)
        if self.sharpness is not None:
            self.sharpness.span(self.run.train.batch_size, micro_batch, mesh.size("data"))

    def batch_spec(self, rows: int) -> Batch:
        config = self.run.model
        return {
            "image": torch.empty(rows, 3, config.image_size, config.image_size, device="meta"),
            "text": torch.empty(rows, config.text_len, dtype=torch.int64, device="meta"),
            "key": torch.empty(rows, dtype=torch.int64, device="meta"),
        }

    def corpus_samples(self, folder: str, split: str) -> Samples:
        return ClipSamples(
            PairDataset.open(folder, split),
            self.tokenizer,
            text_len=self.run.model.text_len,
            image_size=self.run.model.image_size,
            train=split == "train",
            min_crop=self.run.objective.min_crop,
            mirror=self.run.objective.mirror,
        )

    def identity(self) -> dict[str, str]:
        return {**self.data_identity(), **self.parts()}

    def parts(self) -> dict[str, str]:
        return {"tokenizer": self.tokenizer.fingerprint}

    def prepare(self, batch: Batch) -> Batch:
        return {**batch, "image": batch["image"].float() / 255}

    def embed(self, model: nn.Module, batch: Batch) -> Outputs:
        output = model(batch["image"], batch["text"])
        return {"image": output.image_embeddings, "text": output.text_embeddings, "scale": output.scale}

    def loss_of(self, outputs: Outputs, peers: Peers = ALONE) -> tuple[Tensor, Metrics]:
        image, text, scale = outputs["image"], outputs["text"], outputs["scale"]
        logits = contrastive_logits(image, text, scale, peers, self.run.objective.local_loss)
        metrics = {
            "scale": scale.detach().mean(),
            "accuracy": logits.accuracy(),
            "rows": image.new_full((1,), len(image)),
        }
        metrics |= {f"{name}_sum": outputs[name].detach().float().sum(0) for name in ("image", "text")}
        return logits.loss(), metrics

    def digest(self, sums: Metrics) -> dict[str, float]:
        """Spreads of the whole batch's embeddings: of those of one process, which may have one row, they would tell less."""
        return {f"{name}_spread": spread(sums[f"{name}_sum"] / sums["rows"]) for name in ("image", "text")}

    def evaluate(self, model: Callable[..., Any], batch: Batch) -> Metrics:
        """Embeddings of these rows, each at its row's place among the zeros of all others: added up, those of all."""
        output = model(batch["image"], batch["text"])
        valid = batch["valid"]
        sums = {"count": valid.sum(), "scale": output.scale * valid.sum()}
        for name, rows in (("image", output.image_embeddings), ("text", output.text_embeddings)):
            whole = rows.new_zeros(self.validation_rows, rows.shape[1])
            sums[name] = whole.index_add(0, batch["place"], rows * valid[:, None])
        return sums

    def summarize(self, sums: Metrics) -> dict[str, float]:
        """Of all rows against each other: loss, and how often the right one is among the most similar k.

        "recall@k" is that of images for captions, "image_recall@k" that of captions for images. Loss and recalls depend on
        the number of rows.
        """
        scale = sums["scale"] / sums["count"]
        logits = contrastive_logits(sums["image"], sums["text"], scale)
        metrics = {"loss": float(logits.loss()), "scale": float(scale)}
        for name, similarities in (("recall", logits.text), ("image_recall", logits.image)):
            metrics |= {f"{name}@{k}": value for k, value in recalls(similarities).items()}
        return metrics | {f"{name}_spread": spread(sums[name].mean(dim=0)) for name in ("image", "text")}

    def preview(self, model: nn.Module, batch: Batch) -> Image.Image:
        """Captions, each with its own image and those of the batch that are most similar to it."""
        clip = cast(Clip, model)
        # The model may have moved to another type; what it is given follows.
        similarities = (
            clip.embed_texts(batch["text"], normalize=True) @ clip.embed_images(batch["image"], normalize=True).T
        )
        images = to_pil_images(batch["image"])
        best = similarities.topk(min(PREVIEW_MATCHES, len(images)), dim=1).indices.tolist()
        captions = [self.tokenizer.decode(row.tolist()) for row in batch["text"]]
        rows = [
            (caption, [images[number], *(images[found] for found in matches)])
            for number, (caption, matches) in enumerate(zip(captions, best, strict=True))
        ]
        return image_grid(rows, titles=["its own", *(f"match {n + 1}" for n in range(PREVIEW_MATCHES))], cell=64)

    def export(self, model: nn.Module, folder: Path) -> None:
        """A folder that `Clip.from_pretrained` reads: the model and its tokenizer."""
        cast(Clip, model).save_pretrained(folder)
        self.tokenizer.save(folder)  # a model that is read from a checkpoint writes its weights only

    def alarm(self, metrics: Mapping[str, float], step: int) -> str | None:
        if step < self.run.optim.warmup_steps:
            return None
        for name in ("image", "text"):
            found = metrics[f"{name}_spread"]
            if not found >= COLLAPSED:  # NaN, too
                return (
                    f"{name} embeddings are collapsing: on average, 1 − cosine of two of them is {found:.2g}; lower optim.lr, "
                    "or raise optim.warmup_steps"
                )
        if metrics["scale"] >= LARGEST_SCALE:
            return (
                f"cosines are scaled by {LARGEST_SCALE:.0f}, the most that is allowed: the pairs are learned by heart, or "
                "told apart without effort; more data, a greater train.batch_size or more of optim.weight_decay help"
            )
        return None

    def describe(self) -> list[str]:
        pieces, room = self.tokenizer.pieces.vocab_size, self.run.model.text_vocab
        lines = [f"text: {pieces:,} pieces, of {room:,} that model.text_vocab has room for"]
        if self.sharpness is not None:
            pairs = self.sharpness.pairs or self.run.train.batch_size
            lines.append(
                f"sharpness-aware: each {pairs:,} pairs take their gradient {self.sharpness.rho:g} away from the weights"
            )
        return lines


def spread(mean: Tensor) -> float:
    """Mean of 1 − cosine over all pairs of rows of length 1, whose mean is given, (D,)."""
    return 1 - float(mean.square().sum())


def recalls(similarities: Tensor) -> dict[int, float]:
    """Share of rows whose own column, that of the same number, is among the k most similar, by k in `RECALLS`.

    Args:
        similarities: (N, N). Columns that are as similar as the row's own count as more so: where all are the same, nothing is
            recalled.
    """
    own = similarities.diagonal()[:, None]
    better = (similarities >= own).sum(dim=1) - 1
    return {k: float((better < k).float().mean()) for k in RECALLS}
