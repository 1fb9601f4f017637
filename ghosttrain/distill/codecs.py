"""Codecs: a teacher's output for an image as a fixed number of bytes, and what that costs.

Owns the three formats and the measurement that compares them; not the files the bytes are kept in
(cache.py), nor the choice (engine/codec_choice.py).

| codec | an image's bytes (little-endian) | bytes |
|---|---|---|
| `topk:N` | N classes as uint16; N float16: log(rest / p_1), then log(p_i / p_1) | 4 N |
| `features:BITS` | float16 least root and step of each segment; codes | 4 S + F BITS / 8 |
| `logits:BITS` | float16 least value and step; codes | 4 + K BITS / 8 |

With 16 bits the last two are plain float16. p_1 >= ... >= p_N are the largest probabilities at
T = 1 and the rest is the mass of the other classes.

Shapes: B batch, K classes, F pooled features, S segments (members of an ensemble, F is the sum of
their widths), N values, G words, R bytes of an image's output, n samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ghosttrain.config.codec import parse_codec
from ghosttrain.distill.teacher_output import TeacherOutput
from ghosttrain.errors import UserError

_HALF_MAX = 65504.0  # the largest float16, and the smallest above 0
_HALF_TINY = 2.0**-24
_NO_ZERO = 1e-30  # in a denominator
_LEAST_MEAN = 1e-12  # of a class in the teacher's mean output: log-probabilities stay finite


def candidates(num_classes: int, widths: Sequence[int]) -> list[str]:
    """Return the codecs worth measuring, fewest bytes first; `features` if there are `widths`.

    A `topk` is worth it while it is smaller than the smallest `logits`.
    """
    most = min(bytes_per_image("logits:4", num_classes), 4 * num_classes)
    top = [k for k in (10, 20, 50, 100) if 4 * k < most] or [k for k in (2, 5) if 4 * k < most]
    names = [f"topk:{k}" for k in top if num_classes <= 65536]
    names += [f"features:{bits}" for bits in (3, 4, 6, 8) if widths]
    names += [f"logits:{bits}" for bits in (4, 6, 8, 16)]
    return sorted(names, key=lambda name: bytes_per_image(name, num_classes, widths))


@dataclass(frozen=True)
class Codec:
    """Outputs to bytes and back. Made by `make_codec`."""

    name: str
    num_classes: int
    widths: tuple[int, ...]
    """Width of each segment of the pooled features; () unless they are what is stored."""
    tables: dict[str, Tensor]
    """What all outputs share, in float32. `topk`: "mean" (K,), the teacher's mean output, as
    probabilities; `features`: "weight" (K, F) and "bias" (K,) of its classifier."""

    @property
    def bytes_per_image(self) -> int:
        """R, bytes of one output."""
        return bytes_per_image(self.name, self.num_classes, self.widths)

    def to(self, device: torch.device | str) -> Codec:
        """Return the codec that decodes on `device`."""
        return replace(self, tables={name: x.to(device) for name, x in self.tables.items()})

    @torch.no_grad()
    def encode(self, output: TeacherOutput) -> Tensor:
        """Return the bytes (B, R), uint8 on the CPU, of an output on any device.

        Raises:
            UserError: a value of the output is not finite.
            ValueError: the output has another shape than the codec was made for.
        """
        kind, number = parse_codec(self.name)
        values_BN = output.features if kind == "features" else output.logits
        width = sum(self.widths) if kind == "features" else self.num_classes
        if values_BN is None or values_BN.shape[1:] != (width,):
            shape = None if values_BN is None else tuple(values_BN.shape)
            raise ValueError(f"{self.name} stores (B, {width}) of each output, got {shape}")
        values_BN = values_BN.float()
        if not values_BN.isfinite().all():
            raise UserError(
                "the teacher's output for an image is not finite: type teacher.dtype=fp32, or give"
                " another teacher"
            )
        if kind == "topk":
            cached_BR = _encode_topk(values_BN, number)
        elif number == 16:
            cached_BR = _half_bytes(values_BN)
        elif kind == "logits":
            cached_BR = _quantise(_shifted(values_BN), (self.num_classes,), number)
        else:
            # Pooled features have many small values and a long tail: at 3 and 4 bits equal steps of
            # the square root have half the squared error of equal steps (EfficientNet-Lite2 on
            # photos). Signed, since not every activation is positive.
            cached_BR = _quantise(values_BN.sign() * values_BN.abs().sqrt(), self.widths, number)
        return cached_BR.cpu()

    @torch.no_grad()
    def decode(self, cached_BR: Tensor) -> TeacherOutput:
        """Return the output that cached bytes (B, R) hold, on their and the tables' device.

        `topk` gives the log of probabilities at T = 1; `logits`, below 16 bits, may have another
        constant added to each sample's than the teacher gave, which no loss can see.
        """
        kind, number = parse_codec(self.name)
        if kind == "topk":
            return TeacherOutput(_decode_topk(cached_BR, number, self.tables["mean"]))
        if kind == "logits":
            if number == 16:
                return TeacherOutput(_halves(cached_BR))
            return TeacherOutput(_dequantise(cached_BR, (self.num_classes,), number))
        if number == 16:
            features_BF = _halves(cached_BR)
        else:
            root_BF = _dequantise(cached_BR, self.widths, number)
            features_BF = root_BF * root_BF.abs()
        with torch.autocast(cached_BR.device.type, enabled=False):
            logits_BK = F.linear(features_BF, self.tables["weight"], self.tables["bias"])
        return TeacherOutput(logits_BK, features_BF)


def make_codec(
    name: str, num_classes: int, widths: Sequence[int], tables: Mapping[str, Tensor]
) -> Codec:
    """Return the codec called `name` of a teacher.

    Args:
        name: see `parse_codec`.
        num_classes: K.
        widths: of the segments of its pooled features; empty where they do not make its logits.
        tables: what the codec needs of `Codec.tables`; others are left out.

    Raises:
        UserError: no such codec, K too small or too large for it, no features to store, or a
            table that is missing or has another shape.
    """
    kind, number = parse_codec(name)
    if kind == "topk" and not number < num_classes <= 65536:
        given = f"cache.codec={name}, but the data has {num_classes:,} classes"
        if num_classes > 65536:
            raise UserError(f"{given} and topk numbers at most 65,536: type cache.codec=logits:6")
        raise UserError(
            f"{given}: type topk:K with K below that, or cache.codec=logits:8, which stores all"
        )
    if kind == "features" and not widths:
        raise UserError(
            f"cache.codec={name} needs a teacher whose logits are one linear layer of its pooled"
            " features (an ensemble of such: teacher.average=logit); type cache.codec=logits:6"
        )
    widths = tuple(widths) if kind == "features" else ()
    shapes: dict[str, tuple[int, ...]] = {}
    if kind == "topk":
        shapes = {"mean": (num_classes,)}
    elif kind == "features":
        shapes = {"weight": (num_classes, sum(widths)), "bias": (num_classes,)}
    for key, shape in shapes.items():
        given_shape = tuple(tables[key].shape) if key in tables else "nothing"
        if given_shape != shape:
            raise UserError(f"codec {name} needs a table {key!r} of {shape}, got {given_shape}")
    kept = {key: tables[key].detach().float().contiguous() for key in shapes}
    return Codec(name, num_classes, widths, kept)


def bytes_per_image(name: str, num_classes: int, widths: Sequence[int] = ()) -> int:
    """Return the bytes of one output (`make_codec` explains the arguments)."""
    kind, number = parse_codec(name)
    if kind == "topk":
        return 4 * number
    width, segments = (sum(widths), len(widths)) if kind == "features" else (num_classes, 1)
    return 2 * width if number == 16 else 4 * segments + math.ceil(width * number / 8)


# --- The largest probabilities --------------------------------------------------------------------


def _encode_topk(logits_BK: Tensor, k: int) -> Tensor:
    top_Bk, classes_Bk = logits_BK.topk(k, dim=1)
    rest_B = logits_BK.scatter(1, classes_Bk, -math.inf).logsumexp(dim=1)
    stored_Bk = torch.cat([rest_B[:, None], top_Bk[:, 1:]], dim=1) - top_Bk[:, :1]
    classes = classes_Bk.to(torch.int16).view(torch.uint8)  # the low 16 bits of each
    return torch.cat([classes, _half_bytes(stored_Bk)], dim=1)


def _decode_topk(cached_BR: Tensor, k: int, mean_K: Tensor) -> Tensor:
    """Return log-probabilities (B, K): the rest is spread in proportion to the mean output."""
    classes_Bk = _typed(cached_BR[:, : 2 * k], torch.int16).long() & 0xFFFF
    stored_Bk = _halves(cached_BR[:, 2 * k :])
    rest_B1, top_Bk = stored_Bk[:, :1], F.pad(stored_Bk[:, 1:], (1, 0))
    log_sum_B1 = torch.cat([top_Bk, rest_B1], dim=1).logsumexp(dim=1, keepdim=True)
    mean_K = mean_K.clamp_min(_LEAST_MEAN)
    # Summed over the other classes, not subtracted from 1: the top ones may hold nearly all of it.
    others_B1 = mean_K.expand(len(cached_BR), -1).scatter(1, classes_Bk, 0.0).sum(1, keepdim=True)
    rest_BK = mean_K.log() + (rest_B1 - log_sum_B1 - others_B1.log())
    return rest_BK.scatter(1, classes_Bk, top_Bk - log_sum_B1)


# --- Equal steps ----------------------------------------------------------------------------------


def _shifted(logits_BK: Tensor) -> Tensor:
    """Add to each sample what makes its least logit a float16; none is further below the largest
    than float16 reaches, where no softmax sees it any more.
    """
    logits_BK = logits_BK.clamp_min(logits_BK.amax(dim=1, keepdim=True) - _HALF_MAX)
    least_B1 = logits_BK.amin(dim=1, keepdim=True)
    return logits_BK - least_B1 + _half(least_B1).float()


def _quantise(values_BN: Tensor, widths: Sequence[int], bits: int) -> Tensor:
    """Return the bytes of values in equal steps from the least to the largest of each segment.

    A value is off by at most half a step, and by the float16 rounding of the least one where it is
    below that. A step is (largest - least) / (2^bits - 1), rounded to float16.
    """
    last = 2**bits - 1
    heads, codes = [], []
    for x_BN in values_BN.split(list(widths), dim=1):
        least_B1 = _half(x_BN.amin(dim=1, keepdim=True))
        step_B1 = (x_BN.amax(dim=1, keepdim=True) - least_B1) / last
        step_B1 = _half(step_B1.clamp_min(_HALF_TINY))
        codes.append(((x_BN - least_B1) / step_B1).round().clamp(0, last))  # as rounded
        heads += [least_B1, step_B1]
    head = torch.cat(heads, dim=1).view(torch.uint8)
    return torch.cat([head, _pack(torch.cat(codes, dim=1), bits)], dim=1)


def _dequantise(cached_BR: Tensor, widths: Sequence[int], bits: int) -> Tensor:
    head_bytes = 4 * len(widths)
    head = _halves(cached_BR[:, :head_bytes])
    codes = _unpack(cached_BR[:, head_bytes:], sum(widths), bits).float().split(list(widths), 1)
    parts = [
        torch.addcmul(head[:, 2 * i, None], codes_BN, head[:, 2 * i + 1, None])
        for i, codes_BN in enumerate(codes)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _word(bits: int) -> tuple[int, int, torch.dtype]:
    """Return how many codes fill how many whole bytes, and a type that holds these."""
    size = bits // math.gcd(bits, 8)
    return 8 // math.gcd(bits, 8), size, torch.int32 if size < 4 else torch.int64


def _pack(codes_BN: Tensor, bits: int) -> Tensor:
    """Return codes below 2^bits as bytes (B, N bits / 8 rounded up), lowest bit first."""
    count, size, dtype = _word(bits)
    num_bytes = math.ceil(codes_BN.shape[1] * bits / 8)
    codes_BN = F.pad(codes_BN, (0, -codes_BN.shape[1] % count)).to(dtype)
    shifts = torch.arange(count, dtype=dtype, device=codes_BN.device) * bits
    words_BG = (codes_BN.unflatten(1, (-1, count)) << shifts).sum(dim=2, dtype=dtype)
    shifts = torch.arange(size, dtype=dtype, device=codes_BN.device) * 8
    return ((words_BG[:, :, None] >> shifts) & 255).to(torch.uint8).flatten(1)[:, :num_bytes]


def _unpack(bytes_BR: Tensor, num_codes: int, bits: int) -> Tensor:
    """Return the codes (B, num_codes), as integers, that `_pack` made bytes of."""
    count, size, dtype = _word(bits)
    if size == 1 and count == 1:
        return bytes_BR
    bytes_BR = F.pad(bytes_BR, (0, -bytes_BR.shape[1] % size))
    if size == 1:
        words_BG, dtype = bytes_BR, torch.uint8
    else:
        words_BG = bytes_BR[:, ::size].to(dtype)
        for i in range(1, size):
            words_BG = words_BG | bytes_BR[:, i::size].to(dtype) << 8 * i
    shifts = torch.arange(count, dtype=dtype, device=bytes_BR.device) * bits
    codes_BGN = (words_BG[:, :, None] >> shifts) & (2**bits - 1)
    return codes_BGN.flatten(1)[:, :num_codes]


def _half(x: Tensor) -> Tensor:
    return x.clamp(-_HALF_MAX, _HALF_MAX).half()


def _half_bytes(x_BN: Tensor) -> Tensor:
    return _half(x_BN).contiguous().view(torch.uint8)


def _typed(bytes_BR: Tensor, dtype: torch.dtype) -> Tensor:
    """Read bytes as numbers; copied first, since a part of the bytes may be anywhere in memory."""
    return bytes_BR.clone(memory_format=torch.contiguous_format).view(dtype)


def _halves(bytes_BR: Tensor) -> Tensor:
    return _typed(bytes_BR, torch.float16).float()


# --- What a codec costs ---------------------------------------------------------------------------

LogitLoss = Callable[[Tensor, Tensor, slice], Tensor]
"""(student (B, K), teacher (B, K), which of the n samples these are) -> scalar, a mean over B."""

CHUNK = 64
"""Samples of a batch on which gradients, and losses that compare samples, are taken."""


class Quality(NamedTuple):
    """What cached outputs do to a loss, for the student and the loss that suffer most."""

    loss_error: float
    """Mean |loss with the cached output - loss with the exact one| / mean loss with the exact."""
    cosine: float
    """Between the student's gradients with the stored and with the exact output."""


