"""Training of the discrete VAE (DALL·E §2.1, App. A)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from dalle_ds.config import DvaeRun
from dalle_ds.data import DvaeSamples, PairDataset
from dalle_ds.models.dvae import DiscreteVAE, ResidualBlock, gumbel_noise, kl_to_uniform, map_pixels
from dalle_ds.optim import gumbel_temperature, kl_weight
from dalle_ds.sampling.grid import image_grid, to_pil_images
from dalle_ds.tasks.base import Batch, Metrics, Samples, Task

PREVIEW_IMAGES = 12


class DvaeTask(Task[DvaeRun]):
    """Maximizes the evidence lower bound on the logit-Laplace likelihood of images under a soft Gumbel relaxation."""

    name = "dvae"

    def build_model(self) -> DiscreteVAE:
        return DiscreteVAE(self.run.model)

    def residual_blocks(self, model: nn.Module) -> list[nn.Module]:
        return [module for module in model.modules() if isinstance(module, ResidualBlock)]

    def batch_spec(self, rows: int) -> Batch:
        side = self.run.model.image_size
        return {
            "image": torch.empty(rows, 3, side, side, device="meta"),
            "key": torch.empty(rows, dtype=torch.int64, device="meta"),
        }

    def corpus_samples(self, folder: str, split: str) -> Samples:
        return DvaeSamples(PairDataset.open(folder, split), self.run.model.image_size, train=split == "train")

    def identity(self) -> dict[str, str]:
        return self.data_identity()

    def prepare(self, batch: Batch) -> Batch:
        return {**batch, "image": batch["image"].float() / 255}

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        config = self.run.model
        images = batch["image"]
        noise_shape = (config.vocab_size, config.grid, config.grid)
        noise = gumbel_noise(batch["key"], noise_shape, images.device)
        temperature, beta = gumbel_temperature(self.run.objective, step), kl_weight(self.run.objective, step)
        output = model(images, temperature, noise)
        # One KL term per code, spread over the pixel values that the code covers (App. A.2: β / 192 at full size).
        codes_per_value = config.grid**2 / (3 * config.image_size**2)
        loss = output.nll + beta * codes_per_value * output.kl
        metrics = {
            "nll": output.nll.detach(),
            "kl": output.kl.detach(),
            "temperature": torch.tensor(temperature, device=loss.device),
            "kl_weight": torch.tensor(beta, device=loss.device),
            "histogram": _histogram(output.logits.detach().argmax(1), config.vocab_size),
        }
        return loss, metrics

    def digest(self, sums: Metrics) -> dict[str, float]:
        return _usage(sums["histogram"])

    def evaluate(self, model: Callable[..., Any], batch: Batch) -> Metrics:
        vae = cast(DiscreteVAE, getattr(model, "module", model))
        config, images, valid = self.run.model, batch["image"], batch["valid"]
        logits = vae.encoder(map_pixels(images))
        codes = logits.argmax(dim=1)
        squared = (vae.decode(codes) - images).square().mean(dim=(1, 2, 3))
        # The bound itself, not its relaxation: the likelihood of images decoded from codes drawn from the posterior,
        # which is what argmax gives with Gumbel noise on the logits.
        noise = gumbel_noise(batch["key"], tuple(logits.shape[1:]), images.device)
        nll = vae.nll(images, (logits + noise).argmax(dim=1))
        return {
            "count": valid.sum(),
            "psnr": (-10 * torch.log10(squared.clamp_min(1e-10)) * valid).sum(),
            "nll": (nll * valid).sum(),
            "kl": (kl_to_uniform(logits).mean(dim=(1, 2)) * valid).sum(),
            "histogram": _histogram(codes[valid.bool()], config.vocab_size),
        }

    def summarize(self, sums: Metrics) -> dict[str, float]:
        config = self.run.model
        metrics = {name: float(sums[name] / sums["count"]) for name in ("psnr", "nll", "kl")}
        values_per_code = 3 * config.factor**2
        metrics["elb"] = -(metrics["nll"] * values_per_code + metrics["kl"])
        return metrics | _usage(sums["histogram"])

    def preview(self, model: nn.Module, batch: Batch) -> Image.Image:
        vae = cast(DiscreteVAE, model)
        images = batch["image"][:PREVIEW_IMAGES]
        restored = vae.decode(vae.encode(images))
        return image_grid([("images", to_pil_images(images)), ("reconstructions", to_pil_images(restored))])

    def export(self, model: nn.Module, folder: Path) -> None:
        cast(DiscreteVAE, model).save_pretrained(folder)

    def alarm(self, metrics: Mapping[str, float], step: int) -> str | None:
        limit = max(2.0, 0.01 * self.run.model.vocab_size)
        if step < self.run.objective.kl_warmup_steps or metrics["perplexity"] >= limit:
            return None
        return (
            f"the codebook is collapsing: perplexity {metrics['perplexity']:.1f} of {self.run.model.vocab_size} codes "
            f"({metrics['codes_used']:.0f} used in this batch); lower objective.kl_weight or optim.lr (docs/dvae.md)"
        )


def _histogram(codes: Tensor, vocab_size: int) -> Tensor:
    """(vocab_size,) how often each code occurs, as floats."""
    codes = codes.flatten()
    return torch.zeros(vocab_size, device=codes.device).index_add_(
        0, codes, torch.ones_like(codes, dtype=torch.float32)
    )


def _usage(histogram: Tensor) -> dict[str, float]:
    """Codebook health from counts of codes: perplexity of their distribution, codes used, codes dead."""
    share = histogram / histogram.sum().clamp_min(1)
    entropy = -(share * torch.log(share.clamp_min(1e-12))).sum()
    used = int((histogram > 0).sum())
    return {"perplexity": math.exp(entropy), "codes_used": float(used), "codes_dead": float(len(histogram) - used)}
