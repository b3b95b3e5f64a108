"""Layers: MLPs, the convolutional network for images, and a recurrent layer that is reset where episodes begin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.nn.utils.rnn import PackedSequence


def tanh_(x: Tensor) -> Tensor:
    """Compute tanh in place, without a graph, as 2 * sigmoid(2 x) - 1: four times as fast as torch's tanh.

    The absolute error is about 1e-7 everywhere, so the relative error is larger near 0.
    """
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = tanh_(x.clone())
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore
        (y,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward.default(gradient, y)


class Tanh(nn.Module):
    """tanh by :func:`tanh_`."""

    def forward(self, x: Tensor) -> Tensor:
        return _Tanh.apply(x) if torch.is_grad_enabled() else tanh_(x.clone())


ACTIVATIONS = {"tanh": Tanh, "relu": nn.ReLU}
IMAGE_FEATURES = 512
SHORTEST_PADDED = 8
"""Pad an LSTM's shortest sequences to this many steps, and longer ones to the next power of two times this."""


def layer(kind: Any, *sizes: Any, gain: float, generator: torch.Generator, **kwargs: Any) -> Any:
    """Make a Linear or Conv2d layer with an orthogonal weight and a zero bias."""
    # skip_init: the default initialisation would draw from torch's global generator.
    made = cast(Any, skip_init(kind, *sizes, dtype=torch.float32, **kwargs))
    nn.init.orthogonal_(made.weight, gain, generator=generator)
    nn.init.zeros_(made.bias)
    return made


def mlp(
    sizes: Sequence[int], output_gain: float | None, generator: torch.Generator, activation: str = "tanh"
) -> nn.Sequential:
    """Make linear layers with an activation between them; orthogonal weights (gain sqrt 2, the last ``output_gain``).

    ``output_gain`` None: the last layer is a hidden one too, followed by its activation.

    Source: Andrychowicz et al., "What Matters in On-Policy RL" (2021): a small last policy layer starts the policy
    near uniform, whatever the observation.
    """
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        last = output_gain is not None and i == len(sizes) - 2
        gain = cast(float, output_gain) if last else math.sqrt(2)
        layers.append(layer(nn.Linear, inputs, outputs, gain=gain, generator=generator))
        if not last:
            layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers)


def image_network(shape: tuple[int, ...], generator: torch.Generator) -> nn.Sequential:
    """Make the network from pixels [N, C, H, W], bytes or 0 to 1, to features [N, 512].

    Source: Mnih et al., "Human-level control through deep reinforcement learning" (2015), its three convolutions.
    """
    channels, height, width = shape
    layers: list[nn.Module] = [Pixels()]
    for filters, size, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
        gain = math.sqrt(2)
        layers += [
            layer(nn.Conv2d, channels, filters, size, stride=stride, gain=gain, generator=generator),
            nn.ReLU(),
        ]
        channels, height, width = filters, (height - size) // stride + 1, (width - size) // stride + 1
    last = layer(nn.Linear, channels * height * width, IMAGE_FEATURES, gain=math.sqrt(2), generator=generator)
    return nn.Sequential(*layers, nn.Flatten(), last, nn.ReLU())


class MixedNetwork(nn.Module):
    """Features of rows that hold images among other numbers: a network for each image, the other numbers as they are.

    Args:
        parts: (columns, shape) of each part of a row, (channels, height, width) for an image.
        generator: source of the initial weights.
    """

    def __init__(self, parts: Sequence[tuple[slice, tuple[int, ...]]], generator: torch.Generator) -> None:
        super().__init__()
        self.parts = list(parts)
        images = [shape for _, shape in self.parts if len(shape) == 3]
        self.images = nn.ModuleList(image_network(shape, generator) for shape in images)
        self.width = IMAGE_FEATURES * len(images) + sum(shape[0] for _, shape in self.parts if len(shape) == 1)

    def forward(self, rows: Tensor) -> Tensor:
        networks = iter(self.images)
        features = [
            next(networks)(rows[:, columns].unflatten(1, shape)) if len(shape) == 3 else rows[:, columns]
            for columns, shape in self.parts
        ]
        return torch.cat(features, dim=-1)


