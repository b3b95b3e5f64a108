"""Replay a black box: recompute its minibatch, and find the first non-finite number."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.config.arguments.commands import ReplayArgs
from rlhf_ppo.models.acceleration.activation_memory import checkpoint_layers
from rlhf_ppo.models.actor_critic import ActorCritic, build_actor_critic
from rlhf_ppo.models.adapters.policy_adapter import prepare_policy
from rlhf_ppo.models.adapters.quantization import load_quantized, load_reference
from rlhf_ppo.models.compare import OBJECT
from rlhf_ppo.models.forward.forward_checks import check_forward
from rlhf_ppo.models.loading import BASE_FOLDER, REFERENCE_FOLDER, load_policy, resolve_model
from rlhf_ppo.models.reference import Reference
from rlhf_ppo.pipeline.rebuild import adapter_config, build_policy, build_trunk, restore_weights
from rlhf_ppo.runtime.machine.device import resolve_device
from rlhf_ppo.runtime.machine.threads import torch_threads
from rlhf_ppo.runtime.texts import display_text
from rlhf_ppo.training.checkpoints.black_box import BlackBox, read_black_box
from rlhf_ppo.training.gradients import clear_gradients, critic_gradient, minibatch_gradient
from rlhf_ppo.training.optimizer import train_critic_alone
from rlhf_ppo.training.stability import nonfinite_parameters, spoil_gradient


@dataclass(frozen=True)
class Replay:
    """The result of a recomputation."""

    box: BlackBox
    numbers: dict[str, float]
    """The minibatch's losses and its gradient's norm."""
    findings: list[str]
    """What was non-finite, in order of computation; look at the first."""

    @property
    def finite(self) -> bool:
        """Whether losses, gradient and everything they were computed from are finite."""
        return not self.findings

    @property
    def same(self) -> bool:
        """Whether the numbers equal the run's to the last bit."""
        pairs = [(x, self.box.numbers[name]) for name, x in self.numbers.items()]
        return all(x == y or (math.isnan(x) and math.isnan(y)) for x, y in pairs)


def replay(args: ReplayArgs) -> Replay:
    """Recompute the gradient of a black box's minibatch.

    Raises:
        FileNotFoundError, ValueError: no black box, a damaged one, or models that cannot be built.
    """
    box = read_black_box(args.folder)
    device = resolve_device(args.device or box.device)
    model, reference = build_models(box, args.model, device)
    box = on_device(box, device)
    alone = train_critic_alone(model, on=box.warming_up or box.critic_alone)
    with torch_threads(args.num_threads or box.objective.num_threads, model), alone:
        findings = [f"weight {name}" for name in nonfinite_parameters(model)] + _nonfinite_records(box)
        findings += [f"{name} = {x} of the rollout" for name, x in box.estimates.items()]
        with _nonfinite_outputs(model) as outputs:
            numbers, broken = _gradient(box, model, reference, box.passes)
        findings += outputs
        findings += [
            f"loss {name} = {x}" for name, x in numbers.items() if not math.isfinite(x) and name != "grad_norm"
        ]
        findings += [f"gradient of {name}" for name in broken]
        if not broken and not math.isfinite(numbers["grad_norm"]):
            findings.append("the gradient's norm, though no part of it: it overflows, or the loss is non-finite")
        if findings:
            findings += _rows_alone(box, model, reference)
    return Replay(box, numbers, findings)


def _gradient(
    box: BlackBox, model: ActorCritic, reference: Reference | None, passes: list[list[int]]
) -> tuple[dict[str, float], list[str]]:
    """Compute losses and gradient norm, and the names of the parameters whose gradient is non-finite."""
    clear_gradients(model)
    if box.critic_alone:
        losses = critic_gradient(model, box.rollout, box.old, passes, box.objective, bf16=box.bf16)
    else:
        _, losses = minibatch_gradient(
            model, box.rollout, box.old, passes, box.objective, bf16=box.bf16, reference=reference
        )
    named = [(name, p) for name, p in model.named_parameters() if p.grad is not None and p.requires_grad]
    broken = [name for name, p in named if not torch.isfinite(p.grad).all()]  # pyright: ignore[reportArgumentType]
    # From here on as in the update.
    spoil_gradient([p for _, p in named], losses, box.estimates)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.trainable_parameters() if p.grad is not None])
    clear_gradients(model)
    return {name: float(x) for name, x in {**losses, "grad_norm": norm}.items()}, broken


def _nonfinite_records(box: BlackBox) -> list[str]:
    """Name the recorded tensors that are non-finite: scores before what was estimated from them."""
    findings: list[str] = []
    for where, record, mask in (("rollout", box.rollout, box.rollout.mask), ("experience", box.old, box.old.mask)):
        for field in dataclasses.fields(record):
            x = getattr(record, field.name)
            if not isinstance(x, Tensor) or not x.is_floating_point():
                continue
            rows = (~torch.isfinite(x) & mask).any(dim=1) if x.ndim == 2 else ~torch.isfinite(x)
            if rows.any():
                findings.append(f"{where}.{field.name} in {_rows(rows.nonzero().flatten().tolist())}")
    return findings


