"""The step that differs between DDP and DeepSpeed, and the fp32 state behind it.

for batch in batches:
    with accelerator.accumulate(objective):
        output = objective(batch)
        outcome = backward_and_step(accelerator, objective, optimizer, output.loss, max_grad_norm=1.0)
...what else there is for the device to do...
grad_norm, _ = outcome.read()
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator

from aliblip.runtime.accelerator import is_deepspeed
from aliblip.runtime.arrival import Arrival
from aliblip.runtime.distributed import reduce_max, world_size
from aliblip.runtime.mistakes import UsageError
from aliblip.training.profiling import BACKWARD, OPTIMIZER, record_function

FROZEN = "_frozen_fp32"  # attribute of a frozen parameter


class Outcome:
    """What came of a step, on its way from the device: the gradient norm, and a number that the ranks told each other.
    While it is read the device moves the weights, and the host can give it the next step before it has run dry."""

    def __init__(self, norm: torch.Tensor, number: int = 0):
        """A collective."""
        self._number = number
        values = norm.detach().float().reshape(1)
        if world_size() > 1:
            values = torch.cat([values, reduce_max(torch.full((1,), float(number), device=norm.device))])
        self._values = Arrival(values)

    def read(self) -> tuple[float, int]:
        """The global gradient norm before clipping, `inf` when the step was left out, and the largest number of any
        rank; equal on all ranks. The one time in a step that the host waits for the device."""
        norm, number = [*self._values.read(), self._number][:2]
        return norm if math.isfinite(norm) else math.inf, int(number)


def backward_and_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: torch.Tensor,
    max_grad_norm: float,
    number: int = 0,
) -> Outcome | None:
    """Differentiate a loss and, when the accumulation is complete, clip, step and clear the gradients.

    A collective: every rank calls it for every micro-batch, inside `accelerator.accumulate(model)`. A step with a loss
    or a gradient that is not finite on any rank is left out on every rank: weights and optimizer state stay as they
    were. What else moves with a step (momentum encoder, queue, schedule) is to be held back by the caller then.

    Args:
        accelerator: from `build_accelerator`.
        model: the prepared module.
        optimizer: the prepared optimizer, one of torch's with `fused=True`: these can leave out a step on the device.
        loss: scalar, the loss of this rank's micro-batch, not divided by the accumulation steps.
        max_grad_norm: the value given to `build_accelerator`; 0 means no clipping.
        number: what this rank has to tell the others; the largest comes back with the outcome.

    Returns:
        The outcome; None when this micro-batch only accumulated.
    """
    # A loss that is not finite makes every gradient NaN, also where the derivative there happens to be finite: the norm
    # that all ranks share then tells all of them, and DeepSpeed inside its backward, without one more collective.
    loss = loss * (0.0 * loss.detach() + 1.0)
    with record_function(BACKWARD):
        accelerator.backward(loss)  # under DeepSpeed this clips, steps and clears as well
    if not accelerator.sync_gradients:
        return None
    if is_deepspeed(accelerator):
        norm = model.get_global_grad_norm()
        return Outcome(norm if torch.is_tensor(norm) else torch.full((), float(norm), device=loss.device), number)
    with record_function(OPTIMIZER):
        # After DDP's reduction every rank has the same gradient, hence the same norm and the same decision.
        # In fp16 this takes the scale out of the gradients first.
        norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm if max_grad_norm > 0 else math.inf)
        outcome = Outcome(norm, number)
        _step_if_finite(optimizer, norm, accelerator.scaler)
        optimizer.zero_grad()
    return outcome


def _step_if_finite(
    optimizer: torch.optim.Optimizer, norm: torch.Tensor, scaler: torch.amp.GradScaler | None = None
) -> None:
    """Step, or change nothing: the device decides, and the host goes on without knowing. By what torch's GradScaler
    tells an optimizer; the fused kernels return at once then, and the count of steps goes back.

    Args:
        scaler: of a run in fp16, which has taken its scale out of the gradients: it follows what it found in them. The
            one rule about steps is ours, with a scaler or without.
    """
    optimizer.optimizer.found_inf = (~norm.isfinite()).float()
    try:
        if scaler is None:
            optimizer.step()
        else:
            optimizer.optimizer.step()  # accelerate's wrapper would step by the scaler's rule
    finally:
        del optimizer.optimizer.found_inf
    if scaler is not None:
        scaler.update()


def loss_scale_state(scaler: torch.amp.GradScaler | None) -> dict[str, torch.Tensor]:
    """The loss scale and the steps since it last changed, on the device; nothing without a scaler, or before it is
    first used. (What `state_dict` says would have to be waited for.)"""
    if scaler is None or scaler._scale is None:
        return {}
    return {"loss_scale": scaler._scale.clone(), "loss_scale_steps": scaler._growth_tracker.clone()}


def load_loss_scale_state(scaler: torch.amp.GradScaler | None, state: dict[str, torch.Tensor]) -> None:
    """The way back of `loss_scale_state`; of a run in another precision there is none, and the scale begins anew."""
    if scaler is not None and "loss_scale" in state:
        now = {"scale": state["loss_scale"].item(), "_growth_tracker": int(state["loss_scale_steps"].item())}
        scaler.load_state_dict(scaler.state_dict() | now)


def keep_frozen(module: torch.nn.Module) -> None:
    """Let the frozen parameters of a module keep their fp32 values: an engine in bf16 casts them too, and holds no
    masters of what it does not train. Before the module is prepared, on its device; without such an engine it takes no
    memory."""
    for parameter in module.parameters():
        if not parameter.requires_grad:
            setattr(parameter, FROZEN, parameter.data)


def weights_to_follow(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters by name as the module computes with them, those that are frozen in fp32."""
    return {name: getattr(parameter, FROZEN, parameter).detach() for name, parameter in module.named_parameters()}


