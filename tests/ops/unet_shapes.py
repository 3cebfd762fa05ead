"""Lists the (channels, resolution) of every group norm of three well-known U-Nets, derived from how they are built.

Stable Diffusion 1.5 and XL as in diffusers' configurations of `UNet2DConditionModel`; ADM-256 as in guided-diffusion's
256x256 ImageNet model. Blocks: norm1 at the input's width, norm2 at the output's; the decoder's inputs carry a skip.
"""


def norm_shapes(
    resolution: int, widths: tuple[int, ...], blocks: int, *, residual_resampling: bool = False
) -> set[tuple[int, int]]:
    """Return the (channels, height = width) of the norms of a U-Net.

    It has `blocks` residual blocks a level, one more when going up.

    `residual_resampling`: down- and upsampling are residual blocks too, normed before and after, with skips.
    """
    shapes, channels, skips = set(), widths[0], [widths[0]]
    for level, width in enumerate(widths):
        for _ in range(blocks):
            shapes |= {(channels, resolution), (width, resolution)}
            channels = width
            skips.append(channels)
        if level < len(widths) - 1:
            if residual_resampling:
                shapes |= {(channels, resolution), (channels, resolution // 2)}
            resolution //= 2
            skips.append(channels)
    shapes.add((channels, resolution))
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(blocks + 1):
            shapes |= {(channels + skips.pop(), resolution), (width, resolution)}
            channels = width
        if level:
            if residual_resampling:
                shapes |= {(channels, resolution), (channels, resolution * 2)}
            resolution *= 2
    return shapes


UNETS = {
    "SD 1.5": norm_shapes(64, (320, 640, 1280, 1280), 2),
    "SDXL": norm_shapes(128, (320, 640, 1280), 2),
    "ADM-256": norm_shapes(256, (256, 256, 512, 512, 1024, 1024), 2, residual_resampling=True),
}