@contextmanager
def _nonfinite_outputs(model: ActorCritic) -> Iterator[list[str]]:
    """Name the first module with a non-finite output inside this block, and then the model's own such outputs."""
    found: list[str] = []

    def check(name: str, output: Any) -> None:
        tensors = [x for x in (output if isinstance(output, tuple) else (output,)) if isinstance(x, Tensor)]
        if not found and not all(torch.isfinite(x).all() for x in tensors if x.is_floating_point()):
            found.append(f"the output of {name}")

    def check_model(output: Any) -> None:
        for name, x in vars(output).items():
            if isinstance(x, Tensor) and not torch.isfinite(x).all() and f"the policy's {name}" not in found:
                found.append(f"the policy's {name}")

    def hook(name: str) -> Any:
        return lambda module, inputs, output: check(name, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    handles.append(model.register_forward_hook(lambda module, inputs, output: check_model(output)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _rows_alone(box: BlackBox, model: ActorCritic, reference: Reference | None) -> list[str]:
    """Name the responses that are non-finite in a minibatch of their own."""
    rows = [row for group in box.passes for row in group]
    box = dataclasses.replace(box, estimates={})  # they are of all responses together
    guilty = [row for row in rows if not all(map(math.isfinite, _gradient(box, model, reference, [[row]])[0].values()))]
    if not guilty:
        return ["no response of the minibatch by itself: only their sum"]
    said = [(row, display_text(box.rollout.prompts[row]), display_text(box.rollout.completions[row])) for row in guilty]
    shown = [f"  response {row}: {prompt!r} -> {completion!r}" for row, prompt, completion in said]
    return [f"by themselves, {_rows(guilty)} of the minibatch", *shown]


def _rows(rows: list[int]) -> str:
    return f"response{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))}"


def build_models(box: BlackBox, name: str | None, device: torch.device) -> tuple[ActorCritic, Reference | None]:
    """Build the models as they were at that step; a policy that was trained whole needs only the box."""
    models = box.models
    if models["adapter"] is None and not _has_exact_kl(box):
        policy, reference = build_policy(models), None
    else:
        policy, reference = _load_policy(box, name, device)
    if models["adapter"] is None:
        policy.requires_grad_(True)
    trunk = build_trunk(models, box.objective.critic_frozen)
    model = build_actor_critic(policy, models["critic"], trunk=trunk, head=None, head_from=None).to(device)
    if reference is not None and reference.model is not None:
        reference.model.to(device)
    longest = box.rollout.prompt_ids.shape[1] + box.rollout.response_ids.shape[1]
    check_forward(model, reference, longest=longest, bf16=box.bf16)  # before the box's weights, which may be NaN
    if box.objective.gradient_checkpointing:
        checkpoint_layers(model)
    restore_weights(model, box.weights, "the box's weights")
    return model, reference


def _has_exact_kl(box: BlackBox) -> bool:
    return box.objective.kl_loss_coef > 0 and box.objective.kl_loss == "exact"


def _load_policy(box: BlackBox, name: str | None, device: torch.device) -> tuple[Any, Reference | None]:
    """Load the base model with the box's adapter, and under an exact KL the reference.

    Raises:
        ValueError: nothing names the base, or the reference is not in the box.
    """
    models, objective = box.models, box.objective
    name = resolve_model(name or (models["model"] if models["model"] != OBJECT else models["base"]))
    if not name:
        raise ValueError(
            "this black box does not name its base model, which was an object: say where it is with --model (a run "
            f"with an adapter has it in {BASE_FOLDER}/, another in {REFERENCE_FOLDER}/)"
        )
    quantized = objective.quantization
    policy = load_policy(name) if quantized == "none" else load_quantized(name, quantized, device=device, bf16=box.bf16)
    frozen = load_reference(name, models["ref_model"], objective, device, bf16=box.bf16)
    adapter_off = False
    if models["adapter"] is not None:
        prepared = prepare_policy(policy, adapter_config(models["adapter"]))
        policy, adapter_off = prepared.policy, prepared.off_is_start
    if not _has_exact_kl(box):
        return policy, None
    if models["ref_model"] == OBJECT or adapter_off == models.get("own_reference", not adapter_off):
        raise ValueError(
            "the exact KL of this black box was measured to a model object (ref_model, or an adapter that was there "
            "before the run), which it does not hold: it cannot be recomputed"
        )
    return policy, Reference(
        policy,
        frozen,
        adapter_off=adapter_off,
        bf16=box.bf16,
        half=objective.reference_format(bf16=box.bf16) == "bfloat16",
    )


def on_device(box: BlackBox, device: torch.device) -> BlackBox:
    """Move the recorded tensors to a device."""

    def moved(record: Any) -> Any:
        tensors = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
        found = {name: x.to(device) for name, x in tensors.items() if isinstance(x, Tensor)}
        if tensors.get("banned") is not None:
            found["banned"] = tensors["banned"]._replace(where=tensors["banned"].where.to(device))
        return dataclasses.replace(record, **found)

    return dataclasses.replace(box, rollout=moved(box.rollout), old=moved(box.old))


def print_replay(args: ReplayArgs) -> int:
    """Run the `replay` command; return 0 if everything is finite, else 1."""
    result = replay(args)
    box = result.box
    print(f"optimizer step {box.step} of the update on rollout {box.iteration}; training data: {box.data or 'none'}")
    for name, now in result.numbers.items():
        print(f"  {name:<10} {now:<12.6g} in the run {box.numbers[name]:.6g}")
    print(f"the same numbers as in the run: {'yes' if result.same else 'no (another machine or version?)'}")
    if result.finite:
        print("finite")
        return 0
    print("non-finite, in order of computation:")
    for finding in result.findings:
        print(f"  {finding}")
    return 1
