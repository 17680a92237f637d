"""Pure modules: no process groups, no logging, no DeepSpeed."""

from dalle_ds.models.clip import Clip
from dalle_ds.models.dalle import Dalle
from dalle_ds.models.decoder import UnclipDecoder
from dalle_ds.models.dvae import DiscreteVAE
from dalle_ds.models.latent_prior import AutoregressivePrior
from dalle_ds.models.prior import DiffusionPrior
from dalle_ds.models.upsampler import Upsampler
from dalle_ds.models.vqgan import ImageTokenizer, Vqgan, load_image_tokenizer

__all__ = [
    "AutoregressivePrior",
    "Clip",
    "Dalle",
    "DiffusionPrior",
    "DiscreteVAE",
    "ImageTokenizer",
    "UnclipDecoder",
    "Upsampler",
    "Vqgan",
    "load_image_tokenizer",
]
