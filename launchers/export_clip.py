"""Export a CLIP for other programs: OpenAI's clip, Hugging Face's transformers, open_clip."""

from dalle_ds.cli import run_launcher
from dalle_ds.commands import export_clip

if __name__ == "__main__":
    run_launcher(export_clip)