def fp32_value(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The value of a parameter in full precision, as a detached copy on every rank.

    Under ZeRO the weights in the module are working copies and the fp32 master is spread over the ranks; there this
    is a collective. Frozen parameters have no master, but the value that `keep_frozen` kept.

    Returns:
        A tensor of the parameter's shape in fp32.
    """
    if hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).detach()
    return getattr(parameter, FROZEN, parameter).detach().float().clone()


def fp32_state_dict(module: torch.nn.Module, keep: bool = True) -> dict[str, torch.Tensor]:
    """The state of a module with its parameters in full precision, on the CPU, for saving.

    A collective under ZeRO, where a checkpoint of the working copies would lose the digits that bfloat16 has not.

    Args:
        module: the plain module, not the engine around it.
        keep: False on ranks that only take part: they give {}, and don't fill their host's memory.

    Returns:
        The keys of `module.state_dict()`; parameters in fp32, buffers as they are.
    """
    state = {}
    for name, value in module.state_dict(keep_vars=True).items():
        value = fp32_value(value) if isinstance(value, torch.nn.Parameter) else value.detach()
        if keep:
            state[name] = value.cpu()
    return state


def load_fp32_state_dict(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """The way back of `fp32_state_dict`, into a prepared module: working copies and fp32 masters alike.

    Args:
        module: the plain module, not the engine around it.
        state: its parameters and buffers by name, whole, on the CPU; the same on every rank.

    Raises:
        UsageError: names or shapes that are not those of the module.
    """
    own = module.state_dict(keep_vars=True)
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    if shapes != given:
        differing = sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
        raise UsageError(
            f"the weights are those of another model: {', '.join(differing[:3])}"
            f"{f' and {len(differing) - 3} more' if len(differing) > 3 else ''} differ in name or shape"
        )
    for name, value in own.items():
        _set_fp32_value(value, state[name])


def _set_fp32_value(tensor: torch.Tensor, value: torch.Tensor) -> None:
    if hasattr(tensor, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(tensor, value.to(tensor.device))
    if hasattr(tensor, FROZEN):
        getattr(tensor, FROZEN).copy_(value)
    # Setting the master alone would show only after the next step, and setting the copy alone would be undone by it.
    tensor.data.copy_(value)


def optimizer_state(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True
) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter name, whole and on the CPU, whatever shards it: `exp_avg.vision_proj.weight`.

    A collective under ZeRO. Parameters that the optimizer has not stepped yet have no entries.

    Args:
        module: the plain module.
        optimizer: the prepared optimizer.
        keep: as for `fp32_state_dict`.
    """
    if not _is_sharded(optimizer):
        if not keep:
            return {}
        states = optimizer.optimizer.state
        entries = {f"{key}.{name}": value for name, p in module.named_parameters() for key, value in states[p].items()}
        return {key: value.detach().cpu() for key, value in entries.items()}
    from deepspeed.utils import safe_get_full_optimizer_state

    flat_states = list(optimizer.optimizer.optimizer.state.values())
    if not flat_states:
        return {}
    _link_optimizer_state(optimizer.optimizer)
    entries = {}
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "_hp_mapping"):
            for key, value in flat_states[0].items():
                # The count of steps is one number for a whole group.
                value = safe_get_full_optimizer_state(parameter, key) if value.dim() else value.clone()
                if keep:
                    entries[f"{key}.{name}"] = value.detach().cpu()
    return entries