def measure(
    codec: Codec, output: TeacherOutput, students: Mapping[str, Tensor], losses: Sequence[LogitLoss]
) -> Quality:
    """Return how much of `output` is left once it was stored, as students' losses see it.

    The loss error is of single samples, where a loss treats samples apart; of a loss that compares
    the samples of a batch, it is of batches of `CHUNK`. The cosine is of each sample's gradient to
    the logits, averaged with the norm of the exact gradient as weight: that is what the sample
    contributes to a step, and where it is nearly 0 its direction is noise. A student
    whose logits equal the teacher's has no such gradient, and is left out: another draw is one,
    where the augmentation draws nothing.

    Args:
        codec: what stores.
        output: the teacher's, to n samples.
        students: logits (n, K) by name.
        losses: which are used in training (`LogitLoss`).
    """
    exact_nK = output.logits.float()
    codec = codec.to(exact_nK.device)
    stored_nK = codec.decode(codec.encode(output).to(exact_nK.device)).logits
    agreeing = [torch.allclose(x.float(), exact_nK, 1e-3, 1e-3) for x in students.values()]
    found = [
        _compare(loss, student_nK.float(), exact_nK, stored_nK)
        for student_nK, agrees in zip(students.values(), agreeing, strict=True)
        for loss in losses
        if not agrees or all(agreeing)
    ]
    errors, cosines = torch.tensor(found).unbind(dim=1)  # unlike max(), keeps a NaN
    return Quality(errors.max().item(), cosines.min().item())


