"""The recipe of ``lnl``: how the adversary is trained so that a bias is unlearned, not hidden.

Three things together: what the bias says about the label is taken from the batches, from the label
loss and from the heads, so that unlearning does not press on the label; further head steps keep the
heads near their optimum; and the strength rises after the heads have learned.

Importing this does not import torch: the command's help shows the numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lnl_ext.training.methods import METHODS, Method

if TYPE_CHECKING:
    from lnl_ext.adversary.bias_adversary import BiasAdversary
    from lnl_ext.schedules import Linear
    from lnl_ext.training.config import TrainerConfig

__all__ = ["LNL", "Recipe"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The numbers of ``lnl``, the same for every data set.

    Attributes
    ----------
    reversal, entropy_weight
        Coefficients at full strength, of all bias columns together: each column's adversary has its
        share of them.
    confusion_weight
        The same for ``blindeye``.
    warm_up, rise
        Parts of the run: the first, in which only the heads learn, and the one after it, over
        which the strength rises from 0 to 1.
    head_steps, balance, adjust
        As in `TrainerConfig`.
    head_sizes
        Hidden layers of a head on a vector of features.
    head_learning_rate, head_betas
        Of the heads' Adam.
    """

    reversal: float = 0.6
    entropy_weight: float = 0.06
    confusion_weight: float = 0.5
    warm_up: float = 0.1
    rise: float = 0.3
    head_steps: int = 4
    balance: float = 0.35
    adjust: bool = True
    head_sizes: tuple[int, ...] = (512, 512)
    head_learning_rate: float = 1e-3
    head_betas: tuple[float, float] = (0.5, 0.999)

    @property
    def strength(self) -> Linear:
        """The schedule of the strength."""
        from lnl_ext.schedules import Linear

        return Linear(begin=self.warm_up, finish=min(1.0, self.warm_up + self.rise))

    def adversaries(
        self,
        shape: tuple[int, ...],
        classes: Mapping[str, int],
        *,
        method: Method = METHODS["lnl"],
        **options: Any,
    ) -> dict[str, BiasAdversary]:
        """Make the adversary of every bias column.

        Parameters
        ----------
        shape
            Of the features of one sample.
        classes
            The number of bias classes by column.
        method
            Decides which terms they have.
        **options
            Passed on to `BiasAdversary`.
        """
        from lnl_ext.adversary.heads import bias_head

        share = 1 / max(1, len(classes))
        return {
            name: method.adversary(
                bias_head(shape, number, sizes=self.head_sizes),
                reversal=share * self.reversal,
                entropy_weight=share * self.entropy_weight,
                confusion_weight=share * self.confusion_weight,
                **options,
            )
            for name, number in classes.items()
        }

    def config(self, **settings: Any) -> TrainerConfig:
        """Return the configuration of a run; ``settings`` are the other fields, or replace some."""
        from lnl_ext.training.config import OptimizerConfig, TrainerConfig

        own: dict[str, Any] = {
            "strength": self.strength,
            "head_steps": self.head_steps,
            "balance": self.balance,
            "adjust": self.adjust,
            "head_optimizer": OptimizerConfig(
                name="adam", learning_rate=self.head_learning_rate, betas=self.head_betas
            ),
        }
        return TrainerConfig(**own | settings)


LNL = Recipe()
"""The recipe of the method ``lnl``."""
