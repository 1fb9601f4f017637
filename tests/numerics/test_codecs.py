"""Codecs against independent references: bits by numpy, bounds in float64, quality row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from outputs import WIDTHS, K, N, classifier, codec, draw, output, pooled
from torch import Tensor

from ghosttrain.config.codec import BITS, parse_codec
from ghosttrain.distill import codecs
from ghosttrain.distill.codecs import candidates, make_codec
from ghosttrain.distill.teacher_output import TeacherOutput
from ghosttrain.errors import UserError

SMALL_BITS = [2, 3, 4, 5, 6, 7, 8]
EVERY = ["topk:1", "topk:10", *(f"{k}:{b}" for k in ("logits", "features") for b in BITS)]


def stored(name: str, given: TeacherOutput, mean: Tensor | None = None) -> TeacherOutput:
    first = codec(name, given.logits.shape[1], mean)
    cached = first.encode(given)
    assert cached.dtype == torch.uint8 and cached.device.type == "cpu"
    assert cached.shape == (len(given.logits), first.bytes_per_image)
    return first.decode(cached)


def extreme(scale: float) -> Tensor:
    """Rows of one large logit, one small, all equal, a tie, far from zero, spread."""
    rows = torch.zeros(6, K)
    rows[0, 5], rows[1, 7], rows[2], rows[3, 2:4] = scale, -scale, scale, scale
    rows[4] = draw(K, seed=4) + scale
    rows[5] = torch.linspace(-scale, scale, K)[draw(K, seed=5).argsort()]
    return rows


@pytest.mark.parametrize("name", EVERY)
def test_names_are_read(name: str) -> None:
    kind, number = parse_codec(name)
    assert f"{kind}:{number}" == name


@pytest.mark.parametrize(
    "name",
    ["", "topk", "topk:", "topk:0", "topk:-1", "topk:1.5", "topk:²", "Topk:5", "logits:1"]
    + ["logits:9", "logits:32", "features:0", "features:x", "pca:8", "auto", "topk:5 "]
    + ["topk:007", "topk:３", "logits:４", "features:04"],
)
def test_other_names_are_refused_with_what_is_valid(name: str) -> None:
    with pytest.raises(UserError, match=r"topk:K .* features:BITS or logits:BITS .*2, 3, 4") as e:
        parse_codec(name)
    assert "\n" not in str(e.value) and f"cache.codec={name} " in str(e.value)


@pytest.mark.parametrize(
    ("name", "classes", "widths", "expected"),
    [
        ("topk:10", 10, (), "10 classes: type topk:K with K below"),
        ("topk:11", 10, (), "10 classes: type topk:K with K below"),
        ("topk:10", 65537, (), "at most 65,536: type cache.codec=logits"),
        ("features:4", 10, (), "one linear layer .*teacher.average=logit"),
        ("features:4", 10, (5,), "table 'weight' of .10, 5., got nothing"),
        ("topk:4", 10, (), "table 'mean' of .10,., got nothing"),
    ],
)
def test_what_does_not_fit_is_refused(name, classes, widths, expected) -> None:
    with pytest.raises(UserError, match=expected):
        make_codec(name, classes, widths, {})


def test_tables_of_another_shape_are_refused() -> None:
    tables = {"weight": torch.zeros(10, 6), "bias": torch.zeros(10)}
    with pytest.raises(UserError, match=r"table 'weight' of \(10, 5\), got \(10, 6\)"):
        make_codec("features:4", 10, (2, 3), tables)


def test_a_codec_keeps_only_what_it_needs() -> None:
    assert codec("logits:4").tables == {} and codec("logits:4").widths == ()
    assert set(codec("topk:3").tables) == {"mean"} and codec("topk:3").widths == ()
    features = codec("features:4")
    assert set(features.tables) == {"weight", "bias"} and features.widths == WIDTHS


def test_records_have_the_promised_size() -> None:
    sizes = {"topk:10": 40, "logits:16": 202, "logits:3": 4 + 38, "logits:8": 4 + 101}
    sizes |= {"features:16": 254, "features:3": 8 + 48, "features:8": 8 + 127}
    assert {name: codec(name).bytes_per_image for name in sizes} == sizes


def test_candidates_come_smallest_first_and_can_be_made() -> None:
    assert candidates(1000, ()) == [
        *("topk:10", "topk:20", "topk:50", "topk:100"),
        *("logits:4", "logits:6", "logits:8", "logits:16"),
    ]
    assert candidates(1000, (1280,))[3:8] == [
        *("topk:100", "features:3", "logits:4", "features:4", "logits:6")
    ]
    assert candidates(10, ())[0] == "topk:2"
    for classes in (2, 3, 5, 10, 20, 50, 100, 1000, 65536, 65537):
        names = candidates(classes, ())
        mean = torch.full((classes,), 1 / classes)
        sizes = [make_codec(n, classes, (), {"mean": mean}).bytes_per_image for n in names]
        assert sizes == sorted(sizes) and "logits:16" in names


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 100, 1000])
@pytest.mark.parametrize("bits", SMALL_BITS)
def test_packing_is_that_of_numpy(bits: int, count: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (5, count))
    codes[0], codes[1] = 0, 2**bits - 1
    bit_by_bit = (codes[:, :, None] >> np.arange(bits) & 1).reshape(5, -1).astype(np.uint8)
    expected = np.packbits(bit_by_bit, axis=1, bitorder="little")
    packed = codecs._pack(torch.from_numpy(codes), bits)
    np.testing.assert_array_equal(packed.numpy(), expected)
    np.testing.assert_array_equal(codecs._unpack(packed, count, bits).numpy(), codes)


@pytest.mark.parametrize("name", EVERY)
def test_any_split_of_a_batch_decodes_alike(name: str) -> None:
    given, first = output(), codec(name)
    cached = first.encode(given)
    whole = first.decode(cached)
    wide = torch.zeros(N, first.bytes_per_image + 3, dtype=torch.uint8)
    wide[:, 1 : 1 + first.bytes_per_image] = cached  # part of something larger, at an odd place
    for cut in (0, 1, 4):
        for source in (cached, wide[:, 1 : 1 + first.bytes_per_image]):
            parts = [first.decode(source[:cut]), first.decode(source[cut:])]
            logits = torch.cat([part.logits for part in parts])
            torch.testing.assert_close(logits, whole.logits, rtol=1e-5, atol=1e-5)
            if whole.features is not None:
                assert torch.equal(torch.cat([p.features for p in parts]), whole.features)
    alone = torch.cat(
        [first.encode(TeacherOutput(x[None], f[None])) for x, f in zip(*given, strict=True)]
    )
    if not name.startswith("topk"):
        assert torch.equal(alone, cached)


def test_logits_in_16_bits_are_float16() -> None:
    logits = torch.cat([draw(4, K) * 10, extreme(1e3), torch.full((1, K), 1e-7)])
    assert torch.equal(stored("logits:16", TeacherOutput(logits)).logits, logits.half().float())
    huge = stored("logits:16", TeacherOutput(extreme(1e6))).logits
    assert torch.equal(huge, extreme(1e6).clamp(-65504, 65504).half().float())


def up_to_a_constant(x: Tensor, y: Tensor) -> Tensor:
    """Return the largest |x - y| of each row, but for the constant that makes it least."""
    d = (x - y).double()
    return (d.amax(dim=1) - d.amin(dim=1)) / 2


@pytest.mark.parametrize("bits", SMALL_BITS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 1e3, 1e4])
def test_a_logit_is_off_by_half_a_step_at_most(bits: int, scale: float) -> None:
    for logits in (draw(N, K) * scale, extreme(scale), draw(N, K) * scale - 777):
        back = stored(f"logits:{bits}", TeacherOutput(logits)).logits
        step = (logits.amax(dim=1) - logits.amin(dim=1)) / (2**bits - 1)
        bound = step.double() * 0.5 * 1.001 + 1e-7 + logits.abs().amax() * 1e-6
        assert (up_to_a_constant(back, logits) <= bound).all()
        shift = (back - logits).abs().amax(dim=1)  # and the constant is float16's rounding
        assert (shift <= bound + logits.abs().amax(dim=1) * 2**-11 + 1e-7).all()


@pytest.mark.parametrize("bits", BITS)
def test_logits_beyond_float16_keep_what_a_softmax_sees(bits: int) -> None:
    logits = extreme(1e6)
    back = stored(f"logits:{bits}", TeacherOutput(logits)).logits
    assert back.isfinite().all()
    if bits < 16:
        clear = [0, 2, 3]  # the rows whose largest logits are far above the others, or all equal
        probable = (logits / 20).softmax(dim=1)[clear]
        torch.testing.assert_close((back / 20).softmax(dim=1)[clear], probable)
    logits = torch.zeros(1, K)
    logits[0, 5], logits[0, 6] = 1e7 - 3e4, 1e7
    back = stored(f"logits:{bits}", TeacherOutput(logits)).logits
    assert back.isfinite().all() and (bits == 16 or back.argmax(dim=1) == 6)


@pytest.mark.parametrize("bits", SMALL_BITS)
def test_a_constant_changes_nothing_that_a_loss_sees(bits: int) -> None:
    logits = (draw(N, K) * 64).round() / 64
    base = stored(f"logits:{bits}", TeacherOutput(logits)).logits
    for constant in (-3000.0, 0.125, 1e4):
        moved = stored(f"logits:{bits}", TeacherOutput(logits + constant)).logits
        assert (up_to_a_constant(moved, base) <= 1e-3).all()


@pytest.mark.parametrize("k", [1, 2, 10, K - 1])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_topk_keeps_the_largest_and_the_mass_of_the_rest(k: int, scale: float) -> None:
    logits = draw(N, K) * scale
    mean = draw(K, seed=3).softmax(dim=0)
    back = stored(f"topk:{k}", TeacherOutput(logits), mean).logits.double()
    p, q = logits.double().softmax(dim=1), back.softmax(dim=1)
    torch.testing.assert_close(back.exp().sum(dim=1), torch.ones(N).double(), rtol=1e-5, atol=0)
    top, classes = p.topk(k, dim=1)
    bound = 2 * 2**-11 * (logits.amax() - logits.amin() + math.log(K)).item()
    torch.testing.assert_close(q.gather(1, classes), top, rtol=bound, atol=0)
    rest = q.scatter(1, classes, 0.0)
    torch.testing.assert_close(rest.sum(dim=1), 1 - top.sum(dim=1), rtol=bound, atol=1e-12)
    spread = mean.double().expand(N, -1).scatter(1, classes, 0.0)
    spread = spread / spread.sum(dim=1, keepdim=True)
    torch.testing.assert_close(rest / rest.sum(dim=1, keepdim=True), spread, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("zeros", [0, 50, K - 1, K])
def test_topk_stays_finite(scale: float, zeros: int) -> None:
    mean = torch.ones(K)
    mean[:zeros] = 0
    mean = mean / mean.sum().clamp_min(1)
    logits = extreme(scale)
    back = stored("topk:3", TeacherOutput(logits), mean).logits
    assert back.isfinite().all()
    torch.testing.assert_close(back.exp().sum(dim=1), torch.ones(6), rtol=1e-4, atol=0)
    clear = [0, 5]  # the other rows have ties between classes that are stored and not
    assert torch.equal(back.argmax(dim=1)[clear], logits.argmax(dim=1)[clear])


def test_topk_spreads_evenly_over_classes_the_mean_output_never_names() -> None:
    logits, mean = torch.zeros(1, 6), torch.tensor([0.5, 0.5, 0, 0, 0, 0])
    logits[0, :2] = torch.tensor([2.0, 1.0])
    back = make_codec("topk:2", 6, (), {"mean": mean})
    p = back.decode(back.encode(TeacherOutput(logits))).logits.exp()
    torch.testing.assert_close(p, logits.softmax(dim=1), rtol=1e-3, atol=0)


def test_topk_numbers_65536_classes() -> None:
    logits = torch.zeros(3, 65536)
    logits[[0, 1, 2], [32767, 32768, 65535]] = 20.0
    first = make_codec("topk:2", 65536, (), {"mean": torch.full((65536,), 1 / 65536)})
    assert first.decode(first.encode(TeacherOutput(logits))).logits.argmax(1).tolist() == [
        32767,
        32768,
        65535,
    ]


@pytest.mark.parametrize("bits", SMALL_BITS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("kind", ["pooled", "signed", "far from zero"])
def test_a_root_of_a_feature_is_off_by_half_a_step(bits: int, scale: float, kind: str) -> None:
    features = draw(N, sum(WIDTHS)) if kind == "signed" else pooled(N)
    features = (features + 30 * (kind == "far from zero")) * scale
    features[:, WIDTHS[0] :] *= 100  # a member of an ensemble with larger features
    back = stored(f"features:{bits}", output(features=features)).features
    assert back is not None

    def root(x: Tensor) -> Tensor:
        return x.double().sign() * x.double().abs().sqrt()

    for was, now in zip(root(features).split(WIDTHS, 1), root(back).split(WIDTHS, 1), strict=True):
        step = (was.amax(dim=1) - was.amin(dim=1)) / (2**bits - 1)
        bound = 0.5 * 1.001 * step + was.amin(dim=1).abs() * 2**-11 + 1e-6
        assert ((was - now).abs().amax(dim=1) <= bound).all()


@pytest.mark.parametrize("bits", BITS)
def test_extreme_features_stay_finite(bits: int) -> None:
    features = torch.zeros(5, sum(WIDTHS))
    features[1], features[2] = 7.0, -3.0
    features[3, 0], features[4, 40] = 6e4, -6e4
    back = stored(f"features:{bits}", output(features=features))
    assert back.features is not None and back.logits.isfinite().all()
    assert torch.equal(back.features[0], features[0])
    torch.testing.assert_close(back.features[1:3], features[1:3], rtol=2e-3, atol=0)
    torch.testing.assert_close(back.features[3], features[3], rtol=4e-3, atol=0)
    torch.testing.assert_close(back.features[4], features[4], rtol=4e-3, atol=0.5)


def test_features_in_16_bits_are_float16_and_make_the_logits() -> None:
    given = output()
    back = stored("features:16", given)
    assert given.features is not None and back.features is not None
    assert torch.equal(back.features, given.features.half().float())
    weight, bias = classifier()
    expected = back.features.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(back.logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_autocast_does_not_reach_the_classifier() -> None:
    first = codec("features:8")
    cached = first.encode(output())
    expected = first.decode(cached).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(first.decode(cached).logits, expected)


def test_equal_steps_of_the_root_beat_equal_steps() -> None:
    features = pooled(64)
    for bits in (3, 4):
        back = stored(f"features:{bits}", output(features=features)).features
        plain = torch.cat(
            [
                codecs._dequantise(codecs._quantise(x, (x.shape[1],), bits), (x.shape[1],), bits)
                for x in features.split(WIDTHS, 1)
            ],
            dim=1,
        )
        assert back is not None
        error, plain_error = ((x - features).square().mean() for x in (back, plain))
        assert error < 0.75 * plain_error


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["topk:3", "logits:4", "logits:16", "features:4", "features:16"])
def test_an_output_that_is_not_finite_is_not_stored(name: str, bad: float) -> None:
    given = output()
    given.logits[2, 3] = bad
    given.features[2, 3] = bad  # type: ignore[index]
    with pytest.raises(UserError, match="not finite: type teacher.dtype=fp32"):
        codec(name).encode(given)


@pytest.mark.parametrize("name", ["topk:3", "logits:4", "features:4"])
def test_an_output_of_another_shape_is_not_stored(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} stores \(B, "):
        codec(name).encode(TeacherOutput(torch.zeros(N, K + 1), torch.zeros(N, sum(WIDTHS) + 1)))
    with pytest.raises(ValueError, match="stores"):
        codec("features:4").encode(TeacherOutput(torch.zeros(N, K)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", EVERY)
def test_a_gpu_encodes_and_decodes_alike(name: str) -> None:
    first, given = codec(name), output(64)
    on_gpu = TeacherOutput(given.logits.cuda(), given.features.cuda())  # type: ignore[union-attr]
    expected = first.decode(first.encode(given))
    cached = first.encode(on_gpu)
    back = first.to("cuda").decode(cached.cuda())
    assert cached.device.type == "cpu" and back.logits.is_cuda
    torch.testing.assert_close(back.logits.cpu(), expected.logits, rtol=1e-3, atol=0.02)
