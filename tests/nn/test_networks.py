"""Layers, flows, priors and latents' distributions."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.networks import PUBLISHED, costs
from selfvae.distributions.latents import (
    DiagonalNormal,
    GaussianMixture,
    LocalGaussianMixture,
    NoisyLogistic,
    UnitUniform,
    soft_limit,
)
from selfvae.distributions.priors import TOP_PRIORS, MixturePrior
from selfvae.nn.flows import (
    AutoregressiveFlow,
    Coupling,
    Network,
    RealNVP,
    dense_network,
    residual_network,
    squeeze,
    unsqueeze,
)
from selfvae.nn.layers import (
    BACKBONES,
    ChannelAttention,
    Conv,
    DenseBlock,
    DenseStep,
    Down,
    Up,
    data_dependent_init,
)
from selfvae.nn.networks import Branch, Constant, Decoder, Encoder, PriorNet, SubPixel


def test_a_kept_weight_is_never_an_old_one() -> None:
    conv, x = Conv(3, 4).eval(), torch.randn(2, 3, 5, 5)

    def check() -> None:
        """Without gradients, where weights are kept, the same as with them, where they are not."""
        for _ in range(2):
            with torch.no_grad():
                found = conv(x.to(conv.bias.dtype))
            assert torch.equal(found, conv(x.to(conv.bias.dtype)).detach())

    check()
    with torch.no_grad():
        assert conv.weight() is conv.weight()
        conv.gain.mul_(2)
    check()
    torch.optim.Adamax(conv.parameters()).step()  # no gradients: nothing changes
    check()
    conv(x).sum().backward()
    torch.optim.Adamax(conv.parameters(), foreach=True).step()
    check()
    conv.load_state_dict(Conv(3, 4).state_dict())
    check()
    conv.double()
    check()
    flat = torch.nn.utils.parameters_to_vector(conv.parameters())
    torch.nn.utils.vector_to_parameters(torch.rand_like(flat), conv.parameters())  # by way of .data
    check()
    for _ in range(8):  # what is freed may leave its address to the next
        other = {"direction": torch.rand_like(conv.direction)}
        with torch.no_grad():
            found = torch.func.functional_call(conv, other, (x.double(),))
        assert torch.equal(found, torch.func.functional_call(conv, other, (x.double(),)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert conv(x.double()).dtype == torch.float64
        conv.float()
        assert conv(x).dtype == torch.bfloat16
    conv.train()
    check()


@pytest.mark.parametrize("transposed", [False, True])
def test_data_dependent_init_normalises_once(transposed: bool) -> None:
    conv = Conv(5, 7, stride=2, transposed=transposed)
    x = 3 + 2 * torch.randn(8, 5, 6, 6)
    assert not bool(conv.initialised)
    with data_dependent_init(conv):
        conv(x)
    out = conv(x)
    assert out.shape == ((8, 7, 12, 12) if transposed else (8, 7, 3, 3))
    assert out.mean((0, 2, 3)).abs().max() < 1e-4
    assert (out.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-3
    before = conv.gain.clone()
    assert bool(conv.initialised)
    with data_dependent_init(conv):
        conv(5 * x)
    assert torch.equal(conv.gain, before)


def test_initialisation_survives_saving() -> None:
    conv, other = Conv(2, 3), Conv(2, 3)
    with data_dependent_init(conv):
        conv(torch.randn(4, 2, 5, 5))
    other.load_state_dict(conv.state_dict())
    assert bool(other.initialised)


def test_a_constant_input_does_not_break_the_initialisation() -> None:
    conv = Conv(2, 3)
    with data_dependent_init(conv):
        conv(torch.ones(4, 2, 1, 1))
    assert conv.gain.isfinite().all() and conv.bias.isfinite().all()


@pytest.mark.parametrize("inner", [True, False])
def test_a_dense_block_written_by_hand(inner: bool) -> None:
    """Values and the gradients of the input and of every weight."""
    torch.manual_seed(0)
    block = DenseBlock(6, 4, 3, inner).double()
    for p in block.parameters():  # gates of all sizes, no zero biases
        p.data.add_(0.1 * torch.randn_like(p))
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64, requires_grad=True)

    def conv(h: torch.Tensor, layer: Conv) -> torch.Tensor:
        norm = layer.direction.square().sum((1, 2, 3), keepdim=True).sqrt() + 1e-8
        weight = layer.gain.view(-1, 1, 1, 1) * layer.direction / norm
        return F.conv2d(h, weight, layer.bias, padding=weight.shape[-1] // 2)

    def elu(h: torch.Tensor) -> torch.Tensor:
        return torch.where(h > 0, h, torch.exp(h.clamp(max=0)) - 1)

    def inside(h: torch.Tensor) -> torch.Tensor:
        return elu(h) if inner else h

    convs = [m for m in block.modules() if isinstance(m, Conv)]
    assert [c.direction.shape[0] for c in convs] == [16, 4, 16, 4, 16, 4, 2, 18]
    h = x
    for i in range(3):
        h = elu(torch.cat([h, conv(inside(conv(h, convs[2 * i])), convs[2 * i + 1])], 1))
    gate = torch.sigmoid(conv(inside(conv(h.mean((2, 3), keepdim=True), convs[6])), convs[7]))
    found = []
    for y in (h * gate, block(x)):
        assert y.shape == (3, 18, 5, 7)
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().sin()
        found.append((y, *torch.autograd.grad(loss, [x, *block.parameters()])))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_a_dense_block_in_bfloat16() -> None:
    block, x = DenseBlock(6, 4, 5), torch.randn(4, 6, 8, 8)
    exact = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = block(x)
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_training_keeps_the_features_of_a_dense_block_once_a_step() -> None:
    """Bytes kept until the backward pass: each step's input and what lies between its convolutions."""
    block, x = DenseBlock(32, 16, 4), torch.randn(2, 32, 16, 16)
    seen: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = block(x)
    weights = sum(4 * p.numel() for p in block.parameters())
    channels = sum((32, 48, 64, 80, 96)) + 4 * 64
    assert sum(seen.values()) - 2 * weights < 1.05 * 4 * channels * 2 * 16 * 16
    del y


