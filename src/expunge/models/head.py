"""Where a classifier's features end and its head begins."""

from __future__ import annotations

from torch import nn

from expunge.errors import ConfigError, did_you_mean


def find_head(model: nn.Module, n_classes: int) -> str | None:
    """Name of the layer that turns features into logits, or ``None``.

    A model that tells its classifier itself (``get_classifier``, as timm's do) is believed; otherwise it is the last
    linear layer with ``n_classes`` outputs. A model with several classifiers (distilled transformers average two) has
    no such layer.
    """
    own = getattr(model, "get_classifier", None)
    told = own() if callable(own) else None
    if isinstance(told, list | tuple | dict | nn.ModuleList | nn.ModuleDict):
        return None
    found = None
    for name, module in model.named_modules():
        if told is not None and module is told and isinstance(module, nn.Linear):
            return name
        if isinstance(module, nn.Linear) and module.out_features == n_classes:
            found = name
    return found


def check_head(model: nn.Module, name: str) -> str:
    """The name, if the model has such a module.

    Raises:
        ConfigError: It has not; close names are suggested.
    """
    names = [n for n, _ in model.named_modules() if n]
    if name not in names:
        raise ConfigError(f"the model has no module '{name}' to take as head{did_you_mean(name, names)}")
    return name
