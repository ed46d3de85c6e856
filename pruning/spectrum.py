"""Low-pass filters for images and for token sequences (VTC-LFC, eq. 2).

B images, C channels, H height, W width, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pruning.errors import SettingError


def low_pass(images: Tensor, cutoff: float) -> Tensor:
    """Returns images with only their low frequencies left: F^-1(F(X) * G), VTC-LFC eq. 2.

    G is a Gaussian around the zero frequency; its standard deviation is cutoff * K / 2 frequency bins,
    K the shorter side.

    Args:
        images: (B, C, H, W).
        cutoff: width of the Gaussian as a share of half the shorter side, in (0, 1].

    Returns:
        (B, C, H, W), real; a constant image comes back unchanged.

    Raises:
        SettingError: cutoff outside (0, 1].
    """
    _check_cutoff(cutoff)
    height, width = images.shape[-2:]
    deviation = cutoff * min(height, width) / 2
    rows = torch.fft.fftfreq(height, d=1 / height, device=images.device)
    columns = torch.fft.rfftfreq(width, d=1 / width, device=images.device)
    gain = torch.exp(-(rows[:, None] ** 2 + columns**2) / (2 * deviation**2))
    return torch.fft.irfft2(torch.fft.rfft2(images.float()) * gain, s=(height, width)).to(images.dtype)


def token_filter(num_tokens: int, cutoff: float) -> Tensor:
    """Returns the low-pass filter along a sequence of tokens as a matrix: `token_filter(N, cutoff) @ x` filters x.

    A matrix product is what the devices are fastest at, in every precision; a Fourier transform is not.

    Args:
        num_tokens: N.
        cutoff: width of the Gaussian as a share of half the sequence, in (0, 1].

    Returns:
        (N, N), float32, symmetric; every row sums to one.

    Raises:
        SettingError: cutoff outside (0, 1].
    """
    _check_cutoff(cutoff)
    deviation = cutoff * num_tokens / 2
    frequencies = torch.fft.fftfreq(num_tokens, d=1 / num_tokens, dtype=torch.float64)
    gain = torch.exp(-(frequencies**2) / (2 * deviation**2))
    identity = torch.eye(num_tokens, dtype=torch.float64)
    return torch.fft.ifft(torch.fft.fft(identity, dim=0) * gain[:, None], dim=0).real.float()


def _check_cutoff(cutoff: float) -> None:
    if not 0 < cutoff <= 1:
        raise SettingError(f"cut-off frequency {cutoff} is out of range; give one above 0 and at most 1")
