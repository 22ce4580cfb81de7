"""The check of an exported network detects any single wrong layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcgan import export, models
from dcgan.errors import RunError
from tests.support.networks import randomise

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad")

FEATURES, SIZE = 8, 32


def as_constructed(model: Any) -> None:
    pass


def as_in_the_recipe(model: Any) -> None:
    model.apply(models.weights_init)


def saturated(model: Any) -> None:
    """Make a Discriminator's logits for random images all fall below -40; saturate a Generator at ±1."""
    randomise(model)
    last = model.main[-2].weight
    last.copy_(last.abs() * -20 if isinstance(model, models.Discriminator) else last * 20)


def mostly_real(model: Any) -> None:
    randomise(model)
    if isinstance(model, models.Discriminator):
        model.main[-2].weight.abs_().mul_(3)


WEIGHTS = [as_constructed, as_in_the_recipe, randomise, saturated, mostly_real]


def network(kind: str, weights: Callable[[Any], None] = randomise) -> Any:
    torch.manual_seed(0)
    model: Any = {
        "G": lambda: models.Generator(6, 3, FEATURES, SIZE),
        "D": lambda: models.Discriminator(3, FEATURES, SIZE),
        "MLP G": lambda: models.MLPGenerator(6, 1, SIZE),
        "MLP D": lambda: models.MLPDiscriminator(1, SIZE),
    }[kind]()
    weights(model)
    return model.eval()


def check_of(model: Any, batch: int | None = None) -> Any:
    return export._Check(model, export._input_shape(model), batch)


# --- wrong networks -----------------------------------------------------------------------------------------


def scaled(name: str, factor: float, channel: int | None = None) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        tensor = getattr(layer, name)
        tensor[slice(None) if channel is None else channel] *= factor

    return change


def zero_input_channel(layer: Any) -> None:
    layer.weight[:, 0] = 0


def change_eps(layer: Any) -> None:
    layer.eps = 1e-3


def shift_mean(layer: Any) -> None:
    layer.running_mean += 0.05


LAYERS: dict[type[nn.Module], list[Callable[[Any], None]]] = {
    nn.Conv2d: [scaled("weight", 0.0, 0), zero_input_channel, scaled("weight", 0.5), scaled("weight", 1.01)],
    nn.Linear: [zero_input_channel, scaled("weight", 0.5), scaled("bias", 0.0)],
    nn.BatchNorm2d: [change_eps, shift_mean, scaled("running_var", 1.1), scaled("weight", 0.0, 0)],
}
LAYERS[nn.ConvTranspose2d] = LAYERS[nn.Conv2d]


def other_activation(activation: nn.Module) -> nn.Module:
    if isinstance(activation, nn.ReLU):
        return nn.LeakyReLU(0.01)
    if isinstance(activation, nn.LeakyReLU):
        return nn.LeakyReLU(activation.negative_slope + 0.01)
    return nn.Hardtanh() if isinstance(activation, nn.Tanh) else nn.Hardsigmoid()


def wrong_networks(model: Any) -> list[tuple[str, Any]]:
    found = []
    for i, layer in enumerate(model.main):
        for n, change in enumerate(LAYERS.get(type(layer), [])):
            wrong = copy.deepcopy(model)
            change(wrong.main[i])
            found.append((f"change {n} of main.{i}, {type(layer).__name__}", wrong))
        if type(layer) in (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid):
            wrong = copy.deepcopy(model)
            wrong.main[i] = other_activation(layer)
            found.append((f"other activation at main.{i}", wrong))
    return found


CASES = [(kind, weights) for kind in ("G", "D") for weights in WEIGHTS]
CASES += [("MLP G", as_constructed), ("MLP D", as_constructed)]


@pytest.mark.parametrize(("kind", "weights"), CASES)
def test_every_wrong_layer_is_detected(kind: str, weights: Callable[[Any], None]) -> None:
    model = network(kind, weights)
    check = check_of(model)
    for what, wrong in wrong_networks(model):
        with pytest.raises(RunError, match=r"not written: it differs from network\(x\) by"):
            print(what, check.difference(wrong, "it"))


