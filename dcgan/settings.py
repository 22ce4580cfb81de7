"""The settings of a training run, from defaults, a configuration file and the command line."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from dcgan.choices import DATASETS, IMAGE_SIZES, MIN_IMAGES, AugmentationName, Engine, Loss, Model
from dcgan.errors import InputError, is_plain
from dcgan.files import replacing

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:  # these import PyTorch, for which ``dcgan --help`` must not wait
    from dcgan.foreign import Foreign
    from dcgan.networks import Architecture
    from dcgan.training.config import Config


class Allowed:
    """What a type allows, in words that replace pydantic's in error messages."""

    def __init__(self, words: str) -> None:
        self.words = words

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.custom_error_schema(handler(source), "allowed", custom_error_message=self.words)


def _one_of(*values: Any) -> AfterValidator:
    return AfterValidator(lambda value: values[values.index(value)])  # index raises ValueError


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    if not is_plain(value):
        raise ValueError
    return value


AUGMENTATIONS = get_args(AugmentationName)


def _augmentations(value: list[AugmentationName]) -> list[AugmentationName]:
    if len(set(value)) != len(value):
        raise ValueError
    return value


CONFIG = "config.yaml"
"""The file of settings in a run's folder."""

Dataset = Annotated[str, _one_of(*DATASETS), Allowed(f"one of {', '.join(DATASETS)}")]
Count = Annotated[int, Field(ge=1), Allowed("an integer of at least 1")]
CountOrZero = Annotated[int, Field(ge=0), Allowed("an integer of at least 0")]
SIZES = f"one of {', '.join(map(str, IMAGE_SIZES))}"
ImageSize = Annotated[int, Field(ge=1), Allowed(f"{SIZES}, or with networks of your own a positive integer")]
Channels = Annotated[int, _one_of(1, 3), Allowed("1 or 3")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), Allowed("a positive number")]
Fraction = Annotated[float, Field(ge=0, lt=1), Allowed("a number in [0, 1)")]
Switch = Annotated[bool, Allowed("true or false")]
Classes = Annotated[
    list[str], Field(min_length=1), Allowed("a list of strings that names at least one class")
]
Augmentations = Annotated[
    list[AugmentationName],
    Field(min_length=1),
    AfterValidator(_augmentations),
    Allowed(f"a list of {', '.join(AUGMENTATIONS)}, each at most once"),
]
ImageCount = Annotated[int, Field(ge=MIN_IMAGES), Allowed(f"an integer of at least {MIN_IMAGES}")]
Arguments = Annotated[
    dict[str, Any],
    AfterValidator(_plain),
    Allowed("a table of numbers, strings, booleans, and lists of them"),
]

RESUMABLE = {
    *("dataroot", "workers", "engine", "compile", "device", "epochs", "sample_interval"),
    *("checkpoint_interval", "log_interval", "keep", "score", "eval_every", "eval_num", "tensorboard"),
}
"""The settings that may change when a run is resumed."""


