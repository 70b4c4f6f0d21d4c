"""torch's recurrent layers, written out: its kernels have no batching rule for weights, and no second derivative on a GPU.

The functions take what `nn.LSTM`, `nn.GRU` and `nn.RNN` pass to torch's kernels. Weights come layer by layer and, within a
layer, direction by direction: input to hidden, hidden to hidden and, if present, the two biases and an LSTM's projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metaoptim.nn.noise import dropout

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]
"""(W x + b, V h + c, state) -> the next state, whose first part is h."""


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), h.chunk(3, -1)
    n, z = (xn + (xr + hr).sigmoid() * hn).tanh(), (xz + hz).sigmoid()
    return (n + z * (state[0] - n),)


def _tanh(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).tanh(),)


def _relu(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).relu(),)


def _scan(cell: Cell, x: Tensor, state: State, weights: Sequence[Tensor], bias: bool, back: bool) -> tuple[Tensor, State]:
    """One layer in one direction: (L, B, D) -> its outputs (L, B, H) and its last state."""
    b, c = weights[2:4] if bias else (None, None)
    projection = weights[4 if bias else 2 :]
    inputs, outputs = F.linear(x, weights[0], b).unbind(0), []
    for step in reversed(inputs) if back else inputs:
        state = cell(step, F.linear(state[0], weights[1], c), state)
        if projection:
            state = (F.linear(state[0], projection[0]), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if back else outputs), state


def layers(cell: Cell, torchs: Callable[..., Any]) -> Callable[..., Any]:
    """A stack of layers of one cell, with the signature of torch's own function, which still handles packed sequences."""

    def run(
        x: Tensor, hx: Any, weights: Any, bias: Any, num_layers: int, p: float, training: bool, both: bool, *batch_first: bool
    ) -> Any:
        if isinstance(weights, Tensor | tuple):  # a packed sequence: (data, batch sizes, hx, weights, …)
            return torchs(x, hx, weights, bias, num_layers, p, training, both, *batch_first)
        state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        directions = 2 if both else 1
        each = len(weights) // (num_layers * directions)
        x = x.transpose(0, 1) if batch_first[0] else x
        last: list[State] = []
        for layer in range(num_layers):
            if layer:
                x = dropout(x, p, training)
            outputs = []
            for i in range(layer * directions, (layer + 1) * directions):
                one = weights[i * each : (i + 1) * each]
                output, end = _scan(cell, x, tuple(s[i] for s in state), one, bias, back=i % directions == 1)
                outputs.append(output)
                last.append(end)
            x = torch.cat(outputs, -1)
        return (x.transpose(0, 1) if batch_first[0] else x, *(torch.stack(part) for part in zip(*last, strict=True)))

    return run


def single(cell: Cell) -> Callable[..., Any]:
    """One step of a cell, with the signature of torch's own function."""

    def run(
        x: Tensor, hx: Any, w: Tensor, v: Tensor, b: Tensor | None = None, c: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        state = cell(F.linear(x, w, b), F.linear(state[0], v, c), state)
        return state[0] if isinstance(hx, Tensor) else state

    return run


def _pointer(x: Tensor) -> int:
    """0 where a tensor has no memory, as under vmap: on a GPU `flatten_parameters` then leaves the weights where they are."""
    try:
        return x.data_ptr()
    except RuntimeError:
        return 0


RECURRENT: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm: layers(_lstm, torch.lstm),
    torch.gru: layers(_gru, torch.gru),
    torch.rnn_tanh: layers(_tanh, torch.rnn_tanh),
    torch.rnn_relu: layers(_relu, torch.rnn_relu),
    torch.lstm_cell: single(_lstm),
    torch.gru_cell: single(_gru),
    torch.rnn_tanh_cell: single(_tanh),
    torch.rnn_relu_cell: single(_relu),
    Tensor.data_ptr: _pointer,
}
