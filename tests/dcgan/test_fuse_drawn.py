"""Drawn networks: :func:`dcgan.fast.fuse` gives the plain network's outputs, gradients and buffers.

A drawing is a :class:`Recipe`, from which the plain network, the one that is fused and their float64 copy are
built with the same values: as one Sequential, as Sequentials inside one another, as blocks with a forward of
their own, or as a class whose forward is written out from the drawing, with functionals, skip connections,
views and in-place operators.

In float64 the two networks have to agree to 1e-9. In float32 the error is that against the float64 copy; ten
times the plain network's own is allowed. A value within rounding of an activation's kink has another
derivative on its other side, which is no error of either: a disagreement counts if it recurs with new inputs.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from dcgan import fast
from dcgan.kernels import coverage, ops
from tests.support.native import NEEDED, NETWORK, fresh_memory_is_nan

pytestmark = [
    NEEDED,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]

EXACT = 1e-9  # in float64, relative to the largest of a tensor's norm and 1e-2 of all gradients'
TIMES_EAGER = 10  # the plain network's own error, in float32
MAX_CHANNELS, MAX_SIDE, ATTEMPTS = 12, 20, 3
BY_DEFAULT = coverage.MIN_TRAINING_MACS, coverage.MIN_LAYER_MACS


# --- recipes -----------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A convolution, what follows it, and what a hand-written forward does with the result."""

    transposed: bool
    c_in: int
    c_out: int
    kernel: int
    stride: int
    padding: int
    output_padding: int
    groups: int
    bias: bool
    computed: str
    norm: str
    act: str
    slope: float
    inplace: bool
    functional: bool
    extra: str
    hook: str
    repeated: bool
    tail: str

    def convolution(self) -> nn.Module:
        sizes = self.c_in, self.c_out, self.kernel, self.stride, self.padding
        if self.transposed:
            conv: nn.Module = nn.ConvTranspose2d(*sizes, self.output_padding, self.groups, self.bias)
        else:
            conv = nn.Conv2d(*sizes, groups=self.groups, bias=self.bias)
        return COMPUTED[self.computed](conv)  # type: ignore[no-any-return]

    def modules(self) -> list[tuple[str, nn.Module]]:
        """Return the layer's modules with the names of their roles."""
        found = [("conv", self.convolution())]
        if self.norm != "none":
            found.append(("norm", NORMS[self.norm](self.c_out)))
        if self.extra != "none":
            found.append(("extra", EXTRAS[self.extra]()))
        if self.act != "none":
            found.append(("act", ACTS[self.act](self)))
        for role, module in found:
            if self.hook == role:
                module.register_forward_hook(note)
            elif self.hook == f"changes {role}":
                module.register_forward_hook(halve)
            elif self.hook == f"before {role}":
                module.register_forward_pre_hook(double)
        return found


class Recipe(NamedTuple):
    """A network and its input."""

    structure: str
    channels: int
    height: int
    width: int
    batch: int
    layers: tuple[Layer, ...]
    shared_act: bool
    channels_last_input: bool
    channels_last_weights: bool
    frozen: bool
    seed: int


def note(module: nn.Module, args: Any, y: Tensor) -> None:
    module.__dict__.setdefault("noted", []).append(tuple(y.shape))


def halve(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    return 0.5 * y


def double(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (2 * args[0],)


COMPUTED: dict[str, Callable[..., Any]] = {
    "": lambda conv: conv,
    "spectral": nn.utils.parametrizations.spectral_norm,
    "weight": nn.utils.parametrizations.weight_norm,
    "old spectral": nn.utils.spectral_norm,
    "old weight": nn.utils.weight_norm,
}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "batch, average": lambda c: nn.BatchNorm2d(c, momentum=None),
    "batch, eps": lambda c: nn.BatchNorm2d(c, eps=0.1, momentum=0.8),
    "batch, not affine": lambda c: nn.BatchNorm2d(c, affine=False),
    "batch, no statistics": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "batch, neither": lambda c: nn.BatchNorm2d(c, affine=False, track_running_stats=False),
    "batch, frozen": lambda c: Frozen(c),
    "instance": nn.InstanceNorm2d,
    "instance, affine": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "group": lambda c: nn.GroupNorm(1, c),
}
ACTS: dict[str, Callable[[Layer], nn.Module]] = {
    "relu": lambda layer: nn.ReLU(layer.inplace),
    "leaky_relu": lambda layer: nn.LeakyReLU(layer.slope, layer.inplace),
    "tanh": lambda layer: nn.Tanh(),
    "sigmoid": lambda layer: nn.Sigmoid(),
    "prelu": lambda layer: nn.PReLU(),
}
EXTRAS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Dropout(0.3),
    "dropout2d": lambda: nn.Dropout2d(0.3),
    "identity": nn.Identity,
    "upsample": lambda: nn.Upsample(scale_factor=2),
}
TAILS = ("add", "iadd", "cat", "gate", "view", "transpose", "chunk", "scale", "mean", "slice", "clone")


