"""The drop-ins match the reference networks: results, strides, state; and what explain reports."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcgan import fast, models
from dcgan.kernels import ops
from tests.support.networks import (
    EXACT,
    MODES,
    NETWORKS,
    assert_agree,
    assert_equal_results,
    drop_in,
    norms,
    reference,
    results,
    sample,
)
from tests.support.tolerance import relative, unit

pytestmark = pytest.mark.usefixtures("one_thread", "reference_engine")


# --- the same results --------------------------------------------------------------------------------------


@NETWORKS
@MODES
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [32, 64, 128])
def test_results_match_the_reference(kind: str, training: bool, channels: int, image_size: int) -> None:
    """The output, every gradient, every buffer and the output's strides match in float64."""
    model = reference(kind, channels, image_size, features=2).train(training)
    assert_agree(model, drop_in(model), sample(model, 3))


@NETWORKS
@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_accurate_as_eager(kind: str, training: bool, dtype: torch.dtype) -> None:
    """Relative to float64, the error is at most eager's, up to the effect of another summation order.

    A fused layer rounds its output once, eager after each of convolution, BatchNorm and activation, so a
    factor of 2 is ample. But eager's BatchNorm on a CPU sums float32 values in float64, while the ops sum n
    values in float32, with √n roundings. Values near LeakyReLU's kink fall on either side of it by chance, so
    the worst error of a few samples and of eager's two layouts counts.
    """
    model = reference(kind, dtype=dtype).train(training)
    nhwc = copy.deepcopy(model).to(memory_format=torch.channels_last)
    summed = 8 * 16 * 16  # values per channel of the largest normalized map
    errors: dict[str, tuple[float, float]] = {}
    for _ in range(4):
        x = sample(model, 8)
        exact = results(copy.deepcopy(model).double(), x.double())
        eager = [results(copy.deepcopy(m), x) for m in (model, nhwc)]
        actual = results(drop_in(model), x)
        for name, want in exact.items():
            assert actual[name].dtype == eager[0][name].dtype, name
            if want.dtype.is_floating_point:
                eagers, ours = errors.get(name, (0.0, 0.0))
                eagers = max(eagers, *(relative(e[name], want) for e in eager))
                errors[name] = eagers, max(ours, relative(actual[name], want))
    for name, (eagers, ours) in errors.items():
        assert ours <= 2 * eagers + 4 * unit(dtype) + summed**0.5 * unit(torch.float32), name


@MODES
def test_gradients_through_both_networks(training: bool) -> None:
    """A backward through G and D together, as in the generator's step."""
    g, d = reference("G").train(training), reference("D").train(training)
    fast_g, fast_d = drop_in(g), drop_in(d)
    z = sample(g)

    def step(g: Any, d: Any) -> dict[str, Tensor]:
        d.zero_grad()
        found = results(g, z, lambda image: -d(image).log().sum())
        return found | {f"D's gradient of {n}": p.grad for n, p in d.named_parameters()}

    assert_equal_results(step(fast_g, fast_d), step(g, d))


@pytest.mark.parametrize("size", [2, 4])
@MODES
def test_both_shapes_of_z(size: int, training: bool) -> None:
    model = reference("G").train(training)
    z = sample(model)
    assert_agree(model, drop_in(model), z if size == 2 else z[:, :, None, None])


@NETWORKS
@MODES
def test_batches_of_one_and_zero(kind: str, training: bool) -> None:
    model = reference(kind).train(training)
    x = sample(model)
    assert_agree(model, drop_in(model), x[:1])
    other = drop_in(model)
    expected, actual = model(x[:0]), other(x[:0])
    assert expected.shape == actual.shape
    assert_equal_results(dict(other.named_buffers()), dict(model.named_buffers()))
    actual.sum().backward()
    assert all(not bool(p.grad.any()) for p in other.parameters())


# --- strides -----------------------------------------------------------------------------------------------


LATENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "[N, L]": lambda z: z,
    "[N, L, 1, 1]": lambda z: z[:, :, None, None],
    "channels_last": lambda z: z[:, :, None, None].contiguous(memory_format=torch.channels_last),
    "slice": lambda z: torch.cat([z, z], 1)[:, : z.shape[1]],
    "transposed": lambda z: z.t().contiguous().t(),
    "expanded": lambda z: z[:1].expand_as(z),
    "one": lambda z: z[:1],
}


