"""All that a run is made of, as plain values: defaults, a file's, a person's on the command line."""

from __future__ import annotations

import functools
import math
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from dcgan.errors import InputError
from dcgan.files import replacing
from dcgan.models import IMAGE_SIZES
from dcgan.networks import Architecture, Engine, Model
from dcgan.training.config import Config, Loss

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Dtype = Literal["float32", "tf32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Score = Literal["pixels", "none"]


class Option:
    """What a field of :class:`Settings` is on the command line.

    Args:
        about: its help.
        flags: its spellings; by default its name with dashes.
        least: the least value allowed.
        resumes: whether it may change when a run is resumed.
    """

    def __init__(self, about: str, *flags: str, least: float | None = None, resumes: bool = False) -> None:
        self.about, self.flags, self.least, self.resumes = about, flags, least, resumes


@dataclass(frozen=True)
class Settings:
    """One run. Each field is an option of ``dcgan train`` and a key of its configuration file.

    The defaults are the seed's. ``label_smoothing`` s makes D's target on real images 1 - s.

    Raises:
        InputError: a value of another type or out of its range; names the field, the value, what is allowed.
    """

    dataset: Annotated[str, Option("mnist, fashion-mnist, cifar10, celeba, folder, digits or fake.")] = (
        "mnist"
    )
    dataroot: Annotated[str, Option("Folder of the images, or that the dataset is in.", resumes=True)] = (
        "data"
    )
    classes: Annotated[
        list[str] | None, Option("Only these classes of the dataset, separated by commas.")
    ] = None
    limit: Annotated[int | None, Option("Only so many of its images.", least=1)] = None
    workers: Annotated[int, Option("Threads that decode images, once.", least=1, resumes=True)] = 4
    image_size: Annotated[
        int, Option("Height and width: 32, 64, 128 or 256.", "--image-size", "--imageSize")
    ] = 64
    channels: Annotated[
        int | None, Option("Of the images; the dataset's own by default.", "--channels", "--nc")
    ] = None
    nz: Annotated[int, Option("Length of the latent vector z.", least=1)] = 100
    ngf: Annotated[int, Option("Channels of G's map of half the image's size.", least=1)] = 64
    ndf: Annotated[int, Option("Channels of D's map of half the image's size.", least=1)] = 64
    model: Annotated[Model, Option("dcgan, or mlp, the original fully connected GAN.")] = "dcgan"
    engine: Annotated[Engine, Option("What runs the networks; auto: the fastest.", resumes=True)] = "auto"
    compile: Annotated[bool, Option("Both networks through torch.compile.", resumes=True)] = False
    device: Annotated[Device, Option("auto: the GPU if any.", resumes=True)] = "auto"
    dtype: Annotated[Dtype, Option("bfloat16 and float16 under autocast, tf32 on a GPU.")] = "float32"
    batch_size: Annotated[
        int, Option("Images a step, on all devices together.", "--batch-size", "--batchSize", least=1)
    ] = 128
    epochs: Annotated[
        int, Option("Times through the images.", "--epochs", "--niter", least=1, resumes=True)
    ] = 50
    lr: Annotated[float, Option("Adam's step size.")] = 0.0002
    beta1: Annotated[float, Option("Adam's first decay rate.")] = 0.5
    seed: Annotated[int, Option("Of weights, noise and order.", "--seed", "--manualSeed", least=0)] = 0
    loss: Annotated[Loss, Option("G's loss; minimax is the original game's.")] = "non-saturating"
    label_smoothing: Annotated[float, Option("How far below 1 D's target on real images is.")] = 0.1
    clip: Annotated[float | None, Option("Largest norm of a network's gradients.")] = None
    ema: Annotated[float | None, Option("Keep a moving average of G with this decay, e.g. 0.999.")] = None
    sync_batchnorm: Annotated[bool, Option("With several processes: one BatchNorm over all.")] = False
    sample_interval: Annotated[
        int,
        Option("Steps between grids of samples, besides one an epoch; 0: no others.", least=0, resumes=True),
    ] = 0
    checkpoint_interval: Annotated[
        int, Option("Steps between checkpoints, besides one an epoch; 0: no others.", least=0, resumes=True)
    ] = 200
    log_interval: Annotated[int, Option("Steps between readings of the losses.", least=1, resumes=True)] = 10
    keep: Annotated[int, Option("Checkpoints that are kept, besides the best.", least=1, resumes=True)] = 3
    score: Annotated[
        Score,
        Option(
            "What marks the best checkpoint, once an epoch: the Fréchet distance of 8×8 pixels.", resumes=True
        ),
    ] = "pixels"
    tensorboard: Annotated[bool, Option("Write TensorBoard's event files.", resumes=True)] = True
    netG: Annotated[str | None, Option("Start from the Generator in this file.", "--netG")] = None
    netD: Annotated[str | None, Option("Start from the Discriminator in this file.", "--netD")] = None

    def __post_init__(self) -> None:
        for name, (kind, option) in options().items():
            value = getattr(self, name)
            _check_type(name, value, kind)
            if option.least is not None and value is not None and value < option.least:
                raise InputError(f"{name} must be at least {option.least}, got {value!r}")
        if self.image_size not in IMAGE_SIZES:
            allowed = ", ".join(map(str, IMAGE_SIZES))
            raise InputError(f"image_size must be one of {allowed}, got {self.image_size!r}")
        if self.channels not in (None, 1, 3):
            raise InputError(f"channels must be 1 or 3, got {self.channels!r}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InputError(f"lr must be a positive number, got {self.lr!r}")
        if not 0 <= self.beta1 < 1:
            raise InputError(f"beta1 must be in [0, 1), got {self.beta1!r}")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing must be in [0, 1), got {self.label_smoothing!r}")
        if self.clip is not None and not (self.clip > 0 and math.isfinite(self.clip)):
            raise InputError(f"clip must be a positive number, got {self.clip!r}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise InputError(f"ema must be in [0, 1), got {self.ema!r}")
        if self.classes is not None and not self.classes:
            raise InputError("classes must name at least one class, got none")

    def architecture(self, channels: int) -> Architecture:
        """The networks', for images of so many channels."""
        return Architecture(
            model=self.model,
            latent_dim=self.nz,
            channels=channels,
            features_g=self.ngf,
            features_d=self.ndf,
            image_size=self.image_size,
        )

    def config(self) -> Config:
        """What the step takes of it."""
        return Config(
            epochs=self.epochs,
            latent_dim=self.nz,
            lr=self.lr,
            beta1=self.beta1,
            real_label=1 - self.label_smoothing,
            loss=self.loss,
            seed=self.seed,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(values: Mapping[str, Any], where: str = "the configuration") -> Settings:
        """Settings of some values, the rest being the defaults.

        Raises:
            InputError: a key that is none of the fields; a value as the constructor.
        """
        return Settings().updated(values, where)

    def updated(self, values: Mapping[str, Any], where: str = "the configuration") -> Settings:
        """These settings with some values replaced. Raises InputError as :meth:`of`."""
        unknown = [key for key in values if key not in options()]
        if unknown:
            raise InputError(f"{where}: unknown setting {unknown[0]!r}; known are {', '.join(options())}")
        return replace(self, **values)

    def resumed(self, values: Mapping[str, Any]) -> Settings:
        """These settings, a run's, with what may be changed when it is resumed.

        Raises:
            InputError: a value that differs from the run's where that would make another run of it.
        """
        for name, value in values.items():
            if name in options() and not options()[name][1].resumes and value != getattr(self, name):
                raise InputError(
                    f"{name} is {getattr(self, name)!r} in the run to be resumed, got {value!r}; "
                    "a run keeps it, start another one in a folder of its own"
                )
        return self.updated(values)


@functools.cache
def options() -> dict[str, tuple[Any, Option]]:
    """Every field's type and option, by name."""
    hints = typing.get_type_hints(Settings, include_extras=True)
    return {name: get_args(hints[name]) for name in (f.name for f in fields(Settings))}


def _check_type(name: str, value: Any, kind: Any) -> None:
    if not _is_of(value, kind):
        raise InputError(f"{name} must be {_in_words(kind)}, got {value!r}")


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (typing.Union, types.UnionType):
        return any(_is_of(value, one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(one, get_args(kind)[0]) for one in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _in_words(kind: Any) -> str:
    if get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_in_words(one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return "a list of text"
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}
    return words[kind]


# --- files ------------------------------------------------------------------------------------------------


def _yaml() -> Any:
    """A safe loader for which 2e-4 is a number, as it is for everyone but YAML 1.1."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def read_file(path: Path) -> dict[str, Any]:
    """The values in a TOML or YAML file, by its ending.

    Raises:
        InputError: it can't be read or parsed, has another ending, or is no table of settings.
    """
    import yaml

    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise InputError(f"{path} must end in .toml, .yaml or .yml")
    try:
        text = path.read_text()
        values = tomllib.loads(text) if path.suffix == ".toml" else yaml.load(text, _yaml())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} is no {path.suffix[1:].upper()}: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{path} must be a table of settings")
    return {key.replace("-", "_"): value for key, value in values.items()}


def write_file(settings: Settings, path: Path) -> None:
    """As YAML that :func:`read_file` reads."""
    import yaml

    with replacing(path, durable=True) as file:
        file.write(yaml.safe_dump(settings.to_dict(), sort_keys=False).encode())
