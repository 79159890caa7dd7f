"""A run that stops and resumes is the run that did not; a model that trains learns; a mesh changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.config import ModelConfig
from model.sharding import parse_mesh
from model.tokenizer import Tokenizer
from model.training.batches import batch_at, token_stream
from model.training.config import TrainConfig
from model.training.corpus import Document, is_held_out, read_corpus
from model.training.evaluate import evaluate
from model.training.loop import ResumeError, Trainer, fit
from model.training.vocabulary import train_tokenizer
from model.transformer import Transformer

MODEL = ModelConfig(
    model_type="llama",
    vocab_size=300,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=32,
    tie_embeddings=True,
)
TRAIN = TrainConfig(steps=12, batch_tokens=64, context=16, long_steps=4, long_context=32, warmup_steps=2)
STREAM = np.random.default_rng(0).integers(0, 300, 2000).astype(np.int32) % 17


def trainer(mesh=None, **changes):
    return Trainer(dataclasses.replace(TRAIN, **changes), Transformer(MODEL, nnx.Rngs(0)), STREAM, mesh)


def run(folder, *, until=None, mesh=None, **changes):
    """Trains, or until a crash right after step `until`; measures a number that depends on the weights."""

    def crash(step, state):
        if step == until:
            raise KeyboardInterrupt

    def measure(model):
        return float(jnp.sum(model.norm.weight[...]))

    return fit(trainer(mesh, **changes), folder, checkpoint_every=3, measure=measure, on_step=crash)


def assert_equal(state, other):
    jax.tree.map(np.testing.assert_array_equal, state, other)


@pytest.mark.parametrize("until", [3, 8, 10])
def test_an_interrupted_run_continues_bit_for_bit(tmp_path, until):
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "halves", until=until)
    assert_equal(run(tmp_path / "halves"), whole)
    assert_equal(run(tmp_path / "halves"), whole)  # a finished run is only read
    assert np.isfinite(whole.losses).all()
    assert [step for step in range(12) if np.isfinite(whole.scores[step])] == [2, 5, 8, 11]


def test_another_run_is_not_continued(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, until=4)
    with pytest.raises(ResumeError, match=r"`learning_rate` is 0.1 and was 0.003; `seed` is 7 and was 0\. Continue"):
        run(tmp_path, learning_rate=0.1, seed=7)


def test_a_mesh_trains_the_same_model(tmp_path):
    one, many = run(tmp_path / "one"), run(tmp_path / "many", mesh=parse_mesh("dp:2,tp:2"))
    np.testing.assert_allclose(many.losses, one.losses, atol=2e-5)  # float32 sums in another order, over 12 updates


def test_a_restart_may_change_the_mesh(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "moved", until=6, mesh=parse_mesh("dp:2,tp:2"))
    np.testing.assert_allclose(run(tmp_path / "moved").losses, run(tmp_path / "one").losses, atol=2e-5)


def test_training_learns_a_repeated_text(tmp_path):
    learner = Trainer(
        TrainConfig(
            steps=60, batch_tokens=64, context=16, long_steps=0, long_context=16, learning_rate=0.03, warmup_steps=5
        ),
        Transformer(MODEL, nnx.Rngs(0)),
        np.tile(np.arange(10, dtype=np.int32), 50),
    )
    losses = fit(learner, tmp_path, checkpoint_every=60, measure=lambda model: 0.0).losses
    assert losses[0] == pytest.approx(np.log(300), abs=0.1)  # knows nothing yet
    assert losses[-1] < 0.5


def test_the_windows_of_an_epoch_tile_the_text():
    stream = np.arange(1000, dtype=np.int32)
    per_epoch = (len(stream) - 1) // 16 - 1
    rows = np.concatenate([batch_at(stream, step, batch=1, context=16, seed=3) for step in range(per_epoch)])
    np.testing.assert_array_equal(np.diff(rows, axis=1), 1)
    assert len(np.unique(rows[:, :-1])) == per_epoch * 16
    again = np.concatenate([batch_at(stream, step, batch=1, context=16, seed=3) for step in range(per_epoch)])
    np.testing.assert_array_equal(rows, again)
    assert (batch_at(stream, per_epoch, batch=1, context=16, seed=3) != rows[0]).any()
    with pytest.raises(ValueError, match="1000 tokens are too few for windows of 600"):
        batch_at(stream, 0, batch=1, context=600, seed=0)


def test_bits_per_byte_of_a_model_that_knows_nothing_is_the_size_of_a_token():
    documents = [Document("a", ("one two three", "four \N{SNOWMAN}")), Document("b", ("five six seven",))]
    tokenizer = Tokenizer(train_tokenizer(documents[0].entries, 300))
    model = Transformer(MODEL, nnx.Rngs(0))
    model.embed_tokens.weight[...] = jnp.zeros_like(model.embed_tokens.weight[...])  # all tokens equally likely
    tokens = len(token_stream(tokenizer, documents))
    found = evaluate(model, tokenizer, documents, context=4, batch=2)
    assert (found.bytes, found.tokens, found.context) == (13 + 8 + 14, tokens - 1, 4)
    assert found.bits_per_byte == pytest.approx((tokens - 1) * np.log2(300) / found.bytes, rel=1e-6)


def test_evaluation_does_not_depend_on_the_batch():
    documents = [Document("a", ("the quick brown fox", "jumps over the lazy dog"))]
    tokenizer = Tokenizer(train_tokenizer(documents[0].entries, 300))
    model = Transformer(MODEL, nnx.Rngs(1))
    scores = [evaluate(model, tokenizer, documents, context=8, batch=batch).bits_per_byte for batch in (1, 3)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_the_corpus_is_every_python():
    corpus = read_corpus()
    names = [document.name for document in corpus]
    assert names == sorted(set(names))
    assert {"topics/while", "modules/json.decoder", "builtins/builtins"} <= set(names)
    entries = {entry for document in corpus for entry in document.entries}
    assert any(entry.startswith("builtins.str.split\n\n") for entry in entries)
    assert any(entry.startswith("bisect.bisect_left(a, x, lo=0, hi=None, *, key=None)\n\n") for entry in entries)
    held_out = [document for document in corpus if is_held_out(document)]
    size = sum(len(entry.encode()) for document in held_out for entry in document.entries)
    assert "topics/while" in [document.name for document in held_out]
    assert 0.02 < size / sum(len(entry.encode()) for entry in entries) < 0.08
    # No text is learnt and then asked for.
    kept = {entry.partition("\n\n")[2] for d in corpus if not is_held_out(d) for entry in d.entries}
    assert not kept & {entry.partition("\n\n")[2] for document in held_out for entry in document.entries}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": 12}, "12 warm-up and 4 long steps do not fit into 12 steps"),
    ],
)
def test_impossible_schedules_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TRAIN, **changes)
