"""The contrastive loss of one process against open_clip's and against sums written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dalle_ds.nn.contrastive import contrastive_logits
from dalle_ds.parallel.peers import Peers
from tests.references import reference


def embeddings(rows: int, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(rows)
    image, text = (torch.nn.functional.normalize(torch.randn(rows, width, generator=rng), dim=1) for _ in range(2))
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(14.0, requires_grad=True)


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("local", [True, False])
def test_loss_and_gradients_are_open_clips(rows: int, local: bool) -> None:
    leaves = embeddings(rows)
    theirs = reference("open_clip.loss").ClipLoss()(*leaves)
    ours = contrastive_logits(*leaves, local=local).loss()
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_loss_written_out() -> None:
    image, text, scale = (value.detach().double() for value in embeddings(5))
    total = 0.0
    for i in range(5):
        by_caption = [math.exp(float(scale * image[i] @ text[j])) for j in range(5)]
        by_picture = [math.exp(float(scale * image[j] @ text[i])) for j in range(5)]
        total -= math.log(by_caption[i] / sum(by_caption)) + math.log(by_picture[i] / sum(by_picture))
    assert float(contrastive_logits(image, text, scale).loss()) == pytest.approx(total / 10, rel=1e-5)


@pytest.mark.parametrize("local", [True, False])
def test_a_scale_of_each_row_is_that_rows_where_every_process_has_one(local: bool) -> None:
    image, text, scale = torch.eye(2), torch.eye(2).flip(0) + 0.5, torch.tensor([2.0, 5.0])

    class Process(Peers):
        def gather(self, rows: Tensor, *, alike: bool = False) -> Tensor:
            everyone = (image, text, scale[:, None])
            return next(all_rows for all_rows in everyone if torch.equal(all_rows[self.rank : self.rank + 1], rows))

        def shared(self, value: Tensor) -> Tensor:
            return value

    whole = contrastive_logits(image, text, scale)
    for rank in range(2):
        own = slice(rank, rank + 1)
        found = contrastive_logits(image[own], text[own], scale[own], Process(rank, 2), local)
        torch.testing.assert_close(found.image, whole.image[own] if local else whole.image)
        torch.testing.assert_close(found.text, whole.text[own] if local else whole.text)


def test_sixteen_bits_are_compared_in_fp32() -> None:
    image, text, scale = embeddings(4)
    logits = contrastive_logits(image.bfloat16(), text.bfloat16(), scale)
    assert logits.image.dtype == logits.text.dtype == torch.float32
    expected = scale * image.bfloat16().float() @ text.bfloat16().float().T
    torch.testing.assert_close(logits.image, expected)


def test_accuracy_counts_captions_whose_own_picture_is_the_nearest() -> None:
    pictures = torch.eye(4)
    captions = torch.eye(4)[[0, 1, 3, 2]]
    logits = contrastive_logits(pictures, captions, torch.tensor(3.0))
    assert logits.accuracy() == 0.5
    assert logits.text.argmax(dim=1).tolist() == [0, 1, 3, 2], "captions are rows here, images columns"
