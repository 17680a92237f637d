"""Figures of a transformer's likelihoods."""

from __future__ import annotations

import math

import torch

from dalle_ds.config import PADDING
from dalle_ds.evaluation.context import Context
from dalle_ds.evaluation.dealing import Collected, dealt
from dalle_ds.evaluation.metrics.likelihood import pixel_nats, transformer_nats
from dalle_ds.evaluation.sets import pictures_of
from dalle_ds.sampling import TextToImage

ROWS = 4
"""Captioned pictures whose logits are in memory at once."""


def measure_likelihood(context: Context, pipeline: TextToImage) -> None:
    """What first captions, codes and pixels of all rows cost under the transformer and its dVAE. Collective.

    - text_nats_per_token: of the captions' tokens, padding left out.
    - image_nats_per_token: of the codes, given the caption.
    - codes_bits_per_dimension: of the codes, given the caption, in bits per pixel value (3 · H · W of them). No likelihood of
      the picture: codes lose what the dVAE does not keep.
    - pixels_bits_per_dimension: of the 8-bit picture, given its codes, under the dVAE.
    - bits_per_dimension: the sum of these two, an upper bound on −log2 P(picture | caption) per pixel value.
    - captions_cut: share of captions with more tokens than the model has room for.
    """
    dataset, mesh, vae = context.dataset, context.mesh, pipeline.dvae
    size, length, rows = vae.config.image_size, pipeline.model.config.text_len, len(context.dataset)
    names = ("text", "tokens", "codes", "pixels", "cut")
    found = {name: Collected(rows) for name in names}
    for indices in dealt(rows, mesh, "likelihoods", ROWS):
        pixels = pictures_of(dataset, indices, size).to(mesh.device)
        codes = vae.encode(pixels.float() / 255)
        encoded = [pipeline.tokenizer.encode_padded([dataset.captions(row)[0]], length) for row in indices]
        text = torch.cat([tokens for tokens, _ in encoded]).to(mesh.device)
        found["cut"].put(indices, torch.tensor([cut for _, cut in encoded]))
        text_nats, code_nats = transformer_nats(pipeline.model, text, codes.flatten(1))
        found["text"].put(indices, text_nats)
        found["tokens"].put(indices, (text != PADDING).sum(dim=1))
        found["codes"].put(indices, code_nats)
        found["pixels"].put(indices, pixel_nats(vae, pixels, codes))
    sums = {name: collected.everything(mesh) for name, collected in found.items()}
    dimensions = 3 * size**2 * math.log(2)
    for name, chosen in context.of_rows.items():
        mean = {what: float(values[chosen].mean()) for what, values in sums.items()}
        in_codes, in_pixels = mean["codes"] / dimensions, mean["pixels"] / dimensions
        figures = {
            "text_nats_per_token": mean["text"] / max(mean["tokens"], 1e-12),
            "image_nats_per_token": mean["codes"] / pipeline.model.config.image_len,
            "codes_bits_per_dimension": in_codes,
            "pixels_bits_per_dimension": in_pixels,
            "bits_per_dimension": in_codes + in_pixels,
            "captions_cut": mean["cut"],
        }
        context.record(name, "likelihood", figures)
