"""Apply the cost model to a layer: predict launch times and select the tiles worth timing."""

from __future__ import annotations

from bench.layers import Launches, Layer
from dcgan.kernels.gpu import cost_model, offline, tiles

KEEP = 10  # tiles per problem; each takes a second or two to compile


def seconds(problem: tiles.Problem, launches: Launches, tile: tiles.Tile, sms: int) -> float:
    """Return the predicted seconds of a layer's launches: standalone prologues, product and reduction."""
    seen = problem if tile.fused else cost_model.without_prologue(problem)
    splits = launches.product.constants.get("SPLITS", 1)
    total = cost_model.predict(seen, tile, splits, sms=sms).seconds
    if launches.prologues:
        total += cost_model.standalone_prologue_seconds(problem, shared=False)
    if launches.reduction is not None:
        total += cost_model.reduction_seconds(seen, launches.product.arguments["partial_ptr"].shape)
    return total


def candidates(layer: Layer, shared: int) -> list[tiles.Tile]:
    """Return every candidate that fits, with fused and, if there are any, standalone prologues."""
    return [tile for tile in tiles.variants(layer.problem) if cost_model.fits(layer.problem, tile, shared)]


def default(layer: Layer, sms: int, capability: int) -> tiles.Tile:
    """Return the tile that an untuned GPU of sm_<capability> selects, by compiling for it here."""

    def spills(tile: tiles.Tile) -> bool:
        return offline.spills(layer.launches(tile, sms).product, capability)

    return tiles.estimate(layer.problem, sms, tiles.SHARED_LIMIT[capability], spills)


def shortlist(layer: Layer, sms: int, shared: int, keep: int = KEEP) -> list[tiles.Tile]:
    """Return the ``keep`` tiles predicted to be fastest, best first."""
    times = {
        tile: seconds(layer.problem, layer.launches(tile, sms), tile, sms)
        for tile in candidates(layer, shared)
    }
    return sorted(times, key=lambda tile: times[tile])[:keep]
