"""What a GPU computes, against the CPU: other kernels, the same numbers. Skipped where there is no GPU."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dalle_ds.config import DalleConfig, DecoderConfig, PriorConfig, UpsamplerConfig
from dalle_ds.evaluation.features import load_network
from dalle_ds.models import Clip, Dalle, DiscreteVAE, UnclipDecoder, Upsampler
from dalle_ds.models.decoding import DecodingWeights, new_cache, prefill
from dalle_ds.models.prior import Caption, DiffusionPrior
from dalle_ds.models.prior_sampling import CachedPrior, DenoisingWeights
from dalle_ds.sampling.unclip import Residents
from tests.clip_shapes import CLIP_SHAPES
from tests.models.test_decoder import fill

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = "cuda"


def error(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    difference = found.detach().cpu().double() - wanted.detach().double()
    return float(difference.norm() / wanted.detach().double().norm())


def tokens(config: DalleConfig) -> tuple[Tensor, Tensor]:
    """Two captions, one of them half padding, and two images."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(config.text_vocab, (2, config.text_len), generator=generator)
    text[1, config.text_len // 2 :] = -1
    return text, torch.randint(config.image_vocab, (2, config.grid**2), generator=generator)


def test_codes_and_pictures(dvae_export: Path) -> None:
    dvae = DiscreteVAE.from_pretrained(dvae_export).eval()
    there = copy.deepcopy(dvae).to(GPU)
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    codes = dvae.encode(images)
    assert (there.encode(images.to(GPU)).cpu() == codes).float().mean() > 0.999  # of logits that tie, rounding decides
    assert error(there.decode(codes.to(GPU)), dvae.decode(codes)) < 1e-5


@pytest.mark.parametrize(("grid", "text_len"), [(8, 32), (32, 256)])
def test_loss_and_gradients_of_every_kind_of_attention(grid: int, text_len: int) -> None:
    config = DalleConfig(
        width=128, depth=6, heads=2, text_len=text_len, grid=grid, text_vocab=1000, image_vocab=256
    )  # row, column and conv layers
    torch.manual_seed(1)
    model = Dalle(config)
    there = copy.deepcopy(model).to(GPU)
    text, codes = tokens(config)
    wanted, found = model(text, codes), there(text.to(GPU), codes.to(GPU))
    assert error(found.loss, wanted.loss) < 1e-5
    assert error(found.image_logits, wanted.image_logits) < 1e-4
    wanted.loss.backward()
    found.loss.backward()
    for (name, ours), theirs in zip(there.named_parameters(), model.parameters(), strict=True):
        assert theirs.grad is not None and ours.grad is not None, name
        assert error(ours.grad, theirs.grad) < 1e-3, name


def test_decoding_step_by_step() -> None:
    config = DalleConfig(width=128, depth=6, heads=2, text_len=32, grid=8, text_vocab=1000, image_vocab=256)
    torch.manual_seed(2)
    model = Dalle(config).eval()
    text, codes = tokens(config)
    there = copy.deepcopy(model).to(GPU)
    with torch.no_grad():
        wanted = model(text, codes).image_logits
        weights, cache = DecodingWeights(there, reused=False), new_cache(there, 2)
        logits = [prefill(there, text.to(GPU), cache)]
        for step in range(config.grid**2 - 1):
            logits.append(weights.step(codes[:, step].to(GPU), step, cache).clone())
    found = torch.stack([step.reshape(2, -1) for step in logits], dim=1)
    assert error(found, wanted) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_a_priors_steps(dtype: torch.dtype, bound: float, guided: bool) -> None:
    """Each held in a CUDA graph."""
    torch.manual_seed(2)
    shape = PriorConfig(width=128, depth=2, heads=2, text_len=16, embed_dim=64, text_vocab=100, mask_padding=guided)
    prior = DiffusionPrior(shape).eval()
    there = copy.deepcopy(prior).to(GPU, dtype)
    text, embedding, timesteps = torch.randint(100, (2, 16)), torch.randn(2, 64), torch.tensor([3, 500, 999])
    text[0, 9:] = -1
    caption = Caption(text.to(GPU), embedding.to(GPU))
    cached = CachedPrior(DenoisingWeights(there), caption, 2, timesteps.to(GPU), guided)
    for number in (2, 1, 0):
        noised = torch.randn(2 * (1 + guided), 2, 64)
        wanted = [
            prior(Caption(text, embedding), part, timesteps[number].expand(2, 2), dropped=torch.tensor([null, null]))
            for null, part in zip((False, True), noised.split(2), strict=False)
        ]
        assert error(cached(noised.to(GPU), number), torch.cat(wanted)) < bound
    assert cached._graph is not None and cached._graph.output is not None


@pytest.mark.parametrize("shape", ["toy", "ViT-B/32"])
def test_embeddings(shape: str) -> None:
    config = CLIP_SHAPES[shape]
    torch.manual_seed(4)
    clip = Clip(config).eval()
    there = copy.deepcopy(clip).to(GPU)
    images = torch.rand(4, 3, config.image_size, config.image_size)
    text = torch.full((4, config.text_len), -1)
    text[:, :10] = torch.randint(1, 1000, (4, 10))
    text[:, 0], text[:, 10] = config.text_vocab - 2, config.text_vocab - 1
    assert error(there.embed_images(images.to(GPU)), clip.embed_images(images)) < 1e-4
    assert error(there.embed_texts(text.to(GPU)), clip.embed_texts(text)) < 1e-4


def test_features() -> None:
    pixels = torch.rand(8, 3, 64, 64)
    for found, wanted in zip(load_network(device=GPU)(pixels.to(GPU)), load_network()(pixels), strict=True):
        assert error(found, wanted) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_a_decoder_and_an_upsampler(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    shape = DecoderConfig(
        32, 64, 1, (1, 2, 3), attention=(16, 8), embed_dim=64, context_width=128, text_len=16, text_vocab=100,
        text_depth=2, text_heads=2, mask_padding=True,
    )  # fmt: skip
    decoder, upsampler = UnclipDecoder(shape).eval(), Upsampler(UpsamplerConfig(64, 64, 1, (1, 2), low_size=16)).eval()
    fill(decoder)
    fill(upsampler)
    text = torch.randint(100, (2, 16))
    text[1, 5:] = -1
    x, steps, embedding = torch.randn(2, 3, 32, 32), torch.tensor([3, 900]), torch.randn(2, 64)
    caption = Caption(text, torch.zeros(2, 64))
    there = copy.deepcopy(decoder).to(GPU, dtype)
    of_gpu = Caption(text.to(GPU), caption.embedding.to(GPU))
    found = there(x.to(GPU), steps.to(GPU), embedding.to(GPU), of_gpu)
    assert error(found, decoder(x, steps, embedding, caption)) < bound
    x, low = torch.randn(2, 3, 64, 64), torch.rand(2, 3, 16, 16)
    found = copy.deepcopy(upsampler).to(GPU, dtype)(x.to(GPU), steps.to(GPU), low.to(GPU))
    assert error(found, upsampler(x, steps, low)) < bound


def test_stages_leave_the_gpu_under_a_bound() -> None:
    models = [torch.nn.Linear(1024, 1024) for _ in range(3)]
    residents = Residents(torch.device(GPU), 2 * 4 * 1024 * 1025)
    for model in models:
        residents.bring((model, 4 * 1024 * 1025))
    assert [next(model.parameters()).device.type for model in models] == ["cpu", "cuda", "cuda"]
