"""Sampling image codes for captions, and the likelihood of codes under captions.

An image is a function of (seed, its number, its caption): its random numbers are drawn ahead on the CPU, and nothing
that it shares a batch with may reach it. The second part needs care. A matrix multiplication with 1 row and one with 4
add up in different orders, the logits differ in their last bits, and sooner or later a code falls on the other side of
an edge. So the transformer always decodes `ROWS` rows, or a multiple of it, and rows without an image are computed and
dropped. All batch sizes up to `ROWS` are thereby one and the same computation; beyond that, `DecodingWeights` makes
products of as many rows as are measured to give the same bits on CPUs. On GPUs nothing of the kind is known.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from dalle_ds.config import PADDING, DalleConfig
from dalle_ds.diffusion import guide
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.dalle import Dalle
from dalle_ds.models.decoding import DecodingWeights, decoding_device, new_cache, prefill
from dalle_ds.nn.attention.decoding import ROWS, KVCache, bytes_per_prompt, bytes_per_row

CPU_BUDGET = 2**30
"""Bytes that images in the making may take on a CPU, where `batch_size` is not given."""
GPU_SHARE = 0.5
"""The same on a GPU, as a share of what is free."""


# --- from logits to a code


@dataclass(frozen=True)
class Sampling:
    """How codes are sampled. The defaults sample from the model's distribution as it is (DALL·E §2.6)."""

    temperature: float = 1.0
    """The logits are divided by it; 0 takes the likeliest code always."""
    top_k: int | None = None
    """Sample among the k likeliest codes only."""
    top_p: float | None = None
    """Sample among the fewest likeliest codes that have this probability together, after temperature and top_k."""
    guidance: float = 1.0
    """Classifier-free guidance g: logits = unconditional + g · (conditional − unconditional). 1 is off; more needs a model
    that learned without captions, too (loader.caption_dropout, of priors objective.text_drop)."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be 0 (the likeliest code always) or greater, found {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, or left out to allow every code, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1], or be left out to allow every code, found {self.top_p}")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ConfigError(f"guidance must be 0 (ignore the prompt), 1 (off) or greater, found {self.guidance}")


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """(B, V) logits with all but the `top_k` greatest of each row at −∞; ties with the last of them stay."""
    smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < smallest_kept, float("-inf"))


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """(B, V) logits with all at −∞ but the fewest greatest of each row whose probabilities sum to `top_p` or more."""
    descending, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = descending.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # 0 for the greatest, which therefore stays
    dropped = before >= top_p
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), float("-inf"))


def sample(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """One code per row, decided by the row's logits and its uniform number alone.

    Args:
        logits: (B, V) fp32 or fp64, after guidance; where they are NaN, any code may come out.
        uniforms: (B,) float64 in [0, 1).

    Returns:
        (B,) int64.
    """
    if sampling.temperature < torch.finfo(logits.dtype).tiny:  # 0, or would be taken for it
        return logits.argmax(dim=-1)
    if sampling.temperature != 1:
        # The greatest becomes 0, so that a low temperature does not make it infinite.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Below the total even where the product rounds up to it, so that the code found has a probability above 0.
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def candidate_generator(key: tuple[int, ...] | str, seed: int, candidate: int) -> torch.Generator:
    """Of the random numbers that decide sample number `candidate` of the caption `key`, tokens or text, under `seed`: on the
    CPU."""
    digest = hashlib.sha256(repr((seed, candidate, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def candidate_uniforms(key: tuple[int, ...] | str, seed: int, candidate: int, count: int) -> Tensor:
    """(count,) float64 in [0, 1) of `candidate_generator`."""
    return torch.rand(count, dtype=torch.float64, generator=candidate_generator(key, seed, candidate))


# --- images of captions


@dataclass(frozen=True)
class Progress:
    """Images of one batch: in the making, given out whenever a row of codes of them is complete, or whole."""

    images: tuple[tuple[int, int], ...]
    """(caption, candidate) indices of each."""
    codes: Tensor
    """(images, codes so far) int64 on the CPU, a copy."""


@dataclass(frozen=True)
class SamplingRequest:
    """What is asked for of every caption.

    Raises:
        ConfigError: num or batch_size below 1.
    """

    num: int = 1
    """Images of each caption."""
    seed: int = 0
    """Image i of a caption depends on the seed, i, the caption's tokens and what is given only."""
    sampling: Sampling = field(default_factory=Sampling)
    """Temperature and the like."""
    given: Tensor | None = None
    """(B, n) int64, the first n ≤ W² codes of every caption's images; they stay, and the rest is sampled (DALL·E §3.3)."""
    batch_size: int | None = None
    """Most images sampled at once; batches are of about equal size, and take rows of memory and arithmetic in multiples of 4.
    None takes as many as fit in 1 GiB on a CPU, or in half of a GPU's free memory."""
    on_row: Callable[[Progress], None] | None = None
    """Called, without gradients, whenever a row of codes of the images in the making is complete."""

    def __post_init__(self) -> None:
        for name in ("num", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}")


