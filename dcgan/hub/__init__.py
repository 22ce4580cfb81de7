"""The networks on the Hugging Face Hub: ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    from dcgan import hub

    generator = hub.Generator.from_run("runs/mnist")        # a trained network, with its run's record
    generator.save_pretrained("dcgan-mnist")                # a folder, without a network connection
    generator.push_to_hub("you/dcgan-mnist")                # the same folder, uploaded
    generator = hub.Generator.from_pretrained("you/dcgan-mnist")    # or the path of a folder

The classes are the drop-ins of :mod:`dcgan.fast` with huggingface_hub's ``PyTorchModelHubMixin``. A folder
holds ``model.safetensors`` as :func:`dcgan.export.safetensors` writes it, ``config.json`` with the arguments
of the constructor, the model card ``README.md`` (:mod:`dcgan.hub.card`) and, for the network of a run, its
newest sample grid ``samples.png``.

Importing this module raises ModuleNotFoundError if huggingface_hub is missing; the extra ``hub`` installs it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch

from dcgan import export, extras, fast, pretrained
from dcgan.choices import Network, Which
from dcgan.errors import InputError, RunError, one_line
from dcgan.files import reporting_errors

try:
    from huggingface_hub import HfApi, ModelCard, ModelCardData, PyTorchModelHubMixin, hf_hub_download
    from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(extras.advice(error) or str(error), name=error.name) from error

from dcgan.hub import card

__all__ = ["Discriminator", "Generator", "check_repository", "network_of", "push", "write"]

REPOSITORY = "https://github.com/dcgan-kernels/dcgan-kernels"

T = TypeVar("T", bound="_Shared")


class _Shared(
    PyTorchModelHubMixin,
    library_name="dcgan-kernels",
    license="mit",
    repo_url=REPOSITORY,
    tags=["dcgan", "gan", "pytorch"],
):
    """What both classes have in common; the first base of each is a network of :mod:`dcgan.fast`."""

    _NETWORK: ClassVar[Network]
    _training: card.Training | None = None
    """What the card says about the run that the weights are from."""

    @classmethod
    def from_run(cls: type[T], path: Path | str, *, which: Which = "last", ema: bool = True) -> T:
        """Load a trained network, float32, in eval mode, with what its card says about the training.

        Args:
            path: a run's folder, or any file that :mod:`dcgan.pretrained` reads; the training is known for
                the checkpoint of a run only.
            which: which checkpoint of a folder to use: the last or the best.
            ema: use the moving average of the Generator's weights if there is one.

        Raises:
            CheckpointError: the file is missing, damaged, or of another network; the message names it.
            InputError: ``which`` is invalid, or the network is neither a Generator nor a Discriminator of
                :mod:`dcgan.models`.
        """
        return cls._of(pretrained.read(path, cls._NETWORK, ema=ema, which=which))

    @classmethod
    def _of(cls: type[T], found: pretrained.Pretrained) -> T:
        if found.foreign is not None or found.architecture.model != "dcgan":
            kind = found.architecture.model if found.foreign is None else found.foreign.spec
            raise InputError(
                f"the format huggingface is for the networks of the model dcgan, but {found.file} holds the "
                f"{found.network} {kind!r}; export it to safetensors, onnx or torch-export"
            )
        own: Any = cls  # a network of dcgan.models, too
        state = found.module("reference").state_dict()
        network = own(**own.sizes_of(state))
        network.load_state_dict(state)
        network._training = card.Training.of(found)
        return cast(T, network.eval())

    @classmethod
    def _from_pretrained(
        cls: type[T],
        *,
        model_id: str,
        map_location: torch.device | str = "cpu",
        revision: str | None = None,
        cache_dir: Path | str | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **sizes: int,
    ) -> T:
        """Load a folder or a repository of the Hub, in eval mode; called by ``from_pretrained``.

        Unlike the mixin's own it requires every weight, names what does not fit, and reads nothing but
        safetensors.

        Args:
            model_id: the folder, or the repository's name.
            map_location: the device to load onto.
            revision, cache_dir, force_download, local_files_only, token: as for ``hf_hub_download``.
            sizes: arguments of the constructor, from ``config.json``; those missing are read off the weights.

        Raises:
            CheckpointError: the weights are missing, damaged or of the other network.
            RuntimeError: the weights have other sizes than ``sizes``.
        """
        if Path(model_id).is_dir():
            file = Path(model_id, SAFETENSORS_SINGLE_FILE)
        else:
            download: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
            download |= {"force_download": force_download, "local_files_only": local_files_only}
            file = Path(hf_hub_download(model_id, SAFETENSORS_SINGLE_FILE, **download))
        state = pretrained.read(file, cls._NETWORK).state
        own: Any = cls
        network = own(**{**own.sizes_of(state), **sizes})
        network.load_state_dict(state)
        return cast(T, network.to(map_location).eval())

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the weights and the sample grid; called by ``save_pretrained``."""
        export.safetensors(cast(Any, self), save_directory / SAFETENSORS_SINGLE_FILE)
        if self._training is not None and self._training.grid is not None:
            shutil.copyfile(self._training.grid, save_directory / card.GRID)

    def save_pretrained(self, save_directory: Path | str, **arguments: Any) -> str | None:
        """Write the folder, as the mixin's ``save_pretrained`` does; an existing ``README.md`` is kept.

        The example in the card loads ``model_card_kwargs={"name": …}``, by default the folder's name.

        Raises:
            InputError: the network computes something else than the default network with its weights.
            RunError: its outputs are not finite or do not depend on the input.
        """
        named = {"name": Path(save_directory).resolve().name}
        arguments["model_card_kwargs"] = named | (arguments.get("model_card_kwargs") or {})
        return super().save_pretrained(save_directory, **arguments)

    def push_to_hub(self, repo_id: str, **arguments: Any) -> str:
        """Create the repository if needed and upload the folder, as the mixin's ``push_to_hub`` does.

        Returns:
            The URL of the commit.

        Raises:
            Exception: those of ``save_pretrained`` and of huggingface_hub; :func:`push` reports them.
        """
        if "/" not in repo_id:  # the Hub puts the user's name before it, and the card's example needs that
            api = HfApi(token=arguments.get("token"))
            repo_id = api.create_repo(repo_id, private=arguments.get("private"), exist_ok=True).repo_id
        arguments["model_card_kwargs"] = {"name": repo_id} | (arguments.get("model_card_kwargs") or {})
        return super().push_to_hub(repo_id, **arguments)

    def generate_model_card(self, *, name: str = "") -> ModelCard:
        """Return the card; ``name`` is what its example loads, the folder's name or the repository's."""
        data = ModelCardData(**self._hub_mixin_info.model_card_data.to_dict())
        text = card.text(self._NETWORK, cast(Any, self), name, REPOSITORY, self._training)
        if self._training is not None and self._NETWORK == "generator":
            data = ModelCardData(**data.to_dict(), **self._training.results(name))
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


