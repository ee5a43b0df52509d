"""Low-pass filters over vision tokens: how much of each token varies slowly, and fewer tokens with the same spectrum.

LUVC (arXiv 2512.09010) names a low-pass filter and publishes no equations; these are our design.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHANNELS = 1024
"""Channels that :func:`token_energy` transforms at a time, so that memory stays small beside a decoder layer's."""


def cutoff(kept: int, tokens: int, length: int) -> int:
    """Highest frequency that ``kept`` of ``tokens`` samples can carry, among the floor(length / 2) of the transform.

    Nyquist: max(1, round(kept / tokens x floor(length / 2))).
    """
    return max(1, math.floor(kept / tokens * (length // 2) + 0.5))


def token_energy(
    values: Float[Tensor, "batch tokens dim"], highest: int, *, residual: bool = False
) -> Float[Tensor, "batch tokens"]:
    """Energy of each token after a low-pass filter along the tokens: |Y_i|^2, float32.

    Y are the values minus their mean over the tokens, with the frequencies above ``highest`` removed by a real FFT;
    ``residual`` takes |Z_i - Y_i|^2, what was removed, instead.
    """
    tokens = values.shape[1]
    energy = values.new_zeros(values.shape[:2], dtype=torch.float32)
    for part in values.split(CHANNELS, -1):
        spectrum = torch.fft.rfft(part.float(), dim=1)
        spectrum[:, 0] = 0  # the mean over the tokens
        if residual:
            spectrum[:, : highest + 1] = 0
        else:
            spectrum[:, highest + 1 :] = 0
        energy += torch.fft.irfft(spectrum, n=tokens, dim=1).square().sum(-1)
    return energy


def channel_energy(values: Float[Tensor, "batch tokens dim"], highest: int) -> Float[Tensor, "batch tokens"]:
    """As :func:`token_energy`, with the filter along the channels of each token."""
    values = values.float()
    spectrum = torch.fft.rfft(values - values.mean(1, keepdim=True), dim=2)
    spectrum[..., highest + 1 :] = 0
    return torch.fft.irfft(spectrum, n=values.shape[2], dim=2).square().sum(-1)


def grid_energy(
    values: Float[Tensor, "batch tokens dim"],
    coordinates: Int[Tensor, "batch tokens 3"],
    grid: tuple[int, int, int],
    highest: tuple[int, int],
) -> Float[Tensor, "batch tokens"]:
    """As :func:`token_energy`, with a filter along the rows and the columns of each frame.

    ``highest`` are the frequencies that pass, (down the rows, along the columns). Tokens stand at their
    ``coordinates`` (frame, row, column); places of the ``grid`` without one are 0, the mean.
    """
    frames, rows, columns = grid
    batch, _, dim = values.shape
    values = values.float() - values.float().mean(1, keepdim=True)
    frame, row, column = coordinates.unbind(-1)
    place = ((frame * rows + row) * columns + column)[..., None].expand(-1, -1, dim)
    field = values.new_zeros(batch, frames * rows * columns, dim).scatter(1, place, values)
    spectrum = torch.fft.rfft2(field.view(batch, frames, rows, columns, dim), dim=(2, 3))
    down = torch.arange(rows, device=values.device)
    spectrum[:, :, torch.minimum(down, rows - down) > highest[0]] = 0
    spectrum[:, :, :, highest[1] + 1 :] = 0
    filtered = torch.fft.irfft2(spectrum, s=(rows, columns), dim=(2, 3)).flatten(1, 3)
    return filtered.gather(1, place).square().sum(-1)


def resample(values: Float[Tensor, "batch tokens dim"], count: int) -> Float[Tensor, "batch {count} dim"]:
    """``count`` tokens with the low end of the spectrum of ``values`` along the tokens, float32.

    Spectral pooling (Rippel et al. 2015) of a real signal: the spectrum is cut and transformed back at the new length.
    """
    tokens = values.shape[1]
    spectrum = torch.fft.rfft(values.float(), dim=1)[:, : count // 2 + 1]
    return torch.fft.irfft(spectrum, n=count, dim=1) * (count / tokens)
