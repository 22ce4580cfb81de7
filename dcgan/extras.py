"""Optional dependencies: which extra of the distribution provides a module that is not installed."""

from __future__ import annotations

EXTRAS = {
    "train": (
        *("PIL", "matplotlib", "pydantic", "rich", "safetensors", "scipy", "sklearn"),
        *("tensorboard", "tomli", "torchvision", "typer", "yaml"),
    ),
    "eval": ("torchmetrics",),
    "inception": ("torch_fidelity",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "hub": ("huggingface_hub",),
}
"""Top-level modules by the extra in pyproject.toml that installs them."""


def install(extra: str) -> str:
    """Return the command that installs an extra."""
    return f"pip install 'dcgan-kernels[{extra}]'"


def advice(error: ModuleNotFoundError) -> str | None:
    """Return what to install for a failed import, or None if no extra provides the module."""
    module = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules:
            return f"{module} is not installed; {install(extra)} installs it"
    return None
