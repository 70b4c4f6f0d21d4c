"""Warnings point at the user's line, and errors name it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import metaoptim as mo
from metaoptim.core import callers


def test_warnings_point_at_the_users_line(doubles: None) -> None:
    module = mo.MetaModule(
        mo.maml(nn.Linear(1, 1), lambda output, target: output.argmax(-1).to(target).mean(), steps=1, lr=0.1)
    )
    x = torch.randn(2, 3, 1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        mo.reptile(nn.Linear(1, 1), mo.losses.mse, steps=1)
        module.backward(mo.Task((x, x), (x, x)))
    assert len(told) == 2 and {w.filename for w in told} == {__file__}


def test_no_code_of_the_users_has_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        torch.zeros(2).view(3)
    except RuntimeError as error:
        place = callers.where(error)
        assert place and place.startswith("test_callers.py:") and place.endswith("in test_no_code_of_the_users_has_no_place")
        monkeypatch.setattr(callers, "_OTHERS", ("",))
        assert callers.where(error) is None
