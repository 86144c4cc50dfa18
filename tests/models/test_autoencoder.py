import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm.storybook.training.autoencoder import net2wider_state
from tests.checkpoints import sd_v1


def build(**params) -> AutoencoderKL:
    torch.manual_seed(0)
    defaults = {"ch": 16, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "num_groups": 8}
    return AutoencoderKL(**{**defaults, **params})


def test_sd_names_and_counts():
    with torch.device("meta"):
        autoencoder = AutoencoderKL()
    state = autoencoder.state_dict()
    assert set(state) == set(sd_v1.autoencoder())
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (248, 83_653_863)
    assert autoencoder.factor == 8


@pytest.mark.parametrize(
    ("ch_mult", "factor", "embed_dim"), [((1,), 1, 4), ((1, 2), 2, 3), ((1, 2, 2, 2), 8, 4)]
)
@torch.no_grad()
def test_shapes_and_factor(ch_mult, factor, embed_dim):
    autoencoder = build(ch_mult=ch_mult, embed_dim=embed_dim, z_channels=5)
    posterior = autoencoder.encode(torch.zeros(2, 3, 16, 24))
    assert autoencoder.factor == factor
    assert posterior.mean.shape == posterior.std.shape == (2, embed_dim, 16 // factor, 24 // factor)
    assert autoencoder.decode(posterior.mean).shape == (2, 3, 16, 24)


def test_weights_are_channels_last():
    kernels = [p for p in build().parameters() if p.ndim == 4 and p.shape[2] == 3]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


@torch.no_grad()
def test_scale_factor_scales_latents_and_nothing_else():
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    one, tenth = build(scale_factor=1.0), build(scale_factor=0.1)
    plain, scaled = one.encode(pixels), tenth.encode(pixels)
    torch.testing.assert_close(scaled.latent_stats, 0.1 * plain.latent_stats)
    torch.testing.assert_close(scaled.kl(), plain.kl(), rtol=1e-5, atol=0)
    torch.testing.assert_close(tenth.decode(0.1 * plain.mean), one.decode(plain.mean), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_log_variance_is_clamped():
    """SD's bounds, [-30, 20], keep std finite and above zero whatever the network says."""
    autoencoder = build(scale_factor=1.0)
    autoencoder.quant_conv.weight.zero_()
    for bias, std in ((-1000.0, -15.0), (1000.0, 10.0)):
        autoencoder.quant_conv.bias.fill_(bias)
        posterior = autoencoder.encode(torch.zeros(1, 3, 16, 16))
        torch.testing.assert_close(posterior.std.log(), torch.full_like(posterior.std, std))


def test_gaussian_samples_with_the_noise_it_is_given():
    mean, std, noise = torch.randn(3, 2, 4, 5, 5)
    gaussian = DiagonalGaussian(mean, std.abs())
    assert torch.equal(gaussian.sample(noise), mean + std.abs() * noise)
    assert torch.equal(gaussian.sample(torch.zeros_like(noise)), mean)


def test_moments_there_and_back():
    mean, std = torch.randn(2, 2, 4, 5, 5)
    gaussian = DiagonalGaussian(mean, std.abs(), scale_factor=0.2)
    assert gaussian.latent_stats.shape == (2, 8, 5, 5)
    again = DiagonalGaussian.from_latent_stats(gaussian.latent_stats)
    assert torch.equal(again.mean, mean) and torch.equal(again.std, std.abs())


def test_kl_is_that_of_the_unscaled_gaussian():
    mean, std = torch.randn(2, 3, 4, 5, 5)
    std = std.abs() + 0.1
    expected = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(DiagonalGaussian(0.3 * mean, 0.3 * std, scale_factor=0.3).kl(), expected)
    assert DiagonalGaussian(torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)).kl() == 0


def test_gradients_reach_every_parameter():
    autoencoder = build(ch_mult=(1, 2))
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    posterior = autoencoder.encode(pixels)
    output = autoencoder.decode(posterior.sample(torch.randn_like(posterior.mean)))
    ((output - pixels).square().mean() + posterior.kl().mean()).backward()
    silent = [n for n, p in autoencoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert silent == []


@pytest.mark.parametrize("factor", [2, 3])
def test_a_widened_autoencoder_computes_the_same(factor):
    """Until it is trained: then the copies of a channel part, because they are read with other weights."""
    options = {"ch_mult": [1, 2], "num_res_blocks": 1, "num_groups": 4, "scale_factor": 0.5}
    narrow, wide = AutoencoderKL(ch=8, **options), AutoencoderKL(ch=8 * factor, **options)
    for parameter in narrow.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    wide.load_state_dict(net2wider_state(narrow.state_dict(), wide))
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(
            wide.encode(image).latent_stats, narrow.encode(image).latent_stats, rtol=1e-4, atol=1e-5
        )
        z = narrow.encode(image).mean
        torch.testing.assert_close(wide.decode(z), narrow.decode(z), rtol=1e-4, atol=1e-4)
    wide.decode(z).square().mean().backward()
    gradient = wide.decoder.conv_in.weight.grad
    assert not torch.allclose(gradient[0::factor], gradient[1::factor])
