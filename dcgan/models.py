"""The reference networks: DCGAN in plain PyTorch, and the fully connected GAN it is compared with.

Shapes below are for the defaults (image size 64). A Generator's maps double from 4×4 to the image size and
its channels halve from ``features * image_size / 8`` to ``features``; a Discriminator's do the reverse. Every
convolution is 4×4 without bias. As in the reference recipe, DCGAN's initialization must be applied explicitly
(``model.apply(weights_init)``).

Sources: Radford, Metz, Chintala, *Unsupervised Representation Learning with Deep Convolutional Generative
Adversarial Networks*, 2016; Goodfellow et al., *Generative Adversarial Networks*, 2014, for the MLP pair.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dcgan.choices import IMAGE_SIZES
from dcgan.errors import check_positive_integers

LEAKY_SLOPE = 0.2


def weights_init(module: nn.Module) -> None:
    """Initialize as DCGAN does, for ``model.apply``: Conv N(0, 0.02); BatchNorm weight N(1, 0.02), bias 0.

    The class name decides, as in pytorch/examples, so that subclasses of the layers are initialized too.
    """
    name = type(module).__name__
    if "Conv" in name:
        nn.init.normal_(module.weight.data, 0.0, 0.02)  # type: ignore[arg-type]
    elif "BatchNorm" in name:
        nn.init.normal_(module.weight.data, 1.0, 0.02)  # type: ignore[arg-type]
        nn.init.constant_(module.bias.data, 0)  # type: ignore[arg-type]


def check_sigmoid(main: nn.Module) -> None:
    """Raise TypeError unless ``main`` is a plain nn.Sequential that ends in a Sigmoid."""
    what = "logits() needs main to be a plain nn.Sequential that ends in a Sigmoid, but main"
    if not isinstance(main, nn.Sequential):
        raise TypeError(f"{what} is a {type(main).__name__}, not an nn.Sequential")
    plain = vars(type(main)).get("_fused_from", type(main))  # of a fused one
    if plain.forward is not nn.Sequential.forward or "forward" in main.__dict__:
        raise TypeError(f"{what} overrides forward")
    if not len(main) or type(main[-1]) is not nn.Sigmoid:
        raise TypeError(f"{what} ends in {type(main[-1]).__name__ if len(main) else 'nothing'}")


def without_sigmoid(sequence: nn.Sequential) -> nn.Sequential:
    """Return the sequence without the Sigmoid at its end; its modules are shared.

    Raises:
        TypeError: ``sequence`` is not a plain nn.Sequential, or does not end in a Sigmoid.
    """
    check_sigmoid(sequence)
    return sequence[:-1]


def _tensor(name: str, value: Any) -> Tensor:
    """Return ``value`` if it is a tensor, else raise a TypeError that says how to get one."""
    if not isinstance(value, Tensor):
        hint = f"; convert it with torch.from_numpy({name})" if type(value).__module__ == "numpy" else ""
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__qualname__}{hint}")
    return value


def _check_latent(z: Tensor, latent_dim: int) -> Tensor:
    """Return z, [N, latent_dim] or [N, latent_dim, 1, 1]. Raises TypeError or ValueError for others."""
    z = _tensor("z", z)
    if z.shape[1:] != (latent_dim,) and z.shape[1:] != (latent_dim, 1, 1):
        raise ValueError(f"z must be [N, {latent_dim}] or [N, {latent_dim}, 1, 1], got {list(z.shape)}")
    return z


def _check_image(image: Tensor, channels: int, size: int) -> Tensor:
    """Return the image, [N, channels, size, size]. Raises TypeError or ValueError for anything else."""
    image = _tensor("image", image)
    if image.ndim != 4 or image.shape[1:] != (channels, size, size):
        raise ValueError(f"image must be [N, {channels}, {size}, {size}], got {list(image.shape)}")
    return image


def _widths(features: int, image_size: int) -> list[int]:
    """Return the channels of the maps from 4×4 to ``image_size / 2``: [512, 256, 128, 64] by default."""
    if image_size not in IMAGE_SIZES:
        raise ValueError(f"image_size must be one of {IMAGE_SIZES}, got {image_size!r}")
    levels = image_size.bit_length() - 3  # maps of 4, 8, …, image_size / 2
    return [features << (levels - 1 - i) for i in range(levels)]


class _Sized(nn.Module):
    """A network that stores its constructor's arguments, which are all sizes."""

    _SIZES: tuple[str, ...]

    def sizes(self) -> dict[str, int]:
        """Return the constructor's arguments, by name."""
        return {name: getattr(self, name) for name in self._SIZES}


