"""Holds what IP-Adapters add to attention: keys and values of images, beside those of the text."""

from collections.abc import Sequence

from torch import Tensor, nn


class ImagePrompts(nn.Module):
    """Projects the tokens of images to keys and values, with projections and a scale for each IP-Adapter.

    Attention becomes attention(q, k, v) + sum over adapters of scale * attention(q, to_k_ip(image), to_v_ip(image)),
    the queries being those of the text. `scales` may be changed in place; at 0 an adapter is left out.
    Shapes: images, one (N, T, context_dim) for each adapter -> triples of a scale and (N, T, inner) keys and values.
    Raises ValueError where there are not as many images as adapters.
    Ye et al. 2023 (arXiv 2308.06721), section 3.2.2, equation 5. Parameters are named as in diffusers' processor.
    """

    def __init__(self, context_dim: int, inner: int, *, count: int) -> None:
        super().__init__()
        self.scales: list[float] = [1.0] * count
        self.to_k_ip = nn.ModuleList(nn.Linear(context_dim, inner, bias=False) for _ in range(count))
        self.to_v_ip = nn.ModuleList(nn.Linear(context_dim, inner, bias=False) for _ in range(count))

    def forward(self, images: Sequence[Tensor]) -> list[tuple[float, Tensor, Tensor]]:
        if len(images) != len(self.scales):
            raise ValueError(f"{len(self.scales)} IP-Adapters read an image each, and there are {len(images)}")
        adapters = zip(images, self.scales, self.to_k_ip, self.to_v_ip, strict=True)
        return [(scale, to_k(image), to_v(image)) for image, scale, to_k, to_v in adapters if scale != 0]

    def extra_repr(self) -> str:
        return f"scales={self.scales}"