def test_weight_norm() -> None:
    conv = Conv(4, 6)
    with torch.no_grad():
        conv.gain.copy_(torch.arange(1.0, 7.0))
    norm = torch.linalg.vector_norm(conv.weight(), dim=(1, 2, 3))
    assert torch.allclose(norm, torch.arange(1.0, 7.0), rtol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_of_the_weight_norm(transposed: bool) -> None:
    conv = Conv(4, 6, stride=2 if transposed else 1, transposed=transposed).double()
    shape, others = ([1, 6, 1, 1], (0, 2, 3)) if transposed else ([6, 1, 1, 1], (1, 2, 3))

    def plain(v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return v * (g.view(shape) / (torch.linalg.vector_norm(v, dim=others, keepdim=True) + 1e-8))

    rows = conv.direction.detach().transpose(0, 1) if transposed else conv.direction.detach()
    rows[2] = 0.0  # a direction of length 0
    upstream = torch.randn_like(conv.direction)
    with torch.no_grad():
        conv.gain.copy_(torch.rand(6) + 0.5)
    inputs = (conv.direction, conv.gain)
    assert torch.equal(conv.weight(), plain(*inputs))
    found = torch.autograd.grad(conv.weight(), inputs, upstream)
    expected = torch.autograd.grad(plain(*inputs), inputs, upstream)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", list(BACKBONES))
def test_blocks_say_their_channels(name: str) -> None:
    block = BACKBONES[name](6, 8, 3)
    assert block(torch.randn(2, 6, 5, 4)).shape == (2, block.out_channels, 5, 4)


def test_dense_block_concatenates_and_resizing_halves_and_doubles() -> None:
    assert DenseBlock(6, 4, 3).out_channels == 6 + 3 * 4
    x = torch.randn(2, 6, 8, 6)
    assert Down(6)(x).shape == (2, 12, 4, 3)
    assert Up(6)(x).shape == (2, 3, 16, 12)
    gate = ChannelAttention(6)(x) / x
    assert torch.allclose(gate, gate[:, :, :1, :1].expand_as(gate), rtol=1e-3)


def test_growth_doubles_with_every_halving_and_halves_with_every_doubling() -> None:
    for resize, expected in (("down", [8, 16, 32]), ("up", [8, 4])):
        stack = Branch(8, 2, 2, resize, last=resize == "down").build(3)  # type: ignore[arg-type]
        steps = [m for m in stack.modules() if isinstance(m, DenseStep)]
        assert [step[2].gain.numel() for step in steps] == [g for g in expected for _ in range(2)]


def test_residual_stacks_have_no_two_convolutions_in_a_row() -> None:
    stack = Branch(8, 2, 2, "down", stem=8, backbone="residual").build(3)
    modules = [m for m in stack.modules() if not list(m.children()) and not isinstance(m, nn.Identity)]
    for one, other in itertools.pairwise(modules):
        assert not (isinstance(one, Conv) and isinstance(other, Conv))


def test_networks_have_the_asked_shapes() -> None:
    encoder = Encoder(3, 5, Branch(4, 1, 2, "down", last=True))
    assert encoder(torch.randn(2, 3, 16, 12)).shape == (2, 10, 4, 3)
    decoder = Decoder(3, 5, 20, Branch(4, 1, 2, "up", out=9, kernel=3), Branch(4, 1, 1), kernel=1)
    assert decoder(torch.randn(2, 3, 16, 12), torch.randn(2, 5, 4, 3)).shape == (2, 20, 16, 12)
    assert Constant(20)(torch.zeros(2, 0, 4, 4), None).shape == (2, 20, 4, 4)
    joint, stem = Branch(4, 1, 1), Branch(4, 1, 1, stem=4, backbone="residual")
    for y in (Branch(4, 1, 1, "down", last=True, out=6), stem):
        net = PriorNet(3, 5, 7, y, Branch(4, 1, 1, out=6), joint, (0.5, 0.5))
        assert net(torch.randn(2, 3, 8, 6), torch.randn(2, 5, 4, 3)).shape == (2, 14, 4, 3)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_the_papers_networks(name: str) -> None:
    """Every part's parameters are the papers', and its FLOPs, to the digits of the table."""
    found = costs(name)
    assert found.keys() == PUBLISHED[name].keys()
    for part, (n, flop) in PUBLISHED[name].items():
        # each coupling's factor counts twice there, as if weight-normalised: 272 in all
        off = 272 if part.endswith("prior") and n == 11_411_876 else 5000 if part == "all" else 0
        assert abs(found[part][0] - n) <= off, part
        assert found[part][1] == pytest.approx(flop, rel=0.002), part


def test_sub_pixel_convolution_is_torchs() -> None:
    decoder = Decoder(3, 0, 4 * 5, None, Branch(8, 1, 1, stem=8, backbone="residual"))
    y = torch.randn(2, 3, 4, 6)
    assert torch.equal(SubPixel(decoder, (2, 2))(y, None), F.pixel_shuffle(decoder(y, None), 2))
    assert SubPixel(decoder, (1, 4))(y, None).shape == (2, 5, 4, 24)


def test_squeeze_is_invertible() -> None:
    z = torch.randn(2, 3, 4, 6)
    assert torch.equal(unsqueeze(squeeze(z)), z)


def _wake(module: nn.Module) -> None:
    """Weights that make the couplings far from the identity."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)


# a coupling's network, and whether it sees the half of the channels that stays alone
NETWORKS: dict[str, tuple[Network, bool]] = {
    "dense": (partial(dense_network, growth=4, steps=1), True),
    "residual": (partial(residual_network, hidden=4, blocks=1), False),
}


@pytest.mark.parametrize("kind", list(NETWORKS))
@pytest.mark.parametrize("mask", ["checkerboard", "channel"])
@pytest.mark.parametrize("flip", [False, True])
def test_coupling_log_det_is_autograds(mask: str, flip: bool, kind: str) -> None:
    coupling = Coupling(2, mask, flip, *NETWORKS[kind]).double()  # type: ignore[arg-type]
    _wake(coupling)
    z = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    noise, log_det = coupling(z)
    jacobian = torch.autograd.functional.jacobian(lambda t: coupling(t)[0], z).view(8, 8)
    assert torch.allclose(log_det, torch.linalg.slogdet(jacobian).logabsdet, atol=1e-9)
    assert torch.allclose(coupling.inverse(noise), z, atol=1e-9)
    stays = coupling.mask(z).expand_as(z)
    assert torch.equal(noise[stays], z[stays]) and not torch.isclose(noise[~stays], z[~stays]).any()


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_realnvp_inverse_and_log_det(kind: str) -> None:
    flow = RealNVP(2, *NETWORKS[kind]).double()
    _wake(flow)
    z = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    noise, log_det = flow(z)
    jacobian = torch.autograd.functional.jacobian(lambda t: flow(t)[0], z).view(32, 32)
    assert torch.allclose(log_det, torch.linalg.slogdet(jacobian).logabsdet, atol=1e-8)
    assert torch.allclose(flow.inverse(noise), z, atol=1e-6)
    assert (jacobian.abs() > 1e-12).any(0).all()  # every input reaches the noise
    with pytest.raises(ValueError, match="even height and width; got"):
        flow(torch.randn(1, 2, 3, 4, dtype=torch.float64))


@pytest.mark.parametrize("channels", [3, 4])
def test_autoregressive_flow_inverse_and_log_det(channels: int) -> None:
    flow = AutoregressiveFlow(channels, 8, 1).double()
    z = torch.randn(2, channels, 3, 4, dtype=torch.float64)
    with data_dependent_init(flow):
        flow(z)
    _wake(flow)
    noise, log_det = flow(z)
    assert torch.allclose(flow.inverse(noise), z, atol=1e-8)
    n = channels * 12
    jacobian = torch.autograd.functional.jacobian(lambda t: flow(t)[0], z[:1]).view(n, n)
    assert torch.allclose(log_det[:1], torch.linalg.slogdet(jacobian).logabsdet, atol=1e-8)
    assert (jacobian.abs() > 1e-12).any(0).all()
    # a position knows where it is
    same = torch.zeros(1, channels, 3, 4, dtype=torch.float64)
    assert len(flow.maps[0](same)[0][0, 0].flatten().unique()) == 12


SMALL = {
    "mog": ((2, 2), 5),
    "flow": (8, 1),
    "flow-residual": (8, 1),
    "flow-autoregressive": (8, 1),
}  # further arguments of priors


@pytest.mark.parametrize("name", list(TOP_PRIORS))
def test_priors_integrate_to_one(name: str) -> None:
    """Importance sampling from a wide normal: the mean weight is 1."""
    prior = TOP_PRIORS[name](1, 2, *SMALL.get(name, ()))
    n = 20_000
    p = prior(torch.zeros(n, 0, 4, 4), None)
    q = DiagonalNormal(torch.zeros(n, 1, 2, 2), torch.full((n, 1, 2, 2), 1.0))
    with torch.no_grad():
        z = q.sample()
        weight = torch.exp(p.log_prob(z) - q.log_prob(z))
        assert p.sample().shape == p.mode().shape == (n, 1, 2, 2)
    assert abs(weight.mean() - 1) < 5 * weight.std() / n**0.5
    with pytest.raises(ValueError, match=f"divisible by {prior.multiple}; got 5 x 4"):
        prior(torch.zeros(1, 0, 5, 4), None)


def test_diagonal_normal_is_torchs() -> None:
    q = DiagonalNormal.from_params(torch.randn(3, 8, 2, 2))
    z = q.sample()
    reference = torch.distributions.Normal(q.mean, torch.exp(0.5 * q.log_var))
    assert torch.allclose(q.log_prob(z), reference.log_prob(z).sum((1, 2, 3)), rtol=1e-5)
    assert q.repeat(2).mean.shape == (6, 4, 2, 2)
    assert torch.equal(q.sample(0.0), q.mode())


def test_mixture_draws_follow_its_density() -> None:
    means = torch.tensor([[-4.0], [4.0]])
    p = LocalGaussianMixture(torch.tensor([0.0, 1.0]), means, torch.zeros(2, 1), (20_000, 1, 1))
    right = (p.sample() > 0).float().mean()
    assert abs(right - torch.sigmoid(torch.tensor(1.0))) < 0.02
    assert p.mode().unique().tolist() == [4.0]


def test_a_mixture_over_the_whole_latent() -> None:
    """torch's own; draws are of one component as a whole; any other size is an error."""
    means, log_vars = 5 * torch.randn(3, 2, 2, 2), torch.randn(3, 2, 2, 2)
    p = GaussianMixture(means, log_vars, 500)
    each = torch.distributions.Normal(means.flatten(1), torch.exp(0.5 * log_vars).flatten(1))
    reference = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(3)), torch.distributions.Independent(each, 1)
    )
    z = p.sample()
    assert torch.allclose(p.log_prob(z), reference.log_prob(z.flatten(1)), rtol=1e-5, atol=1e-4)
    near = (z[:, None] - means).flatten(2).norm(dim=2).argmin(1)
    assert (torch.bincount(near, minlength=3) > 100).all()
    assert (p.sample(0.0)[:, None] == means).flatten(2).all(2).any(1).all()
    best = reference.log_prob(means.flatten(1)).argmax()
    assert torch.equal(p.mode()[7], means[best])
    prior = MixturePrior(2, 4, (2, 3), 5)
    fresh = prior(torch.zeros(1, 0, 8, 12), None)
    assert torch.allclose(torch.exp(fresh.log_vars), torch.ones(()), atol=0.01)
    with pytest.raises(ValueError, match="must have 8 x 12 pixels; got 8 x 8: use prior='mog-local'"):
        prior(torch.zeros(1, 0, 8, 8), None)