class Pixels(nn.Module):
    """Scale bytes to 0..1; floats are scaled already."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float() / 255 if images.dtype == torch.uint8 else images


class Memory(nn.Module):
    """An LSTM or GRU; its state is one tensor [B, K], reset to 0 before each step that starts an episode."""

    def __init__(self, kind: str, num_features: int, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.size, self.lstm = size, kind == "lstm"
        made = (nn.LSTM if self.lstm else nn.GRU)(
            num_features, size, device="meta", dtype=torch.float32
        )  # no draw from torch's generator
        self.rnn: Any = made.to_empty(device="cpu")
        for name, parameter in self.rnn.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.orthogonal_(parameter, generator=generator)

    @property
    def state_size(self) -> int:
        """K: hidden and cell state side by side, or the hidden state alone."""
        return 2 * self.size if self.lstm else self.size

    def step(self, x: Tensor, starts: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step: x [B, I], starts [B] bool, state [B, K] -> (output [B, size], state after it [B, K])."""
        state = state.masked_fill(starts.unsqueeze(-1), 0.0)
        output, after = self.rnn(x.unsqueeze(0), self._split(state))
        return output[0], torch.cat(after, dim=-1)[0] if self.lstm else after[0]

    def forward(self, x: Tensor, starts: Tensor, state: Tensor) -> Tensor:
        """Run whole sequences: x [B, L, I], starts [B, L] bool, state [B, K] before them -> outputs [B, L, size].

        Episodes are independent, so each becomes a sequence of its own, and they run in batches.
        """
        batch, length = starts.shape
        begins = starts.clone()
        begins[:, 0] = True
        rows, columns = begins.nonzero(as_tuple=True)
        first = rows * length + columns
        lengths = torch.diff(first, append=first.new_tensor([batch * length]))
        fresh = (columns > 0) | starts[rows, 0]
        initial = state[rows].masked_fill(fresh.unsqueeze(-1), 0.0)
        run = self._padded if self.lstm else self._packed
        outputs, places = run(x.flatten(0, 1), first, lengths, initial)
        back = torch.empty_like(places)
        back[places] = torch.arange(len(places), device=places.device)
        return outputs[back].unflatten(0, (batch, length))

    def _padded(self, x: Tensor, first: Tensor, lengths: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        """Run the sequences x[first : first + length]; return outputs and their places in x.

        Sequences of similar length are padded and run together: torch's fused LSTM needs equal lengths, and is several
        times as fast as its packed one.
        """
        outputs, places = [], []
        shorter, longest, last = 0, SHORTEST_PADDED, int(lengths.max())
        while shorter < last:
            alike = (lengths > shorter) & (lengths <= longest)
            if alike.any():
                steps = torch.arange(longest, device=x.device)
                index = first[alike].unsqueeze(-1) + steps
                real = steps < lengths[alike].unsqueeze(-1)
                padded = x[index.clamp(max=len(x) - 1)].transpose(0, 1)
                output, _ = self.rnn(padded, self._split(initial[alike]))
                outputs.append(output.transpose(0, 1)[real])
                places.append(index[real])
            shorter, longest = longest, 2 * longest
        return torch.cat(outputs), torch.cat(places)

    def _packed(self, x: Tensor, first: Tensor, lengths: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        """Do the same in one packed call: all first steps, all second steps, ..., longest sequences first."""
        lengths, order = lengths.sort(descending=True, stable=True)
        steps = torch.arange(int(lengths[0]), device=x.device).unsqueeze(-1)
        alive = steps < lengths
        places = (first[order] + steps)[alive]
        batch_sizes = alive.sum(dim=-1).cpu()  # torch wants these there
        packed, _ = self.rnn(PackedSequence(x[places], batch_sizes), self._split(initial[order]))
        return packed.data, places

    def _split(self, state: Tensor) -> Tensor | tuple[Tensor, ...]:
        state = state.unsqueeze(0).contiguous()
        return tuple(part.contiguous() for part in state.split(self.size, dim=-1)) if self.lstm else state


class Body(nn.Module):
    """What comes before the heads, each if the network has it: image network, recurrent layer, shared layers.

    In place of the image network there may be one of the user's own, for any observations.
    """

    def __init__(self, image: nn.Module | None, memory: Memory | None, layers: nn.Module | None) -> None:
        super().__init__()
        self.image, self.memory, self.layers = image, memory, layers

    def step(self, observations: Tensor, starts: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Take one step of every copy: observations [B, *O] -> (features [B, I], recurrent state [B, K] or None)."""
        x = observations if self.image is None else self.image(observations)
        if self.memory is not None:
            assert starts is not None and state is not None
            x, state = self.memory.step(x, starts, state)
        return x if self.layers is None else self.layers(x), state

    def forward(self, observations: Tensor, starts: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        """Compute features of observations [N, *O], or of whole sequences [B, L, *O] with a recurrent layer."""
        if self.memory is None:
            x = observations if self.image is None else self.image(observations)
        else:
            assert starts is not None and state is not None
            flat = observations.flatten(0, 1)
            flat = flat if self.image is None else self.image(flat)
            x = self.memory(flat.unflatten(0, starts.shape), starts, state)
        return x if self.layers is None else self.layers(x)
