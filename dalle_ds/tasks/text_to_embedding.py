"""What both priors' tasks share: previews and exports."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dalle_ds.config import LatentPriorRun, PriorRun
from dalle_ds.models.pretrained import export_folder, read_safetensors
from dalle_ds.sampling.grid import image_grid
from dalle_ds.sampling.text_to_embedding import SPACE_NAME, TextToEmbedding
from dalle_ds.tasks.base import Batch, ModelParallelTask
from dalle_ds.tasks.embedded import EmbeddedDataTask

PREVIEW_ROWS = 6
PREVIEW_MATCHES = 4
PREVIEW_IMAGES = 512
"""Validation images among which a preview looks for those of sampled embeddings."""
AnyPriorRun = TypeVar("AnyPriorRun", bound=PriorRun | LatentPriorRun)


class TextToEmbeddingTask(EmbeddedDataTask[AnyPriorRun], ModelParallelTask[AnyPriorRun]):
    """What makes embeddings of images from captions."""

    @cached_property
    def initial_space(self) -> dict[str, Tensor]:
        """What the initial model makes of embeddings, and this one must too: the scaling or the codec; empty without one."""
        return read_safetensors(export_folder(self.run.init) / SPACE_NAME) if self.run.init else {}

    @abstractmethod
    def pipeline(self, model: nn.Module) -> TextToEmbedding[Any, Any]:
        """The plain model, with all that using it needs."""

    def preview(self, model: nn.Module, batch: Batch) -> Image.Image:
        """Captions, each with its image and the validation images whose embeddings are most like a sampled one."""
        known = self.validation_images(PREVIEW_IMAGES)
        own = known[:: -(-len(known) // PREVIEW_ROWS)]
        captions = [image.caption for image in own]
        device = self.clip.logit_scale.device
        samples = self.pipeline(model).sample(captions, seed=self.run.seed, normalize=True)[:, 0].cpu()
        self.clip.to(device)  # the pipeline has moved it to the model's
        likeness = samples @ F.normalize(torch.stack([image.embedding for image in known])).T
        best = likeness.topk(min(PREVIEW_MATCHES, len(known)), dim=1).indices.tolist()
        shown = []
        for image, matches in zip(own, best, strict=True):
            places = [image, *(known[match] for match in matches)]
            shown.append((image.caption, [Image.fromarray(place.dataset.image(place.row)) for place in places]))
        return image_grid(shown, titles=["its own", *(f"match {n + 1}" for n in range(PREVIEW_MATCHES))], cell=64)

    def export(self, model: nn.Module, folder: Path) -> None:
        """A folder that `TextToEmbedding.from_pretrained` reads: the prior, CLIP, the tokenizer."""
        self.pipeline(model).save_pretrained(folder)

    def items_per_sample(self) -> tuple[str, int]:
        return "tokens", self.run.model.text_len