def test_a_mixture_is_fitted_to_posteriors() -> None:
    """Three clusters are found; their spreads include the posteriors' own."""
    torch.manual_seed(1)
    centres, spreads = 4 * torch.randn(3, 2, 2, 3), torch.rand(3, 2, 2, 3) + 0.3
    which = torch.arange(600) % 3
    mean = centres[which] + spreads[which] * torch.randn(600, 2, 2, 3)
    var = torch.full_like(mean, 0.25)
    prior = MixturePrior(2, 4, (2, 3), 3)
    prior.fit(mean, var)
    found = prior(torch.zeros(1, 0, 8, 12), None)
    order = (found.means[:, None] - centres).flatten(2).norm(dim=2).argmin(0)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert (found.means[order] - centres).abs().max() < 0.4
    assert torch.allclose(found.log_vars[order].exp(), spreads**2 + 0.25, rtol=0.4)
    # more components than posteriors: some remain alike, none fails
    wide = MixturePrior(2, 4, (2, 3), 700)
    wide.fit(mean, var)
    assert wide(torch.zeros(1, 0, 8, 12), None).log_prob(mean).isfinite().all()


def test_soft_limit() -> None:
    raw = torch.tensor([-1e6, -0.01, 0.0, 0.01, 1e6])
    assert torch.allclose(soft_limit(raw), torch.tensor([-7.0, -0.01, 0.0, 0.01, 7.0]), atol=1e-4)


