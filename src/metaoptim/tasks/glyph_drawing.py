"""Handwriting from type: a letter's outline is thinned to its skeleton, bent, and painted with a round brush."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metaoptim.tasks.base import uniforms

FACES = (
    *(f"DejaVu{family}{style}.ttf" for family in ("Sans", "SansMono") for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}.ttf" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}.ttf" for style in ("", "Bol", "Italic", "BolIta")),
)
DRAWINGS, SIZE = 20, 28
RASTER, MARGIN = 64, 4  # the outline is filled on RASTER pixels, of which MARGIN stay empty on each side
CANVAS, REACH = 2 * SIZE, 2  # the brush paints on CANVAS pixels; a radius of 2.1 reaches 2 of them
GREY = np.array([0, 64, 128, 191, 255], np.uint8)  # of a pixel, by how many of its four canvas pixels are painted


def outlines(letters: str) -> list[list[list[NDArray[np.float64]]]]:
    """For each letter and each typeface that has it, its closed polygons [points, 2], in font units."""
    import matplotlib  # slow to import, and needed only when the glyphs are made
    from matplotlib.ft2font import FT2Font, LoadFlags
    from matplotlib.path import Path as Outline

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [FT2Font(str(folder / face)) for face in FACES]
    found: list[list[list[NDArray[np.float64]]]] = []
    for code in map(ord, letters):
        found.append([])
        for font in (f for f in fonts if f.get_char_index(code)):
            # As designed, in font units: no hinting or rounding, which another release might change.
            font.load_char(code, flags=LoadFlags.NO_SCALE)
            found[-1].append([np.asarray(p) for p in Outline(*font.get_path()).to_polygons(closed_only=True)])
        if not found[-1]:
            raise ValueError(f"matplotlib's type faces have no letter U+{code:04X}; install matplotlib 3.10 or later.")
    return found


def fill(polygons: list[NDArray[np.float64]]) -> NDArray[np.bool_]:
    """Fills an outline, scaled to fit and centred, by the non-zero rule: [RASTER, RASTER]."""
    points = np.concatenate(polygons)
    low, high = points.min(0), points.max(0)
    scale = (RASTER - 2 * MARGIN) / max(high - low)
    turns = np.zeros((RASTER, RASTER + 1), np.int64)
    rows = np.arange(RASTER)[:, None] + 0.5
    for polygon in polygons:
        x, y = ((polygon - (low + high) / 2) * (scale, -scale) + RASTER / 2).T
        x0, y0, x1, y1 = x[:-1], y[:-1], x[1:], y[1:]
        down = (y0 <= rows).astype(np.int64) - (y1 <= rows)
        row, edge = np.nonzero(down)
        crossing = x0[edge] + (row + 0.5 - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
        np.add.at(turns, (row, np.ceil(crossing - 0.5).astype(np.int64)), down[row, edge])
    inside: NDArray[np.bool_] = turns.cumsum(axis=1)[:, :RASTER] != 0
    return inside


def _removable() -> NDArray[np.bool_]:
    """Zhang and Suen's rule as a table [2 halves, 256]; bit k is neighbour k, clockwise from above."""
    bits = (np.arange(256)[:, None] >> np.arange(8) & 1).astype(bool)
    count, starts = bits.sum(1), (~bits & np.roll(bits, -1, axis=1)).sum(1)
    up, right, down, left = bits[:, 0], bits[:, 2], bits[:, 4], bits[:, 6]
    edge = (count >= 2) & (count <= 6) & (starts == 1)
    first = edge & ~(up & right & down) & ~(right & down & left)
    second = edge & ~(up & right & left) & ~(up & down & left)
    return np.stack([first, second])


REMOVABLE = _removable()


def thin(shapes: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The skeletons of shapes [n, H, W], which must not touch the border (Zhang and Suen 1984)."""
    width = shapes.shape[-1]
    around = (-width, 1 - width, 1, width + 1, width, width - 1, -1, -width - 1)
    flat = shapes.reshape(-1).astype(np.uint8)
    ink = np.flatnonzero(flat)
    while True:
        before = len(ink)
        for table in REMOVABLE:
            code = np.zeros(len(ink), np.uint8)
            for k, step in enumerate(around):
                code |= flat[ink + step] << k
            gone = table[code]
            flat[ink[gone]] = 0
            ink = ink[~gone]
        if len(ink) == before:
            return flat.reshape(shapes.shape).astype(bool)


def draw(skeletons: NDArray[np.bool_], stream: str) -> NDArray[np.uint8]:
    """DRAWINGS pictures of one letter, each from a random typeface: uint8 [DRAWINGS, SIZE, SIZE], ink 255."""
    u = uniforms(0, stream, 0, DRAWINGS, 7 + 32)
    style = (u[:, 0] * len(skeletons)).astype(np.int64)
    angle, scale, shear = np.radians(24 * u[:, 1] - 12), 0.8 + 0.28 * u[:, 2], 0.5 * u[:, 3] - 0.25
    shift, radius = 0.2 * u[:, 4:6] - 0.1, 1.3 + 0.8 * u[:, 6]
    sizes, angles = np.sqrt(-2 * np.log(1 - u[:, 7:23])), 2 * np.pi * u[:, 23:]
    field = 0.07 * np.stack([sizes * np.cos(angles), sizes * np.sin(angles)], axis=-1).reshape(-1, 4, 4, 2)

    i, row, column = np.nonzero(skeletons[style])  # i: the drawing that a point belongs to
    x, y = (np.stack([column, row]) + 0.5 - RASTER / 2) / (RASTER / 2 - MARGIN)  # -1 ... 1
    near = [np.clip(1 - np.abs((1.5 * c + 1.5)[:, None] - np.arange(4)), 0, 1) for c in (x, y)]
    weight_x, weight_y = (w * w * (3 - 2 * w) for w in near)  # smoothstep: no kink where two cells meet
    bend = np.einsum("pa,pb,pabc->pc", weight_y, weight_x, field[i])
    x, y = x + shear[i] * y + bend[:, 0], y + bend[:, 1]
    x, y = x * np.cos(angle)[i] - y * np.sin(angle)[i], x * np.sin(angle)[i] + y * np.cos(angle)[i]
    spot = CANVAS / 2 + 0.36 * CANVAS * (scale[i, None] * np.stack([y, x], axis=1) + shift[i])

    inside = ((spot >= 0) & (spot < CANVAS)).all(1)
    i, spot = i[inside], spot[inside]
    pixel = np.floor(spot).astype(np.int64)[:, :, None] + np.arange(-REACH, REACH + 1)  # [points, 2, window]
    squares = (pixel + 0.5 - spot[:, :, None]) ** 2
    point, down, right = np.nonzero(squares[:, 0, :, None] + squares[:, 1, None, :] <= radius[i, None, None] ** 2)
    canvas = np.zeros((DRAWINGS, CANVAS + 2 * REACH, CANVAS + 2 * REACH), np.uint8)
    canvas[i[point], pixel[point, 0, down] + REACH, pixel[point, 1, right] + REACH] = 1
    canvas = canvas[:, REACH:-REACH, REACH:-REACH]
    count = canvas[:, ::2, ::2] + canvas[:, 1::2, ::2] + canvas[:, ::2, 1::2] + canvas[:, 1::2, 1::2]
    return np.take(GREY, count)
