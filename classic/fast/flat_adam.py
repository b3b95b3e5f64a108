"""Adam on one vector: all parameters and gradients are views of it, so that a norm or a step is one operation."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from classic.gradient_step import parameter_shapes, trained_parameters


class FlatParameters:
    """A network's trained parameters as views of ``vector``, and their gradients as views of ``gradient``.

    Frozen ones (``requires_grad`` False) are left out. The network keeps its parameters, names and shapes. Layers of
    ``policy`` and ``critic`` at the same depth are adjacent, so that layers of the same shape are one stacked matrix.
    """

    def __init__(self, network: nn.Module) -> None:
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in trained_parameters(network).items():
            depth = name.removeprefix("policy.").removeprefix("critic.")
            groups.setdefault(depth, []).append((name, parameter))
        self._parameters = {name: parameter for group in groups.values() for name, parameter in group}
        self._slices: dict[str, slice] = {}
        end = 0
        for name, parameter in self._parameters.items():
            self._slices[name] = slice(end, end := end + parameter.numel())
        self.vector = nn.Parameter(self.joined({n: p.detach() for n, p in self._parameters.items()}))
        self.gradient = torch.zeros_like(self.vector)
        self.vector.grad = self.gradient
        self.attach(network)

    def fits(self, network: nn.Module) -> bool:
        """Whether a network trains parameters of the names and shapes that this vector holds."""
        return parameter_shapes(trained_parameters(network)) == parameter_shapes(self._parameters)

    def attach(self, network: nn.Module) -> None:
        """Make a network's parameters views of the vector, if some were replaced or all were copied since."""
        for name, parameter in trained_parameters(network).items():
            self._parameters[name] = parameter
            place = self.of(self.vector.detach(), name)
            if parameter.data_ptr() != place.data_ptr():
                place.copy_(parameter.detach())
                parameter.data = place
            parameter.grad = self.of(self.gradient, name)

    def of(self, vector: Tensor, *names: str) -> Tensor:
        """Return a parameter's part of a vector like :attr:`vector`; for several of one shape [names, *shape]."""
        parts = [self._slices[name] for name in names]
        shape = self._parameters[names[0]].shape
        if any(self._parameters[name].shape != shape for name in names) or any(
            left.stop != right.start for left, right in pairwise(parts)
        ):
            raise ValueError(f"{', '.join(names)} are not adjacent in one shape")
        part = vector[parts[0].start : parts[-1].stop]
        return part.view(shape) if len(names) == 1 else part.view(len(names), *shape)

    @property
    def names(self) -> list[str]:
        """Names of the parameters, in the vector's order."""
        return list(self._parameters)

    def joined(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Join parts by name into one vector."""
        return torch.cat([parts[name].flatten() for name in self.names])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Split a vector like :attr:`vector` into parts by name."""
        return {name: self.of(vector, name) for name in self._parameters}


class FlatAdam:
    """The kernel of ``torch.optim.AdamW(fused=True)`` alone.

    On a few thousand weights the bookkeeping around it takes ten times as long as the kernel.
    """

    def __init__(self, network: nn.Module, lr: float, eps: float = 1e-5) -> None:
        self.weights, self.lr, self.eps, self.weight_decay = FlatParameters(network), lr, eps, 0.0
        gradient = self.weights.gradient
        self.steps = torch.zeros((), dtype=torch.float32, device=gradient.device)
        self.mean, self.square = torch.zeros_like(gradient), torch.zeros_like(gradient)

    def fits(self, network: nn.Module) -> bool:
        """See :meth:`Adam.fits`."""
        return self.weights.fits(network)

    def attach(self, network: nn.Module) -> None:
        """See :meth:`Adam.attach`."""
        self.weights.attach(network)

    def zero_grad(self) -> None:
        """Clear the gradient."""
        self.weights.gradient.zero_()

    def clip_gradient(self, limit: float) -> float:
        """Scale the gradient down to a norm of at most ``limit``; return its norm before."""
        gradient = self.weights.gradient
        norm = torch.linalg.vector_norm(gradient).item()
        if norm > limit:
            gradient.mul_(limit / (norm + 1e-6))
        return norm

    def step(self) -> None:
        """Move the parameters by their gradient."""
        self.steps.add_(1)
        torch.ops.aten._fused_adamw_.default(
            [self.weights.vector.detach()],
            [self.weights.gradient],
            [self.mean],
            [self.square],
            [],
            [self.steps],
            lr=self.lr,
            beta1=0.9,
            beta2=0.999,
            weight_decay=self.weight_decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )

    def state(self) -> dict[str, Tensor]:
        """Return step counts and moments; see :meth:`Adam.state`."""
        if not self.steps:
            return {}
        tensors = {f"{name}/step": self.steps.clone() for name in self.weights.names}
        for key, vector in (("exp_avg", self.mean), ("exp_avg_sq", self.square)):
            tensors |= {f"{name}/{key}": part.clone() for name, part in self.weights.split(vector).items()}
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from :meth:`state`."""
        if not tensors:
            return
        names = self.weights.names
        self.steps.copy_(tensors[f"{names[0]}/step"])
        for key, vector in (("exp_avg", self.mean), ("exp_avg_sq", self.square)):
            vector.copy_(self.weights.joined({name: tensors[f"{name}/{key}"] for name in names}))