def sample_codes(model: Dalle, text: Tensor, request: SamplingRequest) -> Tensor:
    """Sample the codes of `request.num` images for every caption.

    Args:
        text: (B, T) int64, −1 where padded; never modified.

    Returns:
        (B, num, W²) int64 on the CPU.

    Raises:
        DataError: text or given codes of the wrong shape, dtype or range; a model that yields no numbers.
    """
    images = [(caption, number) for caption in range(len(text)) for number in range(request.num)]
    codes = torch.cat([batch.codes for batch in sample_batches(model, text, images, request)])
    return codes.view(len(text), request.num, model.config.image_len)


@torch.no_grad()
def sample_batches(
    model: Dalle, text: Tensor, images: Sequence[tuple[int, int]], request: SamplingRequest
) -> Iterator[Progress]:
    """Sample any images of any captions, whole batch after batch: no more memory is taken than one batch needs.

    Args:
        text: as in `sample_codes`, whose errors are raised when the first batch is asked for.
        images: (row of `text`, number of the image) of each that is wanted, best with those of one caption side by side. An
            image is the same whichever others are asked for.
    """
    config = model.config
    if text.dim() != 2 or text.shape[1] != config.text_len or len(text) == 0:
        raise DataError(f"text must have shape (B, {config.text_len}) with B of at least 1, found {tuple(text.shape)}")
    prompts = _prompts(config, text, request.given)
    if not images:
        return
    batch_size = request.batch_size
    if batch_size is None:
        fewest = min(Counter(caption for caption, _ in images).values())
        batch_size = images_at_once(model, fewest, guided=request.sampling.guidance != 1)
    batch_size = even_batches(len(images), batch_size)
    sampler = _Sampler(model, prompts, request, rows=-(-batch_size // ROWS) * ROWS)
    for start in range(0, len(images), batch_size):
        batch = tuple(images[start : start + batch_size])
        yield Progress(batch, sampler.sample(batch))


class _Prompt(NamedTuple):
    """What an image continues."""

    text: tuple[int, ...]
    """T tokens, −1 where padded."""
    given: tuple[int, ...]
    """The image's first codes; none where it is sampled from the beginning."""


def _prompts(config: DalleConfig, text: Tensor, given: Tensor | None) -> list[_Prompt]:
    """One for every caption."""
    if given is None:
        given = torch.zeros(len(text), 0, dtype=torch.int64)
    if given.dim() != 2 or len(given) != len(text) or given.shape[1] > config.image_len or given.dtype != torch.int64:
        raise DataError(
            f"given codes must be int64 of shape ({len(text)}, n) with n of at most {config.image_len}, found {given.dtype} "
            f"of shape {tuple(given.shape)}"
        )
    if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < config.image_vocab:
        raise DataError(
            f"given codes must lie in [0, {config.image_vocab - 1}], found values from {given.min()} to {given.max()}"
        )
    return [_Prompt(tuple(row), tuple(codes)) for row, codes in zip(text.tolist(), given.tolist(), strict=True)]


class _Sampler:
    """Samples batch after batch of `rows` images; what one has prepared serves the next.

    With guidance, each image takes two rows of the same batch, one under its caption and one under the empty one, so that
    both share each reading of the weights. What is given of an image is given to both.
    """

    def __init__(self, model: Dalle, prompts: Sequence[_Prompt], request: SamplingRequest, rows: int) -> None:
        self.model = model
        self.prompts = prompts
        self.request = request
        self.rows = rows
        self.weights = DecodingWeights(model)
        self.cache: KVCache | None = None
        self.prefixes: dict[_Prompt, tuple[KVCache, Tensor]] = {}

    def sample(self, images: tuple[tuple[int, int], ...]) -> Tensor:
        """Codes (images, W²) of at most `rows` images."""
        config, request, device = self.model.config, self.request, self.weights.device
        guided = request.sampling.guidance != 1
        count = len(images)
        of_rows = [
            *(self.prompts[caption] for caption, _ in images),
            *[self.prompts[images[0][0]]] * (self.rows - count),
        ]
        codes = torch.zeros(self.rows, config.image_len, dtype=torch.int64, device=device)
        first = len(of_rows[0].given)
        codes[:, :first] = torch.tensor([prompt.given for prompt in of_rows], device=device)
        if first == config.image_len:
            return codes[:count].cpu()
        empties = [_Prompt((PADDING,) * config.text_len, prompt.given) for prompt in of_rows] if guided else []
        logits, cache = self._start([*of_rows, *empties])
        seed = index(request.seed)
        uniforms = torch.stack(
            [
                candidate_uniforms(self.prompts[caption].text, seed, number, config.image_len)
                for caption, number in images
            ]
        ).to(device)
        for step in range(first, config.image_len):
            if step > first:
                last = codes[:, step - 1]
                logits = self.weights.step(last.repeat(2) if guided else last, step - 1, cache)
            # Of rows without an image, codes that are sampled stay 0.
            mixed = logits[:count]
            if guided:
                mixed = guide(mixed, logits[self.rows : self.rows + count], request.sampling.guidance)
            codes[:count, step] = sample(mixed, uniforms[:, step], request.sampling)
            if (step + 1) % config.grid == 0:
                if mixed.isnan().any():
                    raise DataError(
                        "the model's logits are not numbers: its weights or sampling.guidance are too large for its dtype, or "
                        "its training has diverged"
                    )
                if request.on_row is not None:
                    request.on_row(Progress(images, codes[:count, : step + 1].to("cpu", copy=True)))
        return codes[:count].cpu()

    def _start(self, prompts: Sequence[_Prompt]) -> tuple[Tensor, KVCache]:
        """(rows, image_vocab) logits of the first code to sample, and a cache whose rows continue `prompts`."""
        distinct = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        prompt_of_row = tuple(distinct[prompt] for prompt in prompts)
        # What is no longer needed is given back before more is taken.
        if self.cache is not None and self.cache.prompt_of_row != prompt_of_row:
            self.cache = None
        self.prefixes = {prompt: kept for prompt, kept in self.prefixes.items() if prompt in distinct}
        # Prompts are run through the model one at a time, each once for as long as consecutive batches ask for it.
        for prompt in distinct:
            if prompt not in self.prefixes:
                self.prefixes[prompt] = self._prefill(prompt)
        if self.cache is None:
            self.cache = new_cache(self.model, prompt_of_row)
        self.cache.load([self.prefixes[prompt][0] for prompt in distinct])
        return torch.cat([self.prefixes[prompt][1] for prompt in prompts]), self.cache

    def _prefill(self, prompt: _Prompt) -> tuple[KVCache, Tensor]:
        cache = new_cache(self.model, 1)
        text = torch.tensor([prompt.text], device=self.weights.device)
        given = torch.tensor([prompt.given], device=self.weights.device) if prompt.given else None
        return cache, prefill(self.model, text, cache, given)


def even_batches(count: int, most: int) -> int:
    """The size of as few batches as hold `count` images, at most `most` in each: about equally full, in whole `ROWS`."""
    batches = -(-count // most)
    return min(most, -(-count // (batches * ROWS)) * ROWS)


def images_at_once(model: Dalle, num: int, *, guided: bool) -> int:
    """How many images fit in the memory set aside for them, where each prompt has `num`: a multiple of `ROWS`."""
    config, device = model.config, decoding_device(model)
    if device.type == "cpu":
        budget = CPU_BUDGET
    else:
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = int((torch.cuda.mem_get_info(device)[0] + reusable) * GPU_SHARE)
    row = sum(bytes_per_row(config, model.weights_dtype).values())
    # Logits in fp32, and from them probabilities in fp32, their sums in fp64, and a few more of either when filtered.
    image = (2 if guided else 1) * (row + 32 * config.image_vocab)
    # A prompt's text lies in the batch's cache and in its own of one row, from which the batch's is loaded.
    prompt = 2 * bytes_per_prompt(config, model.weights_dtype) + row
    fit = (budget - prompt) // image  # of one prompt
    if fit > num:
        fit = int((budget - prompt) / (image + prompt / num))  # the first prompt may have begun in the batch before
    if model.tensor.size > 1:  # all processes of a group must sample the same batches
        fit = -int(model.tensor.max_(torch.tensor([-fit], device=device)))
    return max(1, fit // ROWS) * ROWS


@torch.no_grad()
def score(model: Dalle, text: Tensor, codes: Tensor) -> Tensor:
    """log p(codes | text) of every row, in nats per image.

    Args:
        text: (B, T) int64, −1 where padded.
        codes: (B, W²) int64.

    Returns:
        (B,) float64.
    """
    log_probabilities = model(text, codes).image_logits.double().log_softmax(dim=-1)
    return log_probabilities.gather(-1, codes[..., None])[..., 0].sum(dim=-1)
