"""The contrastive loss of images and captions (CLIP, arXiv 2103.00020, Figure 3), over all rows of all processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_ds.parallel.peers import ALONE, Peers


@dataclass(frozen=True)
class ContrastiveLogits:
    """How each of some rows compares with all N rows of the batch, in fp32."""

    image: Tensor
    """(n, N), images against all captions."""
    text: Tensor
    """(n, N), captions against all images."""
    targets: Tensor
    """(n,) int64, which of the N belongs to the row."""

    def loss(self) -> Tensor:
        """() mean of both cross-entropies in nats, over these rows: this process's, or all if not `local`."""
        return (F.cross_entropy(self.image, self.targets) + F.cross_entropy(self.text, self.targets)) / 2

    def accuracy(self) -> Tensor:
        """() share of captions whose own image is the most similar one, in [0, 1]."""
        return (self.text.detach().argmax(dim=1) == self.targets).float().mean()


def contrastive_logits(
    image: Tensor, text: Tensor, scale: Tensor, group: Peers | None = None, local: bool = True
) -> ContrastiveLogits:
    """Scaled similarities of a batch's N images and captions, whose `loss` is CLIP's symmetric cross-entropy. Collective.

    The mean over processes of their losses is the loss of the whole batch, and the mean over processes of the gradients that
    each gets for shared weights, which is what data-parallel training takes, is that loss's gradient.

    Args:
        image, text: (n, D), this process's rows of a batch, L2-normalized; row i of one belongs to row i of the other. All
            processes have equally many.
        scale: () or (n,), what cosines of all these rows, or of each, are multiplied by.
        group: the processes that have the batch's other rows; None where there are none.
        local: compute this process's 2 · n rows of N only; embeddings' gradients then cross between processes. Otherwise each
            process computes all of N × N, and only embeddings cross. Loss (in the mean) and gradients are the same.
    """
    peers = group or ALONE
    # At its limit, the scale's gradient is dropped or not by its sign, which is to be that of the whole batch's.
    image, text, of_each = image.float(), text.float(), scale.ndim > 0
    scale = peers.shared(scale.float()).reshape(-1, 1)
    all_images, all_texts = peers.gather(image, alike=not local), peers.gather(text, alike=not local)
    first = peers.rank * len(image)
    if not local:
        image, text, first = all_images, all_texts, 0
        scale = peers.gather(scale, alike=True) if of_each else scale
    targets = torch.arange(first, first + len(image), device=image.device)
    if image is all_images and not of_each:  # one matrix, seen from both sides
        similarities = scale * image @ all_texts.T
        return ContrastiveLogits(similarities, similarities.T, targets)
    return ContrastiveLogits(scale * image @ all_texts.T, scale * text @ all_images.T, targets)
