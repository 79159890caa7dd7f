"""Training: every codec and loss stays finite, a cut run continues bit for bit, devices do not change the result."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from gan import training
from gan.checkpoints import ResumeError, fit
from gan.problems import problem
from gan.training import CODECS, Gan, GanConfig, GanState

pytestmark = pytest.mark.usefixtures("quick_compilation")

MOCSS = problem("mocss", 4, flocks=2, sequences=2)


def _leaves(state: GanState) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize(
    "config",
    [
        *(GanConfig(codec=codec) for codec in CODECS),
        GanConfig(loss="wgan_gp", augment=True),
        GanConfig(loss="r1", head="correlation", guidance=1.0),
        GanConfig(codec="rank1", loss="sn", head="correlation", guidance=1.0),
    ],
    ids=lambda config: f"{config.codec}-{config.loss}-{config.head}-{config.guidance}{'-augmented' * config.augment}",
)
def test_losses_stay_finite(config: GanConfig, rng: np.random.Generator) -> None:
    gan = Gan(MOCSS, dataclasses.replace(config, batch=16))
    state, losses = gan.train(gan.initial_state(), MOCSS.random(rng, 20), 200)
    assert all(np.isfinite(values).all() for values in losses.values())
    assert all(np.isfinite(leaf).all() for leaf in _leaves(state))
    _, codes = gan.sample(state, jax.random.key(0), 8)
    assert codes.shape == (8, 16)
    assert (np.abs(codes) == 1).all()


def test_the_correlation_head_sees_all_chips_of_a_folded_code(rng: np.random.Generator) -> None:
    folded = problem("ob_zcp_folded", 7)
    gan = Gan(folded, GanConfig(codec="rank1", loss="sn", head="correlation", guidance=1.0, batch=8))
    state, losses = gan.train(gan.initial_state(), folded.random(rng, 20), 2)
    assert all(np.isfinite(values).all() for values in losses.values())
    assert gan.sample(state, jax.random.key(0), 4)[1].shape == (4, folded.chips)
    with pytest.raises(ValueError, match="use codec rank1, or head raw"):
        Gan(folded, GanConfig(head="correlation"))


def test_convolutions_draw_symmetric_matrices(rng: np.random.Generator) -> None:
    gan = Gan(MOCSS, GanConfig(architecture="conv", batch=8))
    state, losses = gan.train(gan.initial_state(), MOCSS.random(rng, 20), 2)
    assert np.isfinite(losses["generator"]).all()
    samples, _ = gan.sample(state, jax.random.key(0), 4)
    np.testing.assert_array_equal(samples, samples.swapaxes(1, 2))


def test_a_cut_run_continues_bit_for_bit(tmp_path: pathlib.Path, rng: np.random.Generator) -> None:
    gan, codes = Gan(MOCSS, GanConfig(codec="rank1", batch=16)), MOCSS.random(rng, 20)
    straight = fit(gan, codes, tmp_path / "straight", steps=30, checkpoint_every=10)
    fit(gan, codes, tmp_path / "cut", steps=10, checkpoint_every=10)
    resumed = fit(gan, codes, tmp_path / "cut", steps=30, checkpoint_every=10)
    for a, b in zip(_leaves(straight), _leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ResumeError, match="`batch` is 32 and was 16"):
        fit(Gan(MOCSS, GanConfig(codec="rank1", batch=32)), codes, tmp_path / "cut", steps=30, checkpoint_every=10)


def test_eight_devices_train_as_one_does(rng: np.random.Generator) -> None:
    # Adam's first steps have the size of the learning rate however small the gradient, and its sign, which rounding may
    # turn where it nearly vanishes. With steps below the weights' own rounding every gradient can be compared.
    config, codes = GanConfig(batch=32, learning_rate=1e-8), MOCSS.random(rng, 20)
    mesh = Mesh(np.array(jax.devices()), ("batch",))

    def moments_and_losses(gan: Gan) -> list[np.ndarray]:
        state, losses = gan.train(gan.initial_state(), codes, 5)
        means = state.generator_optimizer, state.discriminator_optimizer
        return [np.asarray(leaf) for leaf in jax.tree.leaves((means, losses))]

    alone, together = (moments_and_losses(Gan(MOCSS, config, devices)) for devices in (None, mesh))
    for a, b in zip(alone, together, strict=True):
        # Sums over a batch run in another order: up to 16 times the precision of float32 was seen, of the largest.
        np.testing.assert_allclose(a, b, rtol=0, atol=80 * np.finfo(np.float32).eps * np.abs(a).max())
    with pytest.raises(ValueError, match="cannot be split over 8 devices"):
        Gan(MOCSS, GanConfig(batch=12), mesh)


def test_augmentation_shows_whole_classes(rng: np.random.Generator) -> None:
    code = MOCSS.gauge(MOCSS.random(rng, 1))
    game = Gan(MOCSS, GanConfig(augment=True, batch=2048))._game
    shown = np.unique(np.asarray(game.picked(jnp.asarray(code), jax.random.key(0))), axis=0)
    np.testing.assert_array_equal(shown, np.unique(MOCSS.gauge(MOCSS.orbit(code[0])), axis=0))
    assert len(shown) > 1


def test_seeds_differ_and_compile_once(rng: np.random.Generator) -> None:
    codes = MOCSS.random(rng, 20)
    before = training._train._cache_size()
    first, second = (Gan(MOCSS, GanConfig(batch=24, seed=seed)) for seed in (1, 2))
    one, other = (gan.train(gan.initial_state(), codes, 2)[0] for gan in (first, second))
    assert training._train._cache_size() == before + 1
    assert any((a != b).any() for a, b in zip(_leaves(one), _leaves(other), strict=True))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"codec": "dense"}, "`codec` is 'dense'"),
        ({"codec": "rank1", "architecture": "conv"}, "conv draws matrices"),
        ({"codec": "gumbel", "head": "correlation"}, "reads Hopfield matrices"),
    ],
)
def test_impossible_configs_are_refused(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GanConfig(**wrong)  # pyrefly: ignore
