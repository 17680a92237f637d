"""The dVAE against OpenAI's own code (PyPI `dall-e`), scipy-free references and its own promises."""

from __future__ import annotations

import dataclasses
import math

import dall_e
import pytest
import torch
from torch import Tensor

from dalle_ds.config import DiscreteVAEConfig
from dalle_ds.errors import CheckpointError, DataError
from dalle_ds.models import DiscreteVAE
from dalle_ds.models.dvae import ResidualBlock, gumbel_noise, logit_laplace_nll, map_pixels, unmap_pixels
from dalle_ds.models.pretrained import check_shapes, load_weights
from tests.conftest import TINY_DVAE

NARROW = DiscreteVAEConfig(
    image_size=32, encoder_width=16, decoder_width=16, decoder_input=8, vocab_size=64
)  # the paper's depth: 4 groups of 2


def openai_pair(config: DiscreteVAEConfig) -> tuple[torch.nn.Module, torch.nn.Module]:
    """OpenAI's encoder and decoder of the same shape, with random weights of realistic size."""
    torch.manual_seed(1)
    encoder = dall_e.Encoder(n_hid=config.encoder_width, vocab_size=config.vocab_size)
    decoder = dall_e.Decoder(n_init=config.decoder_input, n_hid=config.decoder_width, vocab_size=config.vocab_size)
    for parameter in [*encoder.parameters(), *decoder.parameters()]:
        if parameter.ndim == 1:  # biases start at 0, which would hide a missing one
            torch.nn.init.normal_(parameter, std=0.1)
    return encoder, decoder


def test_encoder_and_decoder_equal_openais_after_loading_their_state_dict() -> None:
    encoder, decoder = openai_pair(NARROW)
    vae = DiscreteVAE(NARROW)
    load_weights(vae.encoder, encoder.state_dict(), "OpenAI's encoder")
    load_weights(vae.decoder, decoder.state_dict(), "OpenAI's decoder")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits = encoder(dall_e.map_pixels(images))
        codes = logits.argmax(dim=1)
        one_hot = torch.nn.functional.one_hot(codes, NARROW.vocab_size).permute(0, 3, 1, 2).float()
        statistics = decoder(one_hot).float()
        restored = dall_e.unmap_pixels(torch.sigmoid(statistics[:, :3]))
        assert (vae.encoder(map_pixels(images)) - logits).abs().max() < 1e-5
        assert (vae.decoder(one_hot) - statistics).abs().max() < 1e-5
    assert torch.equal(vae.encode(images), codes)
    assert (vae.decode(codes) - restored).abs().max() < 1e-5


