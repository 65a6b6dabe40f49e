"""Both networks: sizes, parameter counts, and the skip connections against the paper's literal wording."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbegan import (
    PRESETS,
    Decoder,
    Discriminator,
    Encoder,
    Generator,
    ModelConfig,
    TrainConfig,
    UserError,
    plain,
)
from fastbegan.nets.models import build, count_parameters, to_plain
from fastbegan.training.cost import step_cost

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (PRESETS["paper-128"].model, 17_334_214),
        (PRESETS["paper-64"].model, 16_153_798),
        (PRESETS["paper-32"].model, 9_582_150),
        (PRESETS["paper-256"].model, 18_514_630),
        (ModelConfig(size=64, filters=64), 4_832_902),
    ],
)
def test_parameter_counts_of_the_paper(config: ModelConfig, parameters: int) -> None:
    with torch.device("meta"):
        assert count_parameters(Generator(config), Discriminator(config)) == parameters


def test_parts_of_paper_128() -> None:
    with torch.device("meta"):
        config = PRESETS["paper-128"].model
        assert count_parameters(Encoder(config)) == 12_131_008
        assert count_parameters(Decoder(config)) == count_parameters(Generator(config)) == 2_601_603


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("vanishing", [True, False])
@pytest.mark.parametrize(
    ("size", "widths", "repeats"),
    [(8, (2,), 2), (16, (1, 2), 1), (32, None, 2), (64, None, 3), (128, None, 2), (256, None, 2), (512, (1,) * 7, 1)],
)
def test_shapes(size: int, widths: tuple[int, ...] | None, repeats: int, skips: bool, vanishing: bool) -> None:
    config = ModelConfig(
        size=size, filters=2, hidden=5, latent=7, widths=widths, repeats=repeats, skips=skips, vanishing=vanishing
    )
    generator, discriminator = build(config, seed=0)
    images = generator(torch.zeros(2, 7))
    assert images.shape == (2, 3, size, size)
    assert discriminator.encoder(images).shape == (2, 5)
    assert discriminator(images).shape == images.shape
    assert images.is_contiguous(memory_format=torch.channels_last)


def _literal_decoder(net: Decoder | plain.Decoder, skips: bool, code: Tensor) -> Tensor:
    """The paper's words: upsample, concatenate h0 upsampled to the new size, convolve."""
    h0 = F.linear(code, net.expand.weight, net.expand.bias).view(len(code), -1, 8, 8)
    x = h0
    for index, level in enumerate(net.levels):
        if index:
            x = F.interpolate(x, scale_factor=2)
            if skips:
                x = torch.cat((x, F.interpolate(h0, size=x.shape[2:])), 1)
        assert isinstance(level, nn.ModuleList)
        for conv in level:
            assert isinstance(conv, nn.Conv2d)
            x = F.elu(F.conv2d(x, conv.weight, conv.bias, padding=1))
    return F.conv2d(x, net.image.weight, net.image.bias, padding=1)


@pytest.mark.parametrize("kind", [Decoder, plain.Decoder])
@pytest.mark.parametrize("skips", [True, False])
def test_decoder_equals_the_papers_words(skips: bool, kind: type[Decoder | plain.Decoder]) -> None:
    config = ModelConfig(size=64, filters=3, hidden=6, skips=skips)
    torch.manual_seed(0)
    net = kind(config).double()
    code = torch.randn(2, 6, dtype=torch.float64)
    torch.testing.assert_close(net(code), _literal_decoder(net, skips, code), rtol=0, atol=1e-12)


CONFIGS = [
    ModelConfig(size=64, filters=3, hidden=6, latent=5),
    ModelConfig(size=64, filters=3, hidden=6, latent=5, vanishing=True),
    ModelConfig(size=32, filters=3, hidden=6, latent=5, skips=False, repeats=3, vanishing=True),
    ModelConfig(size=32, filters=3, hidden=6, latent=5, repeats=1),
    ModelConfig(size=8, filters=2, hidden=5, latent=3, widths=(2,)),
]


