"""Sparse autoencoders in training, against twenty lines of torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from milan_ray.models.features.moments import Moments
from milan_ray.models.features.sae import SaeConfig, SparseAutoencoder
from milan_ray.models.features.statistics import FeatureStatistics, explained_variance

UNITS, WIDTH, K = 6, 16, 3


def outputs(rows: int = 512, seed: int = 0) -> torch.Tensor:
    """Sums of two of twelve directions, far from zero and of another scale."""
    generator = torch.Generator().manual_seed(seed)
    truth = functional.normalize(torch.randn(12, UNITS, generator=torch.Generator().manual_seed(9)), dim=1)
    strength = torch.rand(rows, 12, generator=generator) + 0.5
    on = torch.rand(rows, 12, generator=generator).topk(2, dim=1).indices
    return 5 + 0.03 * torch.zeros(rows, 12).scatter(1, on, strength.gather(1, on)) @ truth


def moments_of(x: torch.Tensor) -> Moments:
    moments = Moments(x.shape[1])
    moments.add(x)
    return moments


def trainee(activation: str = "topk", width: int = WIDTH, **settings: float) -> SparseAutoencoder:
    return SparseAutoencoder(moments_of(outputs()), width, activation, K, SaeConfig(**settings))  # type: ignore[arg-type]


def reference(sae: SparseAutoencoder, x: torch.Tensor, activation: str, config: SaeConfig) -> dict[str, torch.Tensor]:
    """The gradients of one step, with every position and feature by itself, and steps written out as sums."""
    own = {name: tensor.detach().double().requires_grad_() for name, tensor in sae.weights.items()}
    all_x = outputs().double()
    scale = math.sqrt(UNITS / (all_x - all_x.mean(0)).square().sum(1).mean())
    x = (x.double() - all_x.mean(0)) * scale
    pre = (x - own["bias"]) @ own["encoder"].T + own["encoder_bias"]
    loss, on = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    theta = own["log_threshold"].exp() if activation == "jumprelu" else None
    errors = []
    for row in range(len(x)):
        if theta is None:
            best = sorted(range(WIDTH), key=lambda feature: -pre[row, feature].item())[:K]
            codes = {feature: pre[row, feature].relu() for feature in best}
        else:
            codes = {}
            for feature in range(WIDTH):
                p, t = pre[row, feature], theta[feature]
                near = float(abs(p - t) < config.bandwidth / 2) / config.bandwidth
                gate = (p > t).double() - near * (t - t.detach())  # a straight-through step: its slope is the window's
                codes[feature], on = p.relu() * gate, on + gate
        errors.append(x[row] - own["bias"] - sum(z * own["decoder"][f] for f, z in codes.items()))
        loss = loss + errors[-1].square().sum() / (len(x) * UNITS)
    if theta is not None:
        loss = loss + config.sparsity * (on / (len(x) * K) - 1) ** 2
    dead: list[int] = [f for f in range(WIDTH) if int(sae.idle[f]) >= config.dead_after]
    if dead:
        left, whole = torch.zeros((), dtype=torch.float64), sum(float(error.square().sum()) for error in errors)
        for row, error in enumerate(errors):
            best = sorted(dead, key=lambda feature: -pre[row, feature].item())[: UNITS // 2]
            again = sum(pre[row, f] * own["decoder"][f] for f in best)
            left = left + (error.detach() - again).square().sum() / whole
        loss = loss + config.dead_weight * left
    loss.backward()
    grads = {name: tensor.grad for name, tensor in own.items() if tensor.grad is not None}
    unit = own["decoder"].detach()
    grads["decoder"] = grads["decoder"] - (grads["decoder"] * unit).sum(1, keepdim=True) * unit
    return grads


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
@pytest.mark.parametrize("dead", [0, 5])
def test_a_step_is_adams_on_the_gradients_of_the_loss_written_out(activation, dead):
    config = SaeConfig(lr=1e-3, dead_after=100, bandwidth=0.5)
    sae = SparseAutoencoder(moments_of(outputs()), WIDTH, activation, K, config)
    sae.step(outputs(64, seed=1))  # away from where encoder and decoder are equal
    sae.idle[:dead] = 100
    before = {name: tensor.detach().clone() for name, tensor in sae.weights.items()}
    x = outputs(32, seed=2)
    wanted = reference(sae, x, activation, config)
    first = sae.state()["adam"]["state"]
    sae.step(x)
    for number, (name, grad) in enumerate(wanted.items()):
        found = sae.weights[name].grad
        assert found is not None
        torch.testing.assert_close(found.double(), grad, rtol=1e-3, atol=1e-5)
        mean = 0.9 * first[number]["exp_avg"] + 0.1 * grad
        square = 0.999 * first[number]["exp_avg_sq"] + 0.001 * grad.square()
        moved = before[name] - 1e-3 * (mean / (1 - 0.9**2)) / ((square / (1 - 0.999**2)).sqrt() + 6.25e-10)
        if name == "decoder":
            moved = functional.normalize(moved, dim=1)
        torch.testing.assert_close(sae.weights[name].double(), moved.double(), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_training_explains_and_the_dictionary_is_for_outputs_as_they_are(activation):
    sae = trainee(activation, lr=3e-3, rows=64)
    x = outputs(2048, seed=3)
    for _ in range(8):
        for batch in x.split(64):
            missed = sae.step(batch)
    dictionary = sae.dictionary()
    torch.testing.assert_close(dictionary.directions.norm(dim=1), torch.ones(WIDTH))
    assert dictionary.normalisation == "none" and dictionary.rectified
    fresh = outputs(1024, seed=4)
    assert explained_variance(dictionary, fresh) > 0.8
    assert explained_variance(dictionary, x[-64:]) == pytest.approx(1 - float(missed), abs=0.05)
    statistics = FeatureStatistics(WIDTH, UNITS)
    statistics.add(dictionary.encode(fresh))
    assert abs(statistics.l0 - K) < (0.01 if activation == "topk" else 1)


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_dead_features_come_back_and_stay_dead_without_their_loss(activation):
    alive = {}
    for weight in (0.0, 1 / 32):
        sae = trainee(activation, lr=3e-3, rows=64, dead_after=256, dead_weight=weight)
        with torch.no_grad():
            sae.weights["encoder_bias"][: WIDTH // 2] = -3
        for batch in outputs(4096, seed=5).repeat(16, 1).split(64):
            sae.step(batch)
        codes = sae.dictionary().encode(outputs(2048, seed=6))
        alive[weight] = int((codes[:, : WIDTH // 2] > 0).any(dim=0).sum())
    assert alive[0.0] <= 2 and alive[1 / 32] >= 3


def test_a_restored_state_goes_on_to_the_same_weights():
    one, other = trainee(), trainee()
    for seed in range(3):
        one.step(outputs(64, seed))
    other.restore(one.state())
    for sae in (one, other):
        sae.step(outputs(64, 7))
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    assert torch.equal(one.idle, other.idle)


def test_steps_of_two_workers_are_those_of_one_with_both_batches():
    import threading

    alone, both = trainee("jumprelu"), [trainee("jumprelu"), trainee("jumprelu")]
    barrier, given = threading.Barrier(2, timeout=60), [torch.zeros(()), torch.zeros(())]

    def total_of(rank: int):
        def total(tensor: torch.Tensor) -> None:
            given[rank] = tensor.clone()
            barrier.wait()
            tensor.copy_(given[0] + given[1])
            barrier.wait()

        return total

    batches = [outputs(64, seed) for seed in range(4)]

    def work(rank: int) -> None:
        for batch in batches:
            both[rank].step(batch[:40] if rank else batch[40:], total=total_of(rank))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch in batches:
        alone.step(batch)
    for name, tensor in alone.weights.items():
        assert torch.equal(both[0].weights[name], both[1].weights[name])
        torch.testing.assert_close(both[0].weights[name], tensor, rtol=1e-3, atol=1e-4)


def test_weights_depend_on_seed_and_width_alone():
    moments = moments_of(outputs())
    made = [SparseAutoencoder(moments, WIDTH, "topk", K, SaeConfig(), seed) for seed in (0, 0, 1)]
    first, same, other = (sae.weights["decoder"] for sae in made)
    assert torch.equal(first, same) and not torch.equal(first, other)