@pytest.mark.parametrize("channels_out", [16, 8])
def test_a_block_that_upsamples_is_the_same_block_after_upsampling(channels_out: int) -> None:
    torch.manual_seed(0)
    block = ResidualBlock(16, channels_out, (1, 3, 3, 3), gain=0.5, upsample=True).double()
    plain = ResidualBlock(16, channels_out, (1, 3, 3, 3), gain=0.5).double()
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 16, 4, 6, dtype=torch.float64)
    found, expected = block(x), plain(torch.nn.Upsample(scale_factor=2)(x))
    torch.testing.assert_close(found, expected.to(found.dtype))
    for each, other in zip(
        torch.autograd.grad(found.sin().sum(), list(block.parameters())),
        torch.autograd.grad(expected.sin().sum(), list(plain.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(each, other, rtol=1e-5, atol=1e-6)


def test_the_full_size_model_has_the_released_models_keys_and_shapes() -> None:
    with torch.device("meta"):
        ours = DiscreteVAE(DiscreteVAEConfig())
    theirs = {"encoder": dall_e.Encoder(), "decoder": dall_e.Decoder()}
    for name, module in theirs.items():
        expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        found = {key: tuple(value.shape) for key, value in getattr(ours, name).state_dict().items()}
        assert found == expected
    assert sum(p.numel() for p in ours.encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in ours.decoder.parameters()) == 43_829_766


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_any_number_of_groups_halves_the_side_that_often(groups: int) -> None:
    config = DiscreteVAEConfig(
        image_size=16,
        groups=groups,
        blocks_per_group=1,
        encoder_width=8,
        decoder_width=8,
        decoder_input=4,
        vocab_size=10,
    )
    vae = DiscreteVAE(config)
    codes = vae.encode(torch.rand(2, 3, 16, 16))
    assert codes.shape == (2, 16 // 2 ** (groups - 1), 16 // 2 ** (groups - 1)) == (2, config.grid, config.grid)
    assert codes.dtype == torch.int64
    pictures = vae.decode(codes)
    assert pictures.shape == (2, 3, 16, 16)
    assert pictures.min() >= 0 and pictures.max() <= 1


def test_initial_weights_have_the_releases_scale() -> None:
    torch.manual_seed(0)
    encoder = DiscreteVAE(NARROW).encoder
    conv = encoder.blocks.group_2.block_1.res_path.conv_1
    assert conv.w.std().item() == pytest.approx(1 / math.sqrt(16 * 9), rel=0.05)
    assert not conv.b.any()


def test_mapping_is_affine_onto_the_middle_and_back() -> None:
    pixels = torch.tensor([0.0, 0.5, 1.0])
    assert torch.allclose(map_pixels(pixels), torch.tensor([0.1, 0.5, 0.9]))
    assert torch.allclose(unmap_pixels(map_pixels(pixels)), pixels, atol=1e-6)
    assert torch.equal(unmap_pixels(torch.tensor([0.0, 1.0])), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(("mu", "log_b"), [(0.0, 0.0), (1.3, -1.5), (-2.0, 0.7)])
def test_the_likelihood_is_the_density_of_a_sigmoid_of_a_laplace_variable(mu: float, log_b: float) -> None:
    """Against torch's own Laplace distribution and sigmoid transform, and as a density that integrates to 1."""
    distribution = torch.distributions.TransformedDistribution(
        torch.distributions.Laplace(torch.tensor(mu).double(), torch.tensor(log_b).double().exp()),
        torch.distributions.SigmoidTransform(),
    )
    # Midpoints in logit space, where the density is smooth, turned into pixels.
    logits = torch.linspace(-30, 30, 200_001, dtype=torch.float64)
    pixels = torch.sigmoid(logits)
    inner = (pixels > 1e-9) & (pixels < 1 - 1e-9)
    ours = logit_laplace_nll(pixels[inner], torch.tensor(mu).double(), torch.tensor(log_b).double())
    assert torch.allclose(ours, -distribution.log_prob(pixels[inner]), atol=1e-6)
    # ∫ f dv = ∫ f v (1 − v) dlogit
    density = torch.exp(-ours) * pixels[inner] * (1 - pixels[inner])
    assert torch.trapezoid(density, logits[inner]).item() == pytest.approx(1, abs=1e-3)


def reference_parts(vae: DiscreteVAE, images: Tensor, temperature: float, gumbel: Tensor) -> tuple[float, float]:
    """NLL per value and KL per code, in float64, straight from the definitions."""
    vae = vae.double()
    for module in vae.modules():
        module.fp32 = False  # type: ignore[assignment]
    mapped = map_pixels(images.double())
    logits = vae.encoder(mapped)
    relaxed = torch.nn.functional.softmax((logits + gumbel.double()) / temperature, dim=1)
    mu, log_b = vae.decoder(relaxed).chunk(2, dim=1)
    laplace = torch.distributions.Laplace(mu, log_b.exp())
    density = torch.distributions.TransformedDistribution(laplace, torch.distributions.SigmoidTransform())
    posterior = torch.distributions.Categorical(logits=logits.permute(0, 2, 3, 1))
    uniform = torch.distributions.Categorical(logits=torch.zeros_like(posterior.logits))
    kl = torch.distributions.kl_divergence(posterior, uniform)
    return -density.log_prob(mapped).mean().item(), kl.mean().item()


def test_training_outputs_are_the_bounds_parts() -> None:
    torch.manual_seed(0)
    vae = DiscreteVAE(TINY_DVAE)
    images = torch.rand(3, 3, 16, 16)
    gumbel = gumbel_noise(torch.arange(3), (32, 4, 4))
    output = vae(images, 0.7, gumbel)
    twin = DiscreteVAE(TINY_DVAE)
    twin.load_state_dict(vae.state_dict())
    nll, kl = reference_parts(twin, images, 0.7, gumbel)
    assert output.nll.item() == pytest.approx(nll, abs=1e-4)
    assert output.kl.item() == pytest.approx(kl, abs=1e-5)


def test_the_kl_term_does_not_grow_with_the_batch() -> None:
    """DALLE-pytorch's does: 1×, 4×, 16× at batch 1, 4, 16."""
    torch.manual_seed(0)
    vae = DiscreteVAE(TINY_DVAE)
    image = torch.rand(1, 3, 16, 16)
    values = []
    for batch in (1, 4, 16):
        output = vae(image.expand(batch, -1, -1, -1), 1.0, torch.zeros(batch, 32, 4, 4))
        values.append((output.nll.item(), output.kl.item()))
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert values[2] == pytest.approx(values[0], rel=1e-5)


def test_the_relaxation_is_soft_and_the_kl_ignores_noise_and_temperature() -> None:
    torch.manual_seed(0)
    vae = DiscreteVAE(TINY_DVAE)
    images = torch.rand(2, 3, 16, 16)
    noise = gumbel_noise(torch.tensor([1, 2]), (32, 4, 4))
    seen: list[Tensor] = []
    vae.decoder.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
    warm, cold = vae(images, 1.0, noise), vae(images, 1 / 16, noise)
    assert torch.allclose(warm.kl, cold.kl)
    assert torch.allclose(vae(images, 1.0, noise * 0).kl, warm.kl)
    logits = vae.encoder(map_pixels(images))
    for weights, temperature in zip(seen, (1.0, 1 / 16), strict=False):
        assert torch.allclose(weights, ((logits + noise) / temperature).softmax(dim=1), atol=1e-5)
    for weights in seen:
        assert torch.allclose(weights.sum(1), torch.ones(()), atol=1e-5)
    assert seen[0].max() < 1 - 1e-3, "a straight-through estimator would be one-hot"
    assert seen[1].max(dim=1).values.mean() > seen[0].max(dim=1).values.mean()
    # Gradients reach the encoder through the relaxed codes, not through the KL alone.
    warm.nll.backward()
    assert vae.encoder.blocks.output.conv.w.grad.abs().max() > 0


def test_the_scale_floor_bounds_ln_b_and_keeps_its_gradient() -> None:
    import dataclasses

    vae = DiscreteVAE(dataclasses.replace(TINY_DVAE, min_log_scale=-1.0))
    with torch.no_grad():
        vae.decoder.blocks.output.conv.b[3:] = -3.0
    mu, log_b = vae.likelihood_parameters(torch.full((1, 32, 4, 4), 1 / 32))
    assert log_b.min() > -1.0
    log_b.sum().backward()
    assert vae.decoder.blocks.output.conv.b.grad[3:].abs().min() > 0
    assert mu.shape == log_b.shape == (1, 3, 16, 16)


def test_gumbel_noise_belongs_to_the_sample() -> None:
    together = gumbel_noise(torch.tensor([5, 6, 7]), (3, 100, 100))
    alone = gumbel_noise(torch.tensor([6]), (3, 100, 100))
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])
    # Mean Euler's constant, variance π² / 6.
    assert together.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert together.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)
    state = torch.random.get_rng_state()
    gumbel_noise(torch.tensor([1]), (4,))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_export_round_trip_keeps_codes_and_fingerprint(tmp_path) -> None:
    torch.manual_seed(3)
    vae = DiscreteVAE(TINY_DVAE)
    vae.save_pretrained(tmp_path / "export")
    for path in (tmp_path, tmp_path / "export"):  # a run directory, and the export itself
        loaded = DiscreteVAE.from_pretrained(path)
        images = torch.rand(2, 3, 16, 16)
        assert torch.equal(loaded.encode(images), vae.encode(images))
        assert loaded.fingerprint == vae.fingerprint
    assert DiscreteVAE(TINY_DVAE).fingerprint != vae.fingerprint


def test_mistakes_are_told(tmp_path) -> None:
    vae = DiscreteVAE(TINY_DVAE)
    with pytest.raises(DataError, match=r"multiples of 4.*\(1, 3, 18, 16\)"):
        vae.encode(torch.rand(1, 3, 18, 16))
    with pytest.raises(DataError, match="divide bytes by 255"):
        vae.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"\[0, 32\).*found 0 to 32"):
        vae.decode(torch.tensor([[[0, 32]]]))
    with pytest.raises(CheckpointError, match="no such folder"):
        DiscreteVAE.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither config\.json and model\.safetensors"):
        DiscreteVAE.from_pretrained(tmp_path / "empty")
    vae.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        DiscreteVAE.from_pretrained(tmp_path / "cut")


@pytest.mark.parametrize("empty", [{"w": torch.empty(10**6, 0)}, {f"w{n}": torch.empty(0) for n in range(5000)}])
def test_tensors_without_elements_do_not_allow_a_model_of_any_size(empty: dict[str, Tensor]) -> None:
    """They cost next to nothing in a file, whatever sizes they tell and however many they are."""
    config = dataclasses.replace(TINY_DVAE, blocks_per_group=5000)
    with pytest.raises(CheckpointError, match="not those of a model with blocks_per_group=5000"):
        check_shapes(torch.nn.Module, config, {"real": torch.zeros(32), **empty}, "here")


def test_in_bf16_the_residual_survives_a_small_gain_and_the_ends_are_fp32() -> None:
    """At the paper's gain of 1/64, a bf16 sum would leave half of the activations unchanged."""
    torch.manual_seed(0)
    block = ResidualBlock(64, 64, (3, 3, 3, 1), gain=1 / 64)
    x = torch.randn(2, 64, 8, 8) * 4
    exact = block(x) - x
    low = block.bfloat16()(x) - x
    assert ((low - exact).norm() / exact.norm()).item() < 0.05
    assert ResidualBlock(64, 32, (3, 3, 3, 1), gain=1 / 64).bfloat16()(x).dtype == torch.float32
    vae = DiscreteVAE(TINY_DVAE).bfloat16()
    images = torch.rand(1, 3, 16, 16)
    seen: list[Tensor] = []
    vae.encoder.blocks.input.register_forward_hook(lambda module, arguments, output: seen.append(output))
    output = vae(images, 1.0, gumbel_noise(torch.tensor([0]), (32, 4, 4)))
    assert output.logits.dtype == output.nll.dtype == seen[0].dtype == torch.float32
