"""Names our tensors as diffusers does: the same, but for the attention names of 2022."""

from unetgn.interop.transfer import Source
from unetgn.unet import UNet

OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def diffusers_sources(unet: UNet, *, old_attention: bool = False) -> dict[str, Source]:
    """Map our keys to diffusers'; `old_attention` is for files of 2022."""
    sources = {}
    for ours in unet.state_dict():
        theirs = ours
        if old_attention and ".attentions." in ours:
            for new, old in OLD_ATTENTION.items():
                theirs = theirs.replace(f".{new}.", f".{old}.")
        sources[ours] = Source(theirs)
    return sources
