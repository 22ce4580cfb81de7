"""What the model says of a layer's tiles: which are worth timing, and how long its launches should take."""

from __future__ import annotations

from bench.layers import Launches, Layer
from dcgan.kernels.gpu import model, offline, tiles

KEEP = 10  # tiles a problem; a second or two of compiling each


def seconds(problem: tiles.Problem, launches: Launches, tile: tiles.Tile, processors: int) -> float:
    """Predicted for a layer's launches: passes, product and reduction."""
    seen = problem if tile.fused else model.plain(problem)
    splits = launches.product.constants.get("SPLITS", 1)
    total = model.predict(seen, tile, splits, processors=processors).seconds
    if launches.passes:
        total += model.pass_seconds(problem, shared=False)
    if launches.reduction is not None:
        total += model.reduction_seconds(seen, launches.product.arguments["partial_ptr"].shape)
    return total


def every(layer: Layer, shared: int) -> list[tiles.Tile]:
    """Every candidate that fits, fused and, where there is a prologue, with passes of their own."""
    return [tile for tile in tiles.ways(layer.problem) if model.fits(layer.problem, tile, shared)]


def default(layer: Layer, processors: int, capability: int) -> tiles.Tile:
    """What a GPU of sm_<capability> takes where nothing is tuned; told by compiling for it here."""

    def spills(tile: tiles.Tile) -> bool:
        return offline.spills(layer.launches(tile, processors).product, capability)

    return tiles.estimate(layer.problem, processors, tiles.SHARED_LIMIT[capability], spills)


def shortlist(layer: Layer, processors: int, shared: int, keep: int = KEEP) -> list[tiles.Tile]:
    """The ``keep`` tiles that should be fastest, best first."""
    times = {
        tile: seconds(layer.problem, layer.launches(tile, processors), tile, processors)
        for tile in every(layer, shared)
    }
    return sorted(times, key=lambda tile: times[tile])[:keep]