@MODES
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("model_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_strides_match_eager(
    training: bool, channels: int, model_format: torch.memory_format, latent: str, dtype: torch.dtype
) -> None:
    model = reference("G", channels, dtype=dtype).to(memory_format=model_format).train(training)
    other = drop_in(model)
    z = LATENTS[latent](sample(model))
    with torch.no_grad():
        expected, actual = model(z), other(z)
    assert actual.stride() == expected.stride()
    if model_format == torch.contiguous_format and latent != "channels_last":
        assert actual.view(len(z), -1).shape == (len(z), channels * 32 * 32)


@MODES
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("model_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_images_in_both_memory_formats(
    training: bool, channels: int, image_format: torch.memory_format, model_format: torch.memory_format
) -> None:
    model = reference("D", channels).to(memory_format=model_format).train(training)
    assert_agree(model, drop_in(model), sample(model).contiguous(memory_format=image_format))


def test_image_views() -> None:
    model = reference("D")
    other = drop_in(model)
    x = sample(model)
    for view in (x.flip(3), x.transpose(2, 3), torch.cat([x, x], 3)[..., 5:37], x[:1].expand_as(x)):
        assert relative(other(view), model(view)) < EXACT


# --- eval is never stale -----------------------------------------------------------------------------------


@NETWORKS
def test_eval_sees_every_edit_of_a_norm_immediately(kind: str) -> None:
    """BatchNorm is folded at every call, after edits of .data, under no_grad and of replaced buffers."""
    model = reference(kind).eval()
    other = fast.fuse(model)
    x = sample(model)
    _, norm = norms(model)[0]
    previous = other(x)
    edits: list[Callable[[], Any]] = [
        lambda: norm.running_mean.data.add_(0.5),
        lambda: norm.running_var.data.mul_(3),
        lambda: norm.weight.data.mul_(-1),
        lambda: norm.bias.data.copy_(torch.randn_like(norm.bias)),
        lambda: setattr(norm, "running_mean", torch.randn_like(norm.running_mean)),
        lambda: setattr(norm, "weight", nn.Parameter(torch.randn_like(norm.weight))),
        lambda: setattr(norm, "eps", 0.5),
        lambda: norm.reset_running_stats(),
        lambda: setattr(other.main[0].weight, "data", other.main[0].weight.data * 1.5),
    ]
    for edit in edits:
        edit()
        actual = other(x)
        assert relative(actual, model(x)) < EXACT
        assert relative(actual, previous) > 1e-6
        previous = actual


@NETWORKS
def test_eval_after_training_steps(kind: str) -> None:
    model = reference(kind)
    other = drop_in(model)
    x = sample(model)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01, eps=0.1) for m in (model, other)]
    for _ in range(3):
        for network, optimizer in zip((model, other), optimizers, strict=True):
            results(network.train(), x)
            optimizer.step()
        assert relative(other.eval()(x), model.eval()(x)) < 1e-10  # Adam's quotient amplifies rounding


# --- state -------------------------------------------------------------------------------------------------


@NETWORKS
def test_state_dicts_are_interchangeable(kind: str) -> None:
    model, other = reference(kind).eval(), reference(kind).eval()
    fast_model = drop_in(other)
    assert list(model.state_dict()) == list(fast_model.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in fast_model.named_modules()]
    x = sample(model)
    fast_model.load_state_dict(model.state_dict())
    assert_agree(model, fast_model, x)
    other.load_state_dict(fast_model.state_dict())
    assert torch.equal(model(x), other(x))
    with pytest.raises(RuntimeError, match="Nothing was loaded"):
        fast_model.load_state_dict(reference(kind, features=8).state_dict())
    assert_agree(model, fast_model, x)


@NETWORKS
def test_constructor_matches_the_reference(kind: str) -> None:
    expected = reference(kind, dtype=torch.float32)
    actual = getattr(fast, type(expected).__name__)(**expected.sizes())
    assert isinstance(actual, type(expected))
    assert actual.sizes() == expected.sizes()
    assert str(actual.main) == str(expected.main)
    with pytest.raises(ValueError, match="image_size must be one of"):
        type(actual)(image_size=48)
    with pytest.raises(ValueError, match="features must be a positive integer, got 0"):
        type(actual)(features=0)


def test_invalid_inputs_raise_the_reference_errors() -> None:
    g, d = drop_in(reference("G")), drop_in(reference("D"))
    for z in (torch.ones(2, 7), torch.ones(6), torch.ones(2, 6, 2, 2), torch.ones(2, 6, 1)):
        with pytest.raises(ValueError, match=r"z must be \[N, 6\] or \[N, 6, 1, 1\], got \["):
            g(z.double())
    for image in (torch.ones(2, 1, 32, 32), torch.ones(3, 32, 32), torch.ones(2, 3, 64, 64)):
        with pytest.raises(ValueError, match=r"image must be \[N, 3, 32, 32\], got \["):
            d(image.double())