def _nets(config: ModelConfig) -> tuple[Generator, Discriminator]:
    nets = build(config, seed=0)
    for net in nets:
        net.double()
        for name, buffer in net.named_buffers():
            assert name.endswith("carry")
            buffer.fill_(0.3)
    return nets


def _values(output: Tensor, *nets: nn.Module) -> list[Tensor]:
    return [output, *torch.autograd.grad(output.sin().sum(), [p for net in nets for p in net.parameters()])]


def _check(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS)
def test_both_nets_equal_the_plain_ones(config: ModelConfig) -> None:
    generator, discriminator = _nets(config)
    plain_g, plain_d = to_plain(generator), to_plain(discriminator)
    z = torch.rand(4, config.latent, dtype=torch.float64)
    expected = _values(plain_d(plain_g(z)), plain_g, plain_d)
    _check(_values(discriminator(generator(z)), generator, discriminator), expected)
    discriminator.encoder.recompute = True
    _check(_values(discriminator(generator(z)), generator, discriminator), expected)


def test_weights_are_packed_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied first lies elsewhere in every step, where a CUDA graph would not find it."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("looks at addresses on a CPU")
    from fastbegan_kernels.fused import fold

    read: list[int] = []
    layers = fold._fold_layers

    def watched(weights: list[Tensor], kinds: list[str], backward: bool) -> object:
        read.extend(weight.data_ptr() for weight in weights)
        return layers(weights, kinds, backward)

    monkeypatch.setattr(fold, "_fold_layers", watched)
    monkeypatch.setenv("FASTBEGAN_IMPL", "fused")
    for net in build(ModelConfig(size=64, filters=4, hidden=6, latent=5), seed=0):
        read.clear()
        net.pack(torch.bfloat16)
        own = [(p.data_ptr(), p.data_ptr() + p.nbytes) for p in net.parameters()]
        assert read and all(any(begin <= address < end for begin, end in own) for address in read)


