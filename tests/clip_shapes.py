"""Shapes of CLIP that have names: of CLIP Table 20, of unCLIP App. C, and the toy preset's."""

from dataclasses import replace

from dalle_ds.config import ClipConfig

_VIT_L14 = ClipConfig(
    embed_dim=768,
    patch_size=14,
    vision_width=1024,
    vision_depth=24,
    vision_heads=16,
    text_width=768,
    text_heads=12,
)
CLIP_SHAPES: dict[str, ClipConfig] = {
    # Trains in minutes on a laptop CPU, on the toy preset's images and vocabulary.
    "toy": ClipConfig(
        embed_dim=64,
        image_size=32,
        patch_size=8,
        vision_width=128,
        vision_depth=4,
        vision_heads=2,
        text_width=128,
        text_depth=3,
        text_heads=2,
        text_len=32,
        text_vocab=4098,
    ),
    "ViT-B/32": ClipConfig(),
    "ViT-B/16": ClipConfig(patch_size=16),
    "ViT-L/14": _VIT_L14,
    "ViT-L/14@336px": replace(_VIT_L14, image_size=336),
    # unCLIP App. C gives no numbers of heads: "the rest as in CLIP", whose heads are all 64 wide. (open_clip's ViT-H, of other
    # authors, has 16 of 80 in its image tower.)
    "unclip-H/16": ClipConfig(
        embed_dim=1024,
        image_size=256,
        patch_size=16,
        vision_width=1280,
        vision_depth=32,
        vision_heads=20,
        text_width=1024,
        text_depth=24,
        text_heads=16,
    ),
}
