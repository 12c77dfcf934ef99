"""FSDP 2 and DeepSpeed ZeRO under the stages that train one model by back-propagation: sft, reward and dpo.

They take the weights apart while training runs. What a stage does afterwards (merging, scoring, sampling) is done on a model
that is whole: a new one, into which the trained weights are gathered.
"""

from collections.abc import Callable
from contextlib import nullcontext

from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.integrations import deepspeed as hf_deepspeed


def is_sharded(trainer: Trainer) -> bool:
    """Whether an engine holds the model's weights or their optimizer state in parts."""
    return trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def whole_model(trainer: Trainer, build: Callable[[], nn.Module]) -> nn.Module:
    """The trained model with all of its weights on every process.

    Args:
        build: makes the model as it was before training; called where it was sharded.
    """
    weights = whole_weights(trainer)
    if weights is None:
        return trainer.accelerator.unwrap_model(trainer.model)
    hf_deepspeed.unset_hf_deepspeed_config()  # else ZeRO-3 takes every model apart that is loaded from now on
    model = build()
    model.load_state_dict(weights, strict=False)
    return model


def whole_weights(trainer: Trainer) -> dict[str, Tensor] | None:
    """What is trained, gathered from all processes, by name; None where no engine has taken it apart."""
    if not is_sharded(trainer):
        return None
    weights = {}
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if parameter.requires_grad:
            with _gathered(parameter):
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                weights[name] = whole.detach().cpu().clone()
    return weights


def _gathered(parameter: nn.Parameter):
    """While this lasts, a parameter of ZeRO-3 is whole."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])