@NETWORKS
@MODES
def test_inputs_of_another_dtype_or_device_raise_pytorchs_errors(kind: str, training: bool) -> None:
    model = reference(kind).train(training)
    other = drop_in(model)
    x = sample(model)
    for wrong, match in ((x.float(), "should be the same"), (x.to("meta"), "device")):
        messages = []
        for network in (model, other):
            with pytest.raises(RuntimeError, match=match) as raised:
                network(wrong)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]


@NETWORKS
def test_fuse_shares_layers_and_tensors(kind: str) -> None:
    """The containers are copies, so that what is registered on or set in one stays there."""
    model = reference(kind)
    other = fast.fuse(model)
    assert type(other) is getattr(fast, type(model).__name__)
    assert type(model.main) is nn.Sequential
    assert isinstance(other.main, nn.Sequential)
    assert all(a is b for a, b in zip(model.main, other.main, strict=True))
    assert other.sizes() == model.sizes()
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), other.buffers(), strict=True))
    assert fast.fuse(other) is other
    assert type(model) in (models.Generator, models.Discriminator)
    other.register_buffer("extra", torch.ones(1))
    assert not hasattr(model, "extra")
    head, other.main[-1] = other.main[-1], nn.Identity()
    assert model.main[-1] is head
    other.main[-1] = head
    before = model.main[1 if kind == "G" else 3].num_batches_tracked.clone()
    other(sample(model))
    assert model.main[1 if kind == "G" else 3].num_batches_tracked == before + 1


@NETWORKS
def test_fuse_in_place_returns_the_same_object(kind: str) -> None:
    model = reference(kind)
    other, plain, main = copy.deepcopy(model), type(model), model.main
    assert fast.fuse(model, inplace=True) is model
    assert model.main is main
    assert type(model) is getattr(fast, plain.__name__)
    assert_agree(other, model, sample(model))


@pytest.mark.parametrize(
    "wrong", [None, models.Generator, torch.ones(1), "netG.pth"], ids=lambda w: type(w).__name__
)
def test_fuse_rejects_what_is_not_a_module(wrong: Any) -> None:
    for function in (fast.fuse, fast.convert):
        with pytest.raises(
            TypeError, match=rf"module must be a torch.nn.Module, got {type(wrong).__name__}$"
        ):
            function(wrong)


@pytest.mark.parametrize("make", [nn.Identity, models.MLPGenerator, nn.ReLU])
def test_a_network_without_convolutions_is_returned_as_it_is(make: Callable[[], nn.Module]) -> None:
    module = make()
    assert fast.fuse(module) is module
    assert type(module) is make


@MODES
def test_a_subclass_keeps_its_forward(training: bool) -> None:
    class Mine(models.Generator):
        def forward(self, z: Tensor) -> Tensor:
            return -super().forward(z)

    model = Mine(6, 3, 4, 32).double().train(training)
    other = fast.fuse(copy.deepcopy(model))
    assert isinstance(other, Mine)
    z = sample(model)
    assert_agree(model, other, z)
    with torch.no_grad():
        assert relative(other(z), -models.Generator.forward(model, z)) < EXACT
    assert [row.engine for row in fast.explain(other, z)] == ["reference"] * 4


