"""Celo2's direction of a large weight, computed in pieces that stay in the processor's cache.

The same numbers as `celo2.directions` up to rounding, for those who differentiate nothing. The 30 features of all weights at
once are never there: where a feature is constant along an axis, its share of the perceptron's first layer is computed once and
added; the division by a feature's root mean square is folded into that layer's weights; and the features of a piece of a
matrix, (feature, weights), are made twice, for their means and for the perceptron.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from metaoptim.core.types import Params
from metaoptim.lopt.features import Decays, Moments, largest, over_axes

PIECE, WIDE = 2**15, 2**22  # weights in a piece, for a processor's cache and for an accelerator's many units
LEAST = 2**9  # in a matrix, below which it is quicker to compute all at once; on an accelerator, where calls take longest, WIDE
FULL = (*range(15), 27, 28, 29)  # features that differ from weight to weight; 15 to 26 are constant along an axis


def few(x: Tensor) -> bool:
    """Whether weights (1, *kernel, in, out) are quicker computed at once."""
    return x.shape[-2] * x.shape[-1] < LEAST if x.is_cpu else x.numel() < WIDE


def dense(x: Tensor) -> Tensor:
    """The same tensor (D, *kernel, in, out), in memory as (D, *kernel, out, in), which for a matrix is torch's own order."""
    return x.mT.contiguous().mT


def moments_after(old: Moments, g: Tensor, decays: Decays) -> Moments:
    """As `features.after`, for a weight of two or more dimensions."""
    dim, square = g.ndim - 1, g.square()
    of_m, d = (x.reshape(-1, *[1] * dim) for x in (decays.m, decays.factored))
    m, v = dense(old.m) * of_m, dense(old.v) * decays.v.item()
    for i, left in enumerate((1 - decays.m).tolist()):
        m[i].add_(g[0], alpha=left)
    v.add_(square, alpha=(1 - decays.v).item())
    over_first, over_second = over_axes(square.add_(1e-30), dim)
    return Moments(m, v, d * old.row + (1 - d) * over_first, d * old.col + (1 - d) * over_second)


def perceptron_of(psi: Params, x: Tensor, g: Tensor, seen: Moments, eps: float) -> Tensor:
    """The perceptron's first output (*shape) of weights x (*shape) with gradients g, of two or more dimensions (HWIO)."""
    dim, kernel = x.ndim, x.shape[:-2]
    f, c = factors(seen, dim)
    row, col = (_matrices(t, kernel) for t in (seen.row, seen.col))
    f, c = _matrices(f, kernel), _matrices(c, kernel)
    w = {n: t.to(x.dtype) for n, t in psi.items()}
    shares = [_share(torch.cat([t, (t + 1e-8).rsqrt()]), w["w0"], at, eps) for t, at in ((row, 15), (col, 18))]
    x, g, m, v = (_matrices(t, kernel) for t in (x.unsqueeze(0), g.unsqueeze(0), seen.m, seen.v))
    out = torch.empty_like(x[0])
    first = w["w0"][list(FULL)]
    second = torch.cat([w["w1"].T, w["b1"][:, None]], 1)  # the bias belongs to an input that is always 1
    last, bias = w["w2"][:, 0], w["b2"][0]
    for tap in range(len(out)):
        rows, columns = (t[:, tap] for t in shares)
        made = _Features([t[:, tap] for t in (x, g, m, v, f, c)])
        scale = (made.squares() / out[tap].numel() + eps).rsqrt()
        folded = (first * scale[:, None]).T.contiguous()
        hidden, next_hidden = x.new_ones(len(folded) + 1, made.most), x.new_empty(len(second), made.most)
        for piece, features in made:
            before, after = hidden[:, : features.shape[1]], next_hidden[:, : features.shape[1]]
            inputs = before[:-1].view(len(folded), -1, out.shape[-1])
            torch.add(_rows(rows, piece), _rows(columns, piece), out=inputs)
            inputs.add_(w["b0"][:, None, None])
            before[:-1].addmm_(folded, features).relu_()
            torch.mm(second, before, out=after).relu_()
            torch.add(last @ after, bias, out=out[tap, piece].view(-1))
    return out.view(*kernel, *out.shape[1:]).mT


class _Features:
    """The features of a matrix that differ from weight to weight, (18, weights of a piece), piece by piece."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = parts
        rows, columns = parts[0].shape[1:]
        step = max(1, (PIECE if parts[0].is_cpu else WIDE) // columns)
        self.pieces = [slice(a, min(a + step, rows)) for a in range(0, rows, step)]
        self.most = min(step, rows) * columns
        self.space = parts[0].new_empty(len(FULL), self.most)
        self.held = -1

    def squares(self) -> Tensor:
        """The sum of squares of each."""
        return torch.stack([torch.linalg.vector_norm(features, dim=1).square() for _, features in self]).sum(0)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for i, piece in enumerate(self.pieces):
            columns = self.parts[0].shape[2]
            found = self.space[:, : (piece.stop - piece.start) * columns]
            if self.held != i:
                self.fill(found.view(len(FULL), -1, columns), [_rows(t, piece) for t in self.parts])
                self.held = i
            yield piece, found

    def fill(self, out: Tensor, parts: Sequence[Tensor]) -> None:
        """g, clip(g), x; m; v; m/√v, 1/√v; g·f, g/√v; m·f, as in `FULL`."""
        x, g, m, v, f, c = parts
        out[0:1], out[2:3], out[3:6], out[6:7] = g, x, m, v
        torch.clamp(g[0], -0.1, 0.1, out=out[1])
        torch.add(v[0], 1e-8, out=out[10]).rsqrt_()
        torch.mul(out[3:6], out[10], out=out[7:10])
        torch.mul(f, c, out=out[11:14])
        torch.mul(out[3:6], out[11:14], out=out[15:18])
        out[11:14].mul_(out[0])
        torch.mul(out[0], out[10], out=out[14])


def factors(seen: Moments, dim: int) -> tuple[Tensor, Tensor]:
    """The two of which Adafactor's factor is the product (see `features.factor`)."""
    mean = seen.row.mean(largest(seen.m, dim)[1], keepdim=True)
    return (seen.row / (mean + 1e-9)).clamp(min=1e-9).rsqrt(), seen.col.clamp(min=1e-9).rsqrt()


def _matrices(x: Tensor, kernel: Sequence[int]) -> Tensor:
    """(D, *kernel, in, out) as (D, taps, out, in), where `in` and `out` may be 1."""
    x = x.mT
    return x.expand(len(x), *kernel, -1, -1).reshape(len(x), -1, *x.shape[-2:])


def _share(compact: Tensor, w0: Tensor, at: int, eps: float) -> Tensor:
    """What features (6, taps, …) that are constant along an axis add to the first layer, (units, taps, …)."""
    scale = (compact.square().mean((-2, -1), keepdim=True) + eps).rsqrt()
    weights = torch.cat([w0[at : at + 3], w0[at + 6 : at + 9]])
    return torch.einsum("fh,ftoi->htoi", weights, compact * scale)


def _rows(x: Tensor, piece: slice) -> Tensor:
    """The rows of a piece, of what may be the same in all rows."""
    return x if x.shape[1] == 1 else x[:, piece]
