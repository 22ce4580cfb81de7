"""The settings of a training run, from defaults, a configuration file and the command line."""

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
    """The command-line option of a :class:`Settings` field.

    Args:
        help_text: the option's help.
        flags: the option's spellings; by default the field's name with dashes.
        minimum: the smallest value allowed.
        resumable: whether the value may change when a run is resumed.
    """

    def __init__(
        self, help_text: str, *flags: str, minimum: float | None = None, resumable: bool = False
    ) -> None:
        self.help_text, self.flags, self.minimum, self.resumable = help_text, flags, minimum, resumable


@dataclass(frozen=True)
class Settings:
    """The settings of one run. Each field is an option of ``dcgan train`` and a key of its config file.

    The defaults are those of the reference recipe. With ``label_smoothing`` s, D's target on real images is
    1 - s.

    Raises:
        InputError: if a value has the wrong type or is out of range. The message names the field, the value
            given and what is allowed.
    """

    dataset: Annotated[
        str,
        Option(
            "Dataset to train on: mnist, fashion-mnist, cifar10, celeba, folder (a directory of images), "
            "digits (the 1,797 8×8 digits of scikit-learn) or fake (random noise)."
        ),
    ] = "mnist"
    dataroot: Annotated[
        str,
        Option(
            "Directory that holds the dataset, or for --dataset folder the images. Missing datasets are "
            "downloaded into it.",
            resumable=True,
        ),
    ] = "data"
    classes: Annotated[
        list[str] | None,
        Option("Train on these classes only, given as a comma-separated list. Default: all classes."),
    ] = None
    limit: Annotated[
        int | None, Option("Use at most N images of the dataset. Default: all images.", minimum=1)
    ] = None
    workers: Annotated[
        int,
        Option("Number of threads that decode the images once, before training.", minimum=1, resumable=True),
    ] = 4
    image_size: Annotated[
        int, Option("Image height and width in pixels: 32, 64, 128 or 256.", "--image-size", "--imageSize")
    ] = 64
    channels: Annotated[
        int | None,
        Option(
            "Image channels: 1 (grayscale) or 3 (RGB). Default: those of the dataset.", "--channels", "--nc"
        ),
    ] = None
    nz: Annotated[int, Option("Length of the latent vector z.", minimum=1)] = 100
    ngf: Annotated[
        int, Option("Channels of the generator's last hidden layer (half the image size).", minimum=1)
    ] = 64
    ndf: Annotated[
        int, Option("Channels of the discriminator's first hidden layer (half the image size).", minimum=1)
    ] = 64
    model: Annotated[
        Model, Option("Network architecture: dcgan, or mlp (the original fully connected GAN).")
    ] = "dcgan"
    engine: Annotated[
        Engine,
        Option("Kernels that run the networks; auto picks the fastest available engine.", resumable=True),
    ] = "auto"
    compile: Annotated[bool, Option("Compile both networks with torch.compile.", resumable=True)] = False
    device: Annotated[
        Device, Option("Device to train on; auto uses a GPU if there is one.", resumable=True)
    ] = "auto"
    dtype: Annotated[
        Dtype, Option("Compute precision: float32, tf32 (GPU only), or bfloat16 / float16 under autocast.")
    ] = "float32"
    batch_size: Annotated[
        int,
        Option("Images per step, over all processes together.", "--batch-size", "--batchSize", minimum=1),
    ] = 128
    epochs: Annotated[
        int, Option("Number of passes over the dataset.", "--epochs", "--niter", minimum=1, resumable=True)
    ] = 50
    lr: Annotated[float, Option("Adam's learning rate for both networks.")] = 0.0002
    beta1: Annotated[
        float, Option("Adam's beta1, the decay rate of the first moment; beta2 is always 0.999.")
    ] = 0.5
    seed: Annotated[
        int,
        Option(
            "RNG seed for weight initialization, latent noise and data order.",
            "--seed",
            "--manualSeed",
            minimum=0,
        ),
    ] = 0
    loss: Annotated[
        Loss, Option("Generator loss: non-saturating, or minimax (the saturating loss of the original GAN).")
    ] = "non-saturating"
    label_smoothing: Annotated[
        float, Option("One-sided label smoothing s in [0, 1): the target for real images is 1 - s.")
    ] = 0.1
    clip: Annotated[
        float | None, Option("Clip the gradient norm of each network to this value. Default: no clipping.")
    ] = None
    ema: Annotated[
        float | None,
        Option(
            "Keep an exponential moving average of the generator with this decay, e.g. 0.999. "
            "Default: no average."
        ),
    ] = None
    sync_batchnorm: Annotated[
        bool, Option("Compute BatchNorm statistics over all processes instead of per process.")
    ] = False
    sample_interval: Annotated[
        int,
        Option(
            "Write a grid of samples every N steps, in addition to one per epoch; 0 writes only those.",
            minimum=0,
            resumable=True,
        ),
    ] = 0
    checkpoint_interval: Annotated[
        int,
        Option(
            "Save a checkpoint every N steps, in addition to one per epoch; 0 saves only those.",
            minimum=0,
            resumable=True,
        ),
    ] = 200
    log_interval: Annotated[
        int, Option("Read back and log the losses every N steps.", minimum=1, resumable=True)
    ] = 10
    keep: Annotated[
        int,
        Option("Number of recent checkpoints to keep, in addition to the best.", minimum=1, resumable=True),
    ] = 3
    score: Annotated[
        Score,
        Option(
            "Score that selects the best checkpoint, computed once per epoch: pixels (Fréchet distance of "
            "images reduced to 8×8 pixels; lower is better) or none.",
            resumable=True,
        ),
    ] = "pixels"
    tensorboard: Annotated[bool, Option("Write TensorBoard event files.", resumable=True)] = True
    netG: Annotated[str | None, Option("Initialize the generator from this model file.", "--netG")] = None
    netD: Annotated[str | None, Option("Initialize the discriminator from this model file.", "--netD")] = None

    def __post_init__(self) -> None:
        for name, (kind, option) in options().items():
            value = getattr(self, name)
            _check_type(name, value, kind)
            if option.minimum is not None and value is not None and value < option.minimum:
                raise InputError(f"{name} must be at least {option.minimum}, got {value!r}")
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
        """Return the architecture of both networks for images with `channels` channels."""
        return Architecture(
            model=self.model,
            latent_dim=self.nz,
            channels=channels,
            features_g=self.ngf,
            features_d=self.ndf,
            image_size=self.image_size,
        )

    def config(self) -> Config:
        """Return the part of the settings that the training loop and step use."""
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
        """Return settings with these values, and defaults for the rest.

        Args:
            values: the values by field name.
            where: where the values come from, for error messages.

        Raises:
            InputError: if a key is not a field, or the constructor rejects a value.
        """
        return Settings().updated(values, where)

    def updated(self, values: Mapping[str, Any], where: str = "the configuration") -> Settings:
        """Return these settings with some values replaced. Raises InputError like :meth:`of`."""
        unknown = [key for key in values if key not in options()]
        if unknown:
            raise InputError(
                f"{where}: unknown setting {unknown[0]!r}; the settings are {', '.join(options())}"
            )
        return replace(self, **values)

    def resumed(self, values: Mapping[str, Any]) -> Settings:
        """Return these settings of an existing run, updated with `values`, to resume the run with.

        Raises:
            InputError: if a value differs from the run's and its setting cannot change on resume.
        """
        for name, value in values.items():
            if name in options() and not options()[name][1].resumable and value != getattr(self, name):
                raise InputError(
                    f"{name} is {getattr(self, name)!r} in the run to be resumed, got {value!r}; "
                    "it cannot change on resume, start a new run in another folder instead"
                )
        return self.updated(values)


