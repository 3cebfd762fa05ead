"""Caches of latents, made as users make them."""

from pathlib import Path

from unetgn.training.cache_latents import main


def cache(pipeline: Path, images: Path, out: Path, *arguments: str) -> int:
    """Cache images of 16 pixels, four a shard. The exit code."""
    keys = ["data.name=folder", f"data.path={images}", "data.image_size=16"]
    return main(["--autoencoder", str(pipeline), "--out", str(out), "--shard-size", "4", *keys, *arguments])