def test_whole_numbers_of_a_rounded_logistic() -> None:
    """The density at whole numbers are the probabilities that draws round to them."""
    n = 40_000
    p = NoisyLogistic(torch.full((n, 1, 1, 1), 0.3), torch.full((n, 1, 1, 1), 0.5))
    at = torch.arange(-60.0, 61.0)
    one = NoisyLogistic(torch.full((121, 1, 1, 1), 0.3), torch.full((121, 1, 1, 1), 0.5))
    mass = torch.exp(one.log_prob(at.view(-1, 1, 1, 1)))
    assert mass.sum() == pytest.approx(1, abs=1e-5)
    draws = p.sample().flatten()
    assert torch.equal(draws, draws.round())
    for value in (-2.0, 0.0, 3.0):
        expected = mass[at == value].item()
        assert (draws == value).float().mean() == pytest.approx(expected, abs=5 * (expected / n) ** 0.5)
    assert p.mode().unique().tolist() == [0.0]
    sharp = NoisyLogistic.from_params(torch.tensor([0.4, -50.0]).view(1, 2, 1, 1))
    assert sharp.log_prob(torch.zeros(1, 1, 1, 1)).item() == pytest.approx(0, abs=1e-6)


def test_uniform_box() -> None:
    q = UnitUniform.from_params(torch.randn(50, 4, 3, 3) * 9)
    assert q.mean.shape == (50, 2, 3, 3) and q.repeat(2).mean.shape == (100, 2, 3, 3)
    z = q.sample()
    assert (z - q.mean).abs().max() <= 0.5 and (z - q.mean).abs().max() > 0.45
    assert torch.equal(q.log_prob(z), torch.zeros(50))
    assert torch.isneginf(q.log_prob(q.mean + 1)).all()
    assert torch.equal(q.sample(0.0), q.mean)
    assert (q.mode() - q.mean).abs().max() <= 0.5 and torch.equal(q.mode(), q.mode().round())


def test_layers_say_in_out() -> None:
    assert Conv(3, 8, 5, stride=2).extra_repr() == "3, 8, kernel=5, stride=2"
    assert Conv(8, 3, 5, stride=2, transposed=True).extra_repr().startswith("8, 3, ")
