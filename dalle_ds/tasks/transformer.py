"""Training of the text-image transformer (DALL·E §2.2, App. B)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dalle_ds.config import PADDING, TransformerRun
from dalle_ds.data import CodesCache, PairDataset, TextImageSamples
from dalle_ds.errors import ConfigError
from dalle_ds.models.dalle import Dalle
from dalle_ds.models.flops import model_flops
from dalle_ds.models.pipeline import pipeline_layers
from dalle_ds.models.vqgan import load_image_tokenizer
from dalle_ds.parallel import WHOLE, TensorGroup
from dalle_ds.parallel.stages import PipelineLayer
from dalle_ds.sampling import TextToImage
from dalle_ds.sampling.grid import image_grid, to_pil_images
from dalle_ds.sampling.pipeline import DVAE_NAME, TOKENIZER_NAME
from dalle_ds.tasks.base import Batch, Metrics, PipelineTask, Samples, numbered
from dalle_ds.text.tokenizer import Tokenizer

PREVIEW_ROWS = 6
PREVIEW_SAMPLES = 4


class TransformerTask(PipelineTask[TransformerRun]):
    """Maximizes the likelihood of captions and of the codes of their images, with weights 1/8 and 7/8.

    Raises:
        ConfigError: the dVAE or the tokenizer does not fit the model's grid or vocabularies.
    """

    name = "transformer"

    def __init__(self, run: TransformerRun) -> None:
        super().__init__(run)
        self.dvae = self.part("dvae", DVAE_NAME, load_image_tokenizer, "a dVAE's run directory or export")
        self.tokenizer = self.part("tokenizer", TOKENIZER_NAME, Tokenizer.load, "a tokenizer's file")
        model, dvae = run.model, self.dvae.config
        if dvae.vocab_size != model.image_vocab:
            raise ConfigError(
                f"the dVAE in {run.dvae} has {dvae.vocab_size} codes but model.image_vocab is {model.image_vocab}: "
                f"set --model.image_vocab {dvae.vocab_size}, or name the dVAE that belongs to this preset"
            )
        if dvae.grid != model.grid:
            raise ConfigError(
                f"the dVAE in {run.dvae} makes {dvae.grid}×{dvae.grid} codes of an image but model.grid is {model.grid}: "
                f"set --model.grid {dvae.grid}, or name the dVAE that belongs to this preset"
            )
        # A small corpus supports fewer pieces than the model has room for; the rest of the table is never used.
        if self.tokenizer.vocab_size > model.text_vocab:
            raise ConfigError(
                f"the tokenizer {run.tokenizer} has {self.tokenizer.vocab_size} pieces but model.text_vocab is only "
                f"{model.text_vocab}: set --model.text_vocab {self.tokenizer.vocab_size}, or train a tokenizer with "
                f"--vocab_size {model.text_vocab}"
            )

    @cached_property
    def _found(self) -> list[CodesCache | None]:
        """Of each corpus the cached codes of the training split, or None where there are none."""
        run = self.run
        return [CodesCache.find(folder, self.dvae.fingerprint, "train", run.codes) for folder in run.corpora]

    @cached_property
    def _caches(self) -> list[CodesCache]:
        """The cached codes of all corpora's training splits, or none where codes are made live.

        Raises:
            ConfigError: `loader.codes` is "cached", or `codes` is given, and a corpus has no cache of this dVAE.
        """
        choice, elsewhere = self.run.loader.codes, self.run.codes
        if choice == "live":
            return []
        lacking = self._lacking()
        if lacking and (choice == "cached" or elsewhere):
            corpora = " and ".join(lacking)
            what, place = f"loader.codes=cached but {corpora} has no codes of", ""
            if elsewhere:
                what, place = f"--codes {elsewhere} has no codes of {corpora} by", f" --codes_out {elsewhere}"
            raise ConfigError(
                f"{what} the dVAE in {self.run.dvae}: make them with python launchers/prepare_data.py --out {lacking[0]} "
                f"--cache_codes {self.run.dvae}{place}, or {'leave --codes out' if elsewhere else 'set loader.codes live'}"
            )
        return [] if lacking else [cache for cache in self._found if cache is not None]

    def _lacking(self) -> list[str]:
        """Corpora without cached codes."""
        return [folder for folder, cache in zip(self.run.corpora, self._found, strict=True) if cache is None]

    @property
    def codes_source(self) -> str:
        """ "cached" or "live": where the codes of this run come from."""
        return "cached" if self._caches else "live"

    def build_model(self, tensor: TensorGroup = WHOLE) -> Dalle:
        return Dalle(self.run.model, checkpointing=self.run.train.activation_checkpointing, tensor=tensor)

    def pipeline_layers(self, tensor: TensorGroup) -> list[PipelineLayer]:
        return pipeline_layers(self.run.model, checkpointing=self.run.train.activation_checkpointing, tensor=tensor)

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return tuple(batch[name] for name in ("text", "codes", "key") if name in batch)

    @property
    def resblock_count(self) -> int:
        return 2 * self.run.model.depth

    def batch_spec(self, rows: int) -> Batch:
        # Without keys: dropout keeps nothing.
        config = self.run.model
        shapes = {"text": (rows, config.text_len), "codes": (rows, config.image_len)}
        tokens = {name: torch.empty(shape, dtype=torch.int64, device="meta") for name, shape in shapes.items()}
        return {**tokens, "loss_scale": torch.empty((), device="meta")}

    def corpus_samples(self, folder: str, split: str) -> Samples:
        cache = None
        if self.codes_source == "cached":
            cache = CodesCache.open(folder, self.dvae.fingerprint, split, self.run.codes)
        return TextImageSamples(
            PairDataset.open(folder, split),
            self.tokenizer,
            text_len=self.run.model.text_len,
            image_size=self.dvae.config.image_size,
            train=split == "train",
            caption_dropout=self.run.loader.caption_dropout,
            bpe_dropout=self.run.loader.bpe_dropout,
            codes=cache,
        )

    def identity(self) -> dict[str, str]:
        codes = numbered("codes", [cache.fingerprint for cache in self._caches]) if self._caches else {"codes": "live"}
        return {**self.data_identity(), **self.parts(), **codes}

    def parts(self) -> dict[str, str]:
        return {"dvae": self.dvae.fingerprint, "tokenizer": self.tokenizer.fingerprint}

    def prepare(self, batch: Batch) -> Batch:
        if "codes" in batch:
            return batch
        image = batch["image"]
        dvae = self.dvae.to(image.device)
        return {**batch, "codes": dvae.encode(image.float() / 255).flatten(1)}

    def num_items(self, batch: Batch) -> Tensor:
        """Text tokens: their number differs between micro-batches, that of codes does not."""
        return (batch["text"] != PADDING).sum().float()

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        output = model(batch["text"], batch["codes"], logits=False, dropout_seeds=batch.get("key"))
        text_loss = output.text_loss * batch["loss_scale"]
        weight = self.run.model.text_weight
        loss = weight * text_loss + (1 - weight) * output.image_loss
        return loss, {"text_loss": text_loss.detach(), "image_loss": output.image_loss.detach()}

    def evaluate(self, model: Callable[..., Any], batch: Batch) -> Metrics:
        text, codes, valid = batch["text"], batch["codes"], batch["valid"]
        output = model(text, codes)
        # The same images under the captions of others: what the model gains from reading.
        mismatched = model(batch["other_text"], codes)
        tokens = (text != PADDING).sum(dim=1) * valid
        return {
            "count": valid.sum(),
            "text_tokens": tokens.sum(),
            "text_loss": (_row_sums(output.text_logits, text) * valid).sum(),
            "image_loss": (_row_sums(output.image_logits, codes) * valid).sum(),
            "mismatched_image_loss": (_row_sums(mismatched.image_logits, codes) * valid).sum(),
            "histogram": torch.bincount(codes[valid.bool()].flatten(), minlength=self.run.model.image_vocab).float(),
        }

    def summarize(self, sums: Metrics) -> dict[str, float]:
        share = sums["histogram"] / sums["histogram"].sum()
        text_loss = float(sums["text_loss"] / sums["text_tokens"].clamp_min(1))
        codes = sums["count"] * self.run.model.image_len
        image_loss = float(sums["image_loss"] / codes)
        weight = self.run.model.text_weight
        return {
            "loss": weight * text_loss + (1 - weight) * image_loss,
            "text_loss": text_loss,
            "image_loss": image_loss,
            "caption_gain": float(sums["mismatched_image_loss"] / codes) - image_loss,
            "code_entropy": float(-(share * torch.log(share.clamp_min(1e-12))).sum()),
        }

    def preview(self, model: nn.Module, batch: Batch) -> Image.Image:
        pipeline = TextToImage(cast(Dalle, model), self.dvae, self.tokenizer)
        text, codes = batch["text"][:PREVIEW_ROWS], batch["codes"][:PREVIEW_ROWS]
        grid = self.run.model.grid
        captions = [self.tokenizer.decode(row.tolist()) for row in text]
        restored = to_pil_images(self.dvae.decode(codes.view(-1, grid, grid)))
        samples = pipeline.generate(captions, num=PREVIEW_SAMPLES, seed=self.run.seed)
        rows = [(caption, [real, *fake]) for caption, real, fake in zip(captions, restored, samples, strict=True)]
        return image_grid(rows, titles=["reconstruction", *["sample"] * PREVIEW_SAMPLES])

    def export(self, model: nn.Module, folder: Path) -> None:
        """A folder that `TextToImage.from_pretrained` reads: the transformer, its tokenizer and its dVAE."""
        TextToImage(cast(Dalle, model), self.dvae, self.tokenizer).save_pretrained(folder)

    def flops_per_sample(self) -> float:
        return float(model_flops(self.run.model).total)

    def describe(self) -> list[str]:
        pieces, room = self.tokenizer.vocab_size, self.run.model.text_vocab
        lacking = self._lacking() if self.codes_source == "live" and len(self.run.corpora) > 1 else []
        return [
            f"image codes: {self.codes_source}, of the dVAE {self.dvae.fingerprint[:12]}"
            + (f"; {' and '.join(lacking)} has no cached ones" if lacking else ""),
            f"text: {pieces:,} pieces"
            + (f", fewer than the {room:,} that model.text_vocab has room for" if pieces < room else ""),
        ]

    def items_per_sample(self) -> tuple[str, int]:
        return "tokens", self.run.model.total_len


def _row_sums(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, n, vocabulary) logits and (B, n) targets → (B,) summed cross-entropy, padding left out."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PADDING, reduction="none")
    return losses.view(targets.shape).sum(dim=1)