class Frozen(nn.BatchNorm2d):
    """A BatchNorm that stays in eval mode."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(False)
        return self


def side_after(
    transposed: bool, side: int, kernel: int, stride: int, padding: int, output_padding: int = 0
) -> int:
    """Return the side of a convolution's output."""
    if transposed:
        return (side - 1) * stride - 2 * padding + kernel + output_padding
    return (side + 2 * padding - kernel) // stride + 1


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    def any_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    structure = any_of("sequential", "nested", "blocks", "written", "written")
    channels = draw(st.integers(1, 5))
    height, width = any_of((1, 1), (1, 1), (4, 4), (8, 8), (16, 16), (16, 16), (7, 9), (16, 12), (2, 5))
    c, h, w = channels, height, width
    shapes = [(c, h, w)]
    layers: list[Layer] = []
    for _ in range(any_of(3, 4, 2, 5, 6, 7, 1)):
        transposed = any_of(True, False) if h > 1 and w > 1 else any_of(True, True, True, False)
        kernel, stride, padding = any_of(
            *[(4, 2, 1)] * 10,
            *[(4, 1, 0)] * (20 if h * w == (1 if transposed else 16) else 2),
            *((3, 1, 1), (1, 1, 0), (5, 1, 2), (3, 2, 1), (5, 2, 2), (4, 1, 1), (4, 2, 0), (3, 2, 2)),
        )
        output_padding = 1 if transposed and stride == 2 and any_of(*range(6)) == 0 else 0
        groups = any_of(1, 1, 1, 1, 1, 2, 3)
        c_out = any_of(1, 2, 3, 4, 5, 7, 8)
        if c % groups or c_out % groups:
            groups = 1

        sizes = [side_after(transposed, n, kernel, stride, padding, output_padding) for n in (h, w)]
        if min(sizes) < 1 or max(sizes) > MAX_SIDE:  # try the other direction
            transposed, output_padding = not transposed, 0
            sizes = [side_after(transposed, n, kernel, stride, padding) for n in (h, w)]
        if min(sizes) < 1 or max(sizes) > MAX_SIDE:
            kernel, stride, padding, sizes = 1, 1, 0, [h, w]
        h, w = sizes
        norms = ["none", "none", "none", *["batch"] * 5, *NORMS]
        norm = any_of(*(name for name in norms if h * w > 1 or "instance" not in name))
        extra = any_of(*["none"] * 8, *EXTRAS)
        if extra == "upsample" and 2 * max(h, w) > MAX_SIDE:
            extra = "none"
        roles = "conv", "norm", "act"
        layers.append(
            Layer(
                *(transposed, c, c_out, kernel, stride, padding, output_padding, groups, any_of(True, False)),
                computed=any_of(*[""] * 12, *COMPUTED),
                norm=norm,
                act=any_of("none", "relu", "relu", "leaky_relu", "leaky_relu", "leaky_relu", *ACTS),
                slope=any_of(0.2, 0.2, 0.2, 0.01, 0.0, 1.5, -0.3),
                inplace=any_of(True, False),
                functional=any_of(True, False),
                extra=extra,
                hook=any_of(
                    *[""] * 12, *(f"{when}{role}" for when in ("", "changes ", "before ") for role in roles)
                ),
                repeated=any_of(*range(5)) == 0 and c == c_out,
                tail=any_of(*["none"] * 6, *TAILS) if structure == "written" else "none",
            )
        )
        if extra == "upsample":
            h, w = 2 * h, 2 * w
        c = c_out
        last = layers[-1]
        if last.repeated and ((h, w) != shapes[-1][1:] or extra == "upsample"):
            layers[-1] = last = last._replace(repeated=False)
        before = [shape for shape in shapes if shape[1:] == (h, w)]
        if last.tail in ("add", "iadd") and (c, h, w) not in shapes:
            layers[-1] = last._replace(tail="none")
        elif last.tail == "cat":
            if before and c + before[-1][0] <= MAX_CHANNELS:
                c += before[-1][0]
            else:
                layers[-1] = last._replace(tail="none")
        elif last.tail == "chunk" and c % 2:
            layers[-1] = last._replace(tail="none")
        elif last.tail == "chunk":
            c //= 2
        elif last.tail == "slice":
            c = 1
        elif last.tail == "transpose":
            h, w = w, h
        shapes.append((c, h, w))
    return Recipe(
        structure,
        channels,
        height,
        width,
        any_of(2, 3, 1, 2, 3),
        tuple(layers),
        shared_act=any_of(*range(6)) == 0,
        channels_last_input=any_of(True, False, False),
        channels_last_weights=any_of(True, False, False, False),
        frozen=any_of(*range(8)) == 0,
        seed=draw(st.integers(0, 2**20)),
    )


