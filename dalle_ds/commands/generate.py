"""Generate images for prompts with a trained transformer, and write them as one labelled PNG.

python launchers/generate.py --model RUN_OR_EXPORT --prompt TEXT --out PNG, with --num 512 --rerank CLIP for the best of
many, with --init_image FILE for the rest of an image. For a transformer divided among N GPUs (tensor parallelism), deepspeed
--num_gpus N launchers/generate.py with the same options and --device cuda, but --num_images_per_prompt 8 for --num 8, which
deepspeed refuses as an unclear option of its own; or torchrun --nproc_per_node N launchers/generate.py.
"""

from dalle_ds.allocator import keep_freed_memory
from dalle_ds.cli import parse_options
from dalle_ds.sampling.command import GenerateOptions, generate_to_file


def main() -> None:
    """Parse, generate, write."""
    options = parse_options(GenerateOptions)
    if options.device == "cpu":
        keep_freed_memory()
    for path in generate_to_file(options):
        print(f"wrote {path}")
