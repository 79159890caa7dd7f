"""How to train: lengths, durations, learning rates, and the optimiser that follows from them."""

import dataclasses

import jax
import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. Lengths and batches are in tokens, durations in steps.

    A batch is as many whole windows as fit into `batch_tokens`, and at least one. The last `long_steps` steps see
    windows of `long_context`, so that the model learns to look further back than it could afford to all along. The
    learning rate rises for `warmup_steps` and falls along a cosine to a hundredth; decay applies to matrices only
    (GPT-3, arXiv:2005.14165, appendix B).
    """

    steps: int = 3000
    batch_tokens: int = 1024
    context: int = 256
    long_steps: int = 150
    long_context: int = 2048
    learning_rate: float = 3e-3
    warmup_steps: int = 150
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.warmup_steps < self.steps or not 0 <= self.long_steps <= self.steps:
            raise ValueError(
                f"{self.warmup_steps} warm-up and {self.long_steps} long steps do not fit into {self.steps} steps."
            )

    def context_at(self, step: int) -> int:
        """Window length of a step."""
        return self.context if step < self.steps - self.long_steps else self.long_context

    def learning_rates(self) -> optax.Schedule:
        """Learning rate by step."""
        peak = self.learning_rate
        return optax.warmup_cosine_decay_schedule(0.0, peak, self.warmup_steps, self.steps, end_value=peak / 100)

    def optimizer(self) -> optax.GradientTransformation:
        """Clipped AdamW."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(
                self.learning_rates(),
                b2=0.95,
                weight_decay=self.weight_decay,
                mask=lambda weights: jax.tree.map(lambda weight: weight.ndim > 1, weights),
            ),
        )