def _compare(loss: LogitLoss, student_nK: Tensor, exact_nK: Tensor, stored_nK: Tensor) -> Quality:
    n = len(student_nK)
    count = max(1, round(n / CHUNK))
    chunks = [slice(n * i // count, n * (i + 1) // count) for i in range(count)]
    exact, gradient_nK = _with_gradients(loss, student_nK, exact_nK, chunks)
    stored, stored_gradient_nK = _with_gradients(loss, student_nK, stored_nK, chunks)
    if _treats_samples_apart(loss, student_nK, exact_nK, chunks[0], exact[0]):
        samples = [slice(i, i + 1) for i in range(n)]
        exact, stored = (_values(loss, student_nK, t, samples) for t in (exact_nK, stored_nK))
    error = (stored - exact).abs().mean() / exact.mean().clamp_min(_NO_ZERO)
    along_n = F.normalize(stored_gradient_nK, dim=1, eps=_NO_ZERO).mul(gradient_nK).sum(dim=1)
    cosine = along_n.sum() / gradient_nK.norm(dim=1).sum().clamp_min(_NO_ZERO)
    return Quality(error.item(), cosine.item())


def _with_gradients(
    loss: LogitLoss, student_nK: Tensor, teacher_nK: Tensor, chunks: Sequence[slice]
) -> tuple[Tensor, Tensor]:
    """Return the loss of each chunk, and each sample's gradient (n, K)."""
    values, gradients = [], []
    for chunk in chunks:
        logits_BK = student_nK[chunk].clone().requires_grad_()
        with torch.enable_grad():
            value = loss(logits_BK, teacher_nK[chunk], chunk)
        (gradient_BK,) = torch.autograd.grad(value, logits_BK)
        values.append(value.detach())
        gradients.append(gradient_BK * len(logits_BK))
    return torch.stack(values), torch.cat(gradients)


@torch.no_grad()
def _values(
    loss: LogitLoss, student_nK: Tensor, teacher_nK: Tensor, parts: Sequence[slice]
) -> Tensor:
    return torch.stack([loss(student_nK[part], teacher_nK[part], part) for part in parts])


def _treats_samples_apart(
    loss: LogitLoss, student_nK: Tensor, teacher_nK: Tensor, chunk: slice, value: Tensor
) -> bool:
    """Whether the loss of a chunk is the mean of the losses of its samples alone."""
    samples = [slice(i, i + 1) for i in range(chunk.start, chunk.stop)]
    mean = _values(loss, student_nK, teacher_nK, samples).mean()
    return torch.allclose(mean, value, rtol=1e-4, atol=1e-7)
