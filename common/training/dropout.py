"""Dropout whose masks cost little on a CPU."""

import torch

PARTS, LEVELS = 4, 1 << 16  # a 64-bit draw holds four 16-bit decisions


class PackedDropout(torch.nn.Dropout):
    """nn.Dropout that takes four decisions from each 64-bit draw of the default generator, in
    training on a CPU.

    bernoulli_ draws for each element, on one thread, and takes a tenth of a training step. The
    probability is rounded to 1/65536, and what is kept is scaled by the rounded one, so that the
    mean stays exact.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `hidden` (any shape) with about `p` of its elements 0 and the others scaled by 1
        / (1 - p).
        """
        dropped = round(self.p * LEVELS)  # of the 16-bit numbers
        if not self.training or self.inplace or hidden.device.type != "cpu" or not 0 < dropped < LEVELS:
            return super().forward(hidden)
        # all 64 bits
        draws = torch.empty(-(-hidden.numel() // PARTS), dtype=torch.int64).random_(
            torch.iinfo(torch.int64).min, None
        )
        kept = draws.view(torch.int16)[: hidden.numel()].view(hidden.shape) >= dropped - LEVELS // 2
        return (hidden * kept).mul_(LEVELS / (LEVELS - dropped))


def pack_dropouts(model: torch.nn.Module):
    """Replace each nn.Dropout of a model by a PackedDropout, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is torch.nn.Dropout:
                setattr(module, name, PackedDropout(child.p, child.inplace))
