"""Evaluations of an unCLIP, of stages that are known to do right or wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dalle_ds.config import DecoderConfig, ImageSampling, UpsamplerConfig
from dalle_ds.data import PairDataset
from dalle_ds.data.augment import clip_center_view
from dalle_ds.errors import ConfigError
from dalle_ds.evaluation.curves import pareto_of_guidance
from dalle_ds.evaluation.evaluate import EvaluateOptions, evaluate
from dalle_ds.models import Clip, UnclipDecoder, Upsampler
from dalle_ds.models.upsampler import enlarge
from dalle_ds.parallel import Mesh
from dalle_ds.sampling import Unclip
from dalle_ds.sampling.embedding_to_image import EmbeddingToImage
from dalle_ds.sampling.image_diffusion import DiffusionFacts
from dalle_ds.sampling.super_resolution import SuperResolution
from dalle_ds.sampling.text_to_embedding import TextToEmbedding
from dalle_ds.sampling.unclip_options import UnclipOptions
from dalle_ds.text.tokenizer import Tokenizer

ALONE = Mesh(0, 1, torch.device("cpu"))
FACTS = DiffusionFacts("cosine", 20, "v", ImageSampling("ddim", "2"))


@pytest.fixture(scope="module")
def unclip_export(
    clip_exports: tuple[Path, Path], prior_exports: dict[str, Path], tokenizer_file: Path, tmp_path_factory: Any
) -> Path:
    """All stages, of random weights."""
    torch.manual_seed(0)
    clip = Clip.from_pretrained(clip_exports[0])
    shape = DecoderConfig(
        16, 32, 1, (1, 2), 0.0, False, attention=(), head_channels=32, embed_dim=clip.config.embed_dim, context_width=16,
        text_len=8, text_vocab=400, text_depth=1, text_heads=2,
    )  # fmt: skip
    decoder = EmbeddingToImage(
        UnclipDecoder(shape).eval(), Tokenizer.load(tokenizer_file), None, clip.fingerprint, FACTS
    )
    upsampler = SuperResolution(Upsampler(UpsamplerConfig(32, 32, 1, (1, 2), 0.0, False, low_size=16)).eval(), FACTS)
    prior = TextToEmbedding.from_pretrained(prior_exports["diffusion"])
    folder: Path = tmp_path_factory.mktemp("unclip") / "export"
    Unclip(prior.clip, decoder, prior, [upsampler]).save_pretrained(folder)
    return folder


@pytest.fixture
def recalling(monkeypatch: pytest.MonkeyPatch, data: Path, clip_exports: tuple[Path, Path]) -> None:
    """A decoder that makes the validation image of the nearest embedding, and grey without; an upsampler that resizes."""
    clip = Clip.from_pretrained(clip_exports[0])
    dataset = PairDataset.open(data, "validation")
    views = [torch.tensor(clip_center_view(dataset.image(row), 16)).permute(2, 0, 1) for row in range(len(dataset))]
    images = torch.stack(views).float() / 255
    known = clip.embed_images(images)

    def decode(stage: Any, captions: Any, embeddings: Tensor | None, **_: Any) -> Tensor:
        if embeddings is None:
            return torch.full((len(captions), 3, 16, 16), 0.5)
        return images[(embeddings @ known.T).argmax(dim=1)]

    def sample(stage: Any, low: Tensor, captions: Any, **_: Any) -> Tensor:
        return enlarge(low, 2).clamp(0, 1)

    monkeypatch.setattr(EmbeddingToImage, "sample", decode)
    monkeypatch.setattr(SuperResolution, "sample", sample)


def options(data: Path, unclip: Path, out: Path, **change: Any) -> EvaluateOptions:
    given = {"data": str(data), "unclip": str(unclip), "out": str(out), "blur": "0", "dtype": "fp32"}
    return EvaluateOptions(**{**given, **change})


@pytest.mark.usefixtures("recalling")
def test_a_decoder_that_knows_images_by_their_embeddings(
    data: Path, unclip_export: Path, clip_exports: tuple[Path, Path], tmp_path: Path
) -> None:
    found = evaluate(options(data, unclip_export, tmp_path, judge=str(clip_exports[1]), guidances="1,2"), ALONE).metrics
    true, only = ({name: found[f"unclip/{kind}/{name}"] for name in ("cosine", "judge_cosine", "efficientnet_frechet/blur_0")}
                  for kind in ("true_embedding", "caption_only"))  # fmt: skip
    assert true["cosine"] > only["cosine"] and true["judge_cosine"] > only["judge_cosine"]
    assert true["efficientnet_frechet/blur_0"] < only["efficientnet_frechet/blur_0"]
    # The caption of a random CLIP leads to any image; the same one for all guidances, whose decoder takes none.
    assert found["unclip/guidance_1/cosine"] == found["unclip/guidance_2/cosine"] == found["unclip/prior/cosine"]
    for name, other in (("prior", "text_embedding"), ("text_embedding", "caption_only")):
        gain = found[f"unclip/gain/{name}_over_{other}"]
        assert gain == pytest.approx(
            found[f"unclip/{name}/judge_cosine"] - found[f"unclip/{other}/judge_cosine"], abs=1e-6
        )
        low, high = (found[f"unclip/gain/{name}_over_{other}/{end}_95"] for end in ("low", "high"))
        assert low <= gain <= high
    assert 0 <= found["unclip/true_embedding/retrieval_at_1"] <= 1
    assert found["unclip/swapped/embedding"] > found["unclip/swapped/caption"] == pytest.approx(0, abs=1e-6)
    # Resizing by another's filter, which rounds elsewhere, is the same but for that.
    same, bicubic = found["upsampler_1/sample/psnr"], found["upsampler_1/bicubic/psnr"]
    assert same == pytest.approx(bicubic, abs=0.2) and found["upsampler_1/sample/consistency_psnr"] > 30
    assert found["upsampler_1/lanczos/psnr"] != bicubic
    assert Image.open(tmp_path / "unclip.png").width > 6 * 96
    assert "Guidance of the decoder" in (tmp_path / "evaluation.html").read_text()
    assert not [name for name in found if "clip_score" in name and "caption_only" in name and "judge" in name]


def test_real_stages_are_measured_and_settings_reach_them(data: Path, unclip_export: Path, tmp_path: Path) -> None:
    stages = UnclipOptions(decoder_steps="1", upsampler_steps=("1",), prior_steps="2")
    result = evaluate(options(data, unclip_export, tmp_path, stages=stages, captions=3), ALONE)
    settings = result.protocol["unclip"]["sampling"]
    assert (settings["decoder"]["steps"], settings["upsamplers"][0]["steps"], settings["prior"]["steps"]) == (
        "1",
        "1",
        "2",
    )
    assert {"clip", "prior", "decoder", "upsampler_1"} <= result.models.keys()
    assert not [name for name in result.metrics if "judge" in name or "retrieval" in name]
    for name in ("true_embedding", "prior", "text_embedding", "caption_only"):
        assert -1 <= result.metrics[f"unclip/{name}/cosine"] <= 1


def test_a_pareto_plot_has_a_point_for_each_guidance() -> None:
    metrics = {
        f"unclip/guidance_{guidance}/{name}": float(guidance) for guidance in ("1", "1.5", "4")
        for name in ("cosine", "efficientnet_frechet/blur_0")
    }  # fmt: skip
    drawn = pareto_of_guidance(metrics)
    assert drawn.startswith("<svg") and pareto_of_guidance(dict(list(metrics.items())[:2])) == ""


def test_mistakes_are_told(data: Path, unclip_export: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="guidances"):
        options(data, unclip_export, tmp_path, guidances="-1")
    for change in ({"guidances": "1,2"}, {"stages": UnclipOptions(tile=64)}):
        with pytest.raises(ConfigError, match="unCLIP"):
            EvaluateOptions(data=str(data), out=str(tmp_path), prior="some", **change)