class Settings(BaseModel):
    """The settings of one run. Each field is an option of ``dcgan train`` and a key of its config file.

    The defaults are those of the reference recipe. With ``label_smoothing`` s, D's target on real images is
    1 - s. The docstring of a field is the help of its option.

    Raises:
        InputError: if a value has the wrong type or is out of range. The message names the field, the value
            given and what is allowed.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    dataset: Dataset = "mnist"
    """Dataset to train on: mnist, fashion-mnist, cifar10, celeba, folder (your own images), digits (the 1,797
    digits of 8×8 pixels in scikit-learn) or fake (random noise)."""
    dataroot: str = "data"
    """Folder that holds the dataset, or the images of --dataset folder. A missing mnist, fashion-mnist,
    cifar10 or celeba is downloaded into it."""
    classes: Classes | None = None
    """Train on these classes only, separated by commas. Default: all classes."""
    limit: Count | None = None
    """Use at most this many images of the dataset. Default: all images."""
    workers: Count = 4
    """Number of threads that decode the images once, before training."""
    image_size: ImageSize = 64
    """Image height and width in pixels: 32, 64, 128 or 256."""
    channels: Channels | None = None
    """Image channels: 1 (grayscale) or 3 (RGB). Default: those of the dataset."""
    nz: Count = 100
    """Length of the latent vector z."""
    ngf: Count = 64
    """Channels of the generator's last hidden layer, whose maps have half the image size."""
    ndf: Count = 64
    """Channels of the discriminator's first hidden layer, whose maps have half the image size."""
    model: Model = "dcgan"
    """Network architecture: dcgan, or mlp (the original fully connected GAN)."""
    engine: Engine = "auto"
    """Kernels that run the networks: native (C++, CPU), triton (GPU), reference (PyTorch's own), or auto,
    which picks the fastest that is available for each layer."""
    compile: Switch = False
    """Compile both networks with torch.compile."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto uses a GPU if there is one."""
    dtype: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    """Precision of the computation: float32, tf32 (GPU only), or bfloat16 or float16 under autocast."""
    batch_size: Count = 128
    """Images per step, over all processes together; at most the whole dataset is used."""
    epochs: Count = 50
    """Number of passes over the dataset."""
    lr: Positive = 0.0002
    """Adam's learning rate for both networks."""
    beta1: Fraction = 0.5
    """Adam's beta1, the decay rate of the first moment, in [0, 1); beta2 is always 0.999."""
    seed: CountOrZero = 0
    """RNG seed of weight initialization, latent noise and data order."""
    loss: Loss = "non-saturating"
    """Generator loss: non-saturating, or minimax (the saturating loss of the original GAN)."""
    label_smoothing: Fraction = 0.1
    """One-sided label smoothing s in [0, 1): the target for real images is 1 - s."""
    clip: Positive | None = None
    """Clip the gradient norm of each network to this value. Default: no clipping."""
    ema: Fraction | None = None
    """Keep an exponential moving average of the generator with this decay, e.g. 0.999. The decay is warmed
    up, which suits short runs: after n steps it is at most (1 + n)/(10 + n). Default: no average."""
    flip: Switch = False
    """Mirror each real image horizontally with probability 1/2, for images that have no left and right."""
    diffaugment: Augmentations | None = None
    """Augment real and generated images alike in front of the discriminator, for datasets of a few thousand
    images or fewer: color, translation and cutout, or some of them, separated by commas. Default: no
    augmentation."""
    sync_batchnorm: Switch = False
    """Compute BatchNorm statistics over all processes instead of per process."""
    sample_interval: CountOrZero = 0
    """Number of steps between two grids of samples, in addition to one per epoch; 0 writes only those."""
    checkpoint_interval: CountOrZero = 200
    """Number of steps between two checkpoints, in addition to one per epoch; 0 saves only those."""
    log_interval: Count = 10
    """Number of steps after which their losses are read back and logged."""
    keep: Count = 3
    """Number of recent checkpoints to keep, in addition to the best."""
    score: Literal["pixels", "none"] = "pixels"
    """Score that selects the best checkpoint, computed once per epoch: pixels (Fréchet distance of images
    reduced to 8×8 pixels; lower is better) or none."""
    eval_every: CountOrZero = 0
    """Number of epochs between two evaluations of generated images, as by dcgan eval; best.pt is then the
    checkpoint with the lowest Fréchet distance. 0 never evaluates."""
    eval_num: ImageCount = 10_000
    """Number of images that --eval-every generates, and maximum number of real images to compare them
    with."""
    tensorboard: Switch = True
    """Write TensorBoard event files."""
    netG: str | None = None
    """Initialize the generator from this model file. Default: random weights."""
    netD: str | None = None
    """Initialize the discriminator from this model file. Default: random weights."""
    netG_module: str | None = None
    """Train your own generator, pkg.module:Class or path/to/file.py:Class. It maps z [N, nz, 1, 1] or [N, nz]
    to images and initializes itself. Default: the generator of --model."""
    netG_args: Arguments | None = None
    """Arguments of --netG-module's constructor, separated by commas; values are YAML. Default: none."""
    netD_module: str | None = None
    """Train your own discriminator, given as for --netG-module. It maps images to N probabilities.
    Default: the discriminator of --model."""
    netD_args: Arguments | None = None
    """Arguments of --netD-module's constructor, as for --netG-args. Default: none."""

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(_message(error)) from None
        for name, module, args in (
            ("netG", self.netG_module, self.netG_args),
            ("netD", self.netD_module, self.netD_args),
        ):
            if module is None and args is not None:
                raise InputError(f"{name}_args requires {name}_module, got {args!r}")
        if self.netG_module is None and self.netD_module is None and self.image_size not in IMAGE_SIZES:
            raise InputError(f"image_size must be {SIZES}, got {self.image_size!r}")

    @property
    def foreign_g(self) -> Foreign | None:
        """The user's own Generator, if any."""
        return _foreign(self.netG_module, self.netG_args)

    @property
    def foreign_d(self) -> Foreign | None:
        """The user's own Discriminator, if any."""
        return _foreign(self.netD_module, self.netD_args)

    def import_foreign(self) -> None:
        """Import the user's own networks, to report errors early. Raises InputError."""
        for foreign, option in ((self.foreign_g, "--netG-module"), (self.foreign_d, "--netD-module")):
            if foreign is not None:
                foreign.load(option)

    def architecture(self, channels: int) -> Architecture:
        """Return the architecture of both networks for images with `channels` channels."""
        from dcgan.networks import Architecture

        sizes = self.nz, channels, self.ngf, self.ndf, self.image_size
        return Architecture(self.model, *sizes, self.foreign_g, self.foreign_d)

    def config(self) -> Config:
        """Return the part of the settings that the training loop and step use."""
        from dcgan.training.config import Config

        same = self.model_dump(include={"epochs", "lr", "beta1", "loss", "seed"})
        return Config(latent_dim=self.nz, real_label=1 - self.label_smoothing, **same)

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump()

    @staticmethod
    def of(values: Mapping[str, Any], where: str = "") -> Settings:
        """Return settings with these values, and defaults for the rest.

        Raises:
            InputError: like the constructor, or if a key is not a field. The message begins with ``where``.
        """
        try:
            return Settings(**values)
        except InputError as error:
            raise InputError(f"{where}: {error}" if where else str(error)) from None

    def updated(self, values: Mapping[str, Any]) -> Settings:
        """Return these settings with some values replaced. Raises InputError like :meth:`of`."""
        return Settings(**{**self.to_dict(), **values})

    def resumed(self, values: Mapping[str, Any]) -> Settings:
        """Return these settings of an existing run, updated with `values`, to resume the run with.

        Raises:
            InputError: if a value differs from the run's and its setting cannot change on resume.
        """
        changed = self.updated(values)
        for name, value in values.items():
            if name not in RESUMABLE and getattr(changed, name) != getattr(self, name):
                raise InputError(
                    f"{name} is {getattr(self, name)!r} in the run to be resumed, got {value!r}; "
                    "it cannot change on resume, start a new run in another folder instead"
                )
        return changed