class _Inferable(_Sized, abc.ABC):
    """A network whose sizes can be read off its state dict, so that a mismatched checkpoint changes nothing.

    ``nn.Module.load_state_dict`` reports a size mismatch only after it has copied everything that matches.
    """

    @staticmethod
    @abc.abstractmethod
    def sizes_of(state: Mapping[str, Any]) -> dict[str, int]:
        """Return the constructor's arguments that fit ``state``. Raises ValueError if none do."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load as ``nn.Module.load_state_dict`` does, but leave the network unchanged if any size differs.

        Raises:
            RuntimeError: the checkpoint's sizes differ from the model's; names both. Nothing has been loaded.
        """
        own = self.state_dict(keep_vars=True)
        wrong = [
            k
            for k, v in state_dict.items()
            if k in own and isinstance(v, Tensor) and isinstance(own[k], Tensor) and v.shape != own[k].shape
        ]
        if wrong:
            name, key = type(self).__name__, wrong[0]
            there, here = list(state_dict[key].shape), list(own[key].shape)
            tensor = f"{key} is {there} in the checkpoint and {here} in the model"
            try:
                found: dict[str, int] | str = self.sizes_of(state_dict)
            except ValueError:
                found = "of unknown sizes"
            if found == self.sizes():  # sizes() does not cover every tensor
                more = f"; {len(wrong)} tensors differ" if len(wrong) > 1 else ""
                why = f"its convolutions fit {_call(name, found)}, but {tensor}{more}"
            else:
                model = _call(name, self.sizes())
                why = f"the checkpoint is {_call(name, found)}, the model is {model}; e.g. {tensor}"
            raise RuntimeError(f"state_dict does not fit this {name}: {why}. Nothing was loaded.")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _call(name: str, sizes: dict[str, int] | str) -> str:
    if isinstance(sizes, str):
        return sizes
    return f"{name}({', '.join(f'{k}={v}' for k, v in sizes.items())})"


def _convolutions(state: Mapping[str, Any], what: str) -> list[Tensor]:
    """Return the 4-D weights of a state dict, in the order of their layers."""
    found = (
        sorted(
            (int(k.split(".")[1]), v)
            for k, v in state.items()
            if k.startswith("main.") and k.endswith(".weight") and isinstance(v, Tensor) and v.ndim == 4
        )
        if all(isinstance(k, str) for k in state)
        else []
    )
    if len(found) < 4:
        raise ValueError(
            f"not a {what}'s state dict: found {len(found)} convolution weights named main.N.weight"
        )
    return [w for _, w in found]


class Generator(_Inferable):
    """G(z): ConvTranspose2d–BatchNorm–ReLU from a 1×1 map to 4×4, doubling up to the image size, then Tanh.

    Args:
        latent_dim: length of z.
        channels: channels of the image (1 for MNIST, 3 for RGB).
        features: channels of the last hidden map; the maps before it have 2×, 4×, … as many.
        image_size: 32, 64, 128 or 256.

    Shape:
        z [N, latent_dim] or [N, latent_dim, 1, 1] → image [N, channels, image_size, image_size] in (-1, 1).

    Raises:
        ValueError: a size is not allowed, or z has another shape.
        TypeError: z is not a tensor.
    """

    _SIZES = ("latent_dim", "channels", "features", "image_size")

    def __init__(
        self, latent_dim: int = 100, channels: int = 1, features: int = 64, image_size: int = 64
    ) -> None:
        super().__init__()
        check_positive_integers(ValueError, latent_dim=latent_dim, channels=channels, features=features)
        widths = _widths(features, image_size)
        self.latent_dim, self.channels = latent_dim, channels
        self.features, self.image_size = features, image_size

        layers: list[nn.Module] = []
        c_in, stride, padding = latent_dim, 1, 0
        for c_out in widths:
            layers += [
                nn.ConvTranspose2d(c_in, c_out, 4, stride, padding, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(True),
            ]
            c_in, stride, padding = c_out, 2, 1
        layers += [nn.ConvTranspose2d(c_in, channels, 4, 2, 1, bias=False), nn.Tanh()]
        self.main = nn.Sequential(*layers)

    @staticmethod
    def sizes_of(state: Mapping[str, Any]) -> dict[str, int]:
        weights = _convolutions(state, "Generator")
        return {
            "latent_dim": weights[0].shape[0],
            "channels": weights[-1].shape[1],
            "features": weights[-1].shape[0],
            "image_size": 4 << (len(weights) - 1),
        }

    def _latent(self, z: Tensor) -> Tensor:
        """Return z as [N, latent_dim, 1, 1]. Raises TypeError or ValueError for anything else."""
        z = _check_latent(z, self.latent_dim)
        return z[:, :, None, None] if z.ndim == 2 else z

    def forward(self, z: Tensor) -> Tensor:
        return self.main(self._latent(z))  # type: ignore[no-any-return]


class Discriminator(_Inferable):
    """D(x): Conv2d–BatchNorm–LeakyReLU(0.2), halving to a 4×4 map (no BatchNorm in the first), then Sigmoid.

    Args:
        channels: channels of the image.
        features: channels of the first hidden map.
        image_size: 32, 64, 128 or 256.

    Shape:
        image [N, channels, image_size, image_size] → probability [N] in (0, 1).

    Raises:
        ValueError: a size is not allowed, or the image has another shape.
        TypeError: the image is not a tensor.
    """

    _SIZES = ("channels", "features", "image_size")

    def __init__(self, channels: int = 1, features: int = 64, image_size: int = 64) -> None:
        super().__init__()
        check_positive_integers(ValueError, channels=channels, features=features)
        widths = _widths(features, image_size)[::-1]
        self.channels, self.features, self.image_size = channels, features, image_size

        layers: list[nn.Module] = []
        c_in = channels
        for level, c_out in enumerate(widths):
            layers.append(nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False))
            if level > 0:
                layers.append(nn.BatchNorm2d(c_out))
            layers.append(nn.LeakyReLU(LEAKY_SLOPE, inplace=True))
            c_in = c_out
        layers += [nn.Conv2d(c_in, 1, 4, 1, 0, bias=False), nn.Sigmoid()]
        self.main = nn.Sequential(*layers)

    @staticmethod
    def sizes_of(state: Mapping[str, Any]) -> dict[str, int]:
        weights = _convolutions(state, "Discriminator")
        return {
            "channels": weights[0].shape[1],
            "features": weights[0].shape[0],
            "image_size": 4 << (len(weights) - 1),
        }

    def _image(self, image: Tensor) -> Tensor:
        return _check_image(image, self.channels, self.image_size)

    def forward(self, image: Tensor) -> Tensor:
        return self.main(self._image(image)).view(-1, 1).squeeze(1)  # type: ignore[no-any-return]

    def logits(self, image: Tensor) -> Tensor:
        """Return D(image) before its Sigmoid, [N], for a numerically stable loss.

        Raises:
            TypeError: ``main`` no longer ends in a Sigmoid, or the image is not a tensor.
            ValueError: the image has another shape.
        """
        return without_sigmoid(self.main)(self._image(image)).view(-1, 1).squeeze(1)  # type: ignore[no-any-return]


