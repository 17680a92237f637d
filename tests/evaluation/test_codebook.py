"""Use of the codebook, and what codes look like."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dalle_ds.evaluation import metrics as codebook
from dalle_ds.evaluation.metrics import code_image, codebook_panel, codebook_usage
from dalle_ds.models import DiscreteVAE
from tests.conftest import TINY_DVAE


@pytest.fixture(scope="module")
def vae() -> DiscreteVAE:
    torch.manual_seed(0)
    return DiscreteVAE(TINY_DVAE).eval()


def test_perplexity_is_the_number_of_codes_that_are_used_alike() -> None:
    assert codebook_usage(torch.tensor([5, 5, 5, 5])) == pytest.approx(
        {"perplexity": 4, "used": 4, "dead": 0, "usage": 1}
    )
    assert codebook_usage(torch.tensor([9, 0, 0, 0])) == pytest.approx(
        {"perplexity": 1, "used": 1, "dead": 3, "usage": 0.25}
    )
    share = np.array([3, 1]) / 4
    expected = float(np.exp(-(share * np.log(share)).sum()))
    assert codebook_usage(torch.tensor([3, 0, 1]))["perplexity"] == pytest.approx(expected)


def test_a_code_alone_is_the_middle_of_a_grid_full_of_it(vae: DiscreteVAE) -> None:
    whole = vae.decode(torch.full((1, 4, 4), 7))[0].permute(1, 2, 0).numpy() * 255
    found = np.asarray(code_image(vae, 7), dtype=np.float64)
    assert found.shape == (14, 14, 3)  # three codes of four pixels, and the frame
    assert np.abs(found[1:-1, 1:-1] - whole[2:14, 2:14]).max() <= 0.5
    assert (found[0] == codebook.OUTSIDE).all()


def test_examples_show_the_code_in_their_middle(vae: DiscreteVAE) -> None:
    """Images whose pixels are their code: each example is centred on the code's own colour."""
    codes = torch.randint(0, 32, (20, 4, 4), generator=torch.Generator().manual_seed(0))

    def picture(row: int) -> np.ndarray:
        shades = (7 * codes[row]).byte().numpy().repeat(4, axis=0).repeat(4, axis=1)
        return np.stack([shades] * 3, axis=-1)

    for code in (0, 31):
        patches = codebook._occurrences(vae, codes, code, picture)
        assert 1 <= len(patches) <= codebook.EXAMPLES
        for patch in patches:
            assert patch.size == (12, 12) and (np.asarray(patch)[4:8, 4:8] == 7 * code).all()
    assert codebook_panel(vae, codes, picture).width > 8 * 96