@pytest.mark.parametrize("kind", ["G", "D"])
def test_a_wrong_program_is_not_written(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_program = torch.export.export

    def halved(module: Any, *args: Any, **kwargs: Any) -> Any:
        wrong = copy.deepcopy(module)
        wrong.main[-2].weight *= 0.5
        return export_program(wrong, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", halved)
    with pytest.raises(RunError, match=r"not written: PyTorch \S+, loaded back differs from network\(x\) by"):
        export.torch_export(network(kind, saturated), tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


# --- correct networks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "weights"), CASES)
def test_rounding_is_far_below_the_tolerance(kind: str, weights: Callable[[Any], None]) -> None:
    model = network(kind, weights)
    wide = copy.deepcopy(model).double()
    check = check_of(model)
    assert check.difference(model, "itself") == 0
    assert check.difference(lambda x: wide(x.double()).float(), "float64") < export.TOLERANCE / 5


@pytest.mark.parametrize("weights", WEIGHTS)
def test_probabilities_are_not_saturated(weights: Callable[[Any], None]) -> None:
    model = network("D", weights)
    random = torch.randn(16, 3, SIZE, SIZE)
    if weights is saturated:
        assert model.logits(random).max() < -40
    check = check_of(model)
    logits = torch.cat([model.logits(x) for x in check.inputs])
    outputs = torch.cat(check.outputs)
    assert logits.abs().max() < 3
    assert check.spread > 0.5
    # Evenly spread, so that swapping two inputs of a batch would be detected.
    assert outputs.sort().values.diff().min() > check.spread / 20


@pytest.mark.parametrize(("batch", "sizes"), [(None, [1, 3, 5]), (1, [1] * 9), (4, [4] * 3), (20, [20] * 2)])
def test_batches(batch: int | None, sizes: list[int]) -> None:
    check = check_of(network("D"), batch)
    assert [len(x) for x in check.inputs] == sizes
    assert len(torch.cat(check.inputs).unique(dim=0)) == 9


@pytest.mark.parametrize("wrong", [2e-4, float("nan")])
@pytest.mark.parametrize("kind", ["G", "D"])
def test_the_difference_is_relative_to_the_spread(kind: str, wrong: float) -> None:
    model = network(kind)
    check = check_of(model)
    near = check.difference(lambda x: model(x) + 5e-5 * check.spread, "near")
    assert near == pytest.approx(5e-5, rel=0.05)
    match = r"not written: it differs from network\(x\) by (2\.0e-04|nan) of the outputs' spread; 1e-04 is"
    with pytest.raises(RunError, match=match):
        check.difference(lambda x: model(x) + wrong * check.spread, "it")


def test_wrong_shapes_and_failing_programs() -> None:
    check = check_of(network("G"))
    with pytest.raises(RunError, match=r"it returns \[1, 3, 32, 16\], network\(x\) returns \[1, 3, 32, 32\]"):
        check.difference(lambda z: network("G")(z)[..., :16], "it")

    def only_batches_of_one(z: Tensor) -> Tensor:
        if len(z) > 1:
            raise ValueError("one at a time")
        return network("G")(z)  # type: ignore[no-any-return]

    with pytest.raises(RunError, match="not written: it fails for a batch of 3: ValueError: one at a time"):
        check.difference(only_batches_of_one, "it")


@pytest.mark.parametrize("kind", ["G", "D"])
@pytest.mark.parametrize(
    ("weight", "words"), [(0.0, "is the same for every x"), (float("nan"), "is not finite")]
)
def test_networks_that_cannot_be_verified(kind: str, weight: float, words: str) -> None:
    model = network(kind)
    model.main[0].weight.fill_(weight)
    with pytest.raises(RunError, match=rf"not written: network\(x\) {words}"):
        check_of(model)
