"""Training of the autoregressive prior (unCLIP §2.2, App. C)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_ds.config import LatentPriorRun
from dalle_ds.errors import DataError
from dalle_ds.models.latent_prior import AutoregressivePrior
from dalle_ds.models.latents import LatentCodec, components_for
from dalle_ds.parallel import WHOLE, TensorGroup
from dalle_ds.sampling.prior import trim_padding
from dalle_ds.sampling.text_to_embedding import LatentTextToEmbedding
from dalle_ds.tasks.base import Batch, Metrics, row_noise
from dalle_ds.tasks.text_to_embedding import TextToEmbeddingTask

LOST = 0.01
"""Share of variance that the paper's components leave out at most (unCLIP §2.2)."""


class LatentPriorTask(TextToEmbeddingTask[LatentPriorRun]):
    """Maximizes the likelihood of the codes of image embeddings, given captions."""

    name = "latent_prior"

    @cached_property
    def _fitted(self) -> tuple[LatentCodec, Tensor, float]:
        """The codec, the edges of similarity, and the share of variance lost, by training images and their first captions that
        are evenly spread over all corpora."""
        model = self.run.model
        total = sum(len(cache) for cache in self.caches)
        image, text = [], []
        for cache in self.caches:
            count = max(1, min(len(cache), self.run.objective.fit_rows * len(cache) // total))
            for row, view in ((number * len(cache) // count, number % cache.views) for number in range(count)):
                try:
                    pair = cache.image(row, view), cache.text(row, 0)
                except DataError:
                    continue
                image.append(torch.from_numpy(pair[0]))
                text.append(torch.from_numpy(pair[1]))
        if not image:
            raise DataError("no training image can be read that the codes could be fitted to")
        images, texts = torch.stack(image), torch.stack(text)
        if self.initial_space:
            codec = LatentCodec.from_state_dict(self.initial_space)
        else:
            codec = LatentCodec.fitted(self.moments, images, model.components, model.buckets)
        places = torch.arange(1, model.similarity_buckets) / model.similarity_buckets
        return codec, (images * texts).sum(dim=1).quantile(places), codec.lost(images)

    @property
    def codec(self) -> LatentCodec:
        """Between embeddings and codes."""
        return self._fitted[0]

    @property
    def similarity_edges(self) -> Tensor:
        """(similarity_buckets − 1,) where the buckets of z_i · z_t meet: as many training images are in each."""
        return self._fitted[1]

    def parts(self) -> dict[str, str]:
        return {**super().parts(), **self.embeddings()}  # which the codec is of

    def build_model(self, tensor: TensorGroup = WHOLE) -> AutoregressivePrior:
        checkpointing = self.run.train.activation_checkpointing
        return AutoregressivePrior(self.run.model, checkpointing=checkpointing, tensor=tensor)

    @property
    def resblock_count(self) -> int:
        return 2 * self.run.model.text_depth + 3 * self.run.model.depth

    def batch_spec(self, rows: int) -> Batch:
        model = self.run.model
        shapes = {
            "text": (rows, model.text_len),
            "codes": (rows, model.components),
            "similarity": (rows,),
            "key": (rows,),
        }
        tokens = {name: torch.empty(shape, dtype=torch.int64, device="meta") for name, shape in shapes.items()}
        return {**tokens, "text_embedding": torch.empty(rows, model.embed_dim, device="meta")}

    def prepare(self, batch: Batch) -> Batch:
        image, text = batch["image_embedding"], batch["text_embedding"]
        edges = self.similarity_edges.to(image.device)
        similarity = torch.bucketize((image * text).sum(dim=1), edges, right=True)
        text = trim_padding(self.run.model, batch["text"])
        return {**batch, "text": text, "codes": self.codec.encode(image), "similarity": similarity}

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        uniforms, _ = row_noise(batch["key"], 0, 0, batch["codes"].device)
        dropped = uniforms[:, 0] < self.run.objective.text_drop
        loss, _ = model(*_inputs(batch), dropped=dropped, dropout_seeds=batch["key"])
        return loss, {"dropped": dropped.float().mean()}

    def evaluate(self, model: Callable[..., Any], batch: Batch) -> Metrics:
        """Nats per code; those of the first component, which weighs most; and without the caption."""
        codes, valid = batch["codes"], batch["valid"]
        none = torch.ones(len(codes), dtype=torch.bool, device=codes.device)
        losses, unread = (
            F.cross_entropy(model(*_inputs(batch), dropped=dropped, logits=True)[1].mT, codes, reduction="none")
            for dropped in (~none, none)
        )
        return {
            "count": valid.sum(),
            "loss": (losses.mean(dim=1) * valid).sum(),
            "first_loss": (losses[:, 0] * valid).sum(),
            "unread_loss": (unread.mean(dim=1) * valid).sum(),
        }

    def summarize(self, sums: Metrics) -> dict[str, float]:
        loss, first, unread = (float(sums[name] / sums["count"]) for name in ("loss", "first_loss", "unread_loss"))
        return {"loss": loss, "first_loss": first, "caption_gain": unread - loss}

    def pipeline(self, model: nn.Module) -> LatentTextToEmbedding:
        return LatentTextToEmbedding(cast(AutoregressivePrior, model), self.clip, self.tokenizer, self.codec)

    def describe(self) -> list[str]:
        model, values = self.run.model, self.moments.components()[0]
        left_out = 1 - float(values[: model.components].sum() / values.sum())
        return [
            f"codes: {model.components} of {model.embed_dim} components in {model.buckets} buckets lose "
            f"{self._fitted[2]:.2%} of the variance of training embeddings, {left_out:.2%} by components left "
            f"out, of which {components_for(values, LOST)} would leave less than {LOST:.0%}"
        ]


def _inputs(batch: Batch) -> tuple[Tensor, ...]:
    return batch["text"], batch["text_embedding"], batch["similarity"], batch["codes"]