@functools.cache
def options() -> dict[str, tuple[Any, Option]]:
    """Return the type and option of every field, by name."""
    hints = typing.get_type_hints(Settings, include_extras=True)
    return {name: get_args(hints[name]) for name in (f.name for f in fields(Settings))}


def _check_type(name: str, value: Any, kind: Any) -> None:
    if not _has_type(value, kind):
        raise InputError(f"{name} must be {_describe_type(kind)}, got {value!r}")


def _has_type(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (typing.Union, types.UnionType):
        return any(_has_type(value, member) for member in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_has_type(item, get_args(kind)[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _describe_type(kind: Any) -> str:
    if get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_describe_type(member) for member in get_args(kind))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return "a list of strings"
    words = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "None"}
    return words[kind]


# --- files ------------------------------------------------------------------------------------------------


def _yaml() -> Any:
    """Return a safe loader that also reads 2e-4 as a number; YAML 1.1 requires a decimal point."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def read_file(path: Path) -> dict[str, Any]:
    """Return the values in a TOML or YAML file; the suffix decides the format.

    Raises:
        InputError: if the file cannot be read or parsed, has another suffix, or is not a table of settings.
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
        raise InputError(
            f"{path} is not valid {path.suffix[1:].upper()}: {' '.join(str(error).split())}"
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{path} must be a table of settings")
    return {key.replace("-", "_"): value for key, value in values.items()}


def write_file(settings: Settings, path: Path) -> None:
    """Write the settings as YAML that :func:`read_file` reads."""
    import yaml

    with replacing(path, durable=True) as file:
        file.write(yaml.safe_dump(settings.to_dict(), sort_keys=False).encode())