def load_optimizer_state(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor]
) -> None:
    """The way back of `optimizer_state`, into a prepared optimizer of any kind and any number of processes.

    Raises:
        UsageError: a parameter of the state that the module does not have.
    """
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        kind, _, name = key.partition(".")
        by_name.setdefault(name, {})[kind] = value
    parameters = dict(module.named_parameters())
    if unknown := sorted(by_name.keys() - parameters.keys()):
        raise UsageError(f"the optimizer's state is of another model: it knows {unknown[0]!r}")
    if not by_name:
        return
    if not _is_sharded(optimizer):
        names = {id(parameter): name for name, parameter in parameters.items()}
        _load(
            optimizer.optimizer,
            lambda parameter: {key: value.clone() for key, value in by_name.get(names[id(parameter)], {}).items()},
        )
        return
    from deepspeed.utils import safe_set_full_optimizer_state

    # ZeRO makes its state at the first step. It is made here, empty, so that the parts of the parameters have a place.
    zero, example = optimizer.optimizer, next(iter(by_name.values()))
    _load(
        zero.optimizer,
        lambda flat: {
            key: torch.zeros_like(flat, dtype=value.dtype) if value.dim() else value.clone()
            for key, value in example.items()
        },
    )
    _link_optimizer_state(zero)
    for name, values in by_name.items():
        for key, value in values.items():
            # A parameter that is frozen now has no part in it.
            if value.dim() and hasattr(parameters[name], "_hp_mapping"):
                safe_set_full_optimizer_state(parameters[name], value.to(parameters[name].device), key)


def _load(optimizer: torch.optim.Optimizer, state_of: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> None:
    """Give a torch optimizer the state of each of its tensors, through its own `load_state_dict`."""
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {index: state_of(parameter) for index, parameter in enumerate(own)}
    states = {index: values for index, values in states.items() if values}
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _link_optimizer_state(zero) -> None:
    """Let the parameters know their parts of the sharded state. DeepSpeed 0.19.8 does it after the step of the first
    parameter group, when the other groups have no state yet."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    groups = zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
    for parameters, flat in groups:
        lazy_init_hp_params_optimizer_state(parameters, flat, zero.optimizer.state)


def _is_sharded(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a prepared optimizer is ZeRO's around another one."""
    return hasattr(optimizer.optimizer, "single_partition_of_fp32_groups")


def clamp_parameter(parameter: torch.nn.Parameter, low: float, high: float) -> None:
    """Clamp a parameter in place, its fp32 master included; a frozen one stays what it is. A collective under ZeRO.

    Clamping the tensor of the module alone would be undone by the next step, which copies the master over it.

    Args:
        parameter: of a prepared or of a plain module.
        low: smallest value allowed.
        high: largest value allowed.
    """
    if parameter.requires_grad:
        _set_fp32_value(parameter, fp32_value(parameter).clamp_(low, high))