def _foreign(spec: str | None, args: dict[str, Any] | None) -> Foreign | None:
    from dcgan.foreign import Foreign

    return None if spec is None else Foreign(spec, args or {})


def _message(error: ValidationError) -> str:
    """Return one line that names the setting, what it allows and the value given."""
    first = error.errors()[0]
    name = first["loc"][0]
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(name), Settings.model_fields, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"unknown setting {name!r}; {hint}`dcgan train --help` lists all"
    return f"{name} must be {first['msg'].removeprefix('Input should be ')}, got {first['input']!r}"


# --- files ------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """A safe loader that also reads 2e-4 as a number; YAML 1.1 requires a decimal point."""


_NUMBER = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def read_file(path: Path) -> dict[str, Any]:
    """Return the values in a TOML or YAML file; the suffix decides the format.

    Raises:
        InputError: if the file cannot be read or parsed, has another suffix, or is not a table of settings.
    """
    return {key.replace("-", "_"): value for key, value in _table(path).items()}


def keys_of(path: Path) -> dict[str, str]:
    """Return the key of each setting in a file, as it stands there. Raises as :func:`read_file`."""
    return {key.replace("-", "_"): key for key in _table(path)}


def _table(path: Path) -> dict[str, Any]:
    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise InputError(f"{path} must end in .toml, .yaml or .yml")
    try:
        text = path.read_text()
        values = tomllib.loads(text) if path.suffix == ".toml" else parse_yaml(text)
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
    return values


def of_run(path: Path) -> Settings | None:
    """Return the settings of a run; None if there is no ``config.yaml``.

    Args:
        path: the run's folder, its ``checkpoints`` folder, or a file in that.

    Raises:
        InputError: like :func:`read_file` and :meth:`Settings.of`.
    """
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder.parent) if folder.name == "checkpoints" else (folder,):
        if (place / CONFIG).is_file() and (place == path or (place / "checkpoints").is_dir()):
            return Settings.of(read_file(place / CONFIG), str(place / CONFIG))
    return None


def write_file(settings: Settings, path: Path) -> None:
    """Write the settings as YAML that :func:`read_file` reads."""
    with replacing(path, durable=True) as file:
        file.write(yaml.safe_dump(settings.to_dict(), sort_keys=False).encode())