@NETWORKS
@MODES
def test_copies_are_correct_and_independent(kind: str, training: bool) -> None:
    model = reference(kind).train(training)
    other = drop_in(model)
    x = sample(model)
    other(x)
    model(x)
    stream = io.BytesIO()
    torch.save(other, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    for clone in (copy.deepcopy(other), copy.copy(other), loaded):
        assert type(clone) is type(other)
        assert clone.training == training
        assert relative(clone.eval()(x), model.eval()(x)) < EXACT
        model.train(training)
    loaded.main[0].weight.data.zero_()
    loaded.refresh()
    assert relative(other.eval()(x), model.eval()(x)) < EXACT


def test_averaged_model() -> None:
    model = reference("G")
    other = drop_in(model)
    z = sample(model)
    averages = [torch.optim.swa_utils.AveragedModel(m) for m in (model, other)]
    for _ in range(3):
        for network, average in zip((model, other), averages, strict=True):
            with torch.no_grad():
                network.main[0].weight.add_(1)
            average.update_parameters(network)
            average.eval()
        assert relative(averages[1](z), averages[0](z)) < EXACT


# --- explain -----------------------------------------------------------------------------------------------


@MODES
def test_explain_lists_every_layer(training: bool) -> None:
    g, d = drop_in(reference("G")).train(training), drop_in(reference("D")).train(training)
    rows = fast.explain(g, sample(g))
    assert [row.modules for row in rows] == ["main.0-2", "main.3-5", "main.6-8", "main.9-10"]
    assert {row.op for row in rows} == {"conv_transpose2d_fused"}
    rows = fast.explain(d, sample(d))
    assert [row.modules for row in rows] == ["main.0-1", "main.2-4", "main.5-7", "main.8-9"]
    assert {row.op for row in rows} == {"conv2d_fused"}
    assert {row[2:] for row in rows} == {("reference", "engine 'reference' is forced")}
    with ops.use_engine("auto"):  # PyTorch runs the modules
        rows = fast.explain(d, sample(d))
    assert [(row.modules, row.op) for row in rows] == [
        ("main.0-1", "Conv2d-LeakyReLU"),
        ("main.2-4", "Conv2d-BatchNorm2d-LeakyReLU"),
        ("main.5-7", "Conv2d-BatchNorm2d-LeakyReLU"),
        ("main.8-9", "Conv2d-Sigmoid"),
    ]
    kernels = "training kernels" if training else "kernels"
    assert {row[2:] for row in rows} == {("eager", f"native: the {kernels} do not support float64")}


def test_explain_reports_why_a_layer_is_eager() -> None:
    model = reference("G")
    first = model.main[0]
    model.main[0] = nn.ConvTranspose2d(first.in_channels, first.out_channels, 4, groups=2, bias=False)
    model.main[4].register_forward_hook(lambda m, args, y: None)
    model.main[8] = nn.ELU()
    other = drop_in(model.double()).eval()
    rows = {row.modules.removeprefix("main."): row for row in fast.explain(other, sample(other))}
    assert list(rows) == ["0", "1", "2", "3", "4", "5", "6-7", "8", "9-10"]
    assert rows["0"].engine == "eager"
    assert rows["0"].reason == "the convolution is grouped, dilated or not padded with zeros"
    assert rows["4"] == ("main.4", "BatchNorm2d", "eager", "the module has hooks")
    assert rows["8"] == ("main.8", "ELU", "eager", "ELU is not supported by the fused ops")
    assert rows["6-7"].op == "conv_transpose2d_fused"
    # In training a BatchNorm is fused into the next op; without one, PyTorch runs the BatchNorm.
    rows = {row.modules.removeprefix("main."): row for row in fast.explain(other.train(), sample(other))}
    assert list(rows) == ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9-10"]
    assert rows["6"].op == "conv_transpose2d_fused"
    why = "no fused op follows to apply the BatchNorm"
    assert rows["7"] == ("main.7", "BatchNorm2d", "eager", why)


@NETWORKS
@MODES
def test_explain_changes_nothing(kind: str, training: bool) -> None:
    other = drop_in(reference(kind)).train(training)
    before = {n: t.clone() for n, t in other.state_dict().items()}
    modes = [m.training for m in other.modules()]
    fast.explain(other, sample(other))
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())
    assert [m.training for m in other.modules()] == modes
    assert all(p.grad is None for p in other.parameters())


def test_explain_prints_a_table() -> None:
    other = drop_in(reference("G"))
    lines = str(fast.explain(other, sample(other))).splitlines()
    assert lines[0].split() == ["modules", "op", "engine", "why"]
    assert len(lines) == 5
    column = lines[0].index("engine")
    assert all(line[column:].startswith("reference") for line in lines[1:])


def test_explain_says_how_to_fuse_a_network() -> None:
    model = reference("D")
    rows = fast.explain(model, sample(model))
    assert [row.op for row in rows] == [type(m).__name__ for m in model.main]
    why = "the model is not fused; dcgan.fast.fuse(model) returns one that is"
    assert {row[2:] for row in rows} == {("eager", why)}


def test_explain_unwraps_a_compiled_network() -> None:
    other: Any = drop_in(reference("G"))
    assert fast.explain(torch.compile(other), sample(other)) == fast.explain(other, sample(other))  # type: ignore[arg-type]


def test_explain_of_a_network_without_convolutions() -> None:
    (row,) = fast.explain(nn.Linear(1, 1), torch.ones(1, 1))
    assert row == ("the model", "Linear", "eager", "Linear is not supported by the fused ops")


def test_explain_rejects_invalid_arguments() -> None:
    model: Any = nn.Linear
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got type$"):
        fast.explain(model, torch.ones(1, 1))
    with pytest.raises(ValueError, match="z must be"):
        fast.explain(drop_in(reference("G")), torch.ones(1, 2))
