"""What a training run is besides its weights, as tensors and JSON: random states, optimizer, schedule."""

import base64
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from rlhf_recipes.recipe.errors import RecipeError


def random_state(generator: torch.Generator | None = None) -> dict[str, Any]:
    """The states of python's, numpy's and torch's generators on this process, and of `generator`, as JSON."""
    mersenne: Any = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": mersenne | {"state": {"key": mersenne["state"]["key"].tolist(), "pos": mersenne["state"]["pos"]}},
        "torch": _text(torch.random.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
        "generator": None if generator is None else _text(generator.get_state()),
    }


def restore_random_state(state: dict[str, Any], generator: torch.Generator | None = None) -> None:
    """Sets what `random_state` has read."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(state["numpy"] | {"state": {"key": key, "pos": state["numpy"]["state"]["pos"]}})
    torch.random.set_rng_state(_tensor(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))
    if generator is not None and state["generator"] is not None:
        generator.set_state(_tensor(state["generator"]))


def _text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's tensors by `<parameter's number>.<name>`, whole on every process, and the rest of it as JSON.

    Raises:
        RecipeError: it keeps something that is neither.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for number, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                tensors[f"{number}.{name}"] = whole.detach().cpu().contiguous()
            elif value is None or isinstance(value, bool | int | float | str):
                values[f"{number}.{name}"] = value
            else:
                raise RecipeError(
                    f"the optimizer keeps a {type(value).__name__} ({name}), which a checkpoint cannot hold; choose another "
                    f"`optim`, or no checkpoints (`save_strategy: no`)"
                )
    return tensors, {"groups": state["param_groups"], "values": values}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """Sets what `optimizer_state` has read; an optimizer whose parameters are sharded gets its shards."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in (tensors | rest["values"]).items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
            value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})