class MLPGenerator(_Sized):
    """The original GAN's fully connected generator, for the comparison with DCGAN.

    Linear–ReLU three times (256, 512, 1024), then Linear–Tanh to the pixels, without the normalization that
    DCGAN introduced. z [N, latent_dim] or [N, latent_dim, 1, 1] → [N, channels, image_size, image_size].
    """

    _SIZES = ("latent_dim", "channels", "image_size")

    def __init__(self, latent_dim: int = 100, channels: int = 1, image_size: int = 64) -> None:
        super().__init__()
        check_positive_integers(ValueError, latent_dim=latent_dim, channels=channels, image_size=image_size)
        self.latent_dim, self.channels, self.image_size = latent_dim, channels, image_size
        widths = (latent_dim, 256, 512, 1024)
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(widths):
            layers += [nn.Linear(n_in, n_out), nn.ReLU(True)]
        self.main = nn.Sequential(*layers, nn.Linear(widths[-1], channels * image_size**2), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        pixels = self.main(_check_latent(z, self.latent_dim).flatten(1))
        return pixels.view(-1, self.channels, self.image_size, self.image_size)  # type: ignore[no-any-return]


class MLPDiscriminator(_Sized):
    """The original GAN's fully connected discriminator: Linear–LeakyReLU(0.2) (512, 256), Linear–Sigmoid.

    image [N, channels, image_size, image_size] → probability [N].
    """

    _SIZES = ("channels", "image_size")

    def __init__(self, channels: int = 1, image_size: int = 64) -> None:
        super().__init__()
        check_positive_integers(ValueError, channels=channels, image_size=image_size)
        self.channels, self.image_size = channels, image_size
        widths = (channels * image_size**2, 512, 256)
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(widths):
            layers += [nn.Linear(n_in, n_out), nn.LeakyReLU(LEAKY_SLOPE, inplace=True)]
        self.main = nn.Sequential(*layers, nn.Linear(widths[-1], 1), nn.Sigmoid())

    def _image(self, image: Tensor) -> Tensor:
        return _check_image(image, self.channels, self.image_size).flatten(1)

    def forward(self, image: Tensor) -> Tensor:
        return self.main(self._image(image)).squeeze(1)  # type: ignore[no-any-return]

    def logits(self, image: Tensor) -> Tensor:
        """Return the logits, as :meth:`Discriminator.logits` does."""
        return without_sigmoid(self.main)(self._image(image)).squeeze(1)  # type: ignore[no-any-return]