# --- from a recipe to a network ----------------------------------------------------------------------------


class Block(nn.Module):
    """Modules that are attributes, called one after the other by a forward."""

    def __init__(self, modules: list[tuple[str, nn.Module]], repeated: bool) -> None:
        super().__init__()
        self.conv = modules[0][1]
        self.rest = nn.ModuleList(module for _, module in modules[1:])
        self.repeated = repeated

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2 if self.repeated else 1):
            x = self.conv(x)
            for module in self.rest:
                x = module(x)
        return x


class Residual(nn.Module):
    """A Sequential whose result is added to its input where the shapes allow it."""

    def __init__(self, modules: list[tuple[str, nn.Module]], adds: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(*(module for _, module in modules))
        self.adds = adds

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.adds else y


class Written(nn.Module):
    """Base of the classes whose forward is written out from a recipe."""

    def __init__(self, roles: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, module in roles.items():
            self.add_module(name, module)
        self.gain = 0.75
        self.offset = nn.Parameter(torch.full((1,), 0.1))


def source(recipe: Recipe) -> str:
    """Write out the forward of a recipe."""
    lines = ["def forward(self, x):"]
    c, h, w = recipe.channels, recipe.height, recipe.width
    shapes = [(c, h, w)]
    for i, layer in enumerate(recipe.layers):
        lines.append(f"s{i} = x")
        body = [f"x = self.conv{i}(x)"]
        if layer.norm != "none":
            body.append(f"x = self.norm{i}(x)")
        if layer.extra != "none":
            body.append(f"x = self.extra{i}(x)")
        if layer.act != "none":
            body.append(f"x = {functional(layer)}" if layer.functional else f"x = self.act{i}(x)")
        lines += body * (2 if layer.repeated else 1)
        n = 2 if layer.extra == "upsample" else 1
        geometry = layer.kernel, layer.stride, layer.padding, layer.output_padding
        c = layer.c_out
        h, w = (n * side_after(layer.transposed, side, *geometry) for side in (h, w))
        j = next((j for j in reversed(range(i + 1)) if shapes[j] == (c, h, w)), 0)
        k = next((k for k in reversed(range(i + 1)) if shapes[k][1:] == (h, w)), 0)
        lines += {
            "none": [],
            "add": [f"x = x + s{j}"],
            "iadd": [f"x += s{j}"],
            "cat": [f"x = torch.cat([x, s{k}], 1)"],
            "gate": ["x = x * torch.sigmoid(x)"],
            "view": [f"x = x.reshape(x.size(0), -1).reshape(x.shape[0], {c}, {h}, {w})"],
            "transpose": ["x = x.transpose(2, 3)"],
            "chunk": ["a, b = x.chunk(2, dim=1)", "x = a - b"],
            "scale": ["x = self.gain * x + self.offset"],
            "mean": ["x = x - 0.5 * x.mean((2, 3), keepdim=True)"],
            "slice": ["x = x[:, :1]"],
            "clone": ["x = x.clone()"],
        }[layer.tail]
        if layer.tail == "cat":
            c += shapes[k][0]
        c = {"chunk": c // 2, "slice": 1}.get(layer.tail, c)
        h, w = (w, h) if layer.tail == "transpose" else (h, w)
        shapes.append((c, h, w))
    return "\n    ".join([*lines, "return x"])


def functional(layer: Layer) -> str:
    """Write an activation as a call of a function or method."""
    inplace = ", inplace=True" if layer.inplace else ""
    return {
        "relu": f"F.relu(x{inplace})" if layer.bias else ("x.relu_()" if layer.inplace else "torch.relu(x)"),
        "leaky_relu": f"F.leaky_relu(x, {layer.slope}{inplace})",
        "tanh": "torch.tanh(x)" if layer.bias else "x.tanh()",
        "sigmoid": "torch.sigmoid(x)" if layer.bias else "F.sigmoid(x)",
        "prelu": "F.prelu(x, self.offset)",
    }[layer.act]


def written(recipe: Recipe) -> type[Written]:
    """Return the class whose forward is the recipe's; pickles find it in this file."""
    text = source(recipe)
    name = f"Written_{hashlib.sha1(text.encode()).hexdigest()[:12]}"
    here = sys.modules[__name__]
    if not hasattr(here, name):
        space: dict[str, Any] = {"torch": torch, "F": F, "__name__": __name__}
        exec(text, space)
        setattr(here, name, type(name, (Written,), {"forward": space["forward"], "__module__": __name__}))
    return getattr(here, name)  # type: ignore[no-any-return]


def build(recipe: Recipe, dtype: torch.dtype) -> nn.Module:
    """Return the recipe's network, with the same values at every call."""
    torch.manual_seed(recipe.seed)
    acts: dict[str, nn.Module] = {}

    def modules(layer: Layer) -> list[tuple[str, nn.Module]]:
        found = layer.modules()
        if recipe.shared_act and layer.act != "none":
            found[-1] = "act", acts.setdefault(layer.act, found[-1][1])
        return found

    model: nn.Module
    if recipe.structure == "written":
        roles = {f"{role}{i}": m for i, layer in enumerate(recipe.layers) for role, m in modules(layer)}
        model = written(recipe)(roles)
    else:
        parts: list[nn.Module] = []
        for i, layer in enumerate(recipe.layers):
            found = modules(layer)
            unpadded = layer.kernel, layer.stride, layer.padding
            if recipe.structure == "sequential":
                parts += [module for _, module in found] * (2 if layer.repeated else 1)
            elif recipe.structure == "blocks" or i % 2:
                keeps = unpadded in ((3, 1, 1), (1, 1, 0), (5, 1, 2)) and layer.c_in == layer.c_out
                if keeps and layer.extra != "upsample":
                    parts.append(Residual(found, adds=True))
                else:
                    parts.append(Block(found, layer.repeated))
            else:
                parts.append(nn.Sequential(*(module for _, module in found)))
        if recipe.structure == "nested":
            middle = len(parts) // 2
            parts = [nn.Sequential(*parts[:middle]), nn.Sequential(*parts[middle:])]
        model = nn.Sequential(*parts)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias, 0.0, 0.3)
            if module.running_mean is not None and module.running_var is not None:
                nn.init.normal_(module.running_mean, 0.0, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    if recipe.frozen:
        next(model.parameters()).requires_grad_(False)
    model.to(dtype)
    return model.to(memory_format=torch.channels_last) if recipe.channels_last_weights else model


# --- results -----------------------------------------------------------------------------------------------

Results = dict[str, Tensor]


class Case(NamedTuple):
    """How a network is called."""

    training: bool
    grad: bool
    of_input: bool

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        return f"{mode}, {'with' if self.grad else 'no'} gradients, input {self.of_input}"


CASES = (
    Case(False, False, False),
    Case(True, True, True),
    Case(False, True, True),
    Case(True, True, False),
    Case(True, False, False),
    Case(False, False, True),
)


def strides(y: Tensor) -> Tensor:
    """Return the strides that matter: those of more than one element."""
    return torch.tensor([step for step, size in zip(y.stride(), y.shape, strict=True) if size > 1])


def run(model: nn.Module, x: Tensor, case: Case) -> Results:
    """Return the output, every gradient and every buffer of one call."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_(case.of_input)
    torch.manual_seed(7)
    with torch.set_grad_enabled(case.grad):
        y = model(x)
    found = {"output": y.detach(), "strides": strides(y), "noise": torch.rand(1)}
    if case.grad and y.requires_grad:
        weights = torch.linspace(-1, 1, max(y.numel(), 1), dtype=torch.float64).to(y.dtype)
        (y * weights[: y.numel()].view(y.shape)).sum().backward()
        found["input after the call"] = x.detach()
        gradients = {"input": x.grad, **{name: p.grad for name, p in model.named_parameters()}}
        found |= {f"gradient of {name}": g for name, g in gradients.items() if g is not None}
    found["requires_grad"] = torch.tensor(y.requires_grad)
    found |= {f"buffer {name}": b.detach().clone() for name, b in model.named_buffers()}
    calls = [(name, *shape) for name, m in model.named_modules() for shape in m.__dict__.pop("noted", [])]
    found |= {f"hook {i} of {name}": torch.tensor(shape) for i, (name, *shape) in enumerate(calls)}
    return found


def errors(actual: Results, expected: Results) -> dict[str, float]:
    """Return each tensor's error relative to its norm, or to 1e-2 of all gradients' if that is more."""
    squares = [float(t.double().square().sum()) for n, t in expected.items() if n.startswith("gradient")]
    floor = 1e-2 * sum(squares) ** 0.5
    found = {}
    for name, want in expected.items():
        error = float((actual[name].double() - want.double()).norm())
        norm = max(float(want.double().norm()), floor if name.startswith("gradient") else 0.0, 1e-3)
        found[name] = error / norm if error else 0.0
    return found


def disagreements(actual: Results, plain: Results, exact: Results | None) -> list[str]:
    """List what a fused network's results differ in, beyond rounding."""
    if actual.keys() != plain.keys():
        return [f"only one has {sorted(actual.keys() ^ plain.keys())}"]
    found = []
    for name, want in plain.items():
        got = actual[name]
        if (got.shape, got.dtype, got.device) != (want.shape, want.dtype, want.device):
            found.append(f"{name} is {got.dtype} {list(got.shape)}, not {want.dtype} {list(want.shape)}")
        elif (not want.dtype.is_floating_point or name == "noise") and not torch.equal(got, want):
            found.append(f"{name} is {got}, not {want}")
    if found:
        return found
    own = errors(plain, exact) if exact is not None else {}
    for name, error in errors(actual, plain if exact is None else exact).items():
        bound = EXACT if exact is None else max(NETWORK, TIMES_EAGER * own[name])
        if not error <= bound:
            found.append(f"{name}: error {error:.1e}, {bound:.1e} is allowed")
    return found


def sample(recipe: Recipe, attempt: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(recipe.seed + attempt)
    shape = recipe.batch, recipe.channels, recipe.height, recipe.width
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if recipe.channels_last_input else x


def sequence(model: nn.Module, x: Tensor, cases: tuple[Case, ...]) -> list[Results] | Exception:
    """Return the results of the cases in order; what PyTorch raises about a network is a result too."""
    found = []
    for case in cases:
        model.train(case.training)
        try:
            found.append(run(model, x, case))
        except (RuntimeError, ValueError) as error:
            return error
    return found


@contextlib.contextmanager
def thresholds(lowered: bool) -> Iterator[None]:
    """Let the kernels train networks of any size, or only where they are faster, as by default."""
    with pytest.MonkeyPatch.context() as patch:
        training, layer = (0.0, 0.0) if lowered else BY_DEFAULT
        patch.setattr(coverage, "MIN_TRAINING_MACS", training)
        patch.setattr(coverage, "MIN_LAYER_MACS", layer)
        yield


# --- tests -------------------------------------------------------------------------------------------------


def check(recipe: Recipe, dtype: torch.dtype, engine: str, cases: tuple[Case, ...]) -> None:
    """Compare a fused network with the plain one in these calls; and its copies, afterwards, with it."""
    problems: list[str] = []
    for attempt in range(ATTEMPTS):
        x = sample(recipe, attempt, dtype)
        plain = build(recipe, dtype)
        expected = sequence(plain, x, cases)
        if isinstance(expected, Exception):
            event(f"the plain network raises {type(expected).__name__}")
            return
        unfused = build(recipe, dtype)
        network = fast.fuse(unfused)
        assert list(network.state_dict()) == list(plain.state_dict())
        with ops.use_engine(engine), fresh_memory_is_nan(), ops.recording() as choices:
            actual = sequence(network, x, cases)
        assert not isinstance(actual, Exception), f"{type(actual).__name__}: {actual}\n{recipe}"
        event(f"ops run: {bool(choices)}")
        exact: list[Any] = [None] * len(cases)
        if dtype != torch.float64:
            wide = sequence(build(recipe, torch.float64), x.double(), cases)
            assert not isinstance(wide, Exception)
            exact = wide
        problems = [
            f"call {i} ({cases[i]}): {problem}"
            for i, found in enumerate(zip(actual, expected, exact, strict=True))
            for problem in disagreements(*found)
        ]
        if not problems:
            check_copies(recipe, network, x, engine)
            return
    text = source(recipe) if recipe.structure == "written" else ""
    raise AssertionError("\n".join([*problems, str(recipe), text]))


def check_copies(recipe: Recipe, network: nn.Module, x: Tensor, engine: str) -> None:
    """Check copies, pickles and checkpoints, from and to the plain network, against the network itself."""
    case = Case(False, False, False)
    plain = build(recipe, x.dtype)
    again = fast.fuse(build(recipe, x.dtype))
    plain.load_state_dict(network.state_dict())
    again.load_state_dict(plain.state_dict())
    copies = {"state_dict": again}
    computed = {layer.computed for layer in recipe.layers}
    if not computed & {"old weight", "old spectral"}:  # PyTorch copies none of these that has had gradients
        copies["deepcopy"] = copy.deepcopy(network)
    if not computed & {"old weight", "spectral", "weight"}:  # and pickles none of these
        copies["pickle"] = pickle.loads(pickle.dumps(network))
    with ops.use_engine(engine):
        expected = run(network.eval(), x, case)["output"]
        for name, model in copies.items():
            assert type(model) is type(network), f"{name}: {type(model)}, {type(network)}"
            got = run(model.eval(), x, case)["output"]
            error = float((got.double() - expected.double()).norm())
            assert error <= NETWORK * max(1e-3, float(expected.double().norm())), (
                f"{name}: {error:.1e}\n{recipe}"
            )


def draw_and_check(recipe: Recipe, dtype: torch.dtype, engine: str, lowered: bool, order: list[int]) -> None:
    with warnings.catch_warnings(), thresholds(lowered):
        warnings.simplefilter("ignore")
        check(recipe, dtype, engine, tuple(CASES[i] for i in order))


ROUTES = st.sampled_from(
    [(torch.float32, "auto")] * 4 + [(torch.float64, "auto"), (torch.float64, "reference")]
)
ORDERS = st.permutations(range(len(CASES))).map(lambda order: list(order[:4]))


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(recipe=recipes(), route=ROUTES, lowered=st.sampled_from([True, True, True, False]), order=ORDERS)
def test_drawn_networks(
    recipe: Recipe, route: tuple[torch.dtype, str], lowered: bool, order: list[int]
) -> None:
    draw_and_check(recipe, *route, lowered, order)


@pytest.mark.slow
@settings(max_examples=2000, suppress_health_check=list(HealthCheck))
@given(recipe=recipes(), route=ROUTES, lowered=st.sampled_from([True, True, True, False]), order=ORDERS)
def test_many_drawn_networks(
    recipe: Recipe, route: tuple[torch.dtype, str], lowered: bool, order: list[int]
) -> None:
    draw_and_check(recipe, *route, lowered, order)