def test_copies_of_the_weights_each_get_their_part() -> None:
    config = CONFIGS[0]
    discriminator = _nets(config)[1]
    copies = [{n: w.detach().requires_grad_() for n, w in discriminator.pack().items()} for _ in range(2)]
    images = torch.rand(4, 3, 64, 64, dtype=torch.float64)
    discriminator(images, *copies).sin().sum().backward()
    for part, packed in zip(images.chunk(2), copies, strict=True):
        alone = {n: w.detach().requires_grad_() for n, w in packed.items()}
        discriminator(part, alone).sin().sum().backward()
        for name, weight in packed.items():
            torch.testing.assert_close(weight.grad, alone[name].grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("share", [False, True])
def test_plain_modules_take_the_same_state(share: bool) -> None:
    config = ModelConfig(size=32, filters=2, vanishing=True)
    for net in build(config, seed=0):
        made = to_plain(net, share=share)
        assert list(made.state_dict()) == list(net.state_dict())
        assert not any(type(module).__module__.startswith("fastbegan_kernels") for module in made.modules())
        same = [a is b for a, b in zip(made.parameters(), net.parameters(), strict=True)]
        assert all(same) if share else not any(same)
        net.load_state_dict(made.state_dict())
        made.load_state_dict(net.state_dict())


def test_the_reference_tier_runs_both_nets(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, discriminator = build(ModelConfig(size=32, filters=3), seed=0)
    z = torch.rand(2, 64)
    expected = discriminator(generator(z))
    monkeypatch.setenv("FASTBEGAN_IMPL", "reference")
    torch.testing.assert_close(discriminator(generator(z)), expected, rtol=1e-4, atol=1e-5)


def test_recomputing_keeps_less() -> None:
    train = TrainConfig(batch_size=2)
    for size, filters in ((64, 128), (256, 128)):
        model = ModelConfig(size=size, filters=filters)
        kept = step_cost(model, train).kept
        # every layer's output once and a little more
        outputs = 4 * _outputs(model)
        assert outputs < kept < 1.1 * outputs
        assert step_cost(model, replace(train, recompute=True)).kept < 0.9 * kept
        assert step_cost(model, train, torch.bfloat16).kept == pytest.approx(kept / 2, rel=0.02)


def _outputs(config: ModelConfig) -> int:
    """Values that the layers of G and of D of one image give, images and codes left out."""
    n, side = config.filters, config.size
    encoder, channels = n * side**2, n
    for level, width in enumerate(config.level_channels):
        encoder += channels * side**2
        side = side if level == len(config.level_channels) - 1 else side // 2
        encoder += width * side**2
        channels = width
    decoder = sum((2 + (size == 8)) * n * size**2 for size in (8 << i for i in range(len(config.level_channels))))
    return encoder + 2 * decoder


def test_first_weights_are_torchs_times_a_scale_and_biases_are_torchs() -> None:
    config = ModelConfig(size=16, filters=2, widths=(1, 2))
    for usual, small in zip(build(config, seed=3), build(replace(config, init_scale=0.5), seed=3), strict=True):
        for (name, weight), scaled in zip(usual.named_parameters(), small.parameters(), strict=True):
            assert torch.equal(scaled, (0.5 if name.endswith("weight") else 1) * weight), name


def test_encoder_halves_by_stride_two_on_all_but_the_last_level() -> None:
    encoder = Encoder(ModelConfig(size=64, filters=2, widths=(2, 3, 4, 4)))
    convs = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    assert [c.stride[0] for c in convs] == [1, 1, 2, 1, 2, 1, 2, 1, 1]
    assert [c.out_channels // 2 for c in convs] == [1, 1, 2, 2, 3, 3, 4, 4, 4]


def test_vanishing_residuals_apply_where_width_and_size_stay() -> None:
    config = ModelConfig(size=32, filters=2, vanishing=True)
    encoder, decoder = Encoder(config), Decoder(config)
    flags = lambda net: [m.residual for level in net.levels for m in level]  # noqa: E731
    assert flags(encoder) == [True, False, True, False, True, True]
    assert flags(decoder) == [True, True, False, True, False, True]
    assert flags(Decoder(ModelConfig(size=32, filters=2, vanishing=True, skips=False))) == [True] * 6


def test_carry_at_zero_is_the_plain_net_and_at_one_passes_through() -> None:
    torch.manual_seed(0)
    plain, fading = (Discriminator(ModelConfig(size=32, filters=2, vanishing=v)) for v in (False, True))
    missing = fading.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["encoder.carry", "decoder.carry"] and not missing.unexpected_keys
    images = torch.rand(2, 3, 32, 32)
    full = fading(images)
    for net in (fading.encoder, fading.decoder):
        assert net.carry is not None
        net.carry.zero_()
    torch.testing.assert_close(fading(images), plain(images))
    assert not torch.allclose(full, plain(images))


def test_weights_follow_from_the_seed_and_leave_the_global_state_alone() -> None:
    config = ModelConfig(size=32, filters=2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, other = (build(config, seed=s)[0].state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["expand.weight"], other["expand.weight"])


def test_layers_load_into_plain_convolutions() -> None:
    net = Decoder(ModelConfig(size=32, filters=2))
    plain = nn.Conv2d(4, 2, 3)
    first = net.levels[1]
    assert isinstance(first, nn.ModuleList)
    plain.load_state_dict(first[0].state_dict())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 48}, r"size is 48; accepted: 8 \* 2\^k"),
        ({"size": 4}, "size is 4"),
        ({"size": 512}, "size 512 has no standard widths; give widths, one number for each of 7 levels"),
        ({"size": 64, "widths": (1, 2)}, r"widths is \(1, 2\); accepted: 4 whole numbers"),
        ({"filters": 0}, "filters is 0; accepted: whole numbers from 1"),
    ],
)
def test_impossible_configs_are_named(values: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(**values)  # pyright: ignore[reportArgumentType]


def test_resolved_widths_are_in_the_config() -> None:
    assert ModelConfig(size=64).widths == (2, 3, 4, 4)
    assert all(preset.model.widths for preset in PRESETS.values())
    assert [PRESETS[name].model.filters for name in PRESETS if name.startswith("paper")] == [128] * 4