class Generator(fast.Generator, _Shared, pipeline_tag="unconditional-image-generation"):
    """:class:`dcgan.fast.Generator` that can be saved for, and loaded from, the Hugging Face Hub.

    Arguments, parameters, results and engines are the same; the methods are those of the module docstring.
    """

    _NETWORK = "generator"


class Discriminator(fast.Discriminator, _Shared):
    """:class:`dcgan.fast.Discriminator` with the same methods as :class:`Generator`."""

    _NETWORK = "discriminator"


def network_of(found: pretrained.Pretrained) -> Generator | Discriminator:
    """Return the network of a file that has been read, as ``from_run`` of its class does."""
    return Generator._of(found) if found.network == "generator" else Discriminator._of(found)


def write(network: Generator | Discriminator, folder: Path) -> int:
    """Write the folder by ``save_pretrained`` and return its files' total size in bytes.

    Files that are written replace existing ones, ``README.md`` too, and only when all are complete; others in
    the folder are kept.

    Raises:
        InputError, RunError: those of ``save_pretrained``; or the folder cannot be written to.
    """
    size = 0
    with (
        reporting_errors(f"into {folder}"),
        tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.resolve().parent) as temporary,
    ):
        network.save_pretrained(temporary, model_card_kwargs={"name": folder.resolve().name})
        folder.mkdir(exist_ok=True)
        for file in Path(temporary).iterdir():
            size += file.stat().st_size
            os.replace(file, folder / file.name)
    return size


def check_repository(name: str, option: str = "repo_id") -> None:
    """Raise InputError, which names ``option``, unless ``name`` may be a repository's, ``USER/NAME``."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{option} must be USER/NAME, got {name!r}: {one_line(error)}") from error
    if "/" not in name:
        raise InputError(f"{option} must be USER/NAME, got {name!r}")


def push(network: Generator | Discriminator, repo_id: str) -> str:
    """Upload the network by ``push_to_hub`` and return the URL of the commit.

    Raises:
        RunError: the upload fails; one line says why, and how to log in if the Hub does not know the user.
    """
    try:
        return network.push_to_hub(repo_id)
    except (InputError, RunError):  # of save_pretrained
        raise
    except Exception as error:  # of the network, the Hub or the token, in any version of huggingface_hub
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = ""
        if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
            hint = "; log in by `hf auth login`, or set HF_TOKEN to a token with write access"
        raise RunError(f"cannot push to {repo_id}: {one_line(error)}{hint}") from error
